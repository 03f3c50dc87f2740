//! Pumps over real sockets and a real link that is cut.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use flimcd_core::{Epoch, MigrationId};
use flimcd_link::{Endpoint, LinkConfig, LinkHandle, TlsIdentity, pki};
use flimcd_wire::{CheckOpen, Message, Open, PlanOpen, VmMessage, VmOpen};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::watch,
    task::JoinHandle,
};

use super::{PumpEvent, RamPump, socket_path};
use crate::links::{Admit, Inbox, PeerLink};

const SESSION: MigrationId = MigrationId(0x1234_5678_9abc);
const PATIENCE: Duration = Duration::from_secs(60);

struct NoAdmission;

impl Admit for NoAdmission {
    fn admit(self: Arc<Self>, _: &Arc<PeerLink>, _: MigrationId, _: Open, _: Inbox) {}
    fn admit_vm(self: Arc<Self>, _: &Arc<PeerLink>, _: MigrationId, _: VmOpen, _: Inbox) {}
    fn admit_plan(self: Arc<Self>, _: &Arc<PeerLink>, _: MigrationId, _: PlanOpen, _: Inbox) {}
    fn admit_check(self: Arc<Self>, _: &Arc<PeerLink>, _: MigrationId, _: CheckOpen, _: Inbox) {}
    fn cancel_switch(self: Arc<Self>, _: &Arc<PeerLink>, _: MigrationId, _: Epoch) {}
    fn peer_is_up(self: Arc<Self>, _: &Arc<PeerLink>) {}
}

/// Forwards connections, and cuts them all when told.
struct Wire {
    address: SocketAddr,
    cuts: watch::Sender<u64>,
}

impl Wire {
    async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cuts = watch::Sender::new(0);
        let cut = cuts.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut cut = cut.subscribe();
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(target).await else {
                        return;
                    };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = cut.changed() => {}
                    }
                });
            }
        });
        Self { address, cuts }
    }

    fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

struct World {
    dir: TempDir,
    wire: Wire,
    source: Arc<PeerLink>,
    target: Arc<PeerLink>,
    /// What carries them.
    _endpoints: [Endpoint; 2],
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::create_ca(dir.path(), false).unwrap();
        let endpoint = |name: &str, peer: &str| {
            let issued = pki::issue(dir.path(), &name.parse().unwrap(), false).unwrap();
            let identity = TlsIdentity {
                ca_pem: fs::read_to_string(dir.path().join("ca.pem")).unwrap(),
                cert_pem: fs::read_to_string(issued.certificate).unwrap(),
                key_pem: fs::read_to_string(issued.key).unwrap(),
            };
            let mut config = LinkConfig::new(name.parse().unwrap(), identity);
            config.peers = vec![peer.parse().unwrap()];
            Endpoint::new(config).unwrap()
        };
        let endpoints = [endpoint("east", "west"), endpoint("west", "east")];
        let address = endpoints[1].listen("127.0.0.1:0").await.unwrap();
        let wire = Wire::to(address).await;
        let west = "west".parse().unwrap();
        let source = endpoints[0].link(&west, &wire.address.to_string()).unwrap();
        let target = endpoints[1].peer(&"east".parse().unwrap()).unwrap();
        let route = |handle: LinkHandle| {
            let link = PeerLink::new(handle);
            tokio::spawn(link.clone().route(Arc::new(NoAdmission)));
            link
        };
        Self {
            source: route(source),
            target: route(target),
            dir,
            wire,
            _endpoints: endpoints,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Both pumps, each with what passes the link's news on, and the socket of the hypervisor at the target.
    fn pumps(&self, attempt: u32) -> (Side, Side, UnixListener) {
        let socket = socket_path(self.dir.path(), SESSION, attempt);
        let link = self.source.clone();
        let source = RamPump::listen(link, SESSION, attempt, &socket).unwrap();
        let socket = self.path("incoming");
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let target = RamPump::connect(self.target.clone(), SESSION, attempt, &socket);
        (
            Side::new(source, &self.source),
            Side::new(target, &self.target),
            listener,
        )
    }

    async fn hypervisor(&self, attempt: u32) -> UnixStream {
        let path = socket_path(self.dir.path(), SESSION, attempt);
        UnixStream::connect(path).await.unwrap()
    }
}

/// A pump as its coordinator has it.
struct Side {
    pump: RamPump,
    /// Passes the link's news on.
    feeder: JoinHandle<()>,
}

impl Side {
    fn new(pump: RamPump, link: &Arc<PeerLink>) -> Self {
        let mut inbox = link.register(SESSION);
        let inputs = pump.inputs.clone();
        let feeder = tokio::spawn(async move {
            while let Some(input) = inbox.recv().await {
                if inputs.send(input).is_err() {
                    return;
                }
            }
        });
        Self { pump, feeder }
    }

