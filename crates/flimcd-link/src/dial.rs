//! Keeps dialling one peer while its link is down.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use flimcd_wire::Hello;
use rustls::ClientConfig;
use tokio::{
    net::{TcpStream, lookup_host},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    IdentityError, LinkError,
    endpoint::Shared,
    greet,
    lane::Lane,
    link::{Link, Origin},
    socket,
};

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Head start of a peer whose bundle would win if both dialled at once.
const GIVE_WAY: Duration = Duration::from_millis(100);

/// Pauses between attempts: doubling, each shortened by a random part so that two sides that fail
/// together do not try together for ever.
#[derive(Debug)]
struct Backoff(Duration);

impl Backoff {
    fn next(&mut self, random: u64) -> Duration {
        let pause = self.0;
        self.0 = (self.0 * 2).min(BACKOFF_MAX);
        let part = u32::try_from(random % 1000).unwrap_or(0);
        pause - pause / 2 * part / 1000
    }
}

/// See the module.
pub(crate) struct Dialler {
    shared: Arc<Shared>,
    link: Arc<Link>,
    address: String,
}

impl Dialler {
    pub(crate) fn new(shared: Arc<Shared>, link: Arc<Link>, address: String) -> Self {
        Self {
            shared,
            link,
            address,
        }
    }

    pub(crate) async fn run(self) {
        let tls = match self.shared.credentials.client(&self.link.peer) {
            Ok(tls) => tls,
            Err(error) => {
                self.link
                    .fail(IdentityError::Refused(error.to_string()).into());
                return;
            }
        };
        let mut status = self.link.status.subscribe();
        let mut backoff = Backoff(BACKOFF_MIN);
        loop {
            if status.wait_for(|status| !status.is_up).await.is_err() {
                return;
            }
            if !self.link.has_precedence {
                // The peer may be about to dial as well, and its bundle would win.
                let up = status.wait_for(|status| status.is_up);
                if timeout(GIVE_WAY, up).await.is_ok() {
                    continue;
                }
            }
            let begun = Instant::now();
            let result = tokio::select! {
                result = self.dial(&tls) => result,
                // The peer was faster. With precedence the attempt goes on, because the peer may have
                // seen it already and be about to prefer it.
                _ = status.wait_for(|status| status.is_up), if !self.link.has_precedence => {
                    backoff = Backoff(BACKOFF_MIN);
                    continue;
                }
            };
            match result {
                Ok(lanes) => {
                    self.link.install(lanes, Origin::Dialled);
                    backoff = Backoff(BACKOFF_MIN);
                }
                Err(error) => self.link.fail(error),
            }
            // Counted from the beginning of the attempt: one that waited long was pause enough.
            let pause = backoff.next(self.shared.credentials.random());
            let rest = pause.saturating_sub(begun.elapsed()).max(BACKOFF_MIN / 2);
            tokio::select! {
                () = sleep(rest) => {}
                _ = status.wait_for(|status| status.is_up) => {}
            }
        }
    }

    /// Opens all connections of a bundle at once; any failure is the bundle's.
    async fn dial(&self, tls: &Arc<ClientConfig>) -> Result<Vec<Lane>, LinkError> {
        let lanes = self.shared.lanes();
        let bundle = self.shared.credentials.random();
        let mut tasks = JoinSet::new();
        for lane in 0..lanes {
            let hello = Hello {
                site: self.shared.config.site.clone(),
                bundle,
                lane,
                lanes,
            };
            let (shared, link) = (self.shared.clone(), self.link.clone());
            let (address, tls) = (self.address.clone(), tls.clone());
            tasks.spawn(async move { dial_lane(&shared, &link, &address, tls, &hello).await });
        }
        let mut done = Vec::new();
        while let Some(result) = tasks.join_next().await {
            match result {
                Ok(lane) => done.push(lane?),
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            }
        }
        done.sort_by_key(|lane| lane.index);
        Ok(done)
    }
}

async fn dial_lane(
    shared: &Shared,
    link: &Link,
    address: &str,
    tls: Arc<ClientConfig>,
    hello: &Hello,
) -> Result<Lane, LinkError> {
    let tcp = connect(address, shared.config.connect_timeout).await?;
    socket::prepare(&tcp, shared.config.silence_max);
    let after = shared.config.handshake_timeout;
    let greeting = greet::dial(tcp, tls, hello, &link.peer, &link.traffic);
    timeout(after, greeting)
        .await
        .unwrap_or(Err(LinkError::HandshakeTimeout { after }))
}

/// Connects to the first of the name's addresses that answers.
async fn connect(address: &str, after: Duration) -> Result<TcpStream, LinkError> {
    let no_address = |source| LinkError::Resolve {
        address: address.to_owned(),
        source: Arc::new(source),
    };
    let resolved = timeout(after, lookup_host(address)).await;
    let found = resolved.map_err(|_| LinkError::ConnectTimeout {
        address: address.to_owned(),
        after,
    })?;
    let mut last = no_address(std::io::ErrorKind::NotFound.into());
    for candidate in found.map_err(no_address)? {
        last = match timeout(after, TcpStream::connect(candidate)).await {
            Ok(Ok(tcp)) => return Ok(tcp),
            Ok(Err(source)) => LinkError::Connect {
                address: address.to_owned(),
                source: Arc::new(source),
            },
            Err(_) => LinkError::ConnectTimeout {
                address: address.to_owned(),
                after,
            },
        };
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound_with_jitter() {
        let mut backoff = Backoff(BACKOFF_MIN);
        let pauses: Vec<_> = (0..8).map(|_| backoff.next(0).as_millis()).collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        let shortest = Backoff(BACKOFF_MAX).next(999);
        assert!(shortest >= BACKOFF_MAX / 2 && shortest < BACKOFF_MAX * 51 / 100);
    }
}
