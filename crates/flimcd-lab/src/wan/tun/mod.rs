//! TUN router between two network namespaces: an emulated WAN that is faithful for any protocol,
//! because it handles packets one by one, with loss, jitter, reordering and a queue that drops.
//!
//! ```text
//!  namespace A                                                      namespace B
//!  processes ─ 10.77.0.1 ─ wan0 ─► router thread A→B: Link ─► wan0 ─ 10.77.0.2 ─ processes
//!                               ◄─ router thread B→A: Link ◄─
//! ```
//! It needs the right to make network namespaces and TUN devices: root, or a user namespace in
//! which the process is root ([`in_user_namespace`] starts a command in one, where the system
//! allows that). No tool is needed.
//!
//! **Nothing is left behind.** Namespaces have no names and devices are not persistent: both exist
//! through descriptors of this process alone, so they go away when the [`NamespaceLab`] is dropped,
//! after a panic, and after `kill -9`. Processes started with [`NamespaceLab::spawn`] are killed when
//! their handle is dropped; as long as one of them lives, its namespace does.

mod device;
mod namespace;
mod router;

use std::{
    io,
    net::Ipv4Addr,
    ops::{Deref, DerefMut},
    process::{Child, Command},
    sync::Arc,
};

use serde::Serialize;

use super::{LinkCounters, LinkModel, Side};
use device::TunDevice;
pub(crate) use namespace::Namespace;
use router::{Control, Router};

pub use namespace::{SideThread, in_user_namespace};

/// Largest send and receive buffer that TCP may grow to in each namespace: enough for 1 Gbit/s at
/// 200 ms.
const TCP_BUFFER_BYTES_MAX: u32 = 32 << 20;

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct NamespaceOptions {
    /// The link, the same in both directions.
    pub model: LinkModel,
    /// Largest packet: 1500 as on the Internet, up to 65535.
    pub mtu: u16,
    /// Decides losses, jitter and reordering.
    pub seed: u64,
}

impl NamespaceOptions {
    /// This link with Ethernet-sized packets.
    #[must_use]
    pub const fn new(model: LinkModel) -> Self {
        Self {
            model,
            mtu: 1500,
            seed: 1,
        }
    }
}

