//! Choosing images that resemble what arrives, and reading chunks from them.

use flimcd_content::Fingerprint;
use flimcd_core::{BLOCKS_PER_CHUNK, BlockIndex, BlockRange, ByteRange, ChunkIndex, VolumeLayout};
use flimcd_migrate::SeedChoice;
use flimcd_wire::{Base, SampleChunk, SeedId, SeedTable};
use std::{fs::File, io, iter::repeat, os::unix::fs::FileExt, sync::Arc};

use super::{Candidate, Library};
use crate::migration::volumes::VolumeSet;

/// The images that a migration's volumes are compared with.
#[derive(Debug)]
pub(crate) struct Seeds {
    layout: VolumeLayout,
    /// One for each volume, if there is one.
    images: Vec<Option<Seed>>,
}

#[derive(Debug)]
struct Seed {
    file: File,
    /// It is the volume's own image.
    in_place: bool,
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
    fn seed_of(&self, run: BlockRange) -> Option<(&Seed, ByteRange)> {
        let (volume, within) = self.layout.locate(run)?;
        let seed = self.images.get(volume)?.as_ref()?;
        Some((seed, within.bytes(self.layout.size_of(volume))))
    }

    /// Reads what stands in the seed at the place of `run`, as many bytes as the volume has there. `None` when there is
    /// nothing, or it cannot be read, or it is not what it should be.
    pub(crate) fn read(
        &self,
        run: BlockRange,
        expected: Fingerprint,
        buffer: &mut Vec<u8>,
    ) -> Option<()> {
        let (seed, bytes) = self.seed_of(run)?;
        buffer.resize(usize::try_from(bytes.len()).ok()?, 0);
        if let Err(error) = seed.file.read_exact_at(buffer, bytes.start) {
            tracing::warn!(
                "an image of the library cannot be read at byte {}: {error}",
                bytes.start
            );
            return None;
        }
        (Fingerprint::of_run(buffer) == expected).then_some(())
    }

    /// What stands there, as far as it can be read: nothing behind the seed's end.
    pub(super) fn peek(&self, run: BlockRange) -> Option<Vec<u8>> {
        let (seed, bytes) = self.seed_of(run)?;
        let mut buffer = vec![0; usize::try_from(bytes.len()).ok()?];
        let mut read = 0;
        while read < buffer.len() {
            match seed
                .file
                .read_at(&mut buffer[read..], bytes.start + read as u64)
            {
                Ok(0) | Err(_) => break,
                Ok(count) => read += count,
            }
        }
        buffer.truncate(read);
        Some(buffer)
    }

    /// Whether the seed of these blocks is what stands in the volume already.
    pub(crate) fn is_in_place(&self, run: BlockRange) -> bool {
        self.seed_of(run).is_some_and(|(seed, _)| seed.in_place)
    }
}

impl Library {
    /// For each volume its own image, if a copy stands there whose fingerprints are known; otherwise the image with most chunks of the
    /// sample at the same place, among those that its tenant may see. `None` when there is none with any. Blocks.
    pub(crate) fn choose(
        &self,
        volumes: &VolumeSet,
        bases: &[Base],
        tenants: &[String],
        sample: &[SampleChunk],
    ) -> Option<Chosen> {
        let layout = volumes.layout();
        let mut table = SeedTable::new(layout.size().chunks());
        let mut images = Vec::new();
        let mut names: Vec<String> = Vec::new();
        let mut identity = Vec::new();
        let bases = bases.iter().copied().chain(repeat(Base::Zeroes));
        let all = volumes.all().iter().zip(layout.all_blocks());
        for (((volume, blocks), tenant), base) in all.zip(tenants).zip(bases) {
            let first = blocks.start / BLOCKS_PER_CHUNK;
            let chunks = blocks.len().div_ceil(BLOCKS_PER_CHUNK);
            let mut set = |chunk: ChunkIndex, prefix| {
                if chunk.0 < chunks {
                    table.set(ChunkIndex(first + chunk.0), Some(prefix));
                }
            };
            let own = match base {
                Base::Known | Base::Unknown => self.own(volume, &mut set),
                Base::Zeroes | Base::Invalid => None,
            };
            let in_place = own.is_some();
            let best = own.or_else(|| {
                let here = sample
                    .iter()
                    .filter(|s| blocks.contains(BlockIndex(s.chunk.0 * BLOCKS_PER_CHUNK)));
                let here: Vec<SampleChunk> = here
                    .map(|s| SampleChunk {
                        chunk: ChunkIndex(s.chunk.0 - first),
                        ..*s
                    })
                    .collect();
                self.best(tenant, &here, &mut set)
            });
            identity.push(u8::from(best.is_some()));
            if let Some(best) = &best {
                identity.extend_from_slice(best.root.as_bytes());
                if !names.contains(&best.name) {
                    names.push(best.name.clone());
                }
            }
            images.push(best.map(|best| Seed {
                file: best.file,
                in_place,
            }));
        }
        if table.is_empty() {
            return None;
        }
        let mut id = [0; 16];
        id.copy_from_slice(&Fingerprint::of(&identity).as_bytes()[..16]);
        let in_place = images.iter().flatten().any(|seed| seed.in_place);
        Some(Chosen {
            seeds: Arc::new(Seeds {
                layout: layout.clone(),
                images,
            }),
            choice: SeedChoice {
                id: SeedId(id),
                name: short(&names),
                in_place,
                table: table.into(),
            },
        })
    }

    /// The best image for a volume, whose whole table is given to `each`. One whose table turns out to be damaged is made
    /// anew, and the next one is tried.
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
                    self.make_anew(
                        &candidate.key,
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
                    self.make_anew(&candidate.key, "its table is damaged");
                    continue;
                }
                Err(error) => {
                    self.make_anew(
                        &candidate.key,
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
