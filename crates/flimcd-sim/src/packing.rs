//! What the source's agent does with what it has read: looks at it, asks, packs.

use flimcd_content::{Compression, Encoder, Examined};
use flimcd_core::{BlockRange, Seq};
use flimcd_wire::{ChunkPrefix, Runs};

use crate::{
    host::Done,
    world::{Site, World},
};

/// Packs content, as the machine asks for.
pub(crate) struct Encoders {
    raw: Encoder,
    packed: Encoder,
}

impl Encoders {
    pub(crate) fn new() -> Self {
        Self {
            raw: Encoder::new(Compression::None),
            packed: Encoder::new(Compression::DEFAULT),
        }
    }
}

/// What the machine wants done with what is read.
#[derive(Clone, Debug)]
pub(crate) struct HowToPack {
    pub(crate) compress: bool,
    pub(crate) same: Vec<Option<ChunkPrefix>>,
    pub(crate) probe: bool,
}

/// Content that waits for what the target says of it.
pub(crate) struct Kept {
    bytes: Vec<u8>,
    examined: Examined,
    compress: bool,
}

impl World {
    /// A read to be sent ended.
    pub(crate) fn send_read_done(
        &mut self,
        seq: Seq,
        range: BlockRange,
        how: &HowToPack,
        result: Done,
    ) {
        self.host(Site::Source).rules.end_send(range);
        let bytes = match result {
            Ok(bytes) => bytes,
            Err(error) => {
                return self
                    .source_input(move |machine, now| machine.handle_read(now, seq, Err(error)));
            }
        };
        let kept = Kept {
            examined: Examined::of(range, &bytes, &how.same),
            bytes,
            compress: how.compress,
        };
        if how.probe && kept.examined.needs_probe() {
            let probe = kept.examined.probe(seq);
            self.source.kept.insert(seq, kept);
            self.source_input(move |machine, now| machine.handle_examined(now, probe));
        } else {
            self.pack_kept(seq, &kept, &Runs::default());
        }
    }

    /// The target has said what it has of it.
    pub(crate) fn pack(&mut self, seq: Seq, had: &Runs) {
        match self.source.kept.remove(&seq) {
            Some(kept) => self.pack_kept(seq, &kept, had),
            None => self.fail(format!("{seq:?} is to be packed, and nobody kept it")),
        }
    }

    fn pack_kept(&mut self, seq: Seq, kept: &Kept, had: &Runs) {
        let encoders = &mut self.encoders;
        let encoder = if kept.compress {
            &mut encoders.packed
        } else {
            &mut encoders.raw
        };
        let encoded = encoder.pack(&kept.bytes, &kept.examined, had);
        let packed = (encoded.entries, encoded.payload);
        self.source_input(move |machine, now| machine.handle_read(now, seq, Ok(packed)));
    }

    /// Nobody needs it any more.
    pub(crate) fn forget(&mut self, seq: Seq) {
        if self.source.kept.remove(&seq).is_none() {
            self.fail(format!("{seq:?} is to be forgotten, and nobody kept it"));
        }
    }
}
