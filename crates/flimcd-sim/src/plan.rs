//! What a seed means: the volume, the link, the disks, the load, the operator, and which faults happen how often.

use std::time::Duration;

use flimcd_core::{BLOCK_SIZE, Time, VolumeSize};
use flimcd_migrate::{Switchover, policy};

use crate::{SimOptions, dice::Dice, faults::Fault, world::Site};

/// The link.
#[derive(Clone, Debug)]
pub(crate) struct NetPlan {
    pub(crate) rate_bytes_per_sec: u64,
    pub(crate) delay: Duration,
    pub(crate) jitter_us: u64,
    /// How many of a thousand messages are late by much more.
    pub(crate) spike_permille: u64,
    pub(crate) bulk_lanes: usize,
    /// Whether the machine is told what the link does.
    pub(crate) estimates: bool,
}

/// The disks.
#[derive(Clone, Debug)]
pub(crate) struct DiskPlan {
    pub(crate) latency_us: (u64, u64),
    pub(crate) sync_us: (u64, u64),
    /// How many of a thousand sectors are written back whenever something is written.
    pub(crate) write_back_permille: u64,
    /// Whether trims do anything.
    pub(crate) trims: bool,
}

/// The load.
#[derive(Clone, Debug)]
pub(crate) struct GuestPlan {
    pub(crate) depth: usize,
    pub(crate) think_us: (u64, u64),
    pub(crate) requests_min: u64,
    pub(crate) reads_permille: u64,
    pub(crate) flush_permille: u64,
    /// Blocks of the hot part, which most requests go to.
    pub(crate) hot_blocks: u64,
    /// After a crash, how many of a thousand unanswered requests are not sent again.
    pub(crate) abandon_permille: u64,
    /// Whether it goes to the target as soon as the target is ready, or when the source refuses it.
    pub(crate) moves_early: bool,
}

/// What the operator does.
#[derive(Clone, Debug)]
pub(crate) struct OperatorPlan {
    pub(crate) switch_at: Time,
    pub(crate) switch: Switchover,
    pub(crate) cancel_at: Option<(Time, Site)>,
}

/// What goes wrong.
#[derive(Clone, Debug)]
pub(crate) struct FaultPlan {
    pub(crate) kinds: Vec<Fault>,
    pub(crate) interval_us: u64,
    /// In how many of a thousand cases a new phase draws a fault.
    pub(crate) aimed_permille: u64,
    /// Nothing goes wrong any more from here on.
    pub(crate) quiet_at: Time,
    /// How many of a thousand sectors that were not synced survive a power loss.
    pub(crate) kept_permille: u64,
    /// The power goes once more when everything is over.
    pub(crate) power_at_the_end: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) size: VolumeSize,
    pub(crate) data_permille: u64,
    pub(crate) strategy: &'static str,
    pub(crate) start_at: Time,
    /// The target's agent tells its machine what the volume did now and then, not at once.
    pub(crate) tells_late: bool,
    pub(crate) net: NetPlan,
    pub(crate) disk: DiskPlan,
    pub(crate) guest: GuestPlan,
    pub(crate) operator: OperatorPlan,
    pub(crate) faults: FaultPlan,
}

fn at(duration: Duration) -> Time {
    Time::ZERO + duration
}

impl Plan {
    pub(crate) fn draw(dice: &mut Dice, options: &SimOptions) -> Self {
        let blocks = match dice.below(10) {
            0..=5 => dice.between(64, 128),
            6..=8 => dice.between(128, 384),
            _ => dice.between(384, 1024),
        };
        // The last block may be short, down to a part of a sector that still holds a stamp.
        let cut = match dice.below(4) {
            0 => dice.between(1, BLOCK_SIZE - 32),
            1 => dice.between(1, 7) * 512,
            _ => 0,
        };
        let cut = if (BLOCK_SIZE - cut) % 512 >= 32 {
            cut
        } else {
            cut / 512 * 512
        };
        let size = VolumeSize::new(blocks * BLOCK_SIZE - cut).expect("a size in range");
        let quiet_at = at(dice.micros(200_000, 6_000_000));
        Self {
            size,
            data_permille: dice.pick(&[1000, 700, 300]),
            strategy: dice.pick(policy::STRATEGIES),
            start_at: at(dice.micros(0, 50_000)),
            tells_late: dice.permille(300),
            net: Self::draw_net(dice, size),
            disk: Self::draw_disk(dice),
            guest: Self::draw_guest(dice, blocks),
            operator: Self::draw_operator(dice, quiet_at),
            faults: Self::draw_faults(dice, options, quiet_at),
        }
    }

    fn draw_net(dice: &mut Dice, size: VolumeSize) -> NetPlan {
        // The bare volume takes between 20 ms and 3 s.
        let crossing_us = dice.log_between(20_000, 3_000_000);
        NetPlan {
            rate_bytes_per_sec: (size.bytes() * 1_000_000 / crossing_us).max(100_000),
            delay: Duration::from_micros(dice.log_between(200, 80_000)),
            jitter_us: dice.pick(&[0, 100, 3_000]),
            spike_permille: dice.pick(&[0, 0, 10]),
            bulk_lanes: usize::try_from(dice.between(1, 3)).expect("three"),
            estimates: dice.permille(800),
        }
    }

    fn draw_disk(dice: &mut Dice) -> DiskPlan {
        let slow = dice.pick(&[1, 1, 10]);
        DiskPlan {
            latency_us: (20 * slow, 400 * slow),
            sync_us: (200 * slow, 4_000 * slow),
            write_back_permille: dice.pick(&[0, 5, 100]),
            trims: dice.coin(),
        }
    }

    fn draw_guest(dice: &mut Dice, blocks: u64) -> GuestPlan {
        let think_us = dice.log_between(300, 30_000);
        GuestPlan {
            depth: usize::try_from(dice.between(1, 8)).expect("eight"),
            think_us: (think_us / 4, think_us * 2),
            requests_min: dice.between(50, 250),
            reads_permille: dice.pick(&[300, 500, 700]),
            flush_permille: dice.pick(&[10, 50, 150]),
            hot_blocks: dice.between(4, blocks),
            abandon_permille: dice.pick(&[0, 200, 1000]),
            moves_early: dice.coin(),
        }
    }

    fn draw_operator(dice: &mut Dice, quiet_at: Time) -> OperatorPlan {
        let moment = |dice: &mut Dice| Time(dice.below(quiet_at.0));
        OperatorPlan {
            switch_at: moment(dice),
            switch: if dice.permille(700) {
                Switchover::WhenReady
            } else {
                Switchover::Now
            },
            cancel_at: dice.permille(150).then(|| {
                let site = if dice.permille(800) {
                    Site::Source
                } else {
                    Site::Target
                };
                (moment(dice), site)
            }),
        }
    }

    fn draw_faults(dice: &mut Dice, options: &SimOptions, quiet_at: Time) -> FaultPlan {
        let mut kinds = Vec::new();
        if options.faults && dice.permille(900) {
            // A few kinds per run, so that some runs meet each kind alone.
            let chance = dice.pick(&[150, 300, 600]);
            kinds.extend(Fault::ALL.iter().filter(|_| dice.permille(chance)));
        }
        FaultPlan {
            kinds,
            interval_us: dice.log_between(30_000, 1_500_000),
            aimed_permille: dice.pick(&[0, 100, 500]),
            quiet_at,
            kept_permille: dice.pick(&[0, 500, 1000]),
            power_at_the_end: options.faults && dice.permille(300),
        }
    }
}
