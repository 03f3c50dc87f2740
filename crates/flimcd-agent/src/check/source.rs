//! A check at the source: asks for hashes, compares them with the copy that stayed, and looks closer where they differ.
//!
//! ```text
//!  16 MiB, one hash ──differs──► its chunks ──differs──► their blocks ──differs──► named
//! ```
//! Some questions are under way at a time, so that both sides read at once. A link that breaks makes it wait and go on where it was.

use flimcd_content::Fingerprint;
use flimcd_core::{BLOCKS_PER_CHUNK, BlockRange, MigrationId};
use flimcd_volume::Standing;
use flimcd_wire::{CheckAsk, CheckOpen, CheckPart, Class, Frame, MAX_CHECK_BLOCKS, Message};
use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;

use super::{
    hash::{Pieces, hash, within},
    is_copy_of, unless_stopped,
};
use crate::{
    agent::Agent,
    api::{CheckStatus, DifferentBlocks},
    hosting::Hosted,
    links::{Inbox, LinkInput, PeerLink},
};

/// Questions that are under way.
const WINDOW: usize = 4;
/// How long the target may take for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(300);
/// While there is no link, so often the copy is looked at, which may be gone.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Runs of different blocks that are named.
const NAMED_MAX: usize = 64;
/// Answers between two looks of the status at where it stands.
const REPORT_EVERY: u32 = 16;

/// See the module.
pub(super) struct Checker {
    pub(super) agent: Arc<Agent>,
    pub(super) link: Arc<PeerLink>,
    pub(super) inbox: Inbox,
    pub(super) session: MigrationId,
    pub(super) migration: MigrationId,
    pub(super) copies: Vec<Arc<Hosted>>,
    pub(super) stop: watch::Receiver<bool>,
    pub(super) status: CheckStatus,
}

/// Why it does not go on for now.
enum Pause {
    /// The link broke.
    Link,
    /// The agent stops.
    Stop,
    /// For good.
    End(String),
}

/// What is asked, in order.
struct Questions {
    /// Asked and not answered.
    open: VecDeque<CheckAsk>,
    /// To be asked before anything new.
    todo: VecDeque<CheckAsk>,
    /// Where the part that was never asked about begins: volume and block.
    next: (usize, u64),
    answered: u32,
}

impl Questions {
    fn next(&mut self, copies: &[Arc<Hosted>]) -> Option<CheckAsk> {
        if let Some(ask) = self.todo.pop_front() {
            return Some(ask);
        }
        loop {
            let (index, start) = self.next;
            let blocks = copies.get(index)?.volume().size().blocks();
            if start >= blocks {
                self.next = (index + 1, 0);
                continue;
            }
            let range = BlockRange::new(start, blocks.min(start + MAX_CHECK_BLOCKS));
            self.next = (index, range.end);
            return Some(CheckAsk {
                volume: u32::try_from(index).unwrap_or(u32::MAX),
                range,
                piece_blocks: range.len(),
            });
        }
    }

    /// What was not answered is asked again.
    fn again(&mut self) {
        while let Some(ask) = self.open.pop_back() {
            self.todo.push_front(ask);
        }
    }
}

impl Checker {
    /// Compares all of it. The status says what was found, also with an error. `None` when the agent stops before the end.
    pub(super) async fn run(&mut self) -> Option<Result<(), String>> {
        let mut questions = Questions {
            open: VecDeque::new(),
            todo: VecDeque::new(),
            next: (0, 0),
            answered: 0,
        };
        loop {
            let asked = match self.wait_for_link().await {
                Ok(()) => self.ask(&mut questions).await,
                Err(pause) => Err(pause),
            };
            match asked {
                Ok(()) => return Some(Ok(())),
                Err(Pause::Link) => questions.again(),
                Err(Pause::Stop) => return None,
                Err(Pause::End(why)) => return Some(Err(why)),
            }
        }
    }

    async fn wait_for_link(&mut self) -> Result<(), Pause> {
        loop {
            self.see_copies().map_err(Pause::End)?;
            let input = tokio::time::timeout(LOOK_EVERY, self.inbox.recv());
            match unless_stopped(&mut self.stop, input).await {
                Some(Ok(Some(LinkInput::Up(_)))) => return Ok(()),
                Some(Ok(Some(LinkInput::Down | LinkInput::Message(..))) | Err(_)) => {}
                Some(Ok(None)) | None => return Err(Pause::Stop),
            }
        }
    }

    /// Whether the copies still are what the migration left.
    fn see_copies(&self) -> Result<(), String> {
        let gone = |hosted: &&Arc<Hosted>| {
            let stands = self.agent.hosting.by_id(hosted.volume().id());
            stands.is_none() || !is_copy_of(hosted, self.migration)
        };
        match self.copies.iter().find(gone) {
            None => Ok(()),
            Some(hosted) => Err(format!(
                "the copy of {} was dropped, or comes back",
                hosted.name()
            )),
        }
    }

    async fn say(&mut self, class: Class, message: Message) -> Result<(), Pause> {
        let frame = Frame {
            migration: self.session,
            class,
            message,
        };
        let sent = unless_stopped(&mut self.stop, self.link.handle().send(frame)).await;
        sent.ok_or(Pause::Stop)?.map_err(|_| Pause::Link)
    }

