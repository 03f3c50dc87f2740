//! Two sites for guests: the emulated WAN with one L2 network across it, as two data centres that
//! stretch a network for the time of a move.
//!
//! ```text
//!  client ── eth0                site A                 WAN                site B
//!  192.168.50.1 └────► br0 ◄── vx100 ◄── wan0 ◄──── rate, delay ────► wan0 ──► vx100 ──► br0
//!                       ▲              10.77.0.1        loss          10.77.0.2           ▲
//!                      tap0 (guest 192.168.50.100 before)                   (guest after) tap0
//! ```
//! Everything runs in namespaces without names, held by descriptors of this process: whatever ends
//! it, the kernel removes namespaces, bridges and devices once the last process in them is gone.
//! Unix sockets are not divided by network namespaces: agents' APIs and monitors are reached from
//! anywhere. It needs root and iproute2.

use std::{
    io,
    net::{Ipv4Addr, TcpStream},
    process::Command,
    time::Duration,
};

use super::{
    Net, QemuError,
    process::{CONTROL_MAX, check_answer, converse},
    requirements::find_program,
};
use crate::wan::{
    LinkModel, Side,
    tun::{Namespace, NamespaceError, NamespaceLab, NamespaceOptions, RouterCounters, SideThread},
};

/// The guest's TAP device at either site.
const TAP: &str = "tap0";
/// Inner packets: Ethernet's 1500 less what VXLAN adds.
const INNER_MTU: &str = "1450";

/// The guest's program takes commands there.
const CONTROL_PORT: u16 = 7001;
const CONNECT_MAX: Duration = Duration::from_secs(30);

/// Where something runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At a site: agents and QEMU.
    Site(Side),
    /// At the guest's clients, which are near site A.
    Client,
}

/// Why there are no sites.
#[derive(Debug, thiserror::Error)]
pub enum SitesError {
    /// iproute2 is missing.
    #[error("{0} is not installed (Debian: apt install iproute2)")]
    NoTool(&'static str),
    /// Namespaces or the WAN between them.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// A command that sets up the network failed.
    #[error(
        "the sites' network cannot be set up: `{command}` said: {text}; it needs root, and the kernel \
         modules vxlan, bridge, veth and tun"
    )]
    Command {
        /// The command.
        command: String,
        /// What it said.
        text: String,
    },
}

/// Two sites and a client.
#[derive(Debug)]
pub struct Sites {
    lab: NamespaceLab,
    client: Namespace,
}

