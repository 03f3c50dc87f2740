//! A guest's client: a ping every 10 ms and one TCP connection that is kept all along. What it sees of
//! a move is the downtime that counts.
//!
//! Pings are datagrams to the guest's echo service. A gap is the time between two answers that
//! came one after the other; without any trouble it is the interval. The TCP connection carries one
//! small request at a time, every 10 ms at most; its gap also has what TCP's own timers add.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::sites::{Place, Sites};
use crate::wan::tun::SideThread;

/// The guest's echo service.
const ECHO_PORT: u16 = 7000;
const INTERVAL: Duration = Duration::from_millis(10);
/// How often a waiting probe looks whether it is to end.
const STOP_POLL: Duration = Duration::from_millis(100);
const CONNECT_MAX: Duration = Duration::from_secs(20);

/// What a probe saw.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ProbeReport {
    /// Requests in the time looked at.
    pub sent: u64,
    /// Answers.
    pub received: u64,
    /// Longest time between two answers, or from the last one to the end.
    pub gap_ms_max: f64,
    /// When that gap began, in seconds from the beginning of the time looked at.
    pub gap_at_s: f64,
    /// Median round trip.
    pub rtt_ms_median: f64,
    /// Second by second: answers, and the longest gap that ended in it.
    pub seconds: Vec<ProbeSecond>,
    /// Why it ended early, if it did.
    pub broken: Option<String>,
}

/// One second of a probe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ProbeSecond {
    /// Answers.
    pub received: u64,
    /// Longest gap that ended in this second.
    pub gap_ms_max: f64,
}

/// What the client saw.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ClientReport {
    /// Datagrams every 10 ms.
    pub ping: ProbeReport,
    /// The connection.
    pub tcp: ProbeReport,
}

/// A running client.
#[derive(Debug)]
pub struct Client {
    stop: Arc<AtomicBool>,
    ping: Arc<Record>,
    tcp: Arc<Record>,
    threads: Vec<SideThread<()>>,
}

/// What a probe writes down.
#[derive(Debug, Default)]
struct Record(Mutex<Events>);

#[derive(Debug, Default)]
struct Events {
    sent: Vec<Instant>,
    /// When an answer came, and when its request was sent.
    answers: Vec<(Instant, Instant)>,
    broken: Option<String>,
}

impl Record {
    fn lock(&self) -> MutexGuard<'_, Events> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    /// Connects to the guest from the client's place and starts both probes.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn start(sites: &Sites) -> io::Result<Self> {
        let open = || -> io::Result<(UdpSocket, TcpStream)> {
            let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            udp.connect((Sites::GUEST, ECHO_PORT))?;
            let to = (Sites::GUEST, ECHO_PORT).into();
            let tcp = TcpStream::connect_timeout(&to, CONNECT_MAX)?;
            tcp.set_nodelay(true)?;
            Ok((udp, tcp))
        };
        let opened = sites.run_in(Place::Client, open)?.join();
        let (udp, stream) =
            opened.map_err(|_| io::Error::other("a thread of the lab panicked"))??;
        let mut client = Self {
            stop: Arc::default(),
            ping: Arc::default(),
            tcp: Arc::default(),
            threads: Vec::new(),
        };
        let (stop, record) = (Arc::clone(&client.stop), Arc::clone(&client.ping));
        let ping = move || end(&record, run_ping(&udp, &record, &stop));
        client.threads.push(sites.run_in(Place::Client, ping)?);
        let (stop, record) = (Arc::clone(&client.stop), Arc::clone(&client.tcp));
        let tcp = move || end(&record, run_tcp(stream, &record, &stop));
        client.threads.push(sites.run_in(Place::Client, tcp)?);
        Ok(client)
    }

    /// What was seen between two moments.
    #[must_use]
    pub fn report(&self, from: Instant, to: Instant) -> ClientReport {
        ClientReport {
            ping: self.ping.lock().report(from, to),
            tcp: self.tcp.lock().report(from, to),
        }
    }

    /// When the last answer to a ping came; `None` before the first.
    #[must_use]
    pub fn last_answer(&self) -> Option<Instant> {
        self.ping.lock().answers.last().map(|(came, _)| *came)
    }

    /// Waits until the guest has answered a ping that was sent after `moment`, and the connection too.
    /// False if that did not happen in time.
    #[must_use]
    pub fn wait_answers_after(&self, moment: Instant, longest: Duration) -> bool {
        let deadline = Instant::now() + longest;
        let has = |record: &Record| {
            let events = record.lock();
            events
                .answers
                .last()
                .is_some_and(|(_, sent)| *sent > moment)
        };
        while !(has(&self.ping) && has(&self.tcp)) {
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(INTERVAL);
        }
        true
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a probe of the client panicked");
            }
        }
    }
}

