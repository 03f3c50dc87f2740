//! Reads before the switch, on their way between the drivers: see `flimcd_volume::rules`.
//!
//! They go beside the machines, which know nothing of them: a question changes nothing on either side. Numbers on the wire
//! are the asking driver's; a question is asked anew, under a new number, after every link-up, and the answering
//! driver drops what it has read for an earlier link.

use bytes::Bytes;
use flimcd_core::BlockRange;
use flimcd_wire::{Class, Message};
use std::collections::{HashMap, VecDeque};

use super::volumes::{PeekId, VolumeSet};

/// Questions under way at once, of all volumes of a migration: 16 MiB of answers.
const ASKED_MAX: usize = 16;

/// The target's part.
#[derive(Default)]
pub(crate) struct Asking {
    last: u64,
    /// What the source has been asked, or will be.
    open: HashMap<u64, PeekId>,
    unsent: VecDeque<Message>,
}

impl Asking {
    /// Takes the volumes' questions.
    pub(crate) fn take(&mut self, volumes: &VolumeSet) {
        while self.open.len() < ASKED_MAX
            && let Some((id, range)) = volumes.poll_peek()
        {
            self.last += 1;
            let number = self.last;
            self.open.insert(number, id);
            self.unsent.push_back(Message::Peek { number, range });
        }
    }

    /// The link is up: what an earlier one carried is lost.
    pub(crate) fn handle_link_up(&mut self, volumes: &VolumeSet) {
        self.open.clear();
        self.unsent.clear();
        volumes.requeue_peeks();
        self.take(volumes);
    }

    /// An answer; nothing happens when it is not waited for.
    pub(crate) fn handle_peeked(&mut self, volumes: &VolumeSet, number: u64, payload: &Bytes) {
        if let Some(id) = self.open.remove(&number) {
            volumes.answer_peek(id, (!payload.is_empty()).then_some(payload));
            self.take(volumes);
        }
    }

    /// What to send next.
    pub(crate) fn poll(&mut self, has_room: &dyn Fn(Class) -> bool) -> Option<(Class, Message)> {
        poll(&mut self.unsent, has_room)
    }
}

/// The source's part.
#[derive(Default)]
pub(crate) struct Answering {
    /// Counts link-ups.
    link: u64,
    /// Questions whose blocks are being read.
    reading: usize,
    unsent: VecDeque<Message>,
}

/// A question that may be read for: with the result it goes to [`Answering::handle_read`].
pub(crate) struct Question {
    pub(crate) number: u64,
    pub(crate) range: BlockRange,
    link: u64,
}

impl Answering {
    /// The link is up: nobody waits for what was asked before.
    pub(crate) fn handle_link_up(&mut self) {
        self.link += 1;
        self.unsent.clear();
    }

    /// The target asks; `None` when it has asked for more than it may. A target that keeps to its own limit
    /// never does.
    pub(crate) fn handle_peek(&mut self, number: u64, range: BlockRange) -> Option<Question> {
        if self.reading + self.unsent.len() >= 2 * ASKED_MAX {
            return None;
        }
        self.reading += 1;
        let link = self.link;
        Some(Question {
            number,
            range,
            link,
        })
    }

    /// The blocks were read; `None` if they could not be.
    pub(crate) fn handle_read(&mut self, question: &Question, bytes: Option<Bytes>) {
        self.reading -= 1;
        if question.link == self.link {
            self.unsent.push_back(Message::Peeked {
                number: question.number,
                payload: bytes.unwrap_or_default(),
            });
        }
    }

    /// What to send next.
    pub(crate) fn poll(&mut self, has_room: &dyn Fn(Class) -> bool) -> Option<(Class, Message)> {
        poll(&mut self.unsent, has_room)
    }
}

