//! How moves begin, arrive, go on after a restart, and end.

use flimcd_core::{MigrationId, VolumeName};
use flimcd_migrate::vm::{VmSourceStart, VmTargetStart};
use flimcd_qemu::{Qmp, RunState, transfer};
use flimcd_wire::{Message, VmOpen};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, sleep};

use super::{
    record::{Description, MovedDisk, SessionRecord},
    source::{Disks, SourceSession},
    target::{self, TargetSession, TargetSetup},
};
use crate::{
    agent::Agent,
    api::{
        ApiCode, ErrorBody, MigrateRequest, MoveVm, OwnershipState, RamMode, Role, Switchover,
        VmMoveStatus, VmPhase,
    },
    config::MachineSource,
    error::{io_error, refuse},
    links::{Inbox, PeerLink},
    migration::{Outcome, progress::unix_ms},
    ops::blocking,
    vm::{CareState, Work, Working},
};

/// How long a move that has ended may take to clean up.
const CLEANING_UP: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);

impl Agent {
    /// Begins the move of a machine.
    pub(crate) async fn move_vm(
        self: &Arc<Self>,
        vm: &VolumeName,
        request: MoveVm,
    ) -> Result<VmMoveStatus, ErrorBody> {
        let working = self.vms.begin(vm, Work::Leaving)?;
        let record = self.vms.get(vm)?;
        if record.state != CareState::InCare {
            let message = format!("{vm} is not wholly under care");
            return Err(refuse(
                ApiCode::Busy,
                message,
                "`flimcd vm show` says what is in the way",
            ));
        }
        let qmp = self.vms.qmp(vm).await?;
        let described = describe(&qmp, &record, &request).await;
        let description =
            described.map_err(|why| refuse(ApiCode::Qemu, why, "nothing was changed"))?;
        let status = fresh_status(
            vm,
            Role::Source,
            request.to.clone(),
            description.memory_bytes,
        );
        let record = SessionRecord::new(status, Some(request.clone()), description);
        let volumes: Vec<_> = record
            .description
            .disks
            .iter()
            .map(|disk| disk.volume.clone())
            .collect();
        // Before the disks' migration: that one waits for ever if nobody knows of its session.
        self.save_move(&record).await?;
        let disks = MigrateRequest {
            to: request.to.clone(),
            strategy: request.strategy,
            bandwidth_bytes_per_sec: request.bandwidth_bytes_per_sec,
            switchover: Switchover::Manual,
            compress: None,
            library: None,
            keep_replica: None,
            check: None,
        };
        if let Err(error) = self.begin_migration(volumes, disks, Some(record.id)).await {
            let (store, id) = (self.moves_store.clone(), record.id);
            // What is left of it would be put right by a restart.
            let _ = tokio::task::spawn_blocking(move || store.remove(id)).await;
            return Err(error);
        }
        let Some(link) = self.link_to(&request.to) else {
            return Err(refuse(
                ApiCode::UnknownSite,
                format!("there is no site {}", request.to),
                "",
            ));
        };
        tracing::info!(%vm, to = %request.to, session = %record.id, "a machine begins to move");
        let status = record.status.clone();
        self.spawn_source_session(
            link,
            record,
            VmSourceStart::Fresh,
            Disks::Migrating,
            working,
        );
        Ok(status)
    }

    fn spawn_source_session(
        self: &Arc<Self>,
        link: Arc<PeerLink>,
        record: SessionRecord,
        start: VmSourceStart,
        disks: Disks,
        working: Working,
    ) {
        let ends = self.moves.begin(&record);
        let session = SourceSession::new(self, link, record, ends, start);
        let agent = self.clone();
        self.spawn(async move {
            let ended = session.run(disks).await;
            agent.end_move(ended).await;
            drop(working);
        });
    }

    /// Takes note of what a move came to.
    async fn end_move(self: &Arc<Self>, (mut record, outcome): (SessionRecord, Outcome)) {
        self.add_disks(&mut record.status);
        if outcome == Outcome::Ended {
            tracing::info!(session = %record.id, vm = %record.vm, "the move has ended: {}", record.status.phase);
        }
        if let Err(error) = self.save_move(&record).await {
            tracing::error!(session = %record.id, "{error}");
        }
        if outcome == Outcome::Paused {
            return;
        }
        let surplus = self.moves.end(&record);
        let store = self.moves_store.clone();
        let removed = tokio::task::spawn_blocking(move || {
            surplus.into_iter().try_for_each(|id| store.remove(id))
        });
        if let Ok(Err(error)) = removed.await {
            tracing::warn!("an old move's record cannot be removed: {error}");
        }
        let gives_back = record.role == Role::Target
            && record.description.release
            && record.status.phase == VmPhase::Completed;
        if gives_back && let Err(error) = self.release_vm(&record.vm).await {
            tracing::error!(
                vm = %record.vm,
                "giving its disks back as plain files failed, `flimcd vm release` tries again: {error}"
            );
        }
    }

