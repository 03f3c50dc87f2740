//! Makes a plan: reads what would move, asks the target what of it there is, and measures the rest.
//!
//! ```text
//!  pieces ─► read, look ─┬─ zero, or as the target's table says ──────────────┐
//!                        └─ Probe ─► target ─► Probed ─► seen before here? ───┴─► pack, count
//! ```
//! The guest comes first: while guests do anything, reading rests three times as long after each piece as that took, so that it has a
//! quarter of the disk's time at most; probes have the link's lowest priority. Content is read beside the guest's path and
//! marks nothing.

use flimcd_content::{Compression, Effort, Encoder, Examined, Recent};
use flimcd_core::{BLOCK_SIZE, BLOCKS_PER_CHUNK, BlockIndex, BlockRange, MigrationId, Seq};
use flimcd_migrate::ContentCount;
use flimcd_wire::{
    BlockPrefix, Blocks, Body, ChunkPrefix, Class, Frame, Message, PlanOpen, Probed, Runs,
    SampleChunk, SeedTable,
};
use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::watch, task::JoinSet};

use super::{
    figures::{Figures, Guests, Summary, summarise},
    lacking::{self, Lacking},
    pieces::{Pieces, Todo},
};
use crate::{
    api::{PlanPhase, PlanRequest, PlanStatus},
    links::{Inbox, LinkInput, PeerLink},
    migration::{progress::add_content, volumes::VolumeSet},
};

/// How long a link that is being dialled may take.
const LINK_MAX: Duration = Duration::from_secs(10);
/// How long the target may take to say anything that it owes.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// Pieces that are kept while the target looks for them: 16 MiB, or four times that where much is the same.
const WINDOW: usize = 64;
/// While guests are active, reading rests so many times as long as it took.
const REST: u32 = 3;
/// One piece in so many is packed as if the target had nothing.
const PACKED_WHOLE: u64 = 8;
/// What is sent can be found again at the target only when it has arrived: so many blocks later.
const RECENT_AFTER: u64 = 512;
/// Beside its frame a message costs so many bytes: TLS and acknowledgements.
const MESSAGE_OVERHEAD: u64 = 48;
/// How long the guest is watched if nothing else is said.
const WATCH_S: u32 = 3;

/// See the module.
pub(super) struct Maker {
    pub(super) volumes: Arc<VolumeSet>,
    pub(super) link: Arc<PeerLink>,
    pub(super) inbox: Inbox,
    pub(super) id: MigrationId,
    pub(super) request: PlanRequest,
    pub(super) status: watch::Sender<PlanStatus>,
}

/// What the target has at the same place.
struct Seed {
    table: SeedTable,
    /// What asking for it takes on the link.
    bytes: u64,
}

/// A piece that was read.
struct Looked {
    seq: Seq,
    content: Vec<u8>,
    examined: Examined,
    took: Duration,
}

/// A piece that is understood.
struct Packed {
    blocks: u64,
    is_same: bool,
    count: ContentCount,
    link_bytes: u64,
    /// Bytes that are not zero, and what they come to packed, of some pieces.
    whole: Option<(u64, u64)>,
    encoder: Encoder,
}

enum Step {
    Looked(io::Result<Looked>),
    Packed(Packed),
}

/// What is under way while volumes are compared.
struct Compare {
    pieces: Pieces,
    seed: Option<Arc<SeedTable>>,
    next_seq: Seq,
    /// Waits for the target's answer.
    asked: HashMap<Seq, Looked>,
    to_pack: VecDeque<(Looked, Option<Probed>)>,
    encoder: Option<Encoder>,
    recent: Recent,
    /// On their way, and not yet in `recent`.
    late: VecDeque<(BlockPrefix, BlockIndex)>,
    jobs: JoinSet<Step>,
    is_reading: bool,
    read_after: tokio::time::Instant,
    has_all: bool,
    activity: u64,
    figures: Figures,
}

