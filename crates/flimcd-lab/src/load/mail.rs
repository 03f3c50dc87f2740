//! A load like that of a mail server's disk, scaled to a disk of any size.
//!
//! Parameters come from published statistics of one week of the FIU traces' mail server (Koller and
//! Rangaswami, FAST 2010, Table 1; from memory of the table, so they are parameters here and no
//! quotations): 91% of the requests are writes, 6.3% of the file system is touched, the same few
//! sectors are written about a hundred times, and 88% of what is written had been written before.

use std::{fs::File, io, os::unix::fs::FileExt as _, path::Path};

use flimcd_core::BLOCK_SIZE;

use super::{Duplicates, LoadOptions, Synthetic};
use crate::rng::Rng;

/// Share of reads among the requests.
const READ_SHARE: f64 = 0.09;
/// Share of the disk that is touched at all.
const TOUCHED_SHARE: f64 = 0.063;
/// Skew over the touched chunks: most writes go to few of them.
const ZIPF_EXPONENT: f64 = 1.0;
/// Share of the written blocks whose content is one of the repeated ones.
const DUPLICATE_SHARE: f64 = 0.88;
/// One repeated content for so many blocks of the disk.
const BLOCKS_PER_CONTENT: u64 = 128;
/// Places on the disk at the start that hold one of the contents that are there already.
const PLACES_PER_CONTENT: u64 = 4;

/// A mail-like load on a disk of some size.
#[derive(Clone, Debug, PartialEq)]
pub struct Mail {
    /// The requests.
    pub requests: Synthetic,
    /// How they are paced, and what is written.
    pub options: LoadOptions,
}

impl Mail {
    /// The load on `size_bytes`, which dirties at most so many bytes per second anew. The trace's own
    /// rate is 0.8 MB/s over the week.
    #[must_use]
    pub fn new(size_bytes: u64, seed: u64, dirty_bytes_per_sec: u64) -> Self {
        let contents = (size_bytes / BLOCK_SIZE / BLOCKS_PER_CONTENT).max(16);
        Self {
            requests: Synthetic {
                read_share: READ_SHARE,
                working_set_share: TOUCHED_SHARE,
                zipf_exponent: ZIPF_EXPONENT,
                ..Synthetic::default()
            },
            options: LoadOptions {
                seed,
                dirty_bytes_per_sec: Some(dirty_bytes_per_sec),
                duplicates: Some(Duplicates {
                    share: DUPLICATE_SHARE,
                    contents,
                }),
                ..LoadOptions::default()
            },
        }
    }

    /// Puts every second of the repeated contents onto an image, at several places each: mail that had
    /// come before.
    ///
    /// # Errors
    /// Those of writing the file.
    pub fn plant(&self, image: &Path) -> io::Result<()> {
        let file = File::options().write(true).open(image)?;
        let blocks = file.metadata()?.len() / BLOCK_SIZE;
        let duplicates = self.options.duplicates.unwrap_or(Duplicates {
            share: 0.0,
            contents: 0,
        });
        let mut rng = Rng::new(self.options.seed);
        let mut buffer = vec![0; usize::try_from(BLOCK_SIZE).unwrap_or(4096)];
        for number in (0..duplicates.contents).step_by(2) {
            let (seed, share) = (self.options.seed, self.options.compressible_share);
            duplicates.fill(seed, number, share, &mut buffer);
            for _ in 0..PLACES_PER_CONTENT.min(blocks) {
                file.write_all_at(&buffer, rng.below(blocks) * BLOCK_SIZE)?;
            }
        }
        Ok(())
    }

    /// The parameters in words.
    #[must_use]
    pub fn describe(&self) -> String {
        let duplicates = self.options.duplicates.map_or(0, |some| some.contents);
        format!(
            "{:.0}% writes of 4 KiB over {:.1}% of the disk, Zipf {ZIPF_EXPONENT} by chunk of 64 KiB; {:.0}% of the \
             written blocks have one of {duplicates} contents, half of which stand on the disk before",
            (1.0 - READ_SHARE) * 100.0,
            TOUCHED_SHARE * 100.0,
            DUPLICATE_SHARE * 100.0,
        )
    }
}
