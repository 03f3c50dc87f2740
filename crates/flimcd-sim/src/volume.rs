//! What a volume does around its rules: admitted requests become I/O, ended I/O is told to the rules, and what they decide
//! then is carried out. The same at both sites.

use bytes::Bytes;
use flimcd_content::Decoded;
use flimcd_core::{BlockRange, ByteRange};
use flimcd_migrate::{ApplyId, DiskError};
use flimcd_volume::rules::{Admission, ApplyPlan, ApplyToken, GuestOp, Mode, Outcome, Ticket};
use flimcd_wire::Blocks;

use crate::{
    flow::AfterFlush,
    guest::{Answer, Kind, RequestId},
    host::{Done, Io, Purpose, after, trimmed},
    world::{Event, Site, World},
};

/// A message whose content is being written.
pub(crate) struct Message {
    blocks: Blocks,
    /// Entries that are not written yet.
    left: usize,
    error: Option<DiskError>,
    /// The seed does not hold what it says.
    is_lacking: bool,
}

/// An entry of a message that is being written.
pub(crate) struct Apply {
    id: ApplyId,
    entry: usize,
    /// Pieces that are not written yet.
    left: usize,
    failed: bool,
}

impl World {
    // ---- guest requests

    /// A guest's request reaches the volume.
    pub(crate) fn volume_request(&mut self, site: Site, request: RequestId) {
        let Some((kind, range)) = self.guest.what(request) else {
            return;
        };
        if kind == Kind::Flush {
            if self.host(site).rules.mode() == Mode::Released {
                return self.answer(request, Answer::Moved);
            }
            return self.start_flush(site, AfterFlush::Guest(request));
        }
        let op = match kind {
            Kind::Read => GuestOp::Read,
            Kind::Write { .. } => GuestOp::Write,
            Kind::Zero => GuestOp::WriteZeroes,
            Kind::Trim => GuestOp::Trim,
            Kind::Flush => unreachable!("handled above"),
        };
        match self.host(site).rules.begin(op, range) {
            Admission::Go {
                ticket,
                newly_dirty,
            } => self.admitted(site, request, ticket, newly_dirty),
            Admission::Parked { ticket } => {
                self.cover("guest request parked");
                self.host(site).parked.insert(ticket, request);
            }
            Admission::Refused(_) => self.answer(request, Answer::Moved),
            Admission::Answered => unreachable!("only a parked read is answered"),
        }
        self.pump(site);
    }

    fn admitted(&mut self, site: Site, request: RequestId, ticket: Ticket, newly_dirty: bool) {
        let Some((kind, range)) = self.guest.what(request) else {
            return self.fail(format!("{request:?} was admitted after it was given up"));
        };
        let size = self.plan.size;
        let io = match kind {
            Kind::Read => Io::Read(range),
            Kind::Write { stamp, .. } => {
                let mut bytes = vec![0; crate::disk::index(range.len())];
                crate::content::fill(&mut bytes, range.start / crate::content::SECTOR, stamp);
                Io::Write(range.start, Bytes::from(bytes))
            }
            Kind::Zero => Io::Zero(range),
            // In post-copy a trim is carried out, since what lies under a missing block is nobody's content.
            Kind::Trim
                if self.plan.disk.trims || self.host(site).rules.mode() == Mode::PostCopy =>
            {
                Io::Zero(trimmed(range, size))
            }
            Kind::Trim | Kind::Flush => Io::Nothing,
        };
        if kind.writes() && site == Site::Source {
            self.resend.write_starts(range);
            if newly_dirty {
                // In the page cache before the write is submitted.
                self.host(site).unacked.insert_range(range.blocks_touched());
            }
        }
        self.submit(site, io, Purpose::Guest { request, ticket });
    }

