//! Ports over real files.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use flimcd_core::{BLOCK_SIZE, BlockRange, BlockSet, VolumeSize};
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use super::{GuestError, GuestPort, GuestReply, GuestRequest, RequestKind};
use crate::{
    ApplyData, Volume, VolumeObserver,
    device::{
        FileDevice, IoBuf, OpenOptions, UringUse,
        fault::{FaultDevice, Faults},
    },
    rules::Mode,
};

const BLOCKS: u64 = 64;

struct Lab {
    volume: Arc<Volume>,
    faults: Arc<Faults>,
    _dir: TempDir,
}

fn lab_with(mode: Mode, io_uring: UringUse) -> Lab {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(BLOCKS * BLOCK_SIZE).unwrap();
    let options = OpenOptions {
        io_uring,
        ..OpenOptions::default()
    };
    let device = FileDevice::open(path, &options).unwrap();
    let (device, faults) = FaultDevice::new(Arc::new(device));
    let volume = Volume::ephemeral("vm".parse().unwrap(), Arc::new(device), mode);
    Lab {
        volume,
        faults,
        _dir: dir,
    }
}

fn lab(mode: Mode) -> Lab {
    lab_with(mode, UringUse::Auto)
}

fn request(id: u64, kind: RequestKind, offset: u64, length: usize) -> GuestRequest {
    let buf = match kind {
        RequestKind::Read => IoBuf::zeroed(length),
        #[expect(clippy::cast_possible_truncation, reason = "any byte will do")]
        RequestKind::Write => IoBuf::copy_of(&vec![id as u8; length]),
        _ => IoBuf::empty(),
    };
    GuestRequest {
        id,
        kind,
        offset,
        length: length as u64,
        fua: false,
        buf,
    }
}