impl Maker {
    /// Makes the plan; an error says why there is none.
    pub(super) async fn run(&mut self) -> Result<(), String> {
        let guests = Guests::watch(&self.volumes);
        self.connect().await?;
        let (volumes, peer) = (self.volumes.clone(), self.request.to.clone());
        let lacking = blocking(move || Lacking::of(&volumes, &peer)).await?;
        let open = PlanOpen {
            volumes: lacking.offers(&self.volumes),
        };
        self.send(Class::Control, Message::PlanOpen(open)).await?;
        let Message::Planned(planned) = self.next(true).await? else {
            return Err(self.confused());
        };
        let base = lacking::base(&planned.bases);
        let set = lacking.on(&self.volumes, &planned.bases);
        let volumes = self.volumes.clone();
        let (sample, set) = blocking(move || Ok((volumes.sample(&set), set))).await?;
        let places = self.volumes.layout().all_blocks().collect();
        let todo = Todo::new(set, places);
        let seed = self.ask_seed(sample).await?;
        let seed_bytes = seed.as_ref().map_or(0, |seed| seed.bytes);
        let blocks = todo.blocks();
        self.status.send_modify(|status| {
            status.phase = PlanPhase::Comparing;
            status.base = base;
            status.bytes_to_move = (blocks * BLOCK_SIZE).min(status.bytes_total);
            status.bytes_to_read = status.bytes_to_move;
        });
        let (pieces, all_pieces) = self.pieces(todo).await?;
        let figures = self.compare(pieces, seed).await?;
        self.status
            .send_modify(|status| status.phase = PlanPhase::Watching);
        let watch = self.request.watch_s.unwrap_or(WATCH_S);
        tokio::time::sleep(guests.still_to_watch(Duration::from_secs(watch.into()))).await;
        let estimate = self.link.handle().estimate();
        let summary = Summary {
            figures,
            blocks,
            all_pieces,
            seed_bytes,
            guest: guests.activity(&self.volumes),
            measured: estimate.rate_bytes_per_sec,
            rtt: estimate.rtt_min,
        };
        self.status.send_modify(|status| {
            summarise(status, &self.request, &summary);
        });
        Ok(())
    }

    /// Waits until the link is up.
    async fn connect(&mut self) -> Result<(), String> {
        let up = async {
            while let Some(input) = self.inbox.recv().await {
                if let LinkInput::Up(_) = input {
                    return;
                }
            }
        };
        if tokio::time::timeout(LINK_MAX, up).await.is_ok() {
            return Ok(());
        }
        let why = self.link.handle().last_error();
        let why = why.map_or_else(String::new, |error| format!(": {error}"));
        Err(format!(
            "the link to {} is not up{why}; `flimcd status` shows when it is",
            self.request.to
        ))
    }

    async fn send(&self, class: Class, message: Message) -> Result<(), String> {
        let sent = self.link.handle().send(self.frame(class, message)).await;
        sent.map_err(|_| self.broken())
    }

    fn frame(&self, class: Class, message: Message) -> Frame {
        Frame {
            migration: self.id,
            class,
            message,
        }
    }

    fn broken(&self) -> String {
        format!(
            "the link to {} broke; plan again when it is up",
            self.request.to
        )
    }

    fn confused(&self) -> String {
        format!(
            "site {} answers something else than was asked; are both agents of the same version?",
            self.request.to
        )
    }

    /// What the target says next. It may take its time only if it `owes` nothing.
    async fn next(&mut self, owes: bool) -> Result<Message, String> {
        loop {
            let input = if owes {
                let input = tokio::time::timeout(ANSWER_MAX, self.inbox.recv()).await;
                input.map_err(|_| {
                    let seconds = ANSWER_MAX.as_secs();
                    let to = &self.request.to;
                    format!("site {to} has not answered for {seconds} s; see its agent's log")
                })?
            } else {
                self.inbox.recv().await
            };
            match input {
                Some(LinkInput::Up(_)) => {}
                Some(LinkInput::Down) | None => return Err(self.broken()),
                Some(LinkInput::Message(Message::Failed(error), _)) => {
                    return Err(format!("site {} refuses: {}", self.request.to, error.text));
                }
                Some(LinkInput::Message(message, _)) => return Ok(message),
            }
        }
    }

    /// Asks what the target has at the same place.
    async fn ask_seed(&mut self, sample: Vec<SampleChunk>) -> Result<Option<Seed>, String> {
        if sample.is_empty() {
            return Ok(None);
        }
        let ask = Message::SeedAsk { sample, have: None };
        let mut bytes = frame_bytes(self.frame(Class::Control, ask.clone()));
        self.send(Class::Control, ask).await?;
        let Message::SeedOffer(offer) = self.next(true).await? else {
            return Err(self.confused());
        };
        let Some(offer) = offer else {
            return Ok(None);
        };
        let mut table = SeedTable::new(self.volumes.layout().size().chunks());
        for _ in 0..offer.parts {
            let Message::SeedPart(part) = self.next(true).await? else {
                return Err(self.confused());
            };
            if part.id != offer.id || !table.add(&part) {
                return Err(self.confused());
            }
            bytes += frame_bytes(self.frame(Class::Control, Message::SeedPart(part)));
        }
        self.status
            .send_modify(|status| status.library_image = Some(offer.name));
        Ok(Some(Seed { table, bytes }))
    }

