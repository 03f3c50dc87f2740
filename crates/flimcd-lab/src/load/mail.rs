//! A plain load with the mix of a mail server's disk that makes as many writes as it may: for measuring how content
//! travels. The one with times and streams is `mail` in the [catalog](super::catalog); its statistics are the
//! same.

use std::{io, path::Path};

use flimcd_core::BLOCK_SIZE;

use super::{Duplicates, LoadOptions, Synthetic, catalog::server::MAIL};

/// Share of reads among the requests.
const READ_SHARE: f64 = 0.09;
/// Skew over the touched chunks: most writes go to few of them.
const ZIPF_EXPONENT: f64 = 1.0;
/// One repeated content for so many blocks of the disk.
const BLOCKS_PER_CONTENT: u64 = 128;

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
                working_set_share: MAIL.touched_share,
                zipf_exponent: ZIPF_EXPONENT,
                ..Synthetic::default()
            },
            options: LoadOptions {
                seed,
                dirty_bytes_per_sec: Some(dirty_bytes_per_sec),
                duplicates: Some(Duplicates {
                    share: MAIL.duplicate_share,
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
        match self.options.duplicates {
            Some(duplicates) => duplicates.plant(&self.options, image),
            None => Ok(()),
        }
    }

    /// The parameters in words.
    #[must_use]
    pub fn describe(&self) -> String {
        let duplicates = self.options.duplicates.map_or(0, |some| some.contents);
        format!(
            "{:.0}% writes of 4 KiB over {:.1}% of the disk, Zipf {ZIPF_EXPONENT} by chunk of 64 KiB; {:.0}% of the \
             written blocks have one of {duplicates} contents, half of which stand on the disk before",
            (1.0 - READ_SHARE) * 100.0,
            MAIL.touched_share * 100.0,
            MAIL.duplicate_share * 100.0,
        )
    }
}
