//! What people are told of an entry.

use flimcd_core::CHUNK_SIZE;
use std::{fs::File, sync::atomic::Ordering};

use super::{Entry, image::Identity};
use crate::api::{LibraryImage, LibraryKind, LibraryState};

/// As the API has it. Looks at the file.
pub(super) fn describe(entry: &Entry) -> LibraryImage {
    let record = &entry.record;
    let chunks = record.identity.chunks();
    let (state, problem) = state(entry);
    let scanned = match (&entry.scan, &record.whole) {
        (Some(scan), _) => scan.done_chunks.load(Ordering::Relaxed),
        (None, Some(_)) => chunks,
        (None, None) => 0,
    };
    let whole = record.whole.as_ref();
    LibraryImage {
        name: record.name.clone(),
        kind: record.kind,
        part_of: record.part_of.clone(),
        path: record.path.clone(),
        tenant: record.tenant.clone(),
        is_copy: record.is_copy,
        size_bytes: record.identity.size_bytes,
        data_bytes: whole.map(|whole| whole.data_chunks * CHUNK_SIZE),
        state,
        scanned_bytes: (scanned * CHUNK_SIZE).min(record.identity.size_bytes),
        root: whole.and_then(|whole| whole.root.clone()),
        problem,
        added_unix_ms: record.added_unix_ms,
        scanned_unix_ms: whole.map(|whole| whole.scanned_unix_ms),
    }
}

fn state(entry: &Entry) -> (LibraryState, Option<String>) {
    let record = &entry.record;
    match (&entry.scan, &record.problem, &record.whole) {
        (Some(_), ..) | (None, None, None) => return (LibraryState::Scanning, None),
        (None, Some(problem), _) => return (LibraryState::Failed, Some(problem.clone())),
        (None, None, Some(_)) => {}
    }
    let now = File::open(&record.path).and_then(|file| Identity::of(&file));
    let problem = match now {
        Ok(now) if now == record.identity => return (LibraryState::Ready, None),
        // It is written all the time.
        Ok(_) if record.kind == LibraryKind::Volume => return (LibraryState::Ready, None),
        Ok(_) => "the file was changed since it was read".to_owned(),
        Err(error) => format!("the file cannot be opened: {error}"),
    };
    (LibraryState::Stale, Some(problem))
}