impl Sites {
    /// The guest's address.
    pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 100);
    /// The client's address.
    pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);

    /// Builds the namespaces, the WAN between them and the network across it.
    ///
    /// # Errors
    /// [`SitesError`] says which right or program is missing.
    pub fn new(model: LinkModel, seed: u64) -> Result<Self, SitesError> {
        for tool in ["ip", "nsenter"] {
            find_program(tool).ok_or(SitesError::NoTool(tool))?;
        }
        let options = NamespaceOptions {
            seed,
            ..NamespaceOptions::new(model)
        };
        let lab = NamespaceLab::new(&options)?;
        let client = Namespace::new().map_err(NamespaceError::NotAllowed)?;
        let sites = Self { lab, client };
        for side in [Side::A, Side::B] {
            sites.set_up_site(side)?;
        }
        sites.set_up_client()?;
        Ok(sites)
    }

    /// The WAN: counters, cuts, other models.
    #[must_use]
    pub const fn wan(&self) -> &NamespaceLab {
        &self.lab
    }

    /// What went over the WAN so far.
    #[must_use]
    pub fn counters(&self) -> RouterCounters {
        self.lab.counters()
    }

    /// A site's address on the WAN.
    #[must_use]
    pub const fn address(side: Side) -> Ipv4Addr {
        NamespaceLab::address(side)
    }

    /// The guest's network card, the same at both sites.
    #[must_use]
    pub fn net() -> Net {
        Net::Tap {
            device: TAP.to_owned(),
            address: format!("{}/24", Self::GUEST),
        }
    }

    /// Makes `command` run at `place` once it is spawned.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn put_in(&self, place: Place, command: &mut Command) -> io::Result<()> {
        self.namespace(place).put_in(command)
    }

    /// Runs `work` on a thread of its own at `place`. Sockets made there stay there.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn run_in<T: Send + 'static>(
        &self,
        place: Place,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<SideThread<T>> {
        self.namespace(place).run(work)
    }

    /// Words to put before a command line that somebody else is to run at `place`; good as long as
    /// this process lives.
    #[must_use]
    pub fn prefix(&self, place: Place) -> Vec<String> {
        let net = format!("--net={}", self.namespace(place).path());
        vec!["nsenter".to_owned(), net, "--".to_owned()]
    }

    /// Gives the guest's program a command from the client's place (see `guest/services.rs`) and returns
    /// its answer. Finds the guest wherever it runs, also when it moves meanwhile.
    ///
    /// # Errors
    /// [`QemuError::Control`] with the guest's answer when that is an error, or when none came.
    pub fn ask_guest(&self, command: &str) -> Result<String, QemuError> {
        let failed = |text: String| QemuError::Control {
            command: command.to_owned(),
            text,
        };
        let line = command.to_owned();
        let ask = move || -> io::Result<String> {
            let to = (Self::GUEST, CONTROL_PORT).into();
            let stream = TcpStream::connect_timeout(&to, CONNECT_MAX)?;
            stream.set_read_timeout(Some(CONTROL_MAX))?;
            converse(stream, &line)
        };
        let thread = self
            .run_in(Place::Client, ask)
            .map_err(|error| failed(error.to_string()))?;
        let answer = thread
            .join()
            .map_err(|_| failed("a thread of the lab panicked".to_owned()))?;
        check_answer(command, answer)
    }

    /// Sets the congestion control of connections between the sites, whichever program makes them.
    /// By route, because a namespace may not choose every algorithm as its default.
    ///
    /// # Errors
    /// When the kernel does not have it.
    pub fn set_congestion_control(&self, name: &str) -> Result<(), SitesError> {
        for side in [Side::A, Side::B] {
            let source = Self::address(side);
            let route = format!("route replace 10.77.0.0/24 dev wan0 src {source} congctl {name}");
            self.ip(Place::Site(side), &route)?;
        }
        Ok(())
    }

    fn namespace(&self, place: Place) -> &Namespace {
        match place {
            Place::Site(side) => self.lab.namespace(side),
            Place::Client => &self.client,
        }
    }

    fn set_up_site(&self, side: Side) -> Result<(), SitesError> {
        let (here, there) = (Self::address(side), Self::address(side.other()));
        self.without_ipv6(Place::Site(side));
        for command in [
            "link add br0 type bridge mcast_snooping 0".to_owned(),
            "link set br0 up".to_owned(),
            // One other end: it is the forwarding entry for every address.
            format!(
                "link add vx100 type vxlan id 100 local {here} remote {there} dstport 4789 dev wan0"
            ),
            format!("link set vx100 mtu {INNER_MTU} master br0 up"),
            format!("tuntap add dev {TAP} mode tap"),
            format!("link set {TAP} mtu {INNER_MTU} txqueuelen 2000 master br0 up"),
        ] {
            self.ip(Place::Site(side), &command)?;
        }
        Ok(())
    }

    fn set_up_client(&self) -> Result<(), SitesError> {
        self.without_ipv6(Place::Client);
        let client = self.client.path();
        let site = Place::Site(Side::A);
        self.ip(
            site,
            &format!("link add client0 type veth peer name eth0 netns {client}"),
        )?;
        self.ip(
            site,
            &format!("link set client0 mtu {INNER_MTU} master br0 up"),
        )?;
        let address = Self::CLIENT;
        for command in [
            "link set lo up".to_owned(),
            format!("link set eth0 mtu {INNER_MTU} up"),
            format!("addr add {address}/24 dev eth0"),
        ] {
            self.ip(Place::Client, &command)?;
        }
        Ok(())
    }

    /// Its chatter would only be noise on the link. A kernel without IPv6 has no such files.
    fn without_ipv6(&self, place: Place) {
        let write = || {
            for which in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
                let _ = std::fs::write(path, "1");
            }
        };
        if let Ok(thread) = self.run_in(place, write) {
            let _ = thread.join();
        }
    }

    fn ip(&self, place: Place, words: &str) -> Result<(), SitesError> {
        let failed = |text: String| SitesError::Command {
            command: format!("ip {words}"),
            text,
        };
        let tool = find_program("ip").ok_or(SitesError::NoTool("ip"))?;
        let mut command = Command::new(tool);
        command.args(words.split(' '));
        self.put_in(place, &mut command)
            .map_err(|error| failed(error.to_string()))?;
        let output = command
            .output()
            .map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        Err(failed(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ))
    }
}
