//! Two endpoints and what tests need to look at them.

use std::{fs, path::Path, time::Duration};

use flimcd_core::{BlockRange, MigrationId, Seq, SiteName};
use flimcd_link::{Endpoint, LinkConfig, LinkEvent, LinkHandle, TlsIdentity, pki};
use flimcd_wire::{Blocks, Class, Content, Entry, Frame, Message};
use tempfile::TempDir;

pub(crate) fn site(name: &str) -> SiteName {
    name.parse().unwrap()
}

/// An authority that issues what a test asks for.
pub(crate) struct Authority(TempDir);

impl Authority {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::create_ca(dir.path(), false).unwrap();
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn identity(&self, name: &str) -> TlsIdentity {
        let issued = pki::issue(self.path(), &site(name), true).unwrap();
        TlsIdentity {
            ca_pem: fs::read_to_string(self.path().join("ca.pem")).unwrap(),
            cert_pem: fs::read_to_string(issued.certificate).unwrap(),
            key_pem: fs::read_to_string(issued.key).unwrap(),
        }
    }

    pub(crate) fn config(&self, name: &str, peers: &[&str]) -> LinkConfig {
        let mut config = LinkConfig::new(site(name), self.identity(name));
        config.peers = peers.iter().map(|peer| site(peer)).collect();
        config
    }

    pub(crate) fn endpoint(&self, name: &str, peers: &[&str]) -> Endpoint {
        Endpoint::new(self.config(name, peers)).unwrap()
    }
}

/// Two linked sites; `west` dialled.
pub(crate) struct Pair {
    pub(crate) east_endpoint: Endpoint,
    pub(crate) west_endpoint: Endpoint,
    pub(crate) east: LinkHandle,
    pub(crate) west: LinkHandle,
}

impl Pair {
    pub(crate) async fn up(tune: impl Fn(&mut LinkConfig)) -> Self {
        let authority = Authority::new();
        let endpoint = |name, peer| {
            let mut config = authority.config(name, &[peer]);
            tune(&mut config);
            Endpoint::new(config).unwrap()
        };
        let east_endpoint = endpoint("east", "west");
        let west_endpoint = endpoint("west", "east");
        let address = east_endpoint.listen("127.0.0.1:0").await.unwrap();
        let west = west_endpoint
            .link(&site("east"), &address.to_string())
            .unwrap();
        let east = east_endpoint.peer(&site("west")).unwrap();
        assert_eq!(next_up(&west).await, 1);
        assert_eq!(next_up(&east).await, 1);
        Self {
            east_endpoint,
            west_endpoint,
            east,
            west,
        }
    }

    pub(crate) fn stop(&self) {
        self.east_endpoint.stop();
        self.west_endpoint.stop();
    }
}

/// The next event, which must be `Up`; its generation.
pub(crate) async fn next_up(link: &LinkHandle) -> u64 {
    match next(link).await {
        LinkEvent::Up { generation } => generation,
        other => panic!("expected Up, got {other:?}"),
    }
}

pub(crate) async fn next_frame(link: &LinkHandle) -> Frame {
    match next(link).await {
        LinkEvent::Frame { frame, .. } => frame,
        other => panic!("expected a frame, got {other:?}"),
    }
}

/// The next event; a bound on hanging tests, not on speed.
pub(crate) async fn next(link: &LinkHandle) -> LinkEvent {
    let event = tokio::time::timeout(Duration::from_secs(60), link.next_event());
    event.await.expect("nothing happens").expect("stopped")
}

pub(crate) fn message(id: u64, class: Class) -> Frame {
    Frame {
        migration: MigrationId(id),
        class,
        message: Message::Complete,
    }
}

/// A frame with `len` bytes of payload that tell its number.
pub(crate) fn blocks(id: u64, class: Class, len: usize) -> Frame {
    let range = BlockRange::new(id, id + (len as u64).div_ceil(4096));
    let payload: Vec<u8> = (0..len).map(|at| (at as u64 * 31 + id) as u8).collect();
    Frame {
        migration: MigrationId(id),
        class,
        message: Message::Blocks(Blocks {
            seq: Seq(id),
            entries: vec![Entry {
                range,
                content: Content::Raw { len: len as u32 },
            }],
            payload: payload.into(),
        }),
    }
}