fn poll(
    unsent: &mut VecDeque<Message>,
    has_room: &dyn Fn(Class) -> bool,
) -> Option<(Class, Message)> {
    if unsent.is_empty() || !has_room(Class::Fault) {
        return None;
    }
    Some((Class::Fault, unsent.pop_front()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flimcd_core::BLOCK_SIZE;
    use flimcd_volume::{
        GuestPort, GuestReply, GuestRequest, RequestKind, Volume,
        device::{FileDevice, IoBuf, OpenOptions},
        rules::Mode,
    };
    use std::{path::Path, sync::Arc};

    /// Sizes of two disks, the first of which ends within a block.
    const SIZES: [u64; 2] = [40 * BLOCK_SIZE + 512, 700 * BLOCK_SIZE];

    fn byte(volume: usize, at: u64) -> u8 {
        let mixed = (at / 512 + volume as u64 * 77).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed.to_be_bytes()[0]
    }

    /// Volumes at the source, or empty ones at the target.
    fn volumes(dir: &Path, mode: Mode) -> Arc<VolumeSet> {
        let volumes = SIZES.iter().enumerate().map(|(index, &size)| {
            let path = dir.join(format!("{mode:?}-{index}"));
            let content: Vec<u8> = (0..size).map(|at| byte(index, at)).collect();
            match mode {
                Mode::Owner => std::fs::write(&path, content).unwrap(),
                _ => std::fs::File::create(&path)
                    .and_then(|file| file.set_len(size))
                    .unwrap(),
            }
            let device = FileDevice::open(path, &OpenOptions::default()).unwrap();
            let name = format!("disk{index}").parse().unwrap();
            Volume::ephemeral(name, Arc::new(device), mode)
        });
        VolumeSet::new(volumes.collect()).unwrap()
    }

    /// Both parts of a migration, and what is on the link between them.
    struct Pair {
        source: Arc<VolumeSet>,
        target: Arc<VolumeSet>,
        asking: Asking,
        answering: Answering,
        /// Questions whose blocks are being read.
        reading: Vec<Question>,
    }

    impl Pair {
        fn new(dir: &Path) -> Self {
            let pair = Self {
                source: volumes(dir, Mode::Owner),
                target: volumes(dir, Mode::Incoming),
                asking: Asking::default(),
                answering: Answering::default(),
                reading: Vec::new(),
            };
            pair.target.set_peeking(true);
            pair
        }

        fn ask(&mut self) {
            self.asking.take(&self.target);
            while let Some((class, message)) = self.asking.poll(&|_| true) {
                assert_eq!(class, Class::Fault);
                let Message::Peek { number, range } = message else {
                    panic!("{message:?}");
                };
                let question = self.answering.handle_peek(number, range);
                self.reading.push(question.unwrap());
            }
        }

        fn read(&mut self) {
            for question in std::mem::take(&mut self.reading) {
                let bytes = self.source.peek(question.range).ok().map(Bytes::from);
                self.answering.handle_read(&question, bytes);
            }
        }

        fn answer(&mut self) {
            while let Some((_, message)) = self.answering.poll(&|_| true) {
                let Message::Peeked { number, payload } = message else {
                    panic!("{message:?}");
                };
                self.asking.handle_peeked(&self.target, number, &payload);
            }
        }

        fn break_link(&mut self) {
            self.answering.handle_link_up();
            self.asking.handle_link_up(&self.target);
        }

        fn port(&self, volume: usize, offset: u64, length: usize) -> GuestPort {
            let mut port = self.target.all()[volume].guest_port().unwrap();
            port.submit(GuestRequest {
                id: 1,
                kind: RequestKind::Read,
                offset,
                length: length as u64,
                fua: false,
                buf: IoBuf::zeroed(length),
            });
            port.kick().unwrap();
            port
        }
    }

    fn replies(port: &mut GuestPort) -> Vec<GuestReply> {
        let mut out = Vec::new();
        port.poll(&mut out).unwrap();
        out
    }

    fn check(port: &mut GuestPort, volume: usize, offset: u64) {
        let reply = replies(port).pop().unwrap();
        reply.result.unwrap();
        let expected = (offset..).map(|at| byte(volume, at));
        assert!(reply.buf.iter().copied().eq(expected.take(reply.buf.len())));
    }

    #[test]
    fn reads_of_several_disks_get_what_the_source_has_also_over_a_broken_link() {
        let dir = tempfile::tempdir().unwrap();
        let mut pair = Pair::new(dir.path());
        let end = 40 * BLOCK_SIZE - 100;
        let mut short = pair.port(0, end, 612);
        let mut long = pair.port(1, 5000, 600 * 4096);
        pair.ask();
        // Questions are lost, answers are lost, and answers are read for a link that is gone.
        pair.reading.clear();
        pair.answering = Answering::default();
        pair.break_link();
        pair.ask();
        pair.read();
        pair.break_link();
        pair.ask();
        let stale = std::mem::take(&mut pair.reading);
        pair.break_link();
        for question in stale {
            pair.answering.handle_read(&question, Some(Bytes::new()));
        }
        pair.answer();
        assert!(replies(&mut short).is_empty() && replies(&mut long).is_empty());
        pair.ask();
        pair.read();
        pair.answer();
        check(&mut short, 0, end);
        check(&mut long, 1, 5000);
        assert!(pair.asking.open.is_empty() && pair.answering.reading == 0);
    }

    #[test]
    fn many_reads_are_asked_for_a_few_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut pair = Pair::new(dir.path());
        let mut ports: Vec<_> = (0..60)
            .map(|at| {
                let volume = usize::from(at % 3 == 0);
                (volume, at * 512, pair.port(volume, at * 512, 700))
            })
            .collect();
        for _ in 0..60 {
            pair.ask();
            assert!(pair.reading.len() <= ASKED_MAX);
            pair.read();
            pair.answer();
        }
        for (volume, offset, port) in &mut ports {
            check(port, *volume, *offset);
        }
    }

    #[test]
    fn a_target_that_asks_for_too_much_or_for_nothing_is_harmless() {
        let dir = tempfile::tempdir().unwrap();
        let mut pair = Pair::new(dir.path());
        let between = pair.source.layout().blocks_of(0).end;
        let range = BlockRange::new(between, between + 1);
        let mut taken = 0;
        while let Some(question) = pair.answering.handle_peek(1, range) {
            pair.reading.push(question);
            taken += 1;
        }
        assert_eq!(taken, 2 * ASKED_MAX);
        pair.read();
        assert!(pair.answering.handle_peek(1, range).is_none(), "unsent");
        let answer = pair.answering.poll(&|_| true);
        let (number, payload) = (1, Bytes::new());
        let expected = Message::Peeked { number, payload };
        assert_eq!(answer, Some((Class::Fault, expected)));
    }
}
