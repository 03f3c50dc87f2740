//! Guests' writes that the strategy lets wait: for the target (mirroring), or for their turn (a limit).
//!
//! The volumes hold them ([`flimcd_volume::rules`]); this is the part that needs a clock. No guest is stalled for ever: when the write that is held
//! longest has not moved for [`PATIENCE`], because the link is away, the target hangs, or its blocks are not sent, then mirroring pauses:
//! every held write is answered, and writes are answered at once. That is safe, since they are on the disk here and marked to be sent. It goes
//! on when the target acknowledges something again. The record says both. Dropping this lets everything go, so that a driver that
//! ends, however it ends, leaves no guest waiting.

use flimcd_core::{BlockRange, Time};
use std::{sync::Arc, time::Duration};

use super::volumes::VolumeSet;

/// How long a guest's write may wait for the target. Less than the 30 seconds after which a guest's disk driver gives a request up.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
pub(crate) struct GuestWrites {
    volumes: Arc<VolumeSet>,
    /// The strategy mirrors.
    wanted: bool,
    /// Writes are held: it mirrors, and is not paused.
    is_on: bool,
    limit: Option<u64>,
    /// For each volume, the write that is held longest, and since when it is that.
    oldest: Vec<Option<(u64, Time)>>,
}

impl GuestWrites {
    /// Nothing waits.
    pub(crate) fn new(volumes: Arc<VolumeSet>) -> Self {
        let oldest = vec![None; volumes.all().len()];
        Self {
            volumes,
            wanted: false,
            is_on: false,
            limit: None,
            oldest,
        }
    }

    /// Whether writes are held for the target.
    pub(crate) fn is_mirroring(&self) -> bool {
        self.is_on
    }

    /// The strategy mirrors from now on, or does not. Returns what there is to note.
    pub(crate) fn mirror(&mut self, wanted: bool) -> Option<String> {
        self.wanted = wanted;
        self.set(wanted)
    }

    fn set(&mut self, is_on: bool) -> Option<String> {
        self.is_on = is_on;
        self.oldest.fill(None);
        for volume in self.volumes.all() {
            if let Err(error) = volume.set_mirroring(is_on) {
                // Nothing waits at this volume then: slower for nobody, and every block is sent all the same.
                return Some(format!(
                    "writes to {} do not wait for the target, since what it lacks cannot be read: {error}",
                    volume.name()
                ));
            }
        }
        None
    }

    /// The target has these.
    pub(crate) fn acked(&mut self, ranges: &[BlockRange]) -> Option<String> {
        if !self.wanted {
            return None;
        }
        let resumed = !self.is_on && !ranges.is_empty();
        let failed = if resumed { self.set(true) } else { None };
        self.volumes.acked(ranges);
        failed.or_else(|| {
            resumed.then(|| "the target answers again: writes wait for it as before".to_owned())
        })
    }

    /// Guests may write so much per second in all, each volume an even part of it.
    pub(crate) fn limit(&mut self, bytes_per_sec: Option<u64>, now: Time) {
        self.limit = bytes_per_sec;
        let count = self.volumes.all().len().max(1) as u64;
        for volume in self.volumes.all() {
            volume.set_write_limit(bytes_per_sec.map(|rate| rate / count), now);
        }
    }

    /// To be called every few milliseconds while there is a limit, and now and then while mirroring.
    pub(crate) fn tick(&mut self, now: Time) -> Option<String> {
        if self.limit.is_some() {
            for volume in self.volumes.all() {
                volume.refill_writes(now);
            }
        }
        if !self.is_on {
            return None;
        }
        let mut is_stuck = false;
        for (volume, oldest) in self.volumes.all().iter().zip(&mut self.oldest) {
            *oldest = volume.oldest_held().map(|number| match *oldest {
                Some((before, since)) if before == number => (number, since),
                _ => (number, now),
            });
            is_stuck |= oldest.is_some_and(|(_, since)| now - since >= PATIENCE);
        }
        if !is_stuck {
            return None;
        }
        let failed = self.set(false);
        failed.or_else(|| {
            Some(format!(
                "a guest's write has waited {} s for the target: writes do not wait for it until it answers again",
                PATIENCE.as_secs()
            ))
        })
    }
}

