//! How faithful the WAN emulators are: goodput of one bulk TCP connection and round trips beside
//! it, against what the link model says.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use super::harness::median;
use crate::wan::{
    LinkModel, Side,
    relay::{Relay, RelayError, RelayOptions, Route},
    tun::{NamespaceError, NamespaceLab, NamespaceOptions},
};

/// Time that a bulk connection gets to reach its speed before it is measured.
const WARM_UP: Duration = Duration::from_secs(2);
/// Round trips on the idle link.
const IDLE_PINGS: u32 = 30;
/// Pause between two.
const PING_PAUSE: Duration = Duration::from_millis(10);

/// What one run measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WanMeasurement {
    /// The link.
    pub link: String,
    /// `relay` or `tun`.
    pub front_end: String,
    /// Congestion control of the bulk connection; empty for the relay, where it decides little.
    pub congestion_control: String,
    /// Payload of the bulk connection in bits per second.
    pub goodput_bits_per_sec: f64,
    /// That as a share of the link's rate.
    pub goodput_share: f64,
    /// Round trip of one byte on the idle link: median.
    pub idle_rtt_ms: f64,
    /// Longest of them.
    pub idle_rtt_ms_max: f64,
    /// Round trip of one byte on a connection of its own beside the bulk: median.
    pub loaded_rtt_ms: f64,
    /// CPU time of the emulator's threads as a share of one core while the bulk ran.
    pub cpu_share: f64,
    /// Packets or segments that came too late to keep the model.
    pub late: u64,
    /// Packets dropped by the queue.
    pub dropped_queue: u64,
    /// Packets lost at random.
    pub dropped_loss: u64,
}

/// Why there is no measurement.
#[derive(Debug, thiserror::Error)]
pub enum WanBenchError {
    /// The TUN router does not start.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The relay does not start.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// A test connection failed.
    #[error("a test connection over the emulated link failed: {0}")]
    Connection(#[from] io::Error),
}

/// Measures the TUN router with bulk under `congestion_control` for `duration`.
///
/// # Errors
/// [`WanBenchError`] without the rights for namespaces, or when a connection breaks.
pub fn measure_tun(
    model: LinkModel,
    congestion_control: &str,
    duration: Duration,
) -> Result<WanMeasurement, WanBenchError> {
    let lab = NamespaceLab::new(&NamespaceOptions::new(model))?;
    let listen = || TcpListener::bind((NamespaceLab::address(Side::B), 0));
    let listener = join(lab.run_in(Side::B, listen)?.join())??;
    let address = listener.local_addr()?;
    let _server = Server::start(listener)?;
    let connect = || -> Result<TcpStream, WanBenchError> {
        let name = congestion_control.to_owned();
        // Per socket: a namespace may not choose one that the system restricts, root may.
        let connect = move || -> io::Result<TcpStream> {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_tcp_congestion(name.as_bytes())?;
            socket.connect(&address.into())?;
            Ok(socket.into())
        };
        Ok(join(lab.run_in(Side::A, connect)?.join())??)
    };
    let mut measurement = measure(model, duration, connect)?;
    let counters = lab.counters();
    "tun".clone_into(&mut measurement.front_end);
    congestion_control.clone_into(&mut measurement.congestion_control);
    measurement.late = counters.late;
    measurement.dropped_queue = counters.a_to_b.dropped_queue;
    measurement.dropped_loss = counters.a_to_b.dropped_loss;
    Ok(measurement)
}

/// Measures the TCP relay for `duration`.
///
/// # Errors
/// [`WanBenchError`] when a connection breaks.
pub fn measure_relay(
    model: LinkModel,
    duration: Duration,
) -> Result<WanMeasurement, WanBenchError> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let target = listener.local_addr()?;
    let _server = Server::start(listener)?;
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let routes = vec![Route {
        listen,
        target,
        from: Side::A,
    }];
    let relay = Relay::start(&RelayOptions {
        model,
        routes,
        seed: 1,
    })?;
    let address = relay.addresses()[0];
    let mut measurement = measure(model, duration, || Ok(TcpStream::connect(address)?))?;
    "relay".clone_into(&mut measurement.front_end);
    Ok(measurement)
}