    async fn save_move(&self, record: &SessionRecord) -> Result<(), ErrorBody> {
        let (store, record) = (self.moves_store.clone(), record.clone());
        blocking(move || {
            store
                .save(&record)
                .map_err(|error| io_error("recording the move", &error))
        })
        .await
    }

    // ---- the target ---------------------------------------------------------------------------

    /// A peer wants to move a machine here.
    pub(crate) async fn vm_opened(
        self: &Arc<Self>,
        link: &Arc<PeerLink>,
        id: MigrationId,
        open: VmOpen,
        inbox: Inbox,
    ) {
        let taken = async {
            let (record, machine) = self.take_vm_in(link, id, &open)?;
            let working = self.wait_for_name(&open.name).await?;
            let saved = self.save_move(&record).await;
            saved.map_err(|error| error.to_string())?;
            Ok::<_, String>((record, machine, working))
        };
        let refused = match taken.await {
            Ok((record, machine, working)) => {
                tracing::info!(session = %id, vm = %open.name, from = %link.peer(), "a machine is arriving");
                let setup = TargetSetup {
                    link: link.clone(),
                    ends: self.moves.begin(&record),
                    record,
                    inbox,
                    working,
                    machine: Some(machine),
                    qmp: None,
                    start: VmTargetStart::Fresh,
                };
                return self.run_target_session(setup, false).await;
            }
            Err(why) => why,
        };
        tracing::warn!(session = %id, vm = %open.name, from = %link.peer(), "refused a machine: {refused}");
        link.unregister(id);
        link.send(id, Message::Vm(target::refusal(refused))).await;
    }

    async fn run_target_session(self: &Arc<Self>, setup: TargetSetup, disks_done: bool) {
        let ended = TargetSession::new(self, setup).run(disks_done).await;
        self.end_move(ended).await;
    }

    /// Has the machine's name to itself. A move of it that has just ended still cleans up, and the source may be
    /// faster.
    async fn wait_for_name(&self, name: &VolumeName) -> Result<Working, String> {
        let deadline = Instant::now() + CLEANING_UP;
        loop {
            match self.vms.begin(name, Work::Arriving) {
                Ok(working) => return Ok(working),
                Err(error) if error.code != ApiCode::Busy || Instant::now() >= deadline => {
                    return Err(format!("at site {}: {error}", self.config.site));
                }
                Err(_) => sleep(POLL).await,
            }
        }
    }

    /// Checks whether a machine may come.
    fn take_vm_in(
        self: &Arc<Self>,
        link: &Arc<PeerLink>,
        id: MigrationId,
        open: &VmOpen,
    ) -> Result<(SessionRecord, MachineSource), String> {
        let (site, name, peer) = (&self.config.site, &open.name, link.peer());
        if self.moves.is_known(id, peer) {
            return Err("this move has ended at the target; start a new one".to_owned());
        }
        let description: Description = serde_json::from_str(&open.description)
            .map_err(|error| format!("the description of {name} cannot be read: {error}"))?;
        let config = self.config.peer(peer);
        let allowed = |volume| config.is_some_and(|config| config.allows_sending(volume));
        if let Some(disk) = description.disks.iter().find(|disk| !allowed(&disk.volume)) {
            let volume = &disk.volume;
            return Err(format!(
                "site {site} does not take volume {volume} from site {peer}; add it to may_send of peer {peer} in \
                 the configuration of {site}"
            ));
        }
        let machine = self.config.machine_for(name).ok_or_else(|| {
            format!(
                "site {site} does not know how to start {name}; add a [[machine]] table for it to its configuration \
                 and restart the agent there"
            )
        })?;
        for file in description
            .disks
            .iter()
            .flat_map(|disk| &disk.found.backing)
        {
            if !file.exists() {
                let file = file.display();
                return Err(format!(
                    "site {site} lacks {file}, which a disk of {name} is based on; put it there"
                ));
            }
        }
        let mut status = fresh_status(name, Role::Target, peer.clone(), description.memory_bytes);
        status.id = id;
        let record = SessionRecord::new(status, None, description);
        Ok((record, machine))
    }

    // ---- after a restart ----------------------------------------------------------------------

