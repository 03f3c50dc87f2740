//! The queue for machines without io_uring: everything is done inside `submit`, by plain calls.

use std::{collections::VecDeque, io, os::fd::BorrowedFd, os::unix::fs::FileExt, sync::Arc};

use flimcd_core::ByteRange;

use super::{Shared, usize_of};
use crate::device::{IoDone, IoKind, IoOp, IoQueue};

pub(super) struct InlineQueue {
    shared: Arc<Shared>,
    pushed: VecDeque<IoOp>,
    done: Vec<IoDone>,
}

impl InlineQueue {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            pushed: VecDeque::new(),
            done: Vec::new(),
        }
    }
}

impl IoQueue for InlineQueue {
    fn push(&mut self, op: IoOp) {
        self.pushed.push_back(op);
    }

    fn submit(&mut self) -> io::Result<()> {
        for op in self.pushed.drain(..) {
            self.done.push(self.shared.run(op));
        }
        Ok(())
    }

    fn completions(&mut self, out: &mut Vec<IoDone>) {
        out.append(&mut self.done);
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Shared {
    /// Does `op` here and now.
    pub(super) fn run(&self, mut op: IoOp) -> IoDone {
        let result = self.run_result(&mut op);
        IoDone {
            id: op.id,
            result,
            buf: op.buf,
        }
    }

    /// Does a write that the gate let in alone.
    pub(super) fn run_unaligned_write(&self, op: IoOp) -> IoDone {
        let file = self.buffered.as_ref().unwrap_or(&self.main);
        let result = match op.buf.get(..usize_of(op.length)) {
            Some(data) => file.write_all_at(data, op.offset),
            None => Err(no_room()),
        };
        IoDone {
            id: op.id,
            result,
            buf: op.buf,
        }
    }

    fn run_result(&self, op: &mut IoOp) -> io::Result<()> {
        let length = usize_of(op.length);
        let range = || ByteRange::at(op.offset, op.length);
        match op.kind {
            IoKind::Read => {
                let buf = op.buf.get_mut(..length).ok_or_else(no_room)?;
                self.read_at(op.offset, buf)
            }
            IoKind::Write => self.write_at(op.offset, op.buf.get(..length).ok_or_else(no_room)?),
            IoKind::Sync => self.main.sync_data(),
            IoKind::WriteZeroes { punch } => self.write_zeroes(range(), punch),
            IoKind::Discard => self.discard(range()),
        }
    }
}

fn no_room() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        "buffer is shorter than the request",
    )
}
