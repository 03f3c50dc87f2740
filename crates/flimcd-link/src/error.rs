//! Why a link is not up, in types for programs and in words for people.

use std::{io, sync::Arc, time::Duration};

use flimcd_core::SiteName;
use flimcd_wire::{DecodeError, HelloError, Refusal};

/// Why a link could not be set up, or went down. Cheap to clone: it is kept as the last failure and
/// handed out with the `Down` event.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    /// The address does not lead anywhere.
    #[error(
        "cannot find the address {address}: {source}; check the peer's address in the configuration"
    )]
    Resolve {
        /// Host and port as configured.
        address: String,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// Nobody listens there, or the way is blocked.
    #[error(
        "cannot connect to {address}: {source}; check that the peer's agent runs and that no firewall is in the way"
    )]
    Connect {
        /// Host and port.
        address: String,
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// No answer in time.
    #[error("no answer from {address} within {} s; check the network between the sites and the peer's address", .after.as_secs_f64())]
    ConnectTimeout {
        /// Host and port.
        address: String,
        /// How long was waited.
        after: Duration,
    },
    /// Connected, but the greeting did not end in time.
    #[error("the other end did not finish the handshake within {} s; check that a flimcd agent listens there", .after.as_secs_f64())]
    HandshakeTimeout {
        /// How long was waited.
        after: Duration,
    },
    /// The certificates do not fit.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The other end does not speak TLS, or not as it should.
    #[error(
        "the other end does not speak TLS 1.3 as an agent does ({source}); check the address and port"
    )]
    Tls {
        /// What rustls found.
        source: rustls::Error,
    },
    /// The greeting failed: another protocol, another version, or a refusal.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// This side refused a connection of the peer, and told it why.
    #[error("a connection of the peer was refused: {0}")]
    TurnedAway(Refusal),
    /// The peer sent something that is no frame. The bundle was closed.
    #[error("{0}; the connection was closed, nothing of it was used")]
    Malformed(#[from] DecodeError),
    /// The peer sent a frame of a class that does not belong on its connection.
    #[error(
        "the peer sent a {class} frame on connection {lane}, where it does not belong; the connection was closed"
    )]
    WrongLane {
        /// The frame's class.
        class: &'static str,
        /// The connection's number.
        lane: u8,
    },
    /// A connection failed.
    #[error("the connection to the peer failed: {source}; waiting for it to come back")]
    Io {
        /// What the system said.
        source: Arc<io::Error>,
    },
    /// The peer closed a connection.
    #[error("the peer closed the connection; waiting for it to come back")]
    Closed,
    /// The peer did not answer for too long. It may well be alive: only the link is taken for down.
    #[error("nothing was heard from the peer for {} s; waiting for the link to come back", .after.as_secs_f64())]
    Silent {
        /// How long nothing came.
        after: Duration,
    },
    /// The peer set up a new bundle of connections, so the old one was closed.
    #[error("the peer connected anew")]
    Replaced,
    /// This endpoint was stopped.
    #[error("the link was stopped on this side")]
    Stopped,
}

impl LinkError {
    pub(crate) fn io(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io {
                source: Arc::new(source),
            },
        }
    }
}

/// Why a certificate does not prove what it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Signed by somebody else.
    #[error(
        "the peer's certificate was issued by another authority than ours; issue the certificates of both sites with the same one (flimcd pki issue)"
    )]
    UnknownAuthority,
    /// Too old.
    #[error(
        "the peer's certificate has expired; issue a new one for it (flimcd pki issue SITE --force)"
    )]
    Expired,
    /// Too new, or a wrong clock.
    #[error("the peer's certificate is not valid yet; check the clocks of both sites")]
    NotValidYet,
    /// Not a certificate of a flimcd site.
    #[error("the peer's certificate names no flimcd site; issue one with flimcd pki issue")]
    NoSite,
    /// The certificate of another site.
    #[error(
        "expected site {expected}, but the other end has the certificate of site {found}; check the peer's address and name in the configuration"
    )]
    WrongSite {
        /// Who was dialled.
        expected: SiteName,
        /// Who answered.
        found: SiteName,
    },
    /// Anything else that is wrong with it.
    #[error("the peer's certificate was refused: {0}")]
    Refused(String),
    /// The peer does not like ours.
    #[error("the peer refused our certificate: {0}")]
    RefusedByPeer(&'static str),
}

/// Why an endpoint cannot be made from its configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No certificate or key in the text.
    #[error("cannot read the {what}: {problem}; expected PEM as flimcd pki issue writes it")]
    Pem {
        /// Which of the three.
        what: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// Certificate and key do not fit, or cannot be used.
    #[error("cannot use the certificate and key of this site: {0}")]
    Tls(#[from] rustls::Error),
    /// The certificate is of another site.
    #[error(
        "this site is configured as {configured}, but its certificate is of site {found}; issue one with flimcd pki issue {configured}, or correct the name"
    )]
    WrongSite {
        /// Name in the configuration.
        configured: SiteName,
        /// Name in the certificate.
        found: SiteName,
    },
    /// The certificate names no site.
    #[error("this site's own certificate names no flimcd site; issue one with flimcd pki issue")]
    NoSite,
    /// The site is its own peer.
    #[error("site {0} is among its own peers; remove it there, or correct this site's name")]
    OwnPeer(SiteName),
    /// A number outside of its bounds.
    #[error("{what} must be between {min} and {max}, not {value}")]
    Range {
        /// Which setting.
        what: &'static str,
        /// Its value.
        value: u64,
        /// Least allowed.
        min: u64,
        /// Most allowed.
        max: u64,
    },
}

/// Why no socket could be opened to listen on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}{}", listen_hint(.source))]
pub struct ListenError {
    /// The address asked for.
    pub address: String,
    /// What the system said.
    pub source: io::Error,
}

fn listen_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "; stop the process that uses the port, or choose another one",
        io::ErrorKind::AddrNotAvailable => "; use an address of this machine, or 0.0.0.0",
        io::ErrorKind::PermissionDenied => "; ports below 1024 need rights: choose another one",
        _ => "",
    }
}

/// Why a link does not know this peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("site {0} is not among the configured peers; add it to the configuration")]
pub struct UnknownPeer(pub SiteName);