/// Waits until `count` replies are there, sorted by id.
fn replies(port: &mut GuestPort, count: usize) -> Vec<GuestReply> {
    let mut out = Vec::new();
    loop {
        port.poll(&mut out).unwrap();
        if out.len() >= count {
            out.sort_by_key(|reply| reply.id);
            return out;
        }
        let (queue, inbox) = port.wait_fds();
        let mut fds = vec![PollFd::from_borrowed_fd(inbox, PollFlags::IN)];
        fds.extend(queue.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        poll(&mut fds, None).unwrap();
    }
}

fn ask(port: &mut GuestPort, request: GuestRequest) -> GuestReply {
    port.submit(request);
    port.kick().unwrap();
    replies(port, 1).pop().unwrap()
}

fn missing(ranges: &[(u64, u64)]) -> BlockSet {
    let mut set = BlockSet::new(BLOCKS);
    for &(start, end) in ranges {
        set.insert_range(BlockRange::new(start, end));
    }
    set
}

#[test]
fn many_requests_at_once() {
    for io_uring in [UringUse::Auto, UringUse::Off] {
        let lab = lab_with(Mode::Owner, io_uring);
        let mut port = lab.volume.guest_port().unwrap();
        for id in 0..60 {
            let mut write = request(id, RequestKind::Write, id * BLOCK_SIZE + 7, 4000);
            write.fua = id % 5 == 0;
            port.submit(write);
        }
        port.submit(request(60, RequestKind::Flush, 0, 0));
        port.submit(request(
            61,
            RequestKind::Trim,
            62 * BLOCK_SIZE,
            usize::try_from(BLOCK_SIZE).unwrap(),
        ));
        port.submit(request(62, RequestKind::Trim, 5, 100));
        port.submit(request(63, RequestKind::Read, BLOCKS * BLOCK_SIZE - 10, 11));
        assert_eq!(port.in_flight(), 64);
        port.kick().unwrap();
        for reply in replies(&mut port, 64) {
            match reply.id {
                63 => assert!(matches!(reply.result, Err(GuestError::OutOfRange))),
                _ => reply.result.unwrap(),
            }
        }
        assert_eq!(port.in_flight(), 0);
        let read = request(9, RequestKind::Read, 9 * BLOCK_SIZE, 4096);
        port.submit(read);
        port.kick_inline().unwrap();
        let read = replies(&mut port, 1).pop().unwrap();
        assert_eq!(&read.buf[..7], [0; 7]);
        assert_eq!(&read.buf[7..4007], [9; 4000]);
        assert!(lab.volume.is_drained());
        drop(port);
        assert_eq!(lab.volume.connections(), 0);
    }
}

#[derive(Default)]
struct Counts {
    fault: AtomicUsize,
    drained: AtomicUsize,
    gone: AtomicUsize,
    peek: AtomicUsize,
}

impl VolumeObserver for Counts {
    fn on_fault(&self) {
        self.fault.fetch_add(1, Ordering::SeqCst);
    }
    fn on_peek(&self) {
        self.peek.fetch_add(1, Ordering::SeqCst);
    }
    fn on_drained(&self) {
        self.drained.fetch_add(1, Ordering::SeqCst);
    }
    fn on_guests_gone(&self) {
        self.gone.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_read_waits_for_its_block_and_a_write_brings_its_own() {
    let lab = lab(Mode::Incoming);
    let counts = Arc::new(Counts::default());
    lab.volume.set_observer(counts.clone());
    let mut port = lab.volume.guest_port().unwrap();
    let mut other = lab.volume.guest_port().unwrap();
    port.submit(request(1, RequestKind::Write, 0, 4096));
    port.kick().unwrap();
    let mut out = Vec::new();
    port.poll(&mut out).unwrap();
    assert!(out.is_empty(), "parked before the switch");
    lab.volume.start_postcopy(missing(&[(0, 4)]));
    assert!(replies(&mut port, 1)[0].result.is_ok());

    port.submit(request(2, RequestKind::Read, 0, 8192));
    other.submit(request(3, RequestKind::Cache, 4096, 10));
    port.kick().unwrap();
    other.kick().unwrap();
    assert_eq!(lab.volume.poll_fault(), Some(BlockRange::new(1, 2)));
    assert!(counts.fault.load(Ordering::SeqCst) >= 1);
    let content = vec![7; 4 * 4096];
    let applied = lab
        .volume
        .apply(BlockRange::new(0, 4), ApplyData::Bytes(&content));
    assert_eq!(applied.unwrap().written, 3);
    let read = replies(&mut port, 1).pop().unwrap();
    assert_eq!((read.buf[0], read.buf[4095], read.buf[4096]), (1, 1, 7));
    assert_eq!(replies(&mut other, 1)[0].id, 3);
    assert_eq!(lab.volume.take_overwritten(), missing(&[(0, 1)]));
    assert!(
        ask(&mut port, request(4, RequestKind::Flush, 0, 0))
            .result
            .is_ok()
    );
    lab.volume.finish_postcopy().unwrap();
    assert_eq!(lab.volume.mode(), Mode::Owner);
    drop((port, other));
    assert_eq!(counts.gone.load(Ordering::SeqCst), 1);
}

#[test]
fn a_trim_of_a_missing_block_reads_as_zero() {
    let lab = lab(Mode::Incoming);
    let stale = vec![9; 4096];
    lab.volume
        .apply(BlockRange::new(2, 3), ApplyData::Bytes(&stale))
        .unwrap();
    lab.volume.start_postcopy(missing(&[(2, 3)]));
    let mut port = lab.volume.guest_port().unwrap();
    assert!(
        ask(&mut port, request(1, RequestKind::Trim, 8192, 4096))
            .result
            .is_ok()
    );
    let read = ask(&mut port, request(2, RequestKind::Read, 8192, 4096));
    assert!(read.buf.iter().all(|&b| b == 0));
    assert_eq!(lab.volume.missing_count(), 0);
}

#[test]
fn a_failed_write_of_a_missing_block_leaves_it_missing() {
    let lab = lab(Mode::Incoming);
    lab.volume.start_postcopy(missing(&[(2, 4)]));
    let mut port = lab.volume.guest_port().unwrap();
    lab.faults
        .fail_writes(BlockRange::new(3, 4).bytes(lab.volume.size()));
    let reply = ask(&mut port, request(1, RequestKind::Write, 8192, 8192));
    assert!(matches!(reply.result, Err(GuestError::Io(_))));
    assert_eq!(lab.volume.missing_count(), 2);
    let zeroes = lab.volume.apply(BlockRange::new(2, 4), ApplyData::Zeroes);
    assert!(zeroes.is_err(), "the disk is still broken");
    assert_eq!(lab.volume.missing_count(), 2);
    lab.faults.clear();
    lab.volume
        .apply(BlockRange::new(2, 4), ApplyData::Zeroes)
        .unwrap();
    assert_eq!(lab.volume.missing_count(), 0);
}

#[test]
fn after_a_failed_sync_no_flush_succeeds() {
    let lab = lab(Mode::Owner);
    let mut port = lab.volume.guest_port().unwrap();
    lab.faults.fail_sync(true);
    let mut write = request(1, RequestKind::Write, 0, 512);
    write.fua = true;
    assert!(ask(&mut port, write).result.is_err());
    lab.faults.clear();
    let flush = ask(&mut port, request(2, RequestKind::Flush, 0, 0));
    assert!(
        flush
            .result
            .unwrap_err()
            .to_string()
            .contains("restart the agent")
    );
    assert!(lab.volume.sync().is_err());
}

#[test]
fn freeze_parks_and_release_refuses() {
    let lab = lab(Mode::Owner);
    let mut port = lab.volume.guest_port().unwrap();
    assert!(lab.volume.freeze());
    port.submit(request(1, RequestKind::Write, 0, 4096));
    port.kick().unwrap();
    lab.volume.thaw();
    assert!(replies(&mut port, 1)[0].result.is_ok());
    assert!(lab.volume.freeze());
    port.submit(request(2, RequestKind::Read, 0, 4096));
    port.kick().unwrap();
    lab.volume.release();
    assert!(matches!(
        replies(&mut port, 1)[0].result,
        Err(GuestError::Moved)
    ));
    let late = ask(&mut port, request(3, RequestKind::Read, 0, 4096));
    assert!(matches!(late.result, Err(GuestError::Moved)));
}

#[test]
fn a_read_before_the_switch_gets_what_the_source_has() {
    let lab = lab(Mode::Incoming);
    let counts = Arc::new(Counts::default());
    lab.volume.set_observer(counts.clone());
    lab.volume.set_peeking(true);
    let mut port = lab.volume.guest_port().unwrap();
    port.submit(request(1, RequestKind::Read, 4000, 5000));
    port.submit(request(2, RequestKind::Write, 0, 512));
    port.submit(request(3, RequestKind::Flush, 0, 0));
    port.submit(request(4, RequestKind::Cache, 0, 4096));
    port.submit(request(5, RequestKind::Read, 4096, 512));
    port.kick().unwrap();
    let others = replies(&mut port, 3);
    assert!(matches!(others[0].result, Err(GuestError::NotHere)));
    assert!(others[1].result.is_ok() && others[2].result.is_ok());
    assert!(counts.peek.load(Ordering::SeqCst) >= 1);
    let peek = lab.volume.poll_peek().unwrap();
    assert_eq!(peek.range, BlockRange::new(0, 3));
    let bad = lab.volume.poll_peek().unwrap();
    assert_eq!(lab.volume.poll_peek(), None);
    lab.volume.answer_peek(bad.number, Some(&[0; 4095]));
    let reply = replies(&mut port, 1).pop().unwrap();
    assert!(reply.id == 5 && matches!(reply.result, Err(GuestError::Io(_))));

    lab.volume.requeue_peeks();
    assert_eq!(lab.volume.poll_peek(), Some(peek));
    let content: Vec<u8> = (0..3 * 4096u32)
        .map(|at| (at / 100).to_le_bytes()[0])
        .collect();
    lab.volume.answer_peek(peek.number, Some(&content));
    let reply = replies(&mut port, 1).pop().unwrap();
    assert!(reply.id == 1 && reply.result.is_ok());
    assert_eq!(&reply.buf[..], &content[4000..9000]);
    let stats = lab.volume.stats();
    assert_eq!((stats.peeks, stats.guest_reads), (2, 0));

    // One that is open at the switch reads what is here then; one whose port goes away is forgotten.
    port.submit(request(6, RequestKind::Read, 0, 512));
    port.submit(request(7, RequestKind::Read, 8192, 512));
    port.kick().unwrap();
    let mut other = lab.volume.guest_port().unwrap();
    other.submit(request(8, RequestKind::Read, 4096, 8192));
    other.kick().unwrap();
    let open: Vec<_> = std::iter::from_fn(|| lab.volume.poll_peek()).collect();
    assert_eq!(open.len(), 3);
    drop(other);
    lab.volume.start_postcopy(missing(&[(2, 3)]));
    for peek in open {
        lab.volume.answer_peek(peek.number, Some(&[9; 4096]));
    }
    let reply = replies(&mut port, 1).pop().unwrap();
    assert!(reply.id == 6 && reply.buf[..].iter().all(|&byte| byte == 0));
    assert_eq!(lab.volume.poll_fault(), Some(BlockRange::new(2, 3)));
    let fetched = ApplyData::Bytes(&[7; 4096]);
    lab.volume.apply(BlockRange::new(2, 3), fetched).unwrap();
    let reply = replies(&mut port, 1).pop().unwrap();
    assert!(reply.id == 7 && reply.buf[..].iter().all(|&byte| byte == 7));
    assert_eq!(lab.volume.stats().guest_reads_missed, 0);
    lab.volume.finish_postcopy().unwrap();
}

#[test]
fn an_answered_read_whose_port_is_gone_harms_nobody() {
    let lab = lab(Mode::Incoming);
    lab.volume.set_peeking(true);
    let mut port = lab.volume.guest_port().unwrap();
    port.submit(request(1, RequestKind::Read, 0, 8192));
    port.kick().unwrap();
    let peek = lab.volume.poll_peek().unwrap();
    lab.volume.answer_peek(peek.number, Some(&[1; 8192]));
    drop(port);
    lab.volume.answer_peek(peek.number, Some(&[1; 8192]));
    assert!(lab.volume.is_drained());
}

#[test]
fn a_flush_succeeds_on_a_frozen_and_on_a_released_volume() {
    let lab = lab(Mode::Owner);
    let mut port = lab.volume.guest_port().unwrap();
    assert!(
        ask(&mut port, request(1, RequestKind::Write, 0, 4096))
            .result
            .is_ok()
    );
    assert!(lab.volume.freeze());
    port.submit(request(2, RequestKind::Write, 0, 4096));
    let flush = ask(&mut port, request(3, RequestKind::Flush, 0, 0));
    assert!(flush.id == 3 && flush.result.is_ok());
    lab.faults.fail_sync(true);
    let flush = ask(&mut port, request(4, RequestKind::Flush, 0, 0));
    assert!(flush.result.is_err(), "it really syncs");

    let lab = self::lab(Mode::Owner);
    let mut port = lab.volume.guest_port().unwrap();
    assert!(lab.volume.freeze());
    lab.volume.release();
    let flush = ask(&mut port, request(5, RequestKind::Flush, 0, 0));
    assert!(flush.result.is_ok());
    let read = ask(&mut port, request(6, RequestKind::Read, 0, 512));
    assert!(matches!(read.result, Err(GuestError::Moved)));
}

#[test]
fn dropping_a_port_forgets_what_waits_and_ends_what_was_decided() {
    let lab = lab(Mode::Incoming);
    let mut port = lab.volume.guest_port().unwrap();
    port.submit(request(1, RequestKind::Write, 0, 4096));
    port.submit(request(2, RequestKind::Read, 3 * 4096, 4096));
    port.submit(request(3, RequestKind::Flush, 0, 0));
    port.kick().unwrap();
    // The write is decided, but the port never hears of it; the read stays parked.
    lab.volume.start_postcopy(missing(&[(0, 4)]));
    assert!(!lab.volume.is_drained());
    drop(port);
    assert!(lab.volume.is_drained());
    assert_eq!(
        lab.volume.missing_count(),
        4,
        "the write was never submitted"
    );
    lab.volume
        .apply(BlockRange::new(0, 4), ApplyData::Zeroes)
        .unwrap();
    lab.volume.finish_postcopy().unwrap();
}

#[test]
fn content_that_does_not_fit_is_refused() {
    let lab = lab(Mode::Incoming);
    for (range, length) in [((0, 1), 4095), ((0, 0), 0), ((63, 65), 8192)] {
        let data = vec![1; length];
        let range = BlockRange::new(range.0, range.1);
        let error = lab.volume.apply(range, ApplyData::Bytes(&data));
        assert_eq!(
            error.unwrap_err().kind(),
            std::io::ErrorKind::InvalidInput,
            "{range:?}"
        );
    }
    assert_eq!(lab.volume.size(), VolumeSize::new(BLOCKS * 4096).unwrap());
}
