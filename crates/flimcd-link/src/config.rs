//! Settings of an endpoint and their bounds.

use std::time::Duration;

use flimcd_core::SiteName;

use crate::{ConfigError, TlsIdentity};

/// Most bulk connections in a bundle.
pub const BULK_CONNECTIONS_MAX: u8 = 8;

/// Settings of an [`crate::Endpoint`].
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// Name of this site; must be the one in its certificate.
    pub site: SiteName,
    /// Certificates of this site.
    pub tls: TlsIdentity,
    /// Sites that may connect or be dialled. All others are refused.
    pub peers: Vec<SiteName>,
    /// Connections for bulk data, 1 to 8. `None`: 1 where the kernel has BBR, else 4. The dialler's
    /// setting counts.
    pub bulk_connections: Option<u8>,
    /// Bytes per second that each link sends at most, faults excepted. Can be changed later.
    pub ceiling_bytes_per_sec: Option<u64>,
    /// Whether faults count against the ceiling and wait for it, too.
    pub ceiling_includes_faults: bool,
    /// Silence after which a link is taken for down. Pings go out several times as often.
    pub silence_max: Duration,
    /// Longest wait for a TCP connection.
    pub connect_timeout: Duration,
    /// Longest TLS handshake and greeting.
    pub handshake_timeout: Duration,
}

impl LinkConfig {
    /// The defaults for `site`, with no peers yet.
    #[must_use]
    pub fn new(site: SiteName, tls: TlsIdentity) -> Self {
        Self {
            site,
            tls,
            peers: Vec::new(),
            bulk_connections: None,
            ceiling_bytes_per_sec: None,
            ceiling_includes_faults: false,
            silence_max: Duration::from_secs(10),
            connect_timeout: Duration::from_millis(1500),
            handshake_timeout: Duration::from_secs(5),
        }
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let range = |what, value, min, max| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(ConfigError::Range {
                    what,
                    value,
                    min,
                    max,
                })
            }
        };
        if self.peers.contains(&self.site) {
            return Err(ConfigError::OwnPeer(self.site.clone()));
        }
        let bulk = u64::from(self.bulk_connections.unwrap_or(1));
        range(
            "the number of bulk connections",
            bulk,
            1,
            u64::from(BULK_CONNECTIONS_MAX),
        )?;
        if let Some(rate) = self.ceiling_bytes_per_sec {
            range(
                "the bandwidth limit in bytes per second",
                rate,
                CEILING_MIN,
                u64::MAX,
            )?;
        }
        Ok(())
    }
}

/// A ceiling below this (16 kB/s) would starve the messages that keep a migration alive.
pub(crate) const CEILING_MIN: u64 = 16_000;