fn measure(
    model: LinkModel,
    duration: Duration,
    connect: impl Fn() -> Result<TcpStream, WanBenchError>,
) -> Result<WanMeasurement, WanBenchError> {
    let mut pinger = connect()?;
    pinger.set_nodelay(true)?;
    pinger.write_all(&[PING])?;
    ping(&mut pinger)?; // The first one also pays for the handshake.
    let mut idle = Vec::new();
    for _ in 0..IDLE_PINGS {
        thread::sleep(PING_PAUSE);
        idle.push(ping(&mut pinger)?);
    }
    let mut bulk = connect()?;
    bulk.write_all(&[BULK])?;
    let progress = Bulk::start(bulk)?;
    thread::sleep(WARM_UP);
    let (start, bytes, cpu) = (Instant::now(), progress.received(), emulator_cpu());
    let mut loaded = Vec::new();
    while start.elapsed() < duration {
        loaded.push(ping(&mut pinger)?);
        thread::sleep(PING_PAUSE);
    }
    let seconds = start.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "bytes of a short run")]
    let goodput = (progress.received() - bytes) as f64 * 8.0 / seconds;
    #[expect(clippy::cast_precision_loss, reason = "rates are far below 2^53")]
    let rate = model.rate_bits_per_sec as f64;
    Ok(WanMeasurement {
        link: model.to_string(),
        front_end: String::new(),
        congestion_control: String::new(),
        goodput_bits_per_sec: goodput,
        goodput_share: goodput / rate,
        idle_rtt_ms: median(&idle),
        idle_rtt_ms_max: idle.iter().copied().fold(0.0, f64::max),
        loaded_rtt_ms: median(&loaded),
        cpu_share: (emulator_cpu() - cpu) / seconds,
        late: 0,
        dropped_queue: 0,
        dropped_loss: 0,
    })
}

fn join<T>(result: thread::Result<T>) -> io::Result<T> {
    result.map_err(|_| io::Error::other("a thread of the benchmark panicked"))
}

/// First byte of a connection that wants every further byte back.
const PING: u8 = 1;
/// First byte of a connection that wants 8 bytes back after every so often: the count so far.
const BULK: u8 = 2;

/// One byte there and back, in milliseconds.
fn ping(stream: &mut TcpStream) -> io::Result<f64> {
    let start = Instant::now();
    let mut byte = [7];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Bytes that all servers of this process received on bulk connections.
static BULK_RECEIVED: AtomicU64 = AtomicU64::new(0);

/// Answers pings and swallows bulk. Ends when the connections do and the listener is closed.
struct Server {
    address: SocketAddr,
    is_stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(listener: TcpListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let is_stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&is_stopping);
        listener.set_nonblocking(true)?;
        let accept = move || {
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => drop(thread::spawn(move || serve(stream))),
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        };
        let thread = thread::Builder::new()
            .name("bench-server".into())
            .spawn(accept)?;
        Ok(Self {
            address,
            is_stopping,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(address = %self.address, "the benchmark's server panicked");
        }
    }
}

fn serve(mut stream: TcpStream) {
    let mut kind = [0];
    let is_ready = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_nodelay(true));
    if is_ready
        .and_then(|()| stream.read_exact(&mut kind))
        .is_err()
    {
        return;
    }
    let mut buffer = vec![0; 256 << 10];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if kind == [BULK] {
            BULK_RECEIVED.fetch_add(length as u64, Ordering::Relaxed);
        } else if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// A connection that sends as much as it can until it is dropped.
struct Bulk {
    stream: TcpStream,
    thread: Option<JoinHandle<()>>,
    received_before: u64,
}

impl Bulk {
    fn start(stream: TcpStream) -> io::Result<Self> {
        let received_before = BULK_RECEIVED.load(Ordering::Relaxed);
        let mut writer = stream.try_clone()?;
        let data = vec![0x5a; 256 << 10];
        let send = move || while writer.write_all(&data).is_ok() {};
        let thread = thread::Builder::new()
            .name("bench-bulk".into())
            .spawn(send)?;
        Ok(Self {
            stream,
            thread: Some(thread),
            received_before,
        })
    }

    fn received(&self) -> u64 {
        BULK_RECEIVED.load(Ordering::Relaxed) - self.received_before
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        // Wakes the sender up with an error.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// CPU seconds that this process's emulator threads used so far.
fn emulator_cpu() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else {
        return 0.0;
    };
    let cpu = |task: io::Result<std::fs::DirEntry>| -> Option<f64> {
        let path = task.ok()?.path();
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        if !matches!(name.trim(), "wan-A" | "wan-B" | "wan-relay") {
            return None;
        }
        // First field: time on the CPU in nanoseconds.
        let text = std::fs::read_to_string(path.join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    tasks.filter_map(cpu).sum::<f64>() / 1e9
}