    /// Goes on with the moves that a run before this has left. The disks' migrations go on already.
    pub(crate) async fn resume_moves(self: &Arc<Self>, records: Vec<SessionRecord>) {
        for record in records {
            if record.status.phase.has_ended() {
                self.moves.end(&record);
                continue;
            }
            let work = match record.role {
                Role::Source => Work::Leaving,
                Role::Target => Work::Arriving,
            };
            // What has arrived or left already is known, or not, the other way round.
            let working = self.vms.begin_again(&record.vm, work);
            let Some(link) = self.link_to(&record.peer) else {
                tracing::error!(
                    session = %record.id, vm = %record.vm,
                    "the move waits: site {} is not in the configuration any more", record.peer
                );
                continue;
            };
            tracing::info!(session = %record.id, vm = %record.vm, role = ?record.role, "goes on with a move");
            match record.role {
                Role::Source => self.resume_source(link, record, working),
                Role::Target => self.resume_target(link, record, working).await,
            }
        }
    }

    fn resume_source(
        self: &Arc<Self>,
        link: Arc<PeerLink>,
        record: SessionRecord,
        working: Working,
    ) {
        let states = self.disk_states(&record);
        let offered = states
            .iter()
            .any(|state| matches!(state, OwnershipState::Prepared | OwnershipState::Released));
        let disks = if self.disks_run(&record) {
            Disks::Migrating
        } else if states.contains(&OwnershipState::Released) {
            Disks::Moved
        } else {
            Disks::Here
        };
        let start = VmSourceStart::Resume { offered };
        self.spawn_source_session(link, record, start, disks, working);
    }

    async fn resume_target(
        self: &Arc<Self>,
        link: Arc<PeerLink>,
        mut record: SessionRecord,
        working: Working,
    ) {
        let owned = self
            .disk_states(&record)
            .iter()
            .any(|state| matches!(state, OwnershipState::Arriving | OwnershipState::Owner));
        let qmp = match &record.launched {
            Some(launched) => Qmp::connect(&launched.qmp).await.ok(),
            None => None,
        };
        let (loaded, running) = match &qmp {
            Some(qmp) => target::probe(qmp).await,
            None => (false, false),
        };
        let attempt = record
            .launched
            .as_ref()
            .map_or(record.status.attempt, |launched| launched.attempt);
        record.status.attempt = attempt;
        let disks_done = !self.disks_run(&record);
        let setup = TargetSetup {
            inbox: link.register(record.id),
            link,
            ends: self.moves.begin(&record),
            working,
            machine: self.config.machine_for(&record.vm),
            qmp,
            start: VmTargetStart::Resume {
                attempt,
                owned,
                loaded,
                running,
            },
            record,
        };
        let agent = self.clone();
        self.spawn(async move { agent.run_target_session(setup, disks_done).await });
    }

    /// Whether a migration of the session's disks runs.
    fn disks_run(&self, record: &SessionRecord) -> bool {
        let mut migrations = self.registry.statuses().into_iter();
        migrations.any(|status| status.session == Some(record.id) && !status.phase.has_ended())
    }

    fn disk_states(&self, record: &SessionRecord) -> Vec<OwnershipState> {
        let disks = record.description.disks.iter();
        let hosted = disks.filter_map(|disk| self.hosting.get(&disk.volume).ok());
        hosted.map(|hosted| hosted.state()).collect()
    }
}

/// What the target has to know.
async fn describe(
    qmp: &Qmp,
    record: &crate::vm::VmRecord,
    request: &MoveVm,
) -> Result<Description, String> {
    let found = flimcd_qemu::inspect(qmp)
        .await
        .map_err(|error| error.to_string())?;
    let state = transfer::run_state(qmp)
        .await
        .map_err(|error| error.to_string())?;
    let was_running = match state {
        RunState::Running => true,
        RunState::Paused | RunState::Prelaunch => false,
        other => {
            return Err(format!(
                "the machine is {other}: only one that runs or is paused can be moved"
            ));
        }
    };
    let disks = record.disks.iter().map(|disk| MovedDisk {
        volume: disk.volume.clone(),
        found: disk.found.clone(),
    });
    let description = Description {
        qemu: found.version.to_string(),
        memory_bytes: found.memory_bytes,
        was_running,
        postcopy: request.ram != RamMode::Precopy,
        release: request.release,
        disks: disks.collect(),
    };
    Ok(description)
}

fn fresh_status(
    vm: &VolumeName,
    role: Role,
    peer: flimcd_core::SiteName,
    ram_bytes_total: u64,
) -> VmMoveStatus {
    VmMoveStatus {
        id: MigrationId(rand::random()),
        vm: vm.clone(),
        role,
        peer,
        phase: VmPhase::Disks,
        disks: None,
        attempt: 0,
        ram_bytes_total,
        ram_bytes_left: 0,
        ram_bytes_read: 0,
        ram_bytes_sent: 0,
        ram_rounds: 0,
        started_unix_ms: unix_ms(),
        stopped_unix_ms: None,
        switched_unix_ms: None,
        ended_unix_ms: None,
        downtime_ms: None,
        error: None,
        notes: Vec::new(),
    }
}