    async fn next(&mut self) -> Result<Message, Pause> {
        let input = tokio::time::timeout(ANSWER_MAX, self.inbox.recv());
        let input = unless_stopped(&mut self.stop, input).await;
        match input.ok_or(Pause::Stop)? {
            Ok(Some(LinkInput::Message(Message::Failed(error), _))) => Err(Pause::End(format!(
                "site {} says: {}",
                self.link.peer(),
                error.text
            ))),
            Ok(Some(LinkInput::Message(message, _))) => Ok(message),
            Ok(Some(LinkInput::Up(_) | LinkInput::Down)) => Err(Pause::Link),
            Ok(None) => Err(Pause::Stop),
            Err(_) => Err(Pause::End(format!(
                "site {} has not answered for {} s; see its agent's log",
                self.link.peer(),
                ANSWER_MAX.as_secs()
            ))),
        }
    }

    /// Over one life of the link.
    async fn ask(&mut self, questions: &mut Questions) -> Result<(), Pause> {
        let open = CheckOpen {
            migration: self.migration,
            volumes: (self.copies.iter())
                .map(|copy| copy.volume().id())
                .collect(),
        };
        self.say(Class::Control, Message::CheckOpen(open)).await?;
        let Message::CheckReady = self.next().await? else {
            return Err(self.confused());
        };
        loop {
            while questions.open.len() < WINDOW
                && let Some(ask) = questions.next(&self.copies)
            {
                questions.open.push_back(ask);
                self.say(Class::Bulk, Message::CheckAsk(ask)).await?;
            }
            let Some(&asked) = questions.open.front() else {
                return Ok(());
            };
            let part = match self.next().await? {
                Message::CheckPart(part) if part.ask == asked => part,
                _ => return Err(self.confused()),
            };
            self.compare(questions, &part).await?;
            questions.open.pop_front();
            questions.answered += 1;
            if questions.answered.is_multiple_of(REPORT_EVERY) {
                self.agent.note_check(self.migration, self.status.clone());
            }
        }
    }

    fn confused(&self) -> Pause {
        Pause::End(format!(
            "site {} answers something else than was asked; are both agents of the same version?",
            self.link.peer()
        ))
    }

    async fn compare(&mut self, questions: &mut Questions, part: &CheckPart) -> Result<(), Pause> {
        let ask = part.ask;
        let index = usize::try_from(ask.volume).unwrap_or(usize::MAX);
        let Some(hosted) = self.copies.get(index).cloned() else {
            return Err(self.confused());
        };
        let written: Vec<_> = part.written.iter().collect();
        let begun = Instant::now();
        let read = {
            let (hosted, written) = (hosted.clone(), written.clone());
            tokio::task::spawn_blocking(move || {
                hash(hosted.volume(), ask, |range| {
                    Ok(Some(within(&written, range)))
                })
            })
        };
        let pieces = match read.await {
            Ok(Ok(Some(pieces))) => pieces,
            Ok(Err(error)) => {
                let why = format!("reading the copy of {} here failed: {error}", hosted.name());
                return Err(Pause::End(why));
            }
            Ok(Ok(None)) | Err(_) => return Err(Pause::End("the agent failed".to_owned())),
        };
        let took = begun.elapsed();
        // What was read may not be the copy any more if it began to come back meanwhile.
        self.see_copies().map_err(Pause::End)?;
        if is_top(ask) {
            self.status.blocks_written += written.iter().map(|run| run.len()).sum::<u64>();
        }
        self.judge(questions, &hosted, part, &pieces, &written);
        let rested = unless_stopped(&mut self.stop, tokio::time::sleep(took)).await;
        rested.ok_or(Pause::Stop)
    }

    /// Counts what is equal, and asks closer about what is not.
    fn judge(
        &mut self,
        questions: &mut Questions,
        hosted: &Hosted,
        part: &CheckPart,
        pieces: &Pieces,
        written: &[BlockRange],
    ) {
        let ask = part.ask;
        let mut any = false;
        for (number, (theirs, ours)) in (0..).zip(part.hashes().zip(&pieces.hashes)) {
            let start = ask.range.start + number * ask.piece_blocks;
            let piece = BlockRange::new(start, ask.range.end.min(start + ask.piece_blocks));
            if Fingerprint::from_bytes(theirs) == *ours {
                let left_out: u64 = within(written, piece).iter().map(|run| run.len()).sum();
                self.status.blocks_equal += piece.len() - left_out;
                continue;
            }
            any = true;
            let finer = match piece.len() {
                1 => None,
                blocks if blocks <= BLOCKS_PER_CHUNK => Some(1),
                _ => Some(BLOCKS_PER_CHUNK),
            };
            match finer {
                Some(piece_blocks) => questions.todo.push_back(CheckAsk {
                    volume: ask.volume,
                    range: piece,
                    piece_blocks,
                }),
                None => self.name(hosted, piece),
            }
        }
        // Its hash differed before, and the guest has written over what differed since.
        if !any && !is_top(ask) {
            self.name(hosted, ask.range);
        }
    }

    fn name(&mut self, hosted: &Hosted, blocks: BlockRange) {
        if self.status.blocks_different == 0
            && !matches!(hosted.volume().standing(), Some(Standing::Untouched(_)))
        {
            tracing::warn!(
                volume = %hosted.name(),
                "something has touched the image of the copy here since it moved away, so that a difference may be of that"
            );
        }
        self.status.blocks_different += blocks.len();
        let different = &mut self.status.different;
        if let Some(last) = different.last_mut()
            && last.volume == *hosted.name()
            && last.first + last.blocks == blocks.start
        {
            last.blocks += blocks.len();
        } else if different.len() < NAMED_MAX {
            different.push(DifferentBlocks {
                volume: hosted.name().clone(),
                first: blocks.start,
                blocks: blocks.len(),
            });
        }
    }
}

/// Whether a question is the first about its blocks.
fn is_top(ask: CheckAsk) -> bool {
    ask.piece_blocks == ask.range.len()
}
