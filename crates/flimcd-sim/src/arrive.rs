//! Content that arrives: unpacked, or fetched from where the target has it already, checked, and written.
//!
//! As in the real agent, what is fetched is read before the volume lets the write begin, so that guests and other messages get in
//! between.

use bytes::Bytes;
use flimcd_content::{Decoded, Fingerprint};
use flimcd_core::{BlockIndex, BlockRange, ByteRange};
use flimcd_migrate::{ApplyId, DiskError};
use flimcd_volume::rules::{ApplyPlan, ApplyToken, Outcome};
use flimcd_wire::Blocks;

use crate::{
    disk::index,
    elsewhere::Place,
    host::{Done, Io, Purpose},
    world::{Site, World},
};

/// A message whose content is being written.
pub(crate) struct Message {
    blocks: Blocks,
    entries: Vec<Entry>,
    /// Entries that are not written yet.
    left: usize,
    error: Option<DiskError>,
    /// What it refers to is not here.
    is_lacking: bool,
}

/// The content of an entry.
enum Entry {
    Zeroes,
    Bytes(Bytes),
    /// It stands there.
    Kept,
    Fetching(Fetch),
}

/// Content that is being fetched.
struct Fetch {
    /// It is at the same place of the copy that stands there.
    in_place: bool,
    expected: Fingerprint,
    bytes: Vec<u8>,
    /// Pieces that are not read yet.
    left: usize,
    /// A place is not there, or could not be read.
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
    /// Writes the content of a message.
    pub(crate) fn apply_message(&mut self, id: ApplyId, blocks: Blocks) {
        let mut entries = Vec::new();
        for (entry, payload) in blocks.parts() {
            let decoder = &mut self.target.decoder;
            let fetch = |in_place, expected| Fetch {
                in_place,
                expected,
                bytes: vec![0; index(entry.range.bytes(self.plan.size).len())],
                left: 0,
                is_lacking: false,
            };
            entries.push(match decoder.decode(&entry, &payload, self.plan.size) {
                Ok(Decoded::Zeroes) => Entry::Zeroes,
                Ok(Decoded::Bytes(bytes)) => Entry::Bytes(Bytes::copy_from_slice(bytes)),
                Ok(Decoded::Same(expected)) => {
                    let in_place = self.seed.as_ref().is_some_and(|seed| seed.in_place);
                    Entry::Fetching(fetch(in_place, expected))
                }
                Ok(Decoded::Copy(expected)) => Entry::Fetching(fetch(false, expected)),
                Err(error) => return self.fail(format!("content that cannot be decoded: {error}")),
            });
        }
        let count = entries.len();
        let message = Message {
            blocks,
            entries,
            left: count,
            error: None,
            is_lacking: false,
        };
        self.target.messages.insert(id, message);
        for at in 0..count {
            if matches!(self.target.messages[&id].entries[at], Entry::Fetching(_)) {
                self.fetch(id, at);
            } else {
                self.begin_apply(id, at);
            }
        }
    }

    // ---- fetching

    /// Reads what an entry refers to, wherever it is.
    fn fetch(&mut self, id: ApplyId, at: usize) {
        let size = self.plan.size;
        let message = &self.target.messages[&id];
        let (seq, entry) = (message.blocks.seq, message.blocks.entries[at]);
        let is_same = entry.content == flimcd_wire::Content::Same;
        let in_place = self.seed.as_ref().is_some_and(|seed| seed.in_place);
        let start = entry.range.bytes(size).start;
        let mut found: Vec<(usize, Vec<u8>)> = Vec::new();
        let mut reads: Vec<(usize, ByteRange)> = Vec::new();
        let mut is_lacking = false;
        for block in entry.range.iter() {
            let bytes = BlockRange::single(block).bytes(size);
            let to = index(bytes.start - start);
            let place = match (is_same, in_place) {
                (true, true) => Some(Place::Own(block)),
                (true, false) => Some(Place::Seed),
                (false, _) => self.target.finder.place(seq, block),
            };
            let here = match place {
                Some(Place::Own(own)) => {
                    let from = BlockRange::single(own).bytes(size);
                    reads.push((to, from));
                    is_lacking |= from.len() != bytes.len();
                    continue;
                }
                Some(Place::Seed) => {
                    let seed = self.seed.as_ref();
                    seed.and_then(|seed| seed.bytes(BlockRange::single(block)))
                }
                Some(Place::Other(other)) => Some(self.elsewhere.block(other)),
                None => None,
            };
            match here.filter(|here| here.len() as u64 == bytes.len()) {
                Some(here) => found.push((to, here.to_vec())),
                None => is_lacking = true,
            }
        }
        if is_lacking {
            reads.clear();
        }
        if let Some(fetch) = self.fetching(id, at) {
            fetch.is_lacking = is_lacking;
            // One more, which ends below, so that it cannot end before.
            fetch.left = reads.len() + 1;
            for (to, bytes) in found {
                fetch.bytes[to..to + bytes.len()].copy_from_slice(&bytes);
            }
        }
        for (to, from) in reads {
            let purpose = Purpose::Fetch {
                id,
                entry: at,
                at: to,
            };
            self.submit(Site::Target, Io::Read(from), purpose);
        }
        self.fetch_io_done(id, at, 0, Ok(Vec::new()));
    }

