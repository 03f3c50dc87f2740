//! One emulated WAN behind either front end, for what runs over both: the router where the rights
//! for it are there, and the relay where they are not.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde::Serialize;

use super::{
    LinkModel, Side,
    relay::{Relay, RelayCounters, RelayError, RelayOptions, Route},
    tun::{NamespaceError, NamespaceLab, NamespaceOptions},
};

const CONNECT_MAX: Duration = Duration::from_secs(1);

/// Why there is no WAN, or why something cannot run on it.
#[derive(Debug, thiserror::Error)]
pub enum WanError {
    /// The router.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The relay.
    #[error("the emulated link cannot be started: {0}")]
    Relay(#[from] RelayError),
}

/// What went over a [`Wan`]: whole packets with a router, payload with a relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WanBytes {
    /// From side A to side B.
    pub a_to_b: u64,
    /// From side B to side A.
    pub b_to_a: u64,
    /// Packets that came too late to keep the model. A relay counts none.
    pub late_packets: u64,
}

impl WanBytes {
    /// Both directions.
    #[must_use]
    pub const fn both(&self) -> u64 {
        self.a_to_b + self.b_to_a
    }

    /// What came on top since `earlier`.
    #[must_use]
    pub const fn since(&self, earlier: &Self) -> Self {
        Self {
            a_to_b: self.a_to_b - earlier.a_to_b,
            b_to_a: self.b_to_a - earlier.b_to_a,
            late_packets: self.late_packets - earlier.late_packets,
        }
    }
}

/// An emulated WAN between two sites.
///
/// A program of a site is started by a command that went through [`Wan::put_in`], listens on the
/// site's [`Wan::address`], and is reached from the other site under what [`Wan::reach`] says.
#[derive(Debug)]
pub struct Wan {
    model: Mutex<LinkModel>,
    seed: u64,
    front: Front,
}

#[derive(Debug)]
enum Front {
    Router(NamespaceLab),
    /// One for each address that is reached; what runs at the same time must share one.
    Relays(Mutex<Vec<Relay>>),
}

impl Wan {
    /// Namespaces with a router between.
    ///
    /// # Errors
    /// [`WanError::Namespace`] without the rights.
    pub fn router(model: LinkModel, seed: u64) -> Result<Self, WanError> {
        let options = NamespaceOptions {
            seed,
            ..NamespaceOptions::new(model)
        };
        let lab = NamespaceLab::new(&options)?;
        // Where the kernel lets a namespace choose. Programs that ask for it by themselves get it anyhow.
        if let Err(error) = lab.set_congestion_control("bbr") {
            tracing::debug!(%error, "the machine's congestion control stays");
        }
        Ok(Self {
            model: Mutex::new(model),
            seed,
            front: Front::Router(lab),
        })
    }

    /// Everything on the loopback, with a relay between.
    #[must_use]
    pub const fn relay(model: LinkModel, seed: u64) -> Self {
        Self {
            model: Mutex::new(model),
            seed,
            front: Front::Relays(Mutex::new(Vec::new())),
        }
    }

    /// `tun` or `relay`.
    #[must_use]
    pub const fn front_end(&self) -> &'static str {
        match self.front {
            Front::Router(_) => "tun",
            Front::Relays(_) => "relay",
        }
    }

    /// What the model asks for and this front end cannot do, for people.
    #[must_use]
    pub fn cannot_model(&self) -> Option<String> {
        match &self.front {
            Front::Router(_) => None,
            Front::Relays(relays) => {
                let relays = relays.lock().unwrap_or_else(PoisonError::into_inner);
                relays.first()?.cannot_model().map(str::to_owned)
            }
        }
    }

    /// Where programs of a site listen.
    #[must_use]
    pub const fn address(&self, side: Side) -> IpAddr {
        IpAddr::V4(match self.front {
            Front::Router(_) => NamespaceLab::address(side),
            Front::Relays(_) => Ipv4Addr::LOCALHOST,
        })
    }

    /// Makes `command` run at a site once it is spawned.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn put_in(&self, side: Side, command: &mut Command) -> Result<(), WanError> {
        match &self.front {
            Front::Router(lab) => Ok(lab.put_in(side, command)?),
            Front::Relays(_) => Ok(()),
        }
    }

    /// Under which address programs of site `from` reach what listens on `target` at the other one.
    ///
    /// # Errors
    /// [`WanError::Relay`] when no relay can be started.
    pub fn reach(&self, from: Side, target: SocketAddr) -> Result<SocketAddr, WanError> {
        let Front::Relays(relays) = &self.front else {
            return Ok(target);
        };
        let relay = Relay::start(&RelayOptions {
            model: self.model(),
            routes: vec![Route {
                listen: (Ipv4Addr::LOCALHOST, 0).into(),
                target,
                from,
            }],
            seed: self.seed,
        })?;
        let address = relay.addresses()[0];
        let mut relays = relays.lock().unwrap_or_else(PoisonError::into_inner);
        relays.push(relay);
        Ok(address)
    }

    /// Whether something listens on `address` at a site. Connects there from the same site.
    ///
    /// # Errors
    /// When no thread can be started there.
    pub fn is_listening(&self, side: Side, address: SocketAddr) -> Result<bool, WanError> {
        let connect = move || TcpStream::connect_timeout(&address, CONNECT_MAX).is_ok();
        match &self.front {
            Front::Router(lab) => Ok(lab.run_in(side, connect)?.join().unwrap_or(false)),
            Front::Relays(_) => Ok(connect()),
        }
    }

    /// What went over it so far.
    #[must_use]
    pub fn bytes(&self) -> WanBytes {
        match &self.front {
            Front::Router(lab) => {
                let counters = lab.counters();
                WanBytes {
                    a_to_b: counters.a_to_b.bytes,
                    b_to_a: counters.b_to_a.bytes,
                    late_packets: counters.late,
                }
            }
            Front::Relays(relays) => {
                let relays = relays.lock().unwrap_or_else(PoisonError::into_inner);
                let all = relays.iter().map(Relay::counters);
                all.fold(WanBytes::default(), |sum, one: RelayCounters| WanBytes {
                    a_to_b: sum.a_to_b + one.a_to_b.bytes,
                    b_to_a: sum.b_to_a + one.b_to_a.bytes,
                    late_packets: 0,
                })
            }
        }
    }

    /// The link as it is now.
    #[must_use]
    pub fn model(&self) -> LinkModel {
        *self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the link from now on.
    pub fn set_model(&self, model: LinkModel) {
        *self.model.lock().unwrap_or_else(PoisonError::into_inner) = model;
        match &self.front {
            Front::Router(lab) => lab.set_model(model),
            Front::Relays(relays) => {
                let relays = relays.lock().unwrap_or_else(PoisonError::into_inner);
                relays.iter().for_each(|relay| relay.set_model(model));
            }
        }
    }
}
