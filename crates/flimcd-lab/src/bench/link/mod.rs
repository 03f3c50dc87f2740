//! The link between two agents over an emulated WAN: goodput of bulk, and how long a fault takes
//! beside it.
//!
//! ```text
//!  target ── Demand, class Fault ──► source          every 20 ms, whether or not the last came back
//!         ◄── Blocks, 4 KiB, class Fault ──
//!         ◄══ Blocks, 64 KiB, class Bulk ══          as much as the link takes; does not compress
//! ```
//! Both ends are real endpoints with their own certificates, each on a runtime of its own in its own
//! network namespace, with the TUN router between them. Where namespaces cannot be had, the TCP relay
//! takes its place; loss is then not modelled, and the report says so.
//!
//! Three measurements follow each other on one link: faults alone; bulk and faults without pacing, as
//! before a switchover; bulk and faults with pacing, as while guests can fault.

mod ends;

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::mpsc,
    thread,
    time::Duration,
};

use flimcd_link::{
    ConfigError, LinkConfig, ListenError, TlsIdentity, UnknownPeer,
    pki::{self, PkiError},
};
use serde::Serialize;

use crate::wan::{
    LinkModel, Side,
    relay::{Relay, RelayError, RelayOptions, Route},
    tun::{NamespaceError, NamespaceLab, NamespaceOptions},
};
use ends::{Measured, ends};

/// What to measure.
#[derive(Clone, Debug)]
pub struct LinkBenchOptions {
    /// Links to emulate, one after the other.
    pub models: Vec<LinkModel>,
    /// Length of each of the two measurements with bulk.
    pub duration: Duration,
    /// Bulk connections; `None` for the product's default.
    pub bulk_connections: Option<u8>,
    /// Decides what is lost.
    pub seed: u64,
}

impl Default for LinkBenchOptions {
    /// The links that the project's figures are stated for.
    fn default() -> Self {
        let mut lossy = LinkModel::new(200_000_000, Duration::from_millis(40));
        lossy.loss = 0.001;
        Self {
            models: vec![
                LinkModel::new(200_000_000, Duration::from_millis(40)),
                lossy,
                LinkModel::new(1_000_000_000, Duration::from_millis(20)),
            ],
            duration: Duration::from_secs(15),
            bulk_connections: None,
            seed: 1,
        }
    }
}

/// All measurements.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkBenchReport {
    /// One per link.
    pub cases: Vec<LinkBenchCase>,
}

/// What was measured on one link.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkBenchCase {
    /// The link, as text.
    pub link: String,
    /// `tun` or `relay`.
    pub front_end: String,
    /// What the front end could not emulate; empty if it could do all of it.
    pub not_modelled: String,
    /// Rate of the link in bytes per second, headers included.
    pub rate_bytes_per_sec: f64,
    /// Its round trip.
    pub rtt_ms: f64,
    /// Congestion control of the bulk connections.
    pub congestion_control: String,
    /// Faults on the idle link.
    pub idle_fault: Latency,
    /// Bulk and faults without pacing.
    pub unpaced: UnderBulk,
    /// Bulk and faults with pacing.
    pub paced: UnderBulk,
    /// Packets that the emulator handed over too late: if there are many, the machine was too busy
    /// and the figures mean little.
    pub late_packets: u64,
}

/// One measurement beside bulk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UnderBulk {
    /// Content that arrived in bulk frames, bytes per second.
    pub goodput_bytes_per_sec: f64,
    /// That divided by the link's rate.
    pub goodput_share: f64,
    /// What the source's link took for the path's rate at the end, bytes per second.
    pub estimate_bytes_per_sec: Option<u64>,
    /// Faults meanwhile.
    pub fault: Latency,
}

