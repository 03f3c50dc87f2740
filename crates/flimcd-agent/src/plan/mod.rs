//! Plans: what a migration would cost, asked of the real target, while nothing moves.
//!
//! ```text
//!  API ─► Plans ─► source::Maker ─── PlanOpen, SeedAsk, Probe… ───► target::Answering ─► library, copies
//!                        │ figures                                         (reads only)
//!                        └─► estimate: a model of each strategy
//! ```
//! A plan is a task with the number of a migration of its own; it is in no store, and ends with the agent. The last ones are
//! remembered, so that a migration can say what was planned for it.

mod estimate;
mod figures;
mod lacking;
mod nothing;
mod pieces;
mod sample;
mod source;
mod target;

use flimcd_core::{MigrationId, VolumeName};
use flimcd_wire::Message;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;

use crate::{
    agent::Agent,
    api::{
        ApiCode, ContentStats, ErrorBody, GuestActivity, MigrateRequest, PlanBase, PlanPhase,
        PlanRequest, PlanStatus, Planned, Strategy,
    },
    error::refuse,
    migration::{choose_policy, progress::unix_ms},
};

/// Plans that are remembered.
const KEPT_MAX: usize = 64;
/// Seconds that a guest is watched at most.
const WATCH_S_MAX: u32 = 3600;

/// A plan that runs or has ended.
struct Plan {
    status: watch::Receiver<PlanStatus>,
    cancel: watch::Sender<bool>,
}

/// All plans that this agent knows of, oldest first.
#[derive(Default)]
pub(crate) struct Plans(Mutex<VecDeque<Plan>>);

impl Plans {
    fn all(&self) -> MutexGuard<'_, VecDeque<Plan>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where each stands.
    pub(crate) fn statuses(&self) -> Vec<PlanStatus> {
        let all = self.all();
        all.iter()
            .map(|plan| plan.status.borrow().clone())
            .collect()
    }

    /// Where one stands.
    pub(crate) fn status(&self, id: MigrationId) -> Result<PlanStatus, ErrorBody> {
        let found = self.statuses().into_iter().find(|status| status.id == id);
        found.ok_or_else(|| unknown(id))
    }

    /// Ends one; one that has ended stays as it is.
    pub(crate) fn cancel(&self, id: MigrationId) -> Result<PlanStatus, ErrorBody> {
        let all = self.all();
        let plan = all.iter().find(|plan| plan.status.borrow().id == id);
        let plan = plan.ok_or_else(|| unknown(id))?;
        plan.cancel.send_replace(true);
        let mut status = plan.status.borrow().clone();
        if !status.phase.has_ended() {
            status.phase = PlanPhase::Cancelled;
        }
        Ok(status)
    }

    /// Notes one that begins; refused while one of the same volumes runs.
    fn begin(&self, plan: Plan) -> Result<(), ErrorBody> {
        let mut all = self.all();
        let new = plan.status.borrow().clone();
        for other in all.iter() {
            let other = other.status.borrow();
            let shared = new.volumes.iter().find(|name| other.volumes.contains(name));
            if let Some(name) = shared.filter(|_| !other.phase.has_ended()) {
                let message = format!("{name} is being planned already (plan {})", other.id);
                let hint = "wait for its end, or end it with Ctrl-C where it was asked for";
                return Err(refuse(ApiCode::Busy, message, hint));
            }
        }
        all.push_back(plan);
        while all.len() > KEPT_MAX {
            let ended = all
                .iter()
                .position(|plan| plan.status.borrow().phase.has_ended());
            let Some(ended) = ended else { break };
            all.remove(ended);
        }
        Ok(())
    }

    /// What was planned last for a migration that begins.
    pub(crate) fn planned(
        &self,
        volumes: &[VolumeName],
        request: &MigrateRequest,
    ) -> Option<Planned> {
        let strategy = match (request.strategy, request.compress) {
            (Strategy::Precopy, Some(true)) => "precopy-zstd",
            (strategy, _) => strategy.name(),
        };
        let policy = choose_policy(request.strategy, request.compress, request.library)?;
        let last = self.statuses().into_iter().rfind(|status| {
            status.phase == PlanPhase::Completed
                && status.volumes == volumes
                && status.to == request.to
        })?;
        let estimate = last.estimates.iter().find(|e| e.strategy == strategy)?;
        Some(Planned {
            id: last.id,
            unix_ms: last.ended_unix_ms?,
            is_sample: last.content_error_95.is_some(),
            content: policy.uses_library().then_some(last.content),
            estimate: estimate.clone(),
        })
    }
}

