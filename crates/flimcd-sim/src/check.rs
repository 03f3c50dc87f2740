//! Checks that do not belong to a guest's request: one owner at a time, an end, and what is there then.

use flimcd_core::Time;
use flimcd_migrate::{SourcePhase, TargetPhase};
use flimcd_volume::rules::Mode;

use crate::{
    Outcome,
    host::Stage,
    world::{Site, World},
};

/// Requests that the guest makes after the migration has ended.
const ENCORE: u64 = 15;

impl World {
    /// At most one site serves the guest, and at most one record says that its site owns the volume.
    pub(crate) fn check_owner(&mut self) {
        if self.hosts.iter().all(super::host::Host::serves) {
            self.fail("both sites serve the guest".to_owned());
        }
        let records = |site: Site| {
            let record = &self.hosts[site.index()].record;
            [record.durable, record.visible]
        };
        let both = records(Site::Source).iter().any(|source| {
            source.owns() && records(Site::Target).iter().any(|target| target.owns())
        });
        if both {
            let source = self.hosts[0].record;
            let target = self.hosts[1].record;
            self.fail(format!("two owners: {source:?} and {target:?}"));
        }
    }

    /// Whether the migration is over and both sites agree on how.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        if self.now < self.plan.faults.quiet_at || self.hosts.iter().any(|host| !host.up) {
            return None;
        }
        let record = self.hosts[Site::Source.index()].record.visible.stage;
        let target = self.target_phase();
        match (self.source_phase(), record) {
            (Some(SourcePhase::Completed) | None, Stage::Retired)
                if target == Some(TargetPhase::Complete) =>
            {
                Some(Outcome::Completed)
            }
            // A restarted source does not know of the migration any more, and an orphan at the target waits for a new one.
            (None, Stage::Owner { migrating: false }) if self.now > self.plan.start_at => {
                let orphan = matches!(
                    target,
                    None | Some(
                        TargetPhase::Incoming | TargetPhase::Cancelled | TargetPhase::Failed
                    )
                );
                orphan.then_some(Outcome::Cancelled)
            }
            (Some(phase), Stage::Owner { migrating: false }) => {
                let over = matches!(
                    target,
                    None | Some(TargetPhase::Cancelled | TargetPhase::Failed)
                );
                match phase {
                    SourcePhase::Cancelled if over => Some(Outcome::Cancelled),
                    SourcePhase::Failed if over => Some(Outcome::Failed),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// Whether everything has come to its end: the migration, and after it the guest's last requests.
    pub(crate) fn is_over(&mut self) -> Option<Outcome> {
        let outcome = self.outcome()?;
        let answered = self.guest.answered;
        let enough = *self
            .encore
            .get_or_insert((answered + ENCORE).max(self.plan.guest.requests_min));
        if answered >= enough {
            self.guest.stopped = true;
        }
        (self.guest.stopped && self.guest.is_idle()).then_some(outcome)
    }

    /// What is wrong with a run that does not end.
    pub(crate) fn stuck(&self) -> String {
        let target = &self.hosts[Site::Target.index()];
        format!(
            "no end {:?} after the last fault: source {:?} with record {:?}, target {:?} with record {:?} and {} blocks \
             missing, guest at the {} {}",
            self.now.since(self.plan.faults.quiet_at),
            self.source_phase(),
            self.hosts[0].record.visible,
            self.target_phase(),
            target.record.visible,
            target.rules.missing_count(),
            self.guest.at,
            if self.guest.is_idle() {
                "has all its answers"
            } else {
                "waits for answers"
            },
        )
    }

    /// Looks at what is left in the end.
    pub(crate) fn check_end(&mut self, outcome: Outcome) {
        let owner = match outcome {
            Outcome::Completed => Site::Target,
            Outcome::Cancelled | Outcome::Failed => Site::Source,
        };
        self.check_agreement(owner);
        if self.plan.faults.power_at_the_end {
            let kept = self.plan.faults.kept_permille;
            self.cover("power loss at the end");
            self.hosts[owner.index()]
                .disk
                .lose_power(&mut self.dice, kept);
            self.model.lose_power();
        }
        if let Err(wrong) = self.model.check(self.hosts[owner.index()].image()) {
            self.fail(format!(
                "the image at the {owner} is wrong in the end: {wrong}"
            ));
        }
    }

    fn check_agreement(&mut self, owner: Site) {
        let serving: Vec<Site> = Site::BOTH
            .into_iter()
            .filter(|site| self.hosts[site.index()].serves())
            .collect();
        if serving != [owner] {
            self.fail(format!(
                "in the end {serving:?} serve the guest, not the {owner}"
            ));
        }
        if !self.hosts[owner.index()].record.durable.owns() {
            self.fail(format!(
                "in the end the {owner}'s record does not say that it owns the volume"
            ));
        }
        if owner == Site::Target && self.hosts[owner.index()].rules.mode() != Mode::Owner {
            self.fail("a complete volume still works as if blocks were missing".to_owned());
        }
    }

    /// Virtual time so far.
    pub(crate) fn elapsed(&self) -> std::time::Duration {
        self.now.since(Time::ZERO)
    }
}
