//! Choosing images that resemble what arrives, and reading chunks from them.

use flimcd_content::Fingerprint;
use flimcd_core::{BLOCKS_PER_CHUNK, BlockIndex, BlockRange, ChunkIndex, VolumeLayout};
use flimcd_migrate::SeedChoice;
use flimcd_wire::{SampleChunk, SeedId, SeedTable};
use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use super::{Candidate, Library};

/// The images that a migration's volumes are compared with.
#[derive(Debug)]
pub(crate) struct Seeds {
    layout: VolumeLayout,
    /// One for each volume, if there is one.
    images: Vec<Option<File>>,
}

/// What was chosen.
#[derive(Debug)]
pub(crate) struct Chosen {
    /// To read from.
    pub(crate) seeds: Arc<Seeds>,
    /// To tell the source of.
    pub(crate) choice: SeedChoice,
}

impl Seeds {
    /// Reads what stands in the seed at the place of `run`, as many bytes as the volume has there. `None` when there is
    /// nothing, or it cannot be read, or it is not what it should be.
    pub(crate) fn read(
        &self,
        run: BlockRange,
        expected: Fingerprint,
        buffer: &mut Vec<u8>,
    ) -> Option<()> {
        self.fill(run, buffer)?;
        (Fingerprint::of_run(buffer) == expected).then_some(())
    }

    /// What stands in the seed at the place of `run`.
    pub(crate) fn peek(&self, run: BlockRange) -> Option<Vec<u8>> {
        let mut buffer = Vec::new();
        self.fill(run, &mut buffer)?;
        Some(buffer)
    }

    fn fill(&self, run: BlockRange, buffer: &mut Vec<u8>) -> Option<()> {
        let (volume, within) = self.layout.locate(run)?;
        let image = self.images.get(volume)?.as_ref()?;
        let bytes = within.bytes(self.layout.size_of(volume));
        buffer.resize(usize::try_from(bytes.len()).ok()?, 0);
        match image.read_exact_at(buffer, bytes.start) {
            Ok(()) => Some(()),
            // It may be smaller than the volume.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => {
                let at = bytes.start;
                tracing::warn!("an image of the library cannot be read at byte {at}: {error}");
                None
            }
        }
    }
}

impl Library {
    /// For each volume of the layout the image with most chunks of the sample at the same place, among those that its
    /// tenant may see. `None` when there is none with any. Blocks.
    pub(crate) fn choose(
        &self,
        layout: &VolumeLayout,
        tenants: &[String],
        sample: &[SampleChunk],
    ) -> Option<Chosen> {
        let mut table = SeedTable::new(layout.size().chunks());
        let mut images = Vec::new();
        let mut names: Vec<String> = Vec::new();
        let mut identity = Vec::new();
        for (blocks, tenant) in layout.all_blocks().zip(tenants) {
            let first = blocks.start / BLOCKS_PER_CHUNK;
            let here = sample
                .iter()
                .filter(|s| blocks.contains(BlockIndex(s.chunk.0 * BLOCKS_PER_CHUNK)));
            let here: Vec<SampleChunk> = here
                .map(|s| SampleChunk {
                    chunk: ChunkIndex(s.chunk.0 - first),
                    ..*s
                })
                .collect();
            let chunks = blocks.len().div_ceil(BLOCKS_PER_CHUNK);
            let best = self.best(tenant, &here, |chunk, prefix| {
                if chunk.0 < chunks {
                    table.set(ChunkIndex(first + chunk.0), Some(prefix));
                }
            });
            identity.push(u8::from(best.is_some()));
            if let Some(best) = &best {
                identity.extend_from_slice(best.root.as_bytes());
                let name = best.name.to_string();
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            images.push(best.map(|best| best.file));
        }
        if table.is_empty() {
            return None;
        }
        let mut id = [0; 16];
        id.copy_from_slice(&Fingerprint::of(&identity).as_bytes()[..16]);
        Some(Chosen {
            seeds: Arc::new(Seeds {
                layout: layout.clone(),
                images,
            }),
            choice: SeedChoice {
                id: SeedId(id),
                name: short(&names),
                in_place: false,
                table: table.into(),
            },
        })
    }

    /// The best image for a volume, whose whole table is given to `each`. One whose table turns out to be damaged is put aside,
    /// and the next one is tried.
    fn best(
        &self,
        tenant: &str,
        sample: &[SampleChunk],
        mut each: impl FnMut(ChunkIndex, flimcd_wire::ChunkPrefix),
    ) -> Option<Candidate> {
        let mut ranked: Vec<(usize, Candidate)> = self
            .candidates(tenant)
            .into_iter()
            .filter_map(|candidate| match hits(&candidate, sample) {
                Ok(hits) => (hits > 0).then_some((hits, candidate)),
                Err(error) => {
                    self.put_aside(
                        &candidate.name,
                        &format!("its table cannot be read: {error}"),
                    );
                    None
                }
            })
            .collect();
        // By name among equals, so that the same one is chosen again.
        ranked.sort_by(|(a, x), (b, y)| a.cmp(b).then_with(|| y.name.cmp(&x.name)));
        while let Some((hits, candidate)) = ranked.pop() {
            // Before anything of it is used.
            let root = candidate.table.read_all(|_, _| {});
            match root {
                Ok(tree) if tree.root() == Some(candidate.root) => {}
                Ok(_) => {
                    self.put_aside(&candidate.name, "its table is damaged");
                    continue;
                }
                Err(error) => {
                    self.put_aside(
                        &candidate.name,
                        &format!("its table cannot be read: {error}"),
                    );
                    continue;
                }
            }
            let read = candidate.table.read_all(|chunk, leaf| {
                if let Some(leaf) = leaf {
                    each(chunk, leaf.prefix());
                }
            });
            if read.is_ok() {
                tracing::info!(image = %candidate.name, hits, of = sample.len(), "an image of the library resembles what arrives");
                return Some(candidate);
            }
        }
        None
    }
}

/// How many chunks of the sample an image has at the same place.
fn hits(candidate: &Candidate, sample: &[SampleChunk]) -> io::Result<usize> {
    let mut hits = 0;
    for wanted in sample {
        let leaf = candidate.table.leaf(wanted.chunk)?;
        hits += usize::from(leaf.is_some_and(|leaf| leaf.prefix() == wanted.prefix));
    }
    Ok(hits)
}

/// Names for people.
fn short(names: &[String]) -> String {
    match names {
        [first, second, _, ..] => format!("{first}, {second} and {} more", names.len() - 2),
        _ => names.join(", "),
    }
}
