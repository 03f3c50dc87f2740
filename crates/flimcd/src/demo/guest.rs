//! The demo's guest: the lab's checked load, connected with NBD.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use flimcd_agent::api::ExportInfo;
use flimcd_lab::{
    load::{
        Baseline, DiskOp, DiskRequest, GuestDisk, Load, LoadHandle, LoadOptions, Mail, NbdDisk,
        Synthetic,
    },
    trace::{Replay, ReplayOptions, Trace, read_file},
};
use serde_json::json;

use super::{
    args::{DemoArgs, LoadArg},
    report::LoadFacts,
};
use crate::{format, outcome::advise};

/// The guest that every strategy gets.
pub(crate) struct GuestPlan {
    requests: Requests,
    options: LoadOptions,
    pub(crate) facts: LoadFacts,
}

enum Requests {
    Synthetic(Synthetic),
    Trace(Trace, ReplayOptions),
}

impl GuestPlan {
    /// Reads the trace, if there is one; blocks.
    pub(crate) fn new(args: &DemoArgs) -> anyhow::Result<Self> {
        match &args.load {
            LoadArg::Synthetic => Ok(Self::synthetic(args)),
            LoadArg::Trace(file) => {
                if !(args.speed.is_finite() && args.speed > 0.0) {
                    return Err(advise(
                        format!("a trace cannot be replayed {} times as fast", args.speed),
                        "give --speed a number above 0",
                    ));
                }
                let trace = read_file(file)?;
                let replay = ReplayOptions {
                    speed: args.speed,
                    ..ReplayOptions::default()
                };
                let name = file.display().to_string();
                Ok(Self::replay(trace, &name, replay, args.seed))
            }
        }
    }

    fn synthetic(args: &DemoArgs) -> Self {
        let dirty = args.dirty.unwrap_or(args.link.rate_bytes_per_sec() / 2);
        let options = LoadOptions {
            seed: args.seed,
            dirty_bytes_per_sec: Some(dirty),
            ..LoadOptions::default()
        };
        let requests = Synthetic::default();
        let what = format!(
            "{} requests, {:.0}% reads, Zipf over {:.0}% of the image, at most {} of new dirty bytes",
            format::bytes(requests.request_bytes.into()),
            requests.read_share * 100.0,
            requests.working_set_share * 100.0,
            format::rate(dirty)
        );
        let parameters = json!({ "requests": requests, "options": options });
        let facts = LoadFacts { what, parameters };
        Self {
            requests: Requests::Synthetic(requests),
            options,
            facts,
        }
    }

    /// A mail server as the lab makes it.
    pub(crate) fn mail(mail: &Mail) -> Self {
        let parameters = json!({ "requests": mail.requests, "options": mail.options });
        let what = format!("mail-like: {}", mail.describe());
        Self {
            requests: Requests::Synthetic(mail.requests.clone()),
            options: mail.options.clone(),
            facts: LoadFacts { what, parameters },
        }
    }

    /// A recorded guest.
    pub(crate) fn replay(trace: Trace, name: &str, replay: ReplayOptions, seed: u64) -> Self {
        let options = LoadOptions {
            seed,
            ..LoadOptions::default()
        };
        let summary = &trace.summary;
        let what = format!(
            "trace {name}, {} reads, {} writes in {}, replayed {} times as fast",
            format::count(summary.reads),
            format::count(summary.writes),
            format::seconds(summary.seconds),
            replay.speed
        );
        let parameters =
            json!({ "trace": name, "summary": summary, "replay": replay, "options": options });
        let facts = LoadFacts { what, parameters };
        Self {
            requests: Requests::Trace(trace, replay),
            options,
            facts,
        }
    }

    /// Whether requests come all the time, so that the first one after the switch says when it was over.
    pub(crate) const fn is_busy(&self) -> bool {
        matches!(self.requests, Requests::Synthetic(_))
    }

    /// Starts the guest on a disk with this content.
    pub(crate) fn start(
        &self,
        disk: Box<dyn GuestDisk>,
        baseline: Baseline,
    ) -> anyhow::Result<LoadHandle> {
        let options = self.options.clone();
        match &self.requests {
            Requests::Synthetic(synthetic) => {
                Load::start(disk, baseline, synthetic.clone(), options)
            }
            Requests::Trace(trace, replay) => {
                let replay = Replay::new(trace.clone(), baseline.size(), replay.clone());
                Load::start_with(disk, baseline, Box::new(replay), options)
            }
        }
        .context("the guest cannot be started")
    }
}

/// Reads the first bytes of a disk, and returns when they were there; blocks.
pub(crate) fn probe(disk: &mut dyn GuestDisk) -> anyhow::Result<Instant> {
    let length = u32::try_from(disk.size().min(512))?;
    let data = vec![0; 512.min(length as usize)];
    disk.submit(DiskRequest {
        id: 0,
        op: DiskOp::Read,
        offset: 0,
        length,
        data,
    })?;
    loop {
        if let Some(reply) = disk.receive(Duration::from_secs(1))? {
            reply.result?;
            return Ok(Instant::now());
        }
    }
}

/// Connects to an export as a guest's host would; blocks.
pub(crate) fn connect(export: &ExportInfo) -> anyhow::Result<Box<dyn GuestDisk>> {
    let disk = NbdDisk::connect(&export.socket, &export.export)
        .with_context(|| format!("the guest cannot connect to {}", export.uri))?;
    Ok(Box::new(disk))
}