    /// The I/O of a guest's request ended.
    fn guest_io_done(&mut self, site: Site, request: RequestId, ticket: Ticket, result: Done) {
        let outcome = if result.is_ok() {
            Outcome::Done
        } else {
            Outcome::Failed
        };
        self.host(site).rules.finish(ticket, outcome);
        self.host(site).note_missing();
        let Some((kind, range)) = self.guest.what(request) else {
            return self.fail(format!("{request:?} ended after it was given up"));
        };
        if kind.writes() && site == Site::Source {
            self.resend.write_ends(range);
        }
        match (kind, result) {
            (Kind::Write { durable: true, .. }, Ok(_)) => {
                self.start_flush(site, AfterFlush::Guest(request));
            }
            (_, Ok(bytes)) => self.answer(request, Answer::Done(bytes)),
            (_, Err(_)) => self.answer(request, Answer::Error),
        }
        self.pump(site);
    }

    /// A flush, or a durable write, ended.
    pub(crate) fn guest_flushed(&mut self, request: RequestId, ok: bool) {
        let answer = if ok {
            Answer::Done(Vec::new())
        } else {
            Answer::Error
        };
        self.answer(request, answer);
    }

    // ---- what the rules decide

    /// Carries out what the rules have decided since the last time, and tells the machine what changed.
    pub(crate) fn pump(&mut self, site: Site) {
        loop {
            if let Some((ticket, admission)) = self.host(site).rules.poll_woken() {
                self.woken(site, ticket, admission);
            } else if let Some(plan) = self.host(site).rules.poll_apply_ready() {
                self.run_apply(&plan);
            } else {
                break;
            }
        }
        match site {
            Site::Source => self.check_drained(),
            Site::Target => self.tell_target(),
        }
    }

    fn woken(&mut self, site: Site, ticket: Ticket, admission: Admission) {
        let request = self.host(site).parked.remove(&ticket);
        let request = request.expect("parked requests are remembered until they are cancelled");
        match admission {
            Admission::Go { newly_dirty, .. } => self.admitted(site, request, ticket, newly_dirty),
            Admission::Refused(_) => self.answer(request, Answer::Moved),
            Admission::Parked { .. } | Admission::Answered => unreachable!("a decision"),
        }
    }

    fn tell_target(&mut self) {
        while let Some(range) = self.host(Site::Target).rules.poll_fault() {
            self.cover("blocks demanded");
            self.target_input(move |machine, now| machine.handle_fault(now, range));
        }
        if !self.plan.tells_late {
            return self.tell_counts();
        }
        if !std::mem::replace(&mut self.target.will_tell, true) {
            let life = self.host(Site::Target).life;
            let soon = after(self.now, &mut self.dice, 1_000, 50_000);
            self.at(soon, Event::TellCounts { life });
        }
    }

    /// Tells the target machine what is missing and what the guest has done.
    pub(crate) fn tell_counts(&mut self) {
        self.target.will_tell = false;
        let host = self.host(Site::Target);
        if host.rules.mode() != Mode::PostCopy {
            return;
        }
        let overwritten = host.rules.take_overwritten();
        let missing = host.rules.missing_count();
        if !overwritten.is_empty() {
            self.cover("missing blocks overwritten by the guest");
            self.target_input(move |machine, now| machine.handle_overwritten(now, &overwritten));
        }
        if self.target.told_missing != Some(missing) {
            self.target.told_missing = Some(missing);
            let stats = self.host(Site::Target).rules.stats();
            self.target_input(move |machine, now| {
                machine.handle_guest_stats(now, stats.guest_reads, stats.guest_reads_missed);
            });
            self.target_input(move |machine, now| machine.handle_missing(now, missing));
        }
    }

    // ---- content that arrived

    /// Writes the content of a message.
    pub(crate) fn apply_message(&mut self, id: ApplyId, blocks: Blocks) {
        let ranges: Vec<BlockRange> = blocks.ranges().collect();
        let message = Message {
            blocks,
            left: ranges.len(),
            error: None,
            is_lacking: false,
        };
        self.target.messages.insert(id, message);
        for (range, entry) in ranges.into_iter().zip(0..) {
            let plan = self.host(Site::Target).rules.begin_apply(range);
            let apply = Apply {
                id,
                entry,
                left: 0,
                failed: false,
            };
            self.target.applies.insert(plan.token, apply);
            if plan.wait {
                self.cover("apply waited for another one");
            } else {
                self.run_apply(&plan);
            }
        }
    }