    /// Whether content of this block has arrived as a reference, and is still looked for.
    pub(crate) fn is_being_fetched(&self, block: BlockIndex) -> bool {
        let fetches = |message: &Message| {
            let entries = message.entries.iter().zip(&message.blocks.entries);
            let mut fetching = entries.filter(|(entry, _)| matches!(entry, Entry::Fetching(_)));
            fetching.any(|(_, entry)| entry.range.contains(block))
        };
        self.target.messages.values().any(fetches)
    }

    fn fetching(&mut self, id: ApplyId, entry: usize) -> Option<&mut Fetch> {
        match self.target.messages.get_mut(&id)?.entries.get_mut(entry)? {
            Entry::Fetching(fetch) => Some(fetch),
            _ => None,
        }
    }

    /// A piece of what an entry refers to was read.
    pub(crate) fn fetch_io_done(&mut self, id: ApplyId, entry: usize, at: usize, result: Done) {
        let Some(fetch) = self.fetching(id, entry) else {
            return;
        };
        match result {
            Ok(bytes) => fetch.bytes[at..at + bytes.len()].copy_from_slice(&bytes),
            Err(_) => fetch.is_lacking = true,
        }
        fetch.left -= 1;
        if fetch.left == 0 {
            self.fetched(id, entry);
        }
    }

    /// All of what an entry refers to was read: it is right, or it is not.
    fn fetched(&mut self, id: ApplyId, entry: usize) {
        let trusts = self.breaks_unchecked_copy();
        let Some(fetch) = self.fetching(id, entry) else {
            return;
        };
        let is_right = trusts || Fingerprint::of_run(&fetch.bytes) == fetch.expected;
        if fetch.is_lacking || !is_right {
            return self.entry_lacks(id);
        }
        // Whoever else writes there is a guest, and when that write fails, it leaves this content or its own.
        let content = if fetch.in_place {
            Entry::Kept
        } else {
            Entry::Bytes(std::mem::take(&mut fetch.bytes).into())
        };
        if matches!(content, Entry::Kept) {
            self.cover("kept in place");
        }
        if let Some(message) = self.target.messages.get_mut(&id) {
            message.entries[entry] = content;
        }
        self.begin_apply(id, entry);
    }

    fn entry_lacks(&mut self, id: ApplyId) {
        if let Some(message) = self.target.messages.get_mut(&id) {
            message.is_lacking = true;
            message.left -= 1;
        }
        self.consider_applied(id);
    }

    // ---- writing

    fn begin_apply(&mut self, id: ApplyId, entry: usize) {
        let range = self.target.messages[&id].blocks.entries[entry].range;
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

    /// The volume lets an entry be written.
    pub(crate) fn run_apply(&mut self, plan: &ApplyPlan) {
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
        let content = match &self.target.messages[&id].entries[entry] {
            Entry::Zeroes => None,
            Entry::Bytes(bytes) => Some(bytes.clone()),
            Entry::Kept => return self.end_apply(token),
            Entry::Fetching(_) => return self.fail(format!("{id:?} is not fetched yet")),
        };
        if plan.write.is_empty() {
            return self.end_apply(token);
        }
        let base = plan.range.bytes(size).start;
        for run in &plan.write {
            let bytes = run.bytes(size);
            let io = match &content {
                None => Io::Zero(bytes),
                Some(content) => {
                    let part = index(bytes.start - base)..index(bytes.end - base);
                    Io::Write(bytes.start, content.slice(part))
                }
            };
            self.submit(Site::Target, io, Purpose::Apply { id, token });
        }
    }

    pub(crate) fn apply_io_done(&mut self, id: ApplyId, token: ApplyToken, result: Done) {
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
        if !apply.failed
            && let Some(message) = self.target.messages.get(&apply.id)
            && let Entry::Bytes(bytes) = &message.entries[apply.entry]
        {
            let range = message.blocks.entries[apply.entry].range;
            self.target.finder.arrived(range, bytes);
        }
        self.pump(Site::Target);
        if let Some(message) = self.target.messages.get_mut(&apply.id) {
            message.left -= 1;
        }
        self.consider_applied(apply.id);
    }

    /// Tells the machine of a message when all of its entries have come to an end.
    fn consider_applied(&mut self, id: ApplyId) {
        let messages = &mut self.target.messages;
        if messages.get(&id).is_none_or(|message| message.left > 0) {
            return;
        }
        let Some(message) = messages.remove(&id) else {
            return;
        };
        if message.is_lacking {
            self.cover("lacking at the target");
            self.resend.lacking(message.blocks.seq);
            return self.target_input(move |machine, now| machine.handle_lacking(now, id));
        }
        let result = message.error.map_or(Ok(()), Err);
        self.target_input(move |machine, now| machine.handle_applied(now, id, result));
    }
}