    /// All pieces or a sample of them, and how many there are if it is one.
    async fn pieces(&self, todo: Todo) -> Result<(Pieces, Option<u64>), String> {
        let Some(count) = self.request.sample else {
            return Ok((Pieces::All(todo), None));
        };
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let drawn = blocking(move || Ok(Pieces::sample(todo, count)));
        let (pieces, all) = drawn.await?;
        let bytes = pieces.sampled_blocks() * BLOCK_SIZE;
        self.status.send_modify(|status| {
            status.bytes_to_read = bytes.min(status.bytes_to_move);
        });
        Ok((pieces, Some(all)))
    }

    /// Looks at all pieces.
    async fn compare(&mut self, pieces: Pieces, seed: Option<Seed>) -> Result<Figures, String> {
        let rate = self.request.bandwidth_bytes_per_sec;
        let rate = rate.or(self.link.handle().estimate().rate_bytes_per_sec);
        let mut state = Compare {
            pieces,
            seed: seed.map(|seed| Arc::new(seed.table)),
            next_seq: Seq(0),
            asked: HashMap::new(),
            to_pack: VecDeque::new(),
            encoder: Some(Encoder::new(match Effort::for_rate(rate) {
                Effort::Thorough => Compression::THOROUGH,
                Effort::Fast | Effort::Small => Compression::DEFAULT,
            })),
            recent: Recent::new(),
            late: VecDeque::new(),
            jobs: JoinSet::new(),
            is_reading: false,
            read_after: tokio::time::Instant::now(),
            has_all: false,
            activity: Guests::requests(&self.volumes),
            figures: Figures::new(self.request.sample.is_some()),
        };
        loop {
            state.start_jobs(self);
            if state.is_done() {
                return Ok(state.figures);
            }
            let owes = !state.asked.is_empty();
            let rests = state.wants_read();
            tokio::select! {
                Some(step) = state.jobs.join_next() => {
                    match step.map_err(|error| format!("the agent failed: {error}"))? {
                        Step::Looked(looked) => self.looked(&mut state, looked).await?,
                        Step::Packed(packed) => self.packed(&mut state, packed),
                    }
                }
                message = self.next(owes) => {
                    let Message::Probed(probed) = message? else {
                        return Err(self.confused());
                    };
                    let looked = state.asked.remove(&probed.seq);
                    let looked = looked.ok_or_else(|| self.confused())?;
                    let probed = state.also_repeated(&looked, &probed);
                    state.to_pack.push_back((looked, Some(probed)));
                }
                () = tokio::time::sleep_until(state.read_after), if rests => {}
            }
        }
    }

    /// A piece was read: what the target may have of it is asked.
    async fn looked(&self, state: &mut Compare, looked: io::Result<Looked>) -> Result<(), String> {
        state.is_reading = false;
        let looked = looked.map_err(|error| format!("reading the volume failed: {error}"))?;
        let activity = Guests::requests(&self.volumes);
        if activity != state.activity {
            state.activity = activity;
            state.read_after = tokio::time::Instant::now() + looked.took * REST;
        }
        let read = looked.content.len() as u64;
        self.status.send_modify(|status| status.bytes_read += read);
        if looked.examined.needs_probe() {
            let probe = Message::Probe(looked.examined.probe(looked.seq));
            state.asked.insert(looked.seq, looked);
            return self.send(Class::Bulk, probe).await;
        }
        state.to_pack.push_back((looked, None));
        Ok(())
    }

    fn packed(&self, state: &mut Compare, packed: Packed) {
        state.pieces.adapt(packed.is_same);
        state.encoder = Some(packed.encoder);
        let count = packed.count;
        state
            .figures
            .add(packed.blocks, count, packed.link_bytes, packed.whole);
        self.status.send_modify(|status| {
            status.content = add_content(status.content, count);
            status.bytes_on_link += packed.link_bytes;
        });
    }
}

impl Compare {
    fn is_done(&self) -> bool {
        self.has_all && self.asked.is_empty() && self.to_pack.is_empty() && self.jobs.is_empty()
    }

    fn wants_read(&self) -> bool {
        !self.has_all && !self.is_reading && self.asked.len() + self.to_pack.len() < WINDOW
    }

    /// Reads the next piece and packs another one, one of each at a time.
    fn start_jobs(&mut self, maker: &Maker) {
        if self.wants_read() && self.read_after <= tokio::time::Instant::now() {
            match self.pieces.next() {
                None => self.has_all = true,
                Some(range) => {
                    let seq = self.next_seq;
                    self.next_seq = Seq(seq.0 + 1);
                    self.is_reading = true;
                    let (volumes, seed) = (maker.volumes.clone(), self.seed.clone());
                    self.jobs.spawn_blocking(move || {
                        Step::Looked(look(&volumes, seed.as_deref(), seq, range))
                    });
                }
            }
        }
        if !self.to_pack.is_empty()
            && let Some(encoder) = self.encoder.take()
            && let Some((looked, probed)) = self.to_pack.pop_front()
        {
            let id = maker.id;
            self.jobs
                .spawn_blocking(move || Step::Packed(pack(id, encoder, &looked, probed.as_ref())));
        }
    }