impl Drop for GuestWrites {
    fn drop(&mut self) {
        if self.is_on {
            self.set(false);
        }
        if self.limit.is_some() {
            self.limit(None, Time::ZERO);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_core::{BLOCK_SIZE, Epoch, VolumeId, VolumeSize};
    use flimcd_volume::{
        GuestPort, GuestReply, GuestRequest, NewVolume, Ownership, RequestKind, Volume, VolumesDir,
        device::{IoBuf, OpenOptions},
    };
    use rustix::event::{PollFd, PollFlags, poll};
    use std::path::Path;

    fn volumes(dir: &Path) -> Arc<VolumeSet> {
        let volumes = VolumesDir::open(dir.join("volumes")).unwrap();
        let new = NewVolume {
            id: VolumeId(1),
            image: dir.join("vm.raw"),
            name: "vm".parse().unwrap(),
            tenant: "default".to_owned(),
            epoch: Epoch::FIRST,
            ownership: Ownership::Owner { epoch: Epoch(1) },
        };
        let size = VolumeSize::new(16 * BLOCK_SIZE).unwrap();
        let volume = Volume::create(&volumes, new, size, &OpenOptions::default()).unwrap();
        VolumeSet::new(vec![volume]).unwrap()
    }

    fn submit(port: &mut GuestPort, id: u64, fua: bool) {
        let length = 4096;
        port.submit(GuestRequest {
            id,
            kind: RequestKind::Write,
            offset: id * BLOCK_SIZE,
            length,
            fua,
            buf: IoBuf::copy_of(&[7; 4096]),
        });
        port.kick().unwrap();
    }

    /// Polls until the port has something to say or `is_done`.
    fn replies(port: &mut GuestPort, is_done: impl Fn() -> bool) -> Vec<GuestReply> {
        let mut out = Vec::new();
        loop {
            port.poll(&mut out).unwrap();
            if !out.is_empty() || is_done() {
                return out;
            }
            let (queue, inbox) = port.wait_fds();
            let mut fds = vec![PollFd::from_borrowed_fd(inbox, PollFlags::IN)];
            fds.extend(queue.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            poll(&mut fds, None).unwrap();
        }
    }

    #[test]
    fn a_write_waits_for_the_target_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = volumes(dir.path());
        let volume = volumes.all()[0].clone();
        volume.start_tracking(None).unwrap();
        let all = [BlockRange::new(0, 16)];
        let mut writes = GuestWrites::new(volumes.clone());
        assert_eq!(writes.mirror(true), None);
        assert_eq!(writes.acked(&all), None);
        let mut port = volume.guest_port().unwrap();
        let is_held = || volume.oldest_held().is_some();

        for (id, fua) in [(1, false), (2, true)] {
            submit(&mut port, id, fua);
            assert!(replies(&mut port, is_held).is_empty(), "it is held");
            // It is sent, and arrives.
            assert_eq!(volumes.take_dirty().count(), 1);
            assert_eq!(writes.acked(&all), None);
            let answers = replies(&mut port, || false);
            assert!(answers[0].id == id && answers[0].result.is_ok());
        }

        // The target is gone.
        submit(&mut port, 3, false);
        assert!(replies(&mut port, is_held).is_empty());
        let since = Time(5_000_000_000);
        assert_eq!(writes.tick(since), None);
        assert_eq!(writes.tick(since + PATIENCE / 2), None);
        let note = writes.tick(since + PATIENCE).unwrap();
        assert!(note.contains("10 s"), "{note}");
        assert_eq!(replies(&mut port, || false)[0].id, 3);
        submit(&mut port, 4, false);
        assert_eq!(replies(&mut port, || false)[0].id, 4);

        // It is back. What it has is known from the record, which has the blocks of the writes.
        volumes.take_dirty();
        volumes.mark_clean(&all).unwrap();
        assert!(writes.acked(&all).is_some());
        submit(&mut port, 5, false);
        assert!(replies(&mut port, is_held).is_empty());
        drop(writes);
        assert_eq!(replies(&mut port, || false)[0].id, 5);
    }

    #[test]
    fn a_limit_is_for_all_and_ends_with_the_driver() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = volumes(dir.path());
        let volume = volumes.all()[0].clone();
        volume.start_tracking(None).unwrap();
        let mut writes = GuestWrites::new(volumes.clone());
        writes.limit(Some(1000), Time::ZERO);
        let mut port = volume.guest_port().unwrap();
        submit(&mut port, 1, false);
        assert_eq!(replies(&mut port, || false)[0].id, 1);
        let is_held = || volume.oldest_held().is_some();
        submit(&mut port, 2, false);
        assert!(replies(&mut port, is_held).is_empty());
        assert_eq!(writes.tick(Time(2_000_000_000)), None);
        assert!(is_held(), "4096 bytes take four seconds");
        assert_eq!(writes.tick(Time(5_000_000_000)), None);
        assert_eq!(replies(&mut port, || false)[0].id, 2);
        submit(&mut port, 3, false);
        assert!(replies(&mut port, is_held).is_empty());
        drop(writes);
        assert_eq!(replies(&mut port, || false)[0].id, 3);
    }
}
