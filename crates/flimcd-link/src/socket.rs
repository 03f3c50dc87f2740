//! What is asked of the kernel for each socket. Everything here is a wish: an old kernel that lacks
//! an option makes the link slower, not wrong, so failures are ignored.

use std::{
    io::{self, IoSlice},
    mem,
    os::fd::AsRawFd,
    time::Duration,
};

use socket2::SockRef;
use tokio::net::TcpStream;

/// Unsent bytes in the kernel that stop further writes, until the rate is known.
pub(crate) const NOTSENT_LOWAT: u32 = 128 * 1024;

/// The same for control and faults: as good as nothing, because what waits here could have gone by
/// another connection.
const NOTSENT_LOWAT_URGENT: u32 = 2;

/// Longest pause between retransmissions: without it TCP doubles the pause during an outage and
/// notices the link's return late by as much.
const RTO_MAX: Duration = Duration::from_secs(1);
/// Linux 6.15 and later; not in libc yet.
const TCP_RTO_MAX_MS: libc::c_int = 44;

/// `tcpi_ca_state` of a connection that has no reason to send anything again.
const TCP_CA_OPEN: u8 = 0;

/// Settings that every connection of a link gets, dialled or accepted.
pub(crate) fn prepare(tcp: &TcpStream, user_timeout: Duration) {
    let socket = SockRef::from(tcp);
    let _ = tcp.set_nodelay(true);
    let _ = socket.set_tcp_congestion(b"bbr");
    let _ = socket.set_tcp_notsent_lowat(NOTSENT_LOWAT);
    let _ = socket.set_tcp_user_timeout(Some(user_timeout));
    let millis = libc::c_int::try_from(RTO_MAX.as_millis()).unwrap_or(libc::c_int::MAX);
    let _ = set_option(tcp, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, &millis);
}

/// Name of the congestion control in use, `unknown` if the kernel does not tell.
pub(crate) fn congestion_control(tcp: &TcpStream) -> String {
    SockRef::from(tcp)
        .tcp_congestion()
        .ok()
        .and_then(|name| {
            let name = name.split(|&byte| byte == 0).next()?;
            String::from_utf8(name.to_vec()).ok()
        })
        .unwrap_or_else(|| "unknown".to_owned())
}

/// Whether a socket can have BBR here.
pub(crate) fn has_bbr() -> bool {
    socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .and_then(|socket| socket.set_tcp_congestion(b"bbr"))
        .is_ok()
}

/// For a connection that carries control or faults.
pub(crate) fn keep_short(tcp: &TcpStream) {
    set_notsent_lowat(tcp, NOTSENT_LOWAT_URGENT);
}

/// Whether the kernel holds less unsent data than the mark, or the connection failed.
pub(crate) fn takes_more(tcp: &TcpStream) -> bool {
    let mut poll = libc::pollfd {
        fd: tcp.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one entry, which lives through the call; with no timeout it does not block.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready != 0
}

/// Hands bytes to the kernel. With `more_follows` a packet that they do not fill waits for more, until the next bytes are
/// acknowledged or [`push`] is called.
pub(crate) fn send(tcp: &TcpStream, bufs: &[IoSlice<'_>], more_follows: bool) -> io::Result<usize> {
    let more = if more_follows { libc::MSG_MORE } else { 0 };
    SockRef::from(tcp).send_vectored_with_flags(bufs, libc::MSG_NOSIGNAL | more)
}

/// Sends what waits for more: setting the option again does that, and every connection has it set.
pub(crate) fn push(tcp: &TcpStream) {
    let _ = tcp.set_nodelay(true);
}

/// How many unsent bytes stop further writes.
pub(crate) fn set_notsent_lowat(tcp: &TcpStream, bytes: u32) {
    let _ = SockRef::from(tcp).set_tcp_notsent_lowat(bytes);
}

/// Upper bound of the sending rate, `None` for no bound.
pub(crate) fn set_pacing_rate(tcp: &TcpStream, bytes_per_sec: Option<u64>) {
    // Older kernels take 32 bits only and would refuse nothing but read half of a longer value;
    // every kernel takes all ones as "no bound".
    let rate: libc::c_ulong = match bytes_per_sec {
        None => libc::c_ulong::MAX,
        Some(rate) => libc::c_ulong::try_from(rate.max(1)).unwrap_or(libc::c_ulong::MAX),
    };
    let _ = set_option(tcp, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, &rate);
}

/// Discards what is unsent when the socket is closed, so that a dead bundle does not compete with
/// the next one.
pub(crate) fn discard_on_close(tcp: &TcpStream) {
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

/// What the kernel knows about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TcpInfo {
    /// Bytes that reached the peer's kernel, whether or not in order.
    pub(crate) delivered_bytes: u64,
    /// Smoothed round trip.
    pub(crate) rtt: Duration,
    /// Least round trip seen lately; `None` before the first.
    pub(crate) rtt_min: Option<Duration>,
    /// Bytes that the kernel holds and has not sent yet.
    pub(crate) unsent_bytes: u64,
    /// Packets on their way.
    pub(crate) in_flight: u32,
    /// How many more packets may be sent at once.
    pub(crate) room: u32,
    /// Bytes in a full packet.
    pub(crate) packet_bytes: u32,
    /// Nothing seems lost or out of order.
    pub(crate) is_in_order: bool,
}

/// Asks the kernel; `None` where it does not tell.
pub(crate) fn tcp_info(tcp: &TcpStream) -> Option<TcpInfo> {
    // SAFETY: `tcp_info` is a plain struct of integers, for which all zeros is a value.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of_val(&info)).ok()?;
    // SAFETY: the descriptor is open as long as `tcp` is borrowed; the pointers are to locals that
    // outlive the call, and `len` is the size of `info`, which is as much as the kernel writes at
    // most. A kernel that knows fewer fields writes less, and the rest stays zero.
    let result = unsafe {
        libc::getsockopt(
            tcp.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return None;
    }
    let in_flight =
        (info.tcpi_unacked + info.tcpi_retrans).saturating_sub(info.tcpi_sacked + info.tcpi_lost);
    let has_rtt = info.tcpi_min_rtt != 0 && info.tcpi_min_rtt != u32::MAX;
    Some(TcpInfo {
        delivered_bytes: u64::from(info.tcpi_delivered) * u64::from(info.tcpi_snd_mss),
        rtt: Duration::from_micros(info.tcpi_rtt.into()),
        rtt_min: has_rtt.then(|| Duration::from_micros(info.tcpi_min_rtt.into())),
        unsent_bytes: info.tcpi_notsent_bytes.into(),
        in_flight,
        room: info.tcpi_snd_cwnd.saturating_sub(in_flight),
        packet_bytes: info.tcpi_snd_mss.max(1),
        is_in_order: info.tcpi_ca_state == TCP_CA_OPEN,
    })
}

fn set_option<T>(tcp: &TcpStream, level: i32, name: i32, value: &T) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open as long as `tcp` is borrowed; `value` points to `len` bytes
    // that live through the call, and the kernel copies them.
    let result = unsafe {
        libc::setsockopt(
            tcp.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast(),
            len,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