    fn run_apply(&mut self, plan: &ApplyPlan) {
        let (token, size) = (plan.token, self.plan.size);
        let Some(apply) = self.target.applies.get_mut(&token) else {
            return self.fail(format!(
                "an apply became ready that nobody began: {token:?}"
            ));
        };
        let (id, entry) = (apply.id, apply.entry);
        apply.left = plan.write.len();
        if plan.blocks_to_write() < plan.range.len() {
            self.cover("fetched content dropped");
        }
        if plan.write.is_empty() {
            return self.end_apply(token);
        }
        let Some((entry, payload)) = self.target.messages[&id].blocks.parts().nth(entry) else {
            return self.fail(format!("an apply of an entry that is not there: {token:?}"));
        };
        let content = match self.target.decoder.decode(&entry, &payload, size) {
            Ok(Decoded::Copy(_)) => return self.fail("a copy that was not asked for".to_owned()),
            Ok(Decoded::Same(expected)) => {
                let seed = self.seed.as_ref();
                let Some(found) = seed.and_then(|seed| seed.read(entry.range, expected)) else {
                    if let Some(message) = self.target.messages.get_mut(&id) {
                        message.is_lacking = true;
                    }
                    if let Some(apply) = self.target.applies.get_mut(&token) {
                        apply.failed = true;
                    }
                    return self.end_apply(token);
                };
                Some(Bytes::copy_from_slice(found))
            }
            Ok(Decoded::Zeroes) => None,
            Ok(Decoded::Bytes(bytes)) => Some(Bytes::copy_from_slice(bytes)),
            Err(error) => return self.fail(format!("content that cannot be decoded: {error}")),
        };
        let base = entry.range.bytes(size).start;
        for run in &plan.write {
            let bytes = run.bytes(size);
            let io = match &content {
                None => Io::Zero(bytes),
                Some(content) => {
                    let part = ByteRange::new(bytes.start - base, bytes.end - base);
                    let part = crate::disk::index(part.start)..crate::disk::index(part.end);
                    Io::Write(bytes.start, content.slice(part))
                }
            };
            self.submit(Site::Target, io, Purpose::Apply { id, token });
        }
    }

    fn apply_io_done(&mut self, id: ApplyId, token: ApplyToken, result: Done) {
        let Some(apply) = self.target.applies.get_mut(&token) else {
            return;
        };
        apply.left -= 1;
        let done = apply.left == 0;
        if let Err(error) = result {
            apply.failed = true;
            if let Some(message) = self.target.messages.get_mut(&id) {
                message.error = Some(error);
            }
        }
        if done {
            self.end_apply(token);
        }
    }

    fn end_apply(&mut self, token: ApplyToken) {
        let Some(apply) = self.target.applies.remove(&token) else {
            return;
        };
        let outcome = if apply.failed {
            Outcome::Failed
        } else {
            Outcome::Done
        };
        let host = self.host(Site::Target);
        host.rules.end_apply(token, outcome);
        host.note_missing();
        self.pump(Site::Target);
        let Some(message) = self.target.messages.get_mut(&apply.id) else {
            return;
        };
        message.left -= 1;
        if message.left == 0
            && let Some(message) = self.target.messages.remove(&apply.id)
        {
            if message.is_lacking {
                self.cover("lacking at the target");
                self.resend.lacking(message.blocks.seq);
                let id = apply.id;
                return self.target_input(move |machine, now| machine.handle_lacking(now, id));
            }
            let result = message.error.map_or(Ok(()), Err);
            self.target_input(move |machine, now| machine.handle_applied(now, apply.id, result));
        }
    }

    // ---- I/O

    /// I/O ended.
    pub(crate) fn io_done(&mut self, site: Site, id: u64) {
        let Some((purpose, result)) = self.host(site).complete(id) else {
            return;
        };
        if result.is_err() {
            self.cover("disk error");
            self.resend.forget();
        }
        match purpose {
            Purpose::Guest { request, ticket } => {
                self.guest_io_done(site, request, ticket, result);
            }
            Purpose::Send {
                seq,
                range,
                compress,
                same,
            } => self.send_read_done(seq, range, compress, &same, result),
            Purpose::Apply { id, token } => self.apply_io_done(id, token, result),
            Purpose::Flow(id) => self.flow_done(site, id, result.map(|_| ())),
        }
    }
}