/// How long faults took, from the demand to the last byte of the answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Latency {
    /// Faults answered.
    pub count: usize,
    /// Faults without an answer.
    pub lost: usize,
    /// Median.
    pub p50_ms: f64,
    /// 99 of 100 took at most this long.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Latency {
    fn new(mut took: Vec<Duration>, lost: usize) -> Self {
        took.sort_unstable();
        let at = |percent: usize| {
            let index = (took.len() * percent).div_ceil(100).saturating_sub(1);
            took.get(index)
                .map_or(f64::NAN, |took| took.as_secs_f64() * 1e3)
        };
        Self {
            count: took.len(),
            lost,
            p50_ms: at(50),
            p99_ms: at(99),
            max_ms: at(100),
        }
    }
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum LinkBenchError {
    /// The TUN router does not start, for another reason than missing rights.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The relay does not start.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// Certificates could not be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// An endpoint could not be made.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An endpoint cannot listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// An endpoint does not know the other one.
    #[error(transparent)]
    Peer(#[from] UnknownPeer),
    /// A thread, runtime or file could not be had.
    #[error("cannot set the benchmark up: {0}")]
    Io(#[from] io::Error),
    /// The link did not come up, or broke.
    #[error("the link over the emulated WAN failed: {0}")]
    Link(String),
}

/// Measures every link of `options`; `progress` gets each case as it is done.
///
/// # Errors
/// [`LinkBenchError`] of the first case that failed.
pub fn run(
    options: &LinkBenchOptions,
    mut progress: impl FnMut(&LinkBenchCase),
) -> Result<LinkBenchReport, LinkBenchError> {
    let mut cases = Vec::new();
    for model in &options.models {
        let case = run_case(*model, options)?;
        progress(&case);
        cases.push(case);
    }
    Ok(LinkBenchReport { cases })
}

fn run_case(model: LinkModel, options: &LinkBenchOptions) -> Result<LinkBenchCase, LinkBenchError> {
    let directory = tempfile::tempdir()?;
    pki::create_ca(directory.path(), false)?;
    let source = config(directory.path(), "source", "target", options)?;
    let target = config(directory.path(), "target", "source", options)?;
    let namespace_options = NamespaceOptions {
        seed: options.seed,
        ..NamespaceOptions::new(model)
    };
    match NamespaceLab::new(&namespace_options) {
        Ok(lab) => {
            let listen = format!("{}:0", NamespaceLab::address(Side::B));
            let (source, target) = ends(source, target, listen, options.duration);
            let target = lab.run_in(Side::B, move || target.run())?;
            let source = lab.run_in(Side::A, move || source.run(Ok))?;
            let measured = joined(target.join())?;
            let congestion_control = joined(source.join())?;
            let late = lab.counters().late;
            Ok(measured.into_case(model, "tun", String::new(), congestion_control, late))
        }
        Err(error @ (NamespaceError::NotAllowed(_) | NamespaceError::NoTun(_))) => {
            let listen = format!("{}:0", Ipv4Addr::LOCALHOST);
            let (source, target) = ends(source, target, listen, options.duration);
            let (keep, kept) = mpsc::channel();
            let seed = options.seed;
            let target = thread::spawn(move || target.run());
            let source = thread::spawn(move || {
                source.run(|target| {
                    let relay = relay(model, target, seed)?;
                    let address = relay.addresses()[0];
                    // The relay lives as long as the receiver of this channel.
                    let _ = keep.send(relay);
                    Ok(address)
                })
            });
            let measured = joined(target.join())?;
            let congestion_control = joined(source.join())?;
            let missing = kept
                .try_recv()
                .ok()
                .and_then(|relay| relay.cannot_model().map(str::to_owned));
            let note = match error {
                NamespaceError::NotAllowed(why) => format!("no network namespaces ({why})"),
                _ => "no TUN devices".to_owned(),
            };
            let note = format!(
                "{note}; {}",
                missing.unwrap_or_else(|| "headers do not count".into())
            );
            Ok(measured.into_case(model, "relay", note, congestion_control, 0))
        }
        Err(error) => Err(error.into()),
    }
}

fn joined<T>(result: thread::Result<Result<T, LinkBenchError>>) -> Result<T, LinkBenchError> {
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn relay(model: LinkModel, target: SocketAddr, seed: u64) -> Result<Relay, LinkBenchError> {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let route = Route {
        listen,
        target,
        from: Side::A,
    };
    Ok(Relay::start(&RelayOptions {
        model,
        routes: vec![route],
        seed,
    })?)
}

fn config(
    directory: &Path,
    name: &str,
    peer: &str,
    options: &LinkBenchOptions,
) -> Result<LinkConfig, LinkBenchError> {
    let site = |name: &str| name.parse().expect("a constant name");
    let issued = pki::issue(directory, &site(name), false)?;
    let tls = TlsIdentity {
        ca_pem: fs::read_to_string(directory.join("ca.pem"))?,
        cert_pem: fs::read_to_string(issued.certificate)?,
        key_pem: fs::read_to_string(issued.key)?,
    };
    let mut config = LinkConfig::new(site(name), tls);
    config.peers = vec![site(peer)];
    config.bulk_connections = options.bulk_connections;
    Ok(config)
}

impl Measured {
    fn into_case(
        self,
        model: LinkModel,
        front_end: &str,
        not_modelled: String,
        congestion_control: String,
        late_packets: u64,
    ) -> LinkBenchCase {
        #[expect(clippy::cast_precision_loss, reason = "rates are far below 2^53")]
        let rate = model.rate_bytes_per_sec() as f64;
        let mut under_bulk = self
            .under_bulk
            .into_iter()
            .map(|(goodput, estimate, fault)| UnderBulk {
                goodput_bytes_per_sec: goodput,
                goodput_share: goodput / rate,
                estimate_bytes_per_sec: estimate,
                fault,
            });
        let (Some(unpaced), Some(paced)) = (under_bulk.next(), under_bulk.next()) else {
            unreachable!("both were measured")
        };
        LinkBenchCase {
            link: model.to_string(),
            front_end: front_end.to_owned(),
            not_modelled,
            rate_bytes_per_sec: rate,
            rtt_ms: model.rtt().as_secs_f64() * 1e3,
            congestion_control,
            idle_fault: self.idle_fault,
            unpaced,
            paced,
            late_packets,
        }
    }
}
