//! A TCP proxy that breaks in the ways a network does.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
};

/// What the proxy does with what it carries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Forwards.
    Open,
    /// Holds everything back, silently.
    Frozen,
}

pub(crate) struct Proxy {
    pub(crate) address: String,
    way: watch::Sender<Way>,
    kill: watch::Sender<u64>,
    carried: Arc<AtomicU64>,
}

impl Proxy {
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let way = watch::Sender::new(Way::Open);
        let kill = watch::Sender::new(0);
        let carried = Arc::new(AtomicU64::new(0));
        let (ways, kills, count) = (way.clone(), kill.clone(), carried.clone());
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(target).await else {
                    continue;
                };
                let (near_in, near_out) = near.into_split();
                let (far_in, far_out) = far.into_split();
                for (from, to) in [(near_in, far_out), (far_in, near_out)] {
                    let (ways, mut kills) = (ways.subscribe(), kills.subscribe());
                    let count = count.clone();
                    tokio::spawn(async move {
                        tokio::select! {
                            () = forward(from, to, ways, count) => {}
                            _ = kills.changed() => {}
                        }
                    });
                }
            }
        });
        Self {
            address,
            way,
            kill,
            carried,
        }
    }

    /// Bytes carried so far, both ways.
    pub(crate) fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }

    /// Breaks all connections of this moment.
    pub(crate) fn kill(&self) {
        self.kill.send_modify(|count| *count += 1);
    }

    pub(crate) fn set(&self, way: Way) {
        self.way.send_replace(way);
    }
}

async fn forward(
    mut from: tcp::OwnedReadHalf,
    mut to: tcp::OwnedWriteHalf,
    mut way: watch::Receiver<Way>,
    count: Arc<AtomicU64>,
) {
    // Small, so that connections break in the middle of frames.
    let mut buffer = [0; 5000];
    while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
        if way.wait_for(|way| *way == Way::Open).await.is_err()
            || to.write_all(&buffer[..bytes]).await.is_err()
        {
            return;
        }
        count.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}