/// Why there is no lab.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// No right to make namespaces.
    #[error(
        "no right to make a network namespace ({0}); run it as root, or use the TCP relay, which \
         needs no rights"
    )]
    NotAllowed(io::Error),
    /// No TUN devices.
    #[error(
        "cannot make a TUN device ({0}); load the tun module and check the permissions of \
         /dev/net/tun, or use the TCP relay, which needs neither"
    )]
    NoTun(io::Error),
    /// A device was made and could not be set up.
    #[error("cannot {what}: {source}")]
    SetUp {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Threads or processes could not be started.
    #[error("cannot start {what} in the namespace: {source}")]
    Start {
        /// What was to be started.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// What the router did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RouterCounters {
    /// From side A to side B.
    pub a_to_b: LinkCounters,
    /// From side B to side A.
    pub b_to_a: LinkCounters,
    /// Packets handed over more than a millisecond after their time: the machine was too busy to
    /// keep the model, and figures of such a run mean little.
    pub late: u64,
    /// Packets that the receiving namespace did not take.
    pub refused: u64,
}

/// Two network namespaces with an emulated link between them.
#[derive(Debug)]
pub struct NamespaceLab {
    sides: [Namespace; 2],
    control: Arc<Control>,
    routers: Vec<Router>,
}

impl NamespaceLab {
    /// Builds both namespaces and starts the router.
    ///
    /// # Errors
    /// [`NamespaceError`] when the rights or the system's parts are missing.
    pub fn new(options: &NamespaceOptions) -> Result<Self, NamespaceError> {
        let (side_a, tun_a) = build_side(Side::A, options)?;
        let (side_b, tun_b) = build_side(Side::B, options)?;
        let (tun_a, tun_b) = (Arc::new(tun_a), Arc::new(tun_b));
        let control = Arc::new(Control::new(options));
        let mut lab = Self {
            sides: [side_a, side_b],
            control,
            routers: Vec::new(),
        };
        for (from, input, output) in [(Side::A, &tun_a, &tun_b), (Side::B, &tun_b, &tun_a)] {
            let (input, output) = (Arc::clone(input), Arc::clone(output));
            let router = Router::start(from, input, output, options, Arc::clone(&lab.control));
            let start = |source| NamespaceError::Start {
                what: "the router",
                source,
            };
            lab.routers.push(router.map_err(start)?);
        }
        Ok(lab)
    }

    /// Address of a side.
    #[must_use]
    pub const fn address(side: Side) -> Ipv4Addr {
        match side {
            Side::A => Ipv4Addr::new(10, 77, 0, 1),
            Side::B => Ipv4Addr::new(10, 77, 0, 2),
        }
    }

    /// Makes `command` run in a side's namespace once it is spawned.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn put_in(&self, side: Side, command: &mut Command) -> Result<(), NamespaceError> {
        let start = |source| NamespaceError::Start {
            what: "a process",
            source,
        };
        self.sides[side.index()].put_in(command).map_err(start)
    }

    /// Starts `command` in a side's namespace.
    ///
    /// # Errors
    /// Those of starting a process.
    pub fn spawn(&self, side: Side, mut command: Command) -> Result<SideChild, NamespaceError> {
        self.put_in(side, &mut command)?;
        let start = |source| NamespaceError::Start {
            what: "a process",
            source,
        };
        command.spawn().map(SideChild).map_err(start)
    }

    /// Runs `work` on a thread of its own in a side's namespace. Sockets made there belong to it
    /// for good, whichever thread uses them later.
    ///
    /// # Errors
    /// When no thread can be started or the namespace cannot be entered.
    pub fn run_in<T: Send + 'static>(
        &self,
        side: Side,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<SideThread<T>, NamespaceError> {
        let start = |source| NamespaceError::Start {
            what: "a thread",
            source,
        };
        self.sides[side.index()].run(work).map_err(start)
    }

    /// A side's namespace.
    pub(crate) const fn namespace(&self, side: Side) -> &Namespace {
        &self.sides[side.index()]
    }

    /// What went over the link so far.
    #[must_use]
    pub fn counters(&self) -> RouterCounters {
        self.control.counters()
    }

    /// Cuts the link: every packet is dropped from now on, those on the way too.
    pub fn cut(&self) {
        self.control.set_cut(true);
    }

    /// Joins the link again.
    pub fn restore(&self) {
        self.control.set_cut(false);
    }

    /// Changes the link from now on.
    pub fn set_model(&self, model: LinkModel) {
        self.control.set_model(model);
    }

    /// The congestion control that sockets of a side get when they ask for none. It is the
    /// machine's default: comparisons have to set it.
    ///
    /// # Errors
    /// When the setting cannot be read.
    pub fn congestion_control(&self, side: Side) -> Result<String, NamespaceError> {
        let set_up = |source| NamespaceError::SetUp {
            what: "read the congestion control",
            source,
        };
        let read = || std::fs::read_to_string(CONGESTION_CONTROL);
        let text = self.sides[side.index()].run_here(read).map_err(set_up)?;
        Ok(text.trim().to_owned())
    }

    /// Sets the congestion control for new sockets of both sides, such as `bbr` or `cubic`.
    ///
    /// # Errors
    /// When the kernel does not have it, or does not let namespaces choose it: what
    /// `/proc/sys/net/ipv4/tcp_allowed_congestion_control` lacks can only be set per socket, by root.
    pub fn set_congestion_control(&self, name: &str) -> Result<(), NamespaceError> {
        let set_up = |source| NamespaceError::SetUp {
            what: "set the congestion control",
            source,
        };
        for side in &self.sides {
            let name = name.to_owned();
            side.run_here(move || std::fs::write(CONGESTION_CONTROL, name))
                .map_err(set_up)?;
        }
        Ok(())
    }
}

const CONGESTION_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

fn build_side(
    side: Side,
    options: &NamespaceOptions,
) -> Result<(Namespace, TunDevice), NamespaceError> {
    let namespace = Namespace::new().map_err(NamespaceError::NotAllowed)?;
    let (address, mtu) = (NamespaceLab::address(side), options.mtu);
    let tun = namespace.run_here(move || Ok(set_up_side(address, mtu)));
    let start = |source| NamespaceError::Start {
        what: "a thread",
        source,
    };
    Ok((namespace, tun.map_err(start)??))
}

/// Runs in the namespace.
fn set_up_side(address: Ipv4Addr, mtu: u16) -> Result<TunDevice, NamespaceError> {
    let set_up = |what| move |source| NamespaceError::SetUp { what, source };
    let tun = TunDevice::new("wan0").map_err(NamespaceError::NoTun)?;
    device::configure("wan0", address, mtu).map_err(set_up("configure the TUN device"))?;
    device::bring_up("lo").map_err(set_up("bring the loopback up"))?;
    for name in ["tcp_rmem", "tcp_wmem"] {
        let path = format!("/proc/sys/net/ipv4/{name}");
        let value = format!("4096 131072 {TCP_BUFFER_BYTES_MAX}");
        std::fs::write(path, value).map_err(set_up("raise the TCP buffer limits"))?;
    }
    Ok(tun)
}

/// A process in a side's namespace; killed and waited for when this is dropped.
#[derive(Debug)]
pub struct SideChild(Child);

impl Deref for SideChild {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for SideChild {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for SideChild {
    fn drop(&mut self) {
        // It may have ended already, then both do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