    /// Adds to what the target has what will have come there by then.
    fn also_repeated(&mut self, looked: &Looked, probed: &Probed) -> Probed {
        let probe = looked.examined.probe(looked.seq);
        let had: Vec<BlockRange> = probed.had.iter().collect();
        let is_had = |block: BlockIndex| had.iter().any(|run| run.contains(block));
        let (mut all, mut repeated) = (Vec::new(), 0);
        let blocks = probe.blocks.iter().flat_map(BlockRange::iter);
        for (block, prefix) in blocks.zip(probe.prefixes()) {
            if is_had(block) {
                all.push(block.0);
            } else if self.recent.get(prefix).is_some() {
                all.push(block.0);
                repeated += 1;
            } else {
                self.late.push_back((prefix, block));
            }
        }
        let here = looked.examined.range().start;
        while let Some((prefix, block)) = self
            .late
            .pop_front_if(|(_, block)| block.0 + RECENT_AFTER <= here)
        {
            self.recent.insert(prefix, block);
        }
        Probed {
            seq: probed.seq,
            had: runs(all),
            same_place: probed.same_place,
            repeated: probed.repeated + repeated,
        }
    }
}

/// Reads a piece and looks at it.
fn look(
    volumes: &VolumeSet,
    seed: Option<&SeedTable>,
    seq: Seq,
    range: BlockRange,
) -> io::Result<Looked> {
    let begun = Instant::now();
    let content = volumes.peek(range)?;
    let took = begun.elapsed();
    let examined = Examined::of(range, &content, &same_in(seed, range));
    Ok(Looked {
        seq,
        content,
        examined,
        took,
    })
}

/// What the target has in each chunk of `range`, if that is whole chunks.
fn same_in(seed: Option<&SeedTable>, range: BlockRange) -> Vec<Option<ChunkPrefix>> {
    let is_whole =
        range.start.is_multiple_of(BLOCKS_PER_CHUNK) && range.end.is_multiple_of(BLOCKS_PER_CHUNK);
    let Some(seed) = seed.filter(|_| is_whole) else {
        return Vec::new();
    };
    (range.start / BLOCKS_PER_CHUNK..range.end / BLOCKS_PER_CHUNK)
        .map(|chunk| seed.get(flimcd_core::ChunkIndex(chunk)))
        .collect()
}

/// Packs a piece as a migration would, and counts.
fn pack(id: MigrationId, mut encoder: Encoder, looked: &Looked, probed: Option<&Probed>) -> Packed {
    let bytes_of = |message| {
        frame_bytes(Frame {
            migration: id,
            class: Class::Bulk,
            message,
        })
    };
    let mut count = ContentCount::default();
    let mut link_bytes = 0;
    let none = Runs::default();
    let had = probed.map_or(&none, |probed| &probed.had);
    let encoded = encoder.pack(&looked.content, &looked.examined, had);
    if let Some(probed) = probed {
        count.count_probed(probed);
        link_bytes += bytes_of(Message::Probe(looked.examined.probe(looked.seq)));
        link_bytes += bytes_of(Message::Probed(probed.clone()));
    }
    for entry in &encoded.entries {
        count.count(*entry);
    }
    link_bytes += MESSAGE_OVERHEAD
        + bytes_of(Message::Blocks(Blocks {
            seq: looked.seq,
            entries: encoded.entries,
            payload: encoded.payload,
        }));
    let blocks = looked.examined.range().len();
    let whole = looked.seq.0.is_multiple_of(PACKED_WHOLE).then(|| {
        let encoded = encoder.encode(looked.examined.range(), &looked.content);
        let mut all = ContentCount::default();
        for entry in &encoded.entries {
            all.count(*entry);
        }
        let content = (blocks - all.zero_blocks) * BLOCK_SIZE;
        (content, all.zstd_bytes + all.raw_blocks * BLOCK_SIZE)
    });
    Packed {
        blocks,
        is_same: count.same_blocks + count.zero_blocks == blocks && probed.is_none(),
        count,
        link_bytes,
        whole,
        encoder,
    }
}

/// What a frame takes on a connection, without TLS.
fn frame_bytes(frame: Frame) -> u64 {
    flimcd_wire::encode(&Body::Frame(frame)).len() as u64
}

/// Ascending blocks as runs.
fn runs(blocks: Vec<u64>) -> Runs {
    let mut runs: Vec<BlockRange> = Vec::new();
    for block in blocks {
        match runs.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(BlockRange::new(block, block + 1)),
        }
    }
    Runs::new(runs)
}

/// Runs something that may wait for a disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| format!("looking at the volume failed: {error}")),
        Err(panic) => Err(format!("the agent failed: {panic}")),
    }
}