fn unknown(id: MigrationId) -> ErrorBody {
    let hint = "GET /v1/plans lists those that are remembered; an agent's restart forgets them";
    refuse(
        ApiCode::UnknownMigration,
        format!("there is no plan {id}"),
        hint,
    )
}

impl Agent {
    /// Begins to find out what a migration would cost.
    pub(crate) fn begin_plan(
        self: &Arc<Self>,
        request: PlanRequest,
    ) -> Result<PlanStatus, ErrorBody> {
        let bad = |message: &str, hint: &str| Err(refuse(ApiCode::BadRequest, message, hint));
        if request.sample == Some(0) || request.bandwidth_bytes_per_sec == Some(0) {
            return bad("a sample and a bandwidth have to be more than nothing", "");
        }
        if request.watch_s > Some(WATCH_S_MAX) {
            return bad("a guest is watched for an hour at most", "");
        }
        let (volumes, _) = self.volumes_to_migrate(&request.volumes, &request.to)?;
        if let Some((id, _)) =
            (request.volumes.iter()).find_map(|name| self.registry.running_on(name))
        {
            let message = format!("a volume of it is migrating (migration {id})");
            return Err(refuse(
                ApiCode::Busy,
                message,
                "plan before, or after its end",
            ));
        }
        let Some(link) = self.link_to(&request.to) else {
            let message = format!("there is no link to site {}", request.to);
            return Err(refuse(ApiCode::UnknownSite, message, ""));
        };
        let bytes = volumes
            .all()
            .iter()
            .map(|volume| volume.size().bytes())
            .sum();
        let id = MigrationId(rand::random());
        let fresh = fresh(id, &request, bytes);
        let (status, seen) = watch::channel(fresh.clone());
        let (cancel, mut cancelled) = watch::channel(false);
        self.plans.begin(Plan {
            status: seen,
            cancel,
        })?;
        let mut maker = source::Maker {
            volumes,
            inbox: link.register(id),
            link: link.clone(),
            id,
            request,
            status: status.clone(),
        };
        let mut stop = self.stop_signal();
        self.spawn(async move {
            let result = tokio::select! {
                result = maker.run() => result.map_err(|why| (PlanPhase::Failed, Some(why))),
                _ = cancelled.wait_for(|&asked| asked) => Err((PlanPhase::Cancelled, None)),
                _ = stop.wait_for(|&stop| stop) => {
                    Err((PlanPhase::Failed, Some("the agent was stopped".to_owned())))
                }
            };
            link.send(id, Message::Cancel).await;
            link.unregister(id);
            if let Err((phase, error)) = result {
                status.send_modify(|status| {
                    status.phase = phase;
                    status.error = error;
                    status.ended_unix_ms = Some(unix_ms());
                });
            }
        });
        Ok(fresh)
    }
}

fn fresh(id: MigrationId, request: &PlanRequest, bytes_total: u64) -> PlanStatus {
    PlanStatus {
        id,
        volumes: request.volumes.clone(),
        to: request.to.clone(),
        phase: PlanPhase::Connecting,
        bytes_total,
        bytes_to_move: 0,
        bytes_to_read: 0,
        bytes_read: 0,
        base: PlanBase::Nothing,
        library_image: None,
        content: ContentStats::default(),
        content_error_95: None,
        bytes_on_link: 0,
        bytes_on_link_error_95: None,
        guest: GuestActivity::default(),
        rate_bytes_per_sec: None,
        rate_is_given: false,
        rtt_ms: None,
        estimates: Vec::new(),
        started_unix_ms: unix_ms(),
        ended_unix_ms: None,
        error: None,
        notes: Vec::new(),
    }
}
