//! A device that fails on purpose, for tests of everything above it.
//!
//! [`FaultDevice`] stands on another device and passes on what [`Faults`], its remote control, lets
//! through. A request that is made to fail changes nothing below.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use flimcd_core::{ByteRange, VolumeSize};

use super::{BlockDevice, DataExtent, IoDone, IoKind, IoOp, IoQueue};

/// What goes wrong, changeable at any time from any thread.
#[derive(Debug, Default)]
pub struct Faults {
    plan: Mutex<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    bad_reads: Vec<ByteRange>,
    bad_writes: Vec<ByteRange>,
    sync_fails: bool,
    bytes_left: Option<u64>,
    delay: Duration,
    hits: u64,
}

impl Faults {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads that touch `range` end with EIO.
    pub fn fail_reads(&self, range: ByteRange) {
        self.plan().bad_reads.push(range);
    }

    /// Writes, zeroing and discards that touch `range` end with EIO.
    pub fn fail_writes(&self, range: ByteRange) {
        self.plan().bad_writes.push(range);
    }

    /// Whether syncs end with EIO.
    pub fn fail_sync(&self, fails: bool) {
        self.plan().sync_fails = fails;
    }

    /// After `bytes` more bytes are written the disk is full, whatever place they are written to.
    pub fn fill_after(&self, bytes: u64) {
        self.plan().bytes_left = Some(bytes);
    }

    /// Every request takes `delay` longer.
    pub fn slow_down(&self, delay: Duration) {
        self.plan().delay = delay;
    }

    /// Takes all of it back.
    pub fn clear(&self) {
        let mut plan = self.plan();
        *plan = Plan {
            hits: plan.hits,
            ..Plan::default()
        };
    }

    /// Requests that were made to fail so far.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.plan().hits
    }

    fn check(&self, kind: IoKind, range: ByteRange) -> io::Result<()> {
        let (verdict, delay) = {
            let mut plan = self.plan();
            let verdict = plan.verdict(kind, range);
            plan.hits += u64::from(verdict.is_err());
            (verdict, plan.delay)
        };
        if !delay.is_zero() {
            thread::sleep(delay);
        }
        verdict.map_err(io::Error::from_raw_os_error)
    }
}

impl Plan {
    fn verdict(&mut self, kind: IoKind, range: ByteRange) -> Result<(), i32> {
        let touches = |bad: &[ByteRange]| {
            bad.iter()
                .any(|bad| bad.start.max(range.start) < bad.end.min(range.end))
        };
        let fails = match kind {
            IoKind::Read => touches(&self.bad_reads),
            IoKind::Sync => self.sync_fails,
            IoKind::Write | IoKind::WriteZeroes { .. } | IoKind::Discard => {
                touches(&self.bad_writes)
            }
        };
        if fails {
            return Err(libc::EIO);
        }
        let takes_space = matches!(kind, IoKind::Write | IoKind::WriteZeroes { punch: false });
        if let (Some(left), true) = (&mut self.bytes_left, takes_space) {
            *left = left.checked_sub(range.len()).ok_or(libc::ENOSPC)?;
        }
        Ok(())
    }
}

/// A device with [`Faults`].
pub struct FaultDevice {
    inner: Arc<dyn BlockDevice>,
    faults: Arc<Faults>,
}

impl FaultDevice {
    /// `inner`, with no faults for now, and the control over them.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> (Self, Arc<Faults>) {
        let faults = Arc::new(Faults::default());
        (
            Self {
                inner,
                faults: Arc::clone(&faults),
            },
            faults,
        )
    }
}

impl BlockDevice for FaultDevice {
    fn size(&self) -> VolumeSize {
        self.inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.faults
            .check(IoKind::Read, ByteRange::at(offset, buf.len() as u64))?;
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.faults
            .check(IoKind::Write, ByteRange::at(offset, data.len() as u64))?;
        self.inner.write_at(offset, data)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.faults.check(IoKind::Sync, ByteRange::new(0, 0))?;
        self.inner.sync_data()
    }

    fn write_zeroes(&self, range: ByteRange, punch: bool) -> io::Result<()> {
        self.faults.check(IoKind::WriteZeroes { punch }, range)?;
        self.inner.write_zeroes(range, punch)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.faults.check(IoKind::Discard, range)?;
        self.inner.discard(range)
    }

    fn data_extents(&self, range: ByteRange, max: usize) -> io::Result<Vec<DataExtent>> {
        self.inner.data_extents(range, max)
    }

    fn zeroes_fast(&self) -> bool {
        self.inner.zeroes_fast()
    }

    fn open_queue(&self, depth: u32) -> io::Result<Box<dyn IoQueue>> {
        let inner = self.inner.open_queue(depth)?;
        Ok(Box::new(FaultQueue {
            inner,
            faults: Arc::clone(&self.faults),
            failed: Vec::new(),
        }))
    }
}

/// Sorts out what fails; delays happen in `push`.
struct FaultQueue {
    inner: Box<dyn IoQueue>,
    faults: Arc<Faults>,
    failed: Vec<IoDone>,
}

impl IoQueue for FaultQueue {
    fn push(&mut self, op: IoOp) {
        match self
            .faults
            .check(op.kind, ByteRange::at(op.offset, op.length))
        {
            Ok(()) => self.inner.push(op),
            Err(error) => self.failed.push(IoDone {
                id: op.id,
                result: Err(error),
                buf: op.buf,
            }),
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        self.inner.submit()
    }

    fn submit_inline(&mut self) -> io::Result<()> {
        self.inner.submit_inline()
    }

    fn completions(&mut self, out: &mut Vec<IoDone>) {
        out.append(&mut self.failed);
        self.inner.completions(out);
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.poll_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{FileDevice, IoBuf, OpenOptions};

    #[test]
    fn faults_hit_what_they_are_told_to_and_nothing_else() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, vec![1; 65536]).unwrap();
        let file = FileDevice::open(path, &OpenOptions::default()).unwrap();
        let (device, faults) = FaultDevice::new(Arc::new(file));
        faults.fail_reads(ByteRange::new(4096, 8192));
        faults.fail_writes(ByteRange::new(0, 1));
        let mut buf = [0; 4096];
        device.read_at(0, &mut buf).unwrap();
        assert_eq!(
            device.read_at(8000, &mut buf).unwrap_err().raw_os_error(),
            Some(libc::EIO)
        );
        device
            .write_zeroes(ByteRange::new(0, 10), true)
            .unwrap_err();
        device.write_at(1, &buf).unwrap();

        faults.clear();
        faults.fill_after(5000);
        device.write_at(0, &buf).unwrap();
        let full = device.write_at(0, &buf).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        faults.fail_sync(true);
        device.sync_data().unwrap_err();

        let mut queue = device.open_queue(4).unwrap();
        let op = |id, kind| IoOp {
            id,
            kind,
            offset: 0,
            length: 4096,
            buf: IoBuf::zeroed(4096),
        };
        queue.push(op(1, IoKind::Write));
        queue.push(op(2, IoKind::Sync));
        queue.submit_inline().unwrap();
        let mut done = Vec::new();
        queue.completions(&mut done);
        let failed: Vec<_> = done
            .iter()
            .map(|done| (done.id, done.result.is_err()))
            .collect();
        assert_eq!(failed, [(1, true), (2, true)]);
        assert_eq!(faults.hits(), 6);
    }
}