    async fn event(&mut self) -> PumpEvent {
        let event = self.pump.next_event();
        tokio::time::timeout(PATIENCE, event).await.unwrap()
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.feeder.abort();
    }
}

/// Waits for a condition that comes by itself.
async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Pages of memory: some random, some zero, some seen before.
fn memory(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut out = Vec::with_capacity(len + 4096);
    while out.len() < len {
        match next() % 4 {
            0 => out.resize(out.len() + 4096, 0),
            1 if out.len() > 8192 => out.extend_from_within(..4096),
            _ => (0..512).for_each(|_| out.extend(next().to_le_bytes())),
        }
    }
    out.truncate(len);
    out
}

/// Says all of `bytes`, ends, and returns what it was told.
async fn talk(socket: UnixStream, bytes: Vec<u8>) -> Vec<u8> {
    let (mut reader, mut writer) = socket.into_split();
    let saying = tokio::spawn(async move {
        writer.write_all(&bytes).await.unwrap();
        // Dropping it ends this direction.
        writer.shutdown().await.unwrap();
        writer
    });
    let mut told = Vec::new();
    reader.read_to_end(&mut told).await.unwrap();
    saying.await.unwrap();
    told
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_cross_both_ways_however_often_the_link_is_cut() {
    let world = World::new().await;
    let (mut source, mut target, listener) = world.pumps(1);
    let (first, second) = (memory(24 << 20, 1), memory(1 << 20, 2));
    let (back, back_too) = (memory(2 << 20, 3), memory(10, 4));
    let here = [
        tokio::spawn(talk(world.hypervisor(1).await, first.clone())),
        // In order: the first is accepted before the second connects.
        {
            assert_eq!(source.event().await, PumpEvent::Opened { stream: 0 });
            tokio::spawn(talk(world.hypervisor(1).await, second.clone()))
        },
    ];
    let there = [
        tokio::spawn(talk(listener.accept().await.unwrap().0, back.clone())),
        tokio::spawn(talk(listener.accept().await.unwrap().0, back_too.clone())),
    ];
    let stats = source.pump.stats.clone();
    for acked in (1..=12).map(|step| step * 900_000) {
        let progress = || {
            let stats = *super::lock(&stats);
            stats.bytes_acked >= acked || here.iter().all(JoinHandle::is_finished)
        };
        until("the bytes go on", progress).await;
        world.wire.cut();
    }
    let [a, b] = here;
    assert!(a.await.unwrap() == back && b.await.unwrap() == back_too);
    let [a, b] = there;
    assert!(a.await.unwrap() == first && b.await.unwrap() == second);
    for stream in 0..2 {
        assert_eq!(target.event().await, PumpEvent::Opened { stream });
    }
    assert_eq!(target.event().await, PumpEvent::Finished);
    assert_eq!(source.event().await, PumpEvent::Opened { stream: 1 });
    assert_eq!(source.event().await, PumpEvent::Finished);
    let (sent, got) = (source.pump.stats(), target.pump.stats());
    assert_eq!(sent.bytes_in, (first.len() + second.len()) as u64);
    assert_eq!(sent.bytes_in, got.bytes_out);
    assert_eq!(sent.bytes_packed, sent.bytes_acked);
    assert_eq!(sent.bytes_packed, got.bytes_arrived);
    assert!(
        (10_800_000..sent.bytes_in).contains(&sent.bytes_packed),
        "all the cuts came before the end: {sent:?}"
    );
    assert_eq!(got.bytes_in, sent.bytes_out);
    let socket = socket_path(world.dir.path(), SESSION, 1);
    assert!(socket.exists());
    drop(source);
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hypervisor_that_does_not_read_holds_the_other_one_up() {
    let world = World::new().await;
    let (source, _target, listener) = world.pumps(1);
    let bytes: Vec<u8> = memory(40 << 20, 9);
    let hypervisor = tokio::spawn(talk(world.hypervisor(1).await, bytes.clone()));
    let (mut incoming, _) = listener.accept().await.unwrap();
    let window = flimcd_migrate::stream::WINDOW_BYTES as u64;
    let stats = source.pump.stats.clone();
    until("the window fills", || {
        super::lock(&stats).bytes_packed > window - (1 << 20)
    })
    .await;
    let mut got = Vec::new();
    let mut buffer = vec![0; 1 << 20];
    while got.len() < bytes.len() {
        let stats = source.pump.stats();
        assert!(stats.bytes_packed - stats.bytes_acked <= window);
        let len = incoming.read(&mut buffer).await.unwrap();
        got.extend_from_slice(&buffer[..len]);
    }
    assert!(got == bytes);
    drop(incoming);
    assert!(hypervisor.await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hypervisor_that_closes_early_is_told_and_the_other_one_sees_it() {
    let world = World::new().await;
    let (_source, mut target, listener) = world.pumps(1);
    let hypervisor = tokio::spawn(talk(world.hypervisor(1).await, memory(8 << 20, 5)));
    let (incoming, _) = listener.accept().await.unwrap();
    drop(incoming);
    assert_eq!(target.event().await, PumpEvent::Opened { stream: 0 });
    assert!(matches!(
        target.event().await,
        PumpEvent::Closed { stream: 0, .. }
    ));
    assert!(hypervisor.await.unwrap().is_empty());
    assert_eq!(target.event().await, PumpEvent::Finished);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hypervisor_that_is_not_there_ends_the_attempt() {
    let world = World::new().await;
    let (_source, mut target, listener) = world.pumps(1);
    drop(listener);
    let _hypervisor = world.hypervisor(1).await;
    let PumpEvent::Broken(text) = target.event().await else {
        panic!("it goes on");
    };
    assert!(text.contains("connecting to the hypervisor"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_of_an_earlier_attempt_is_dropped_and_nonsense_ends_this_one() {
    let world = World::new().await;
    let (mut source, mut target, listener) = world.pumps(2);
    let _hypervisor = world.hypervisor(2).await;
    assert_eq!(source.event().await, PumpEvent::Opened { stream: 0 });
    let _incoming = listener.accept().await.unwrap();
    assert_eq!(target.event().await, PumpEvent::Opened { stream: 0 });
    for attempt in [1, 2] {
        let message = Message::Vm(VmMessage::PartAck {
            attempt,
            stream: 0,
            next: 77,
        });
        assert!(world.source.send(SESSION, message).await);
    }
    let PumpEvent::Broken(text) = target.event().await else {
        panic!("it goes on");
    };
    assert!(text.contains("part 77"), "{text}");
}
