//! What goes wrong, and when it is mended.

use std::time::Duration;

use flimcd_core::Time;

use crate::{
    host::after,
    source::SourceAgent,
    target::TargetAgent,
    world::{Event, Site, World},
};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection breaks, and all that is on its way is lost.
    LinkBreak,
    /// Nothing that one side sends arrives for a while.
    Stall(Site),
    /// Nothing arrives for a while.
    Partition,
    /// The connection breaks again and again.
    Flap,
    /// The agent is killed.
    Kill(Site),
    /// The site loses its power.
    Power(Site),
    /// Now and then I/O fails.
    DiskErrors(Site),
    /// The target's disk has no room.
    DiskFull,
}

impl Fault {
    pub(crate) const ALL: [Self; 12] = [
        Self::LinkBreak,
        Self::Stall(Site::Source),
        Self::Stall(Site::Target),
        Self::Partition,
        Self::Flap,
        Self::Kill(Site::Source),
        Self::Kill(Site::Target),
        Self::Power(Site::Source),
        Self::Power(Site::Target),
        Self::DiskErrors(Site::Source),
        Self::DiskErrors(Site::Target),
        Self::DiskFull,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::LinkBreak => "link break",
            Self::Stall(_) => "stall of one direction",
            Self::Partition => "partition",
            Self::Flap => "flapping link",
            Self::Kill(Site::Source) => "kill of the source's agent",
            Self::Kill(Site::Target) => "kill of the target's agent",
            Self::Power(Site::Source) => "power loss at the source",
            Self::Power(Site::Target) => "power loss at the target",
            Self::DiskErrors(Site::Source) => "disk errors at the source",
            Self::DiskErrors(Site::Target) => "disk errors at the target",
            Self::DiskFull => "target's disk full",
        }
    }
}

/// A connection on which nothing arrives for so long is given up.
const KEEPALIVE: Duration = Duration::from_secs(2);

impl World {
    fn noisy(&self) -> bool {
        self.now < self.plan.faults.quiet_at
    }

    /// The time for another fault has come.
    pub(crate) fn fault(&mut self) {
        if !self.noisy() || self.plan.faults.kinds.is_empty() {
            return;
        }
        let mean = self.plan.faults.interval_us;
        let next = after(self.now, &mut self.dice, mean / 4, mean * 2);
        self.at(next, Event::Fault);
        self.strike();
    }

    /// A machine has come to a new phase: something may go wrong right then, when it matters.
    pub(crate) fn aim(&mut self) {
        if self.dice.permille(self.plan.faults.aimed_permille) {
            let widest = self.dice.pick(&[1_000, 20_000, 200_000]);
            let soon = after(self.now, &mut self.dice, 0, widest);
            self.at(soon, Event::Strike);
        }
    }

    /// Something goes wrong.
    pub(crate) fn strike(&mut self) {
        if !self.noisy() || self.plan.faults.kinds.is_empty() {
            return;
        }
        let fault = self.dice.pick(&self.plan.faults.kinds);
        self.trace(|| format!("fault: {fault:?}"));
        self.cover(fault.name());
        match fault {
            Fault::LinkBreak => self.break_link(),
            Fault::Stall(site) => self.stall(&[site]),
            Fault::Partition => self.stall(&Site::BOTH),
            Fault::Flap => self.flap(20),
            Fault::Kill(site) => self.kill(site),
            Fault::Power(site) => self.lose_power(site),
            Fault::DiskErrors(site) => self.disk_errors(site),
            Fault::DiskFull => {
                self.host(Site::Target).full = true;
                self.heal_disk_later(Site::Target);
            }
        }
    }

    fn stall(&mut self, sites: &[Site]) {
        let takes = Duration::from_micros(self.dice.log_between(1_000, 8_000_000));
        let until = (self.now + takes).min(self.plan.faults.quiet_at);
        for &site in sites {
            self.net.stall(site, until);
        }
        if until.since(self.now) > KEEPALIVE {
            self.at(self.now + KEEPALIVE, Event::Flap { left: 1 });
        }
    }

    /// The connection breaks, and will so many times more.
    pub(crate) fn flap(&mut self, left: u32) {
        if left == 0 || !self.noisy() {
            return;
        }
        self.break_link();
        let next = after(self.now, &mut self.dice, 20_000, 700_000);
        self.at(next, Event::Flap { left: left - 1 });
    }

    fn stop_agent(&mut self, site: Site) {
        match site {
            Site::Source => {
                self.source = SourceAgent::default();
                self.resend.restart();
            }
            Site::Target => {
                self.target = TargetAgent::default();
                self.resend.forget();
            }
        }
        self.net.up[site.index()] = false;
        self.break_link();
        let back = after(self.now, &mut self.dice, 5_000, 1_500_000);
        self.at(back, Event::AgentStarts { site });
    }

    fn kill(&mut self, site: Site) {
        if !self.host(site).up {
            return;
        }
        let host = &mut self.hosts[site.index()];
        host.kill(&mut self.dice);
        self.stop_agent(site);
        if self.guest.at == site {
            self.guest_disconnected();
        }
    }

    /// The power of a site goes, and with it the agent, the guest if it runs there, and what was not synced.
    pub(crate) fn lose_power(&mut self, site: Site) {
        let kept = self.plan.faults.kept_permille;
        let host = &mut self.hosts[site.index()];
        let was_up = host.up;
        host.lose_power(&mut self.dice, kept);
        if site == Site::Source {
            self.standing.source_forgets();
        }
        if was_up {
            self.stop_agent(site);
        }
        if self.guest.at == site {
            self.guest_lost_power();
        }
    }

    fn disk_errors(&mut self, site: Site) {
        let often = self.dice.pick(&[20, 200, 1000]);
        self.host(site).errors_permille = often;
        self.heal_disk_later(site);
    }

    fn heal_disk_later(&mut self, site: Site) {
        let until = after(self.now, &mut self.dice, 1_000, 400_000);
        self.at(until, Event::DiskHeals { site });
    }

    /// A disk works again.
    pub(crate) fn disk_heals(&mut self, site: Site) {
        let host = self.host(site);
        host.errors_permille = 0;
        host.full = false;
    }

    /// Faults are over.
    pub(crate) fn quiet(&mut self) {
        self.trace(|| "no more faults".to_owned());
        self.net.heal();
        for site in Site::BOTH {
            self.disk_heals(site);
        }
    }

    /// When a run that has not ended is stuck.
    pub(crate) fn deadline(&self) -> Time {
        self.plan.faults.quiet_at + Duration::from_secs(120)
    }
}
