//! A TUN device: made, configured by ioctl, read and written packet by packet.

use std::{
    fs::File,
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::fs::{Mode, OFlags};

/// Packets that wait for the router at most, before any model: enough for what arrives while its
/// thread does not run for a moment. The modelled queue is the router's.
const DEVICE_QUEUE_PACKETS: i32 = 20_000;

/// A TUN device of the namespace it was made in; gone when this is dropped.
#[derive(Debug)]
pub(super) struct TunDevice(OwnedFd);

impl TunDevice {
    /// Makes one in the calling thread's namespace.
    pub(super) fn new(name: &str) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
        let mut request = request(name)?;
        // Plain packets: no header before them, no segments larger than the MTU.
        let flags = libc::IFF_TUN | libc::IFF_NO_PI;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
        ioctl(fd.as_fd(), libc::TUNSETIFF, &mut request)?;
        Ok(Self(fd))
    }

    /// The descriptor, to wait on.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Reads one packet; `None` when there is none.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match rustix::io::read(&self.0, buffer) {
            Ok(length) => Ok(Some(length)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Hands one packet to the namespace.
    pub(super) fn write(&self, packet: &[u8]) -> io::Result<()> {
        rustix::io::write(&self.0, packet)?;
        Ok(())
    }
}

/// Gives the device its address, MTU and queue, and brings it up.
pub(super) fn configure(name: &str, address: Ipv4Addr, mtu: u16) -> io::Result<()> {
    let socket = control_socket()?;
    let set = |what: libc::c_ulong, fill: &dyn Fn(&mut libc::ifreq)| -> io::Result<()> {
        let mut request = request(name)?;
        fill(&mut request);
        ioctl(socket.as_fd(), what, &mut request)
    };
    set(libc::SIOCSIFADDR, &|request| {
        request.ifr_ifru.ifru_addr = socket_address(address);
    })?;
    let netmask = socket_address(Ipv4Addr::new(255, 255, 255, 0));
    set(libc::SIOCSIFNETMASK, &|request| {
        request.ifr_ifru.ifru_netmask = netmask;
    })?;
    set(libc::SIOCSIFMTU, &|request| {
        request.ifr_ifru.ifru_mtu = i32::from(mtu);
    })?;
    let set_queue = set(libc::SIOCSIFTXQLEN, &|request| {
        // The same integer of the union that the kernel reads the queue's length from.
        request.ifr_ifru.ifru_metric = DEVICE_QUEUE_PACKETS;
    });
    if let Err(error) = set_queue {
        // Root of a user namespace may not. The default of 500 packets does for moderate rates.
        tracing::debug!(%error, "the TUN device keeps its short queue");
    }
    bring_up(name)
}

/// Brings an interface of the calling thread's namespace up.
pub(super) fn bring_up(name: &str) -> io::Result<()> {
    let socket = control_socket()?;
    let mut request = request(name)?;
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    ioctl(socket.as_fd(), libc::SIOCSIFFLAGS, &mut request)
}

/// Interfaces are configured through any socket.
fn control_socket() -> io::Result<File> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    Ok(File::from(OwnedFd::from(socket)))
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an ifreq is plain data, all zeroes are a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the interface name is too long",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_be_bytes([from]);
    }
    Ok(request)
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    // Port (2 bytes), then the address in network order.
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = libc::c_char::from_be_bytes([from]);
    }
    let family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default();
    libc::sockaddr {
        sa_family: family,
        sa_data: data,
    }
}

fn ioctl(fd: BorrowedFd<'_>, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // The type of the second argument differs between C libraries.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let what = what as libc::Ioctl;
    // SAFETY: every `what` used here takes a pointer to an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), what, std::ptr::from_mut(request)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
