//! Loads by name, with times: each is an open load at its own rate, so that a slow disk makes requests late
//! and never fewer. What each of them is made of, and where its figures come from, is in `docs/loads.md`.

#[cfg(test)]
mod check;
mod layout;
mod recorded;
pub mod server;
mod streams;

use std::path::PathBuf;

use super::{
    AccessSpec, LoadOptions, RequestSource, Synthetic,
    access::{AccessSource, describe_rate},
    arrivals::Paced,
    source::SyntheticSource,
};
use crate::trace::TraceError;
use server::Server;
use streams::ServerSource;

/// Names that [`by_name`] knows. The last stands for a trace: `trace:` and the path of a file.
pub const NAMES: [&str; 9] = [
    "mail",
    "homes",
    "web-vm",
    "iometer-database",
    "iometer-fileserver",
    "iometer-webserver",
    "iometer-workstation",
    "random",
    "trace:FILE",
];

/// Bytes of the smallest disk that these loads are for.
pub const MIN_BYTES: u64 = 16 << 20;

/// Requests per second of `random`.
const RANDOM_RATE: f64 = 200.0;
/// Requests per second of the Iometer loads: a tool that asks for the next when it has one has no rate of its own.
const IOMETER_RATE: f64 = 120.0;
/// Share of the disk that is Iometer's test file, and where it starts.
const IOMETER_AREA_SHARE: f64 = 0.25;
/// Before the path of a trace.
const TRACE: &str = "trace:";
/// Requests that wait at most.
const QUEUE_DEPTH: u32 = 32;

/// A load on a disk of some size, ready to run.
pub struct Workload {
    /// As it was asked for.
    pub name: String,
    /// The requests. All have times.
    pub requests: Box<dyn RequestSource>,
    /// What is written, and how many requests wait at most.
    pub options: LoadOptions,
    /// What the disk holds before.
    pub image: ImageProfile,
    /// Every offset and length is a multiple of so many bytes: the granule to survey the image with.
    pub granule: u32,
    /// Its parameters in words.
    pub describe: String,
}

impl std::fmt::Debug for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workload")
            .field("name", &self.name)
            .field("options", &self.options)
            .field("image", &self.image)
            .field("granule", &self.granule)
            .field("describe", &self.describe)
            .finish_non_exhaustive()
    }
}

/// What a disk holds before the load: an assumption of each load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ImageProfile {
    /// Share of the disk that is not zeroes.
    pub data_share: f64,
    /// Share of that which compresses (about 2.5 times); the rest is noise.
    pub compressible_share: f64,
}

/// Why there is no such load.
#[derive(Debug, thiserror::Error)]
pub enum UnknownLoad {
    /// Nobody knows the name.
    #[error("there is no load {name:?}; choose one of {}", NAMES.join(", "))]
    Name {
        /// What was asked for.
        name: String,
    },
    /// The speed is no speed.
    #[error("a load cannot run {speed} times as fast; give a number above 0")]
    Speed {
        /// What was asked for.
        speed: f64,
    },
    /// The disk is too small for it.
    #[error(
        "a disk of {size_bytes} bytes is too small for the load {name:?}; it needs {MIN_BYTES}"
    )]
    Size {
        /// What was asked for.
        name: String,
        /// Of the disk.
        size_bytes: u64,
    },
    /// The trace cannot be used.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// There is no specification of this name.
    #[error("{path} holds no access specification {wanted:?}; choose one of {}", found.join(", "))]
    Specification {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        wanted: String,
        /// Names of those it holds.
        found: Vec<String>,
    },
}

/// The load of this name on a disk of `size_bytes`, `speed` times as fast as it says. The stream of requests
/// and their times depend on name, size, seed and speed alone.
///
/// # Errors
/// [`UnknownLoad`].
pub fn by_name(
    name: &str,
    size_bytes: u64,
    seed: u64,
    speed: f64,
) -> Result<Workload, UnknownLoad> {
    if !(speed.is_finite() && speed > 0.0) {
        return Err(UnknownLoad::Speed { speed });
    }
    if size_bytes < MIN_BYTES {
        let name = name.to_owned();
        return Err(UnknownLoad::Size { name, size_bytes });
    }
    let load = match name {
        "iometer-database" => access(AccessSpec::database(), size_bytes, seed, speed),
        "iometer-fileserver" => access(AccessSpec::file_server(), size_bytes, seed, speed),
        "iometer-webserver" => access(AccessSpec::web_server(), size_bytes, seed, speed),
        "iometer-workstation" => access(AccessSpec::workstation(), size_bytes, seed, speed),
        "random" => random(size_bytes, seed, speed),
        "mail" => server(&server::MAIL, size_bytes, seed, speed),
        "homes" => server(&server::HOMES, size_bytes, seed, speed),
        "web-vm" => server(&server::WEB_VM, size_bytes, seed, speed),
        _ if name.starts_with(TRACE) => recorded::load(name, size_bytes, seed, speed)?,
        _ => {
            return Err(UnknownLoad::Name {
                name: name.to_owned(),
            });
        }
    };
    Ok(Workload {
        name: name.to_owned(),
        ..load
    })
}

fn random(size_bytes: u64, seed: u64, speed: f64) -> Workload {
    let requests = Synthetic::default();
    let describe = format!(
        "{:.0} requests of 4 KiB per second, {:.0}% reads, Zipf {} by chunk of 64 KiB over {:.0}% of the disk",
        RANDOM_RATE * speed,
        requests.read_share * 100.0,
        requests.zipf_exponent,
        requests.working_set_share * 100.0,
    );
    let source = SyntheticSource::new(requests, size_bytes, seed);
    Workload {
        name: String::new(),
        requests: Box::new(Paced::new(source, RANDOM_RATE * speed, seed)),
        options: LoadOptions {
            seed,
            ..LoadOptions::default()
        },
        image: ImageProfile {
            data_share: 0.5,
            compressible_share: 0.5,
        },
        granule: 4096,
        describe,
    }
}

/// A specification over a test file in the middle of the disk.
fn access(spec: AccessSpec, size_bytes: u64, seed: u64, speed: f64) -> Workload {
    let megabytes = size_bytes >> 20;
    let area = (megabytes / 4) << 20;
    let length = layout::share_of(megabytes, IOMETER_AREA_SHARE) << 20;
    let rate = IOMETER_RATE * speed;
    let describe = format!(
        "{}; {}; over {:.0}% of the disk, one area",
        spec.describe(),
        describe_rate(rate),
        IOMETER_AREA_SHARE * 100.0
    );
    Workload {
        name: String::new(),
        granule: spec.granule(),
        requests: Box::new(AccessSource::new(spec, (area, length), (rate, speed), seed)),
        options: LoadOptions {
            seed,
            queue_depth: QUEUE_DEPTH,
            ..LoadOptions::default()
        },
        image: ImageProfile {
            data_share: 0.5,
            compressible_share: 0.5,
        },
        describe,
    }
}

fn server(server: &Server, size_bytes: u64, seed: u64, speed: f64) -> Workload {
    let duplicates = server.duplicates(size_bytes);
    let source = ServerSource::new(server, size_bytes, seed);
    Workload {
        name: String::new(),
        requests: Box::new(Paced::new(source, server.rate_per_sec * speed, seed)),
        options: LoadOptions {
            seed,
            queue_depth: QUEUE_DEPTH,
            compressible_share: server.image.compressible_share,
            duplicates: Some(duplicates),
            ..LoadOptions::default()
        },
        image: server.image,
        granule: 4096,
        describe: server.describe(speed, duplicates.contents),
    }
}
