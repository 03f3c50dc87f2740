//! What a volume does around its rules: admitted requests become I/O, ended I/O is told to the rules, and what they decide
//! then is carried out. The same at both sites.

use bytes::Bytes;
use flimcd_volume::rules::{Admission, Completion, GuestOp, Mode, Outcome, Ticket};

use crate::{
    flow::AfterFlush,
    guest::{Answer, Kind, RequestId},
    host::{Done, Io, Purpose, after, trimmed},
    world::{Event, Site, World},
};

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
        self.count_heat(site, kind, range);
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
            self.standing.source_writes(range);
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
        let completion = self.host(site).rules.finish(ticket, outcome);
        self.host(site).note_missing();
        let Some((kind, range)) = self.guest.what(request) else {
            return self.fail(format!("{request:?} ended after it was given up"));
        };
        if kind.writes() && site == Site::Source {
            self.resend.write_ends(range);
        }
        match (kind, result) {
            (_, Ok(_)) if completion == Completion::Held => {
                self.cover("write held");
                self.host(site).held.insert(ticket, request);
            }
            (_, Ok(bytes)) => self.guest_request_done(site, request, kind, bytes),
            (_, Err(_)) => self.answer(request, Answer::Error),
        }
        self.pump(site);
    }

    fn guest_request_done(&mut self, site: Site, request: RequestId, kind: Kind, bytes: Vec<u8>) {
        if matches!(kind, Kind::Write { durable: true, .. }) {
            self.start_flush(site, AfterFlush::Guest(request));
        } else {
            self.answer(request, Answer::Done(bytes));
        }
    }

    /// A write that was held may be answered.
    fn released(&mut self, site: Site, ticket: Ticket) {
        let request = self.host(site).held.remove(&ticket);
        let request = request.expect("held writes are remembered until they are forgotten");
        let Some((kind, _)) = self.guest.what(request) else {
            return self.fail(format!("{request:?} was held after it was given up"));
        };
        self.guest_request_done(site, request, kind, Vec::new());
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
            } else if let Some(ticket) = self.host(site).rules.poll_released() {
                self.released(site, ticket);
            } else if let Some(plan) = self.host(site).rules.poll_apply_ready() {
                self.run_apply(&plan);
            } else {
                break;
            }
        }
        match site {
            Site::Source => self.check_drained(),
            Site::Target => {
                self.look_for_reads();
                self.tell_target();
            }
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
            for block in range.iter() {
                if self.is_being_fetched(block) {
                    self.resend.asked_for_late(block);
                }
            }
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
            Purpose::Send { seq, range, how } => self.send_read_done(seq, range, &how, result),
            Purpose::Fetch { id, entry, at } => self.fetch_io_done(id, entry, at, result),
            Purpose::Apply { id, token } => self.apply_io_done(id, token, result),
            Purpose::Flow(id) => self.flow_done(site, id, result.map(|_| ())),
        }
    }
}