fn end(record: &Record, result: io::Result<()>) {
    if let Err(error) = result {
        record.lock().broken = Some(error.to_string());
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

/// Sends every interval whatever comes back.
fn run_ping(socket: &UdpSocket, record: &Record, stop: &AtomicBool) -> io::Result<()> {
    let mut buffer = [0; 64];
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        if now >= next {
            next = (next + INTERVAL).max(now);
            let number = {
                let mut events = record.lock();
                events.sent.push(now);
                events.sent.len() as u64
            };
            // An unreachable guest is a gap, not the end.
            let _ = socket.send(&number.to_le_bytes());
        }
        let wait = next.saturating_duration_since(Instant::now());
        socket.set_read_timeout(Some(wait.max(Duration::from_micros(100))))?;
        let Ok(8) = socket.recv(&mut buffer) else {
            continue;
        };
        let came = Instant::now();
        let mut number = [0; 8];
        number.copy_from_slice(&buffer[..8]);
        let index = usize::try_from(u64::from_le_bytes(number))
            .unwrap_or(0)
            .wrapping_sub(1);
        let mut events = record.lock();
        if let Some(sent) = events.sent.get(index).copied() {
            events.answers.push((came, sent));
        }
    }
    Ok(())
}

/// One request at a time. An answer that is not what was sent ends it: that would be corruption.
fn run_tcp(mut stream: TcpStream, record: &Record, stop: &AtomicBool) -> io::Result<()> {
    stream.set_read_timeout(Some(STOP_POLL))?;
    let mut buffer = [0; 64];
    for number in 0u64.. {
        let sent = Instant::now();
        record.lock().sent.push(sent);
        let mut request = [0; 64];
        request[..8].copy_from_slice(&number.to_le_bytes());
        request[56..].copy_from_slice(&number.to_be_bytes());
        stream.write_all(&request)?;
        let mut got = 0;
        while got < buffer.len() {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            match stream.read(&mut buffer[got..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => got += n,
                Err(error) if would_block(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if buffer != request {
            return Err(io::Error::other(format!(
                "request {number} came back with other bytes"
            )));
        }
        let came = Instant::now();
        record.lock().answers.push((came, sent));
        thread::sleep((sent + INTERVAL).saturating_duration_since(came));
    }
    Ok(())
}

impl Events {
    fn report(&self, from: Instant, to: Instant) -> ProbeReport {
        let is_inside = |moment: &Instant| *moment >= from && *moment <= to;
        let seconds = to.saturating_duration_since(from).as_secs() + 1;
        let seconds = usize::try_from(seconds).unwrap_or(usize::MAX).min(100_000);
        let mut report = ProbeReport {
            sent: self.sent.iter().filter(|sent| is_inside(sent)).count() as u64,
            seconds: vec![ProbeSecond::default(); seconds],
            broken: self.broken.clone(),
            ..ProbeReport::default()
        };
        let mut rtts = Vec::new();
        // A gap that began before counts with its part inside.
        let mut last = from;
        for (came, sent) in self.answers.iter().filter(|(came, _)| is_inside(came)) {
            report.received += 1;
            rtts.push(ms(came.saturating_duration_since(*sent)));
            report.add_gap(from, last, *came);
            let at = usize::try_from(came.duration_since(from).as_secs()).unwrap_or(0);
            if let Some(second) = report.seconds.get_mut(at) {
                second.received += 1;
            }
            last = *came;
        }
        report.add_gap(from, last, to.max(last));
        rtts.sort_by(f64::total_cmp);
        report.rtt_ms_median = rtts.get(rtts.len() / 2).copied().unwrap_or(0.0);
        report
    }
}

impl ProbeReport {
    fn add_gap(&mut self, from: Instant, last: Instant, came: Instant) {
        let gap = ms(came.saturating_duration_since(last));
        if gap > self.gap_ms_max {
            self.gap_ms_max = gap;
            self.gap_at_s = last.saturating_duration_since(from).as_secs_f64();
        }
        let at = usize::try_from(came.duration_since(from).as_secs()).unwrap_or(usize::MAX);
        if let Some(second) = self.seconds.get_mut(at) {
            second.gap_ms_max = second.gap_ms_max.max(gap);
        }
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_gap_is_found_also_at_the_edges() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut events = Events::default();
        for t in (0..1000).step_by(10).chain((1500..2000).step_by(10)) {
            events.sent.push(at(t));
            events.answers.push((at(t + 1), at(t)));
        }
        let whole = events.report(at(0), at(1990));
        assert_eq!((whole.sent, whole.received), (150, 149));
        assert_eq!((whole.gap_ms_max, whole.gap_at_s), (510.0, 0.991));
        assert_eq!(whole.rtt_ms_median, 1.0);
        assert_eq!(
            whole.seconds[0],
            ProbeSecond {
                received: 100,
                gap_ms_max: 10.0
            }
        );
        assert_eq!(whole.seconds[1].gap_ms_max, 510.0);
        // Part of a gap at either end, and nothing but a gap.
        assert_eq!(events.report(at(1200), at(1800)).gap_ms_max, 301.0);
        assert_eq!(events.report(at(500), at(1300)).gap_ms_max, 309.0);
        assert_eq!(events.report(at(1100), at(1200)).gap_ms_max, 100.0);
    }
}
