//! What an agent has: volumes over image files, and an NBD server. And a load that checks itself.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use flimcd_nbd::{Client, Server};
use flimcd_qemu::{Disk, Export};
use flimcd_volume::{
    Volume,
    device::{FileDevice, OpenOptions},
    rules::Mode,
};

/// A server for images of running VMs.
pub(crate) struct Host {
    socket: PathBuf,
    server: Option<Server>,
}

impl Host {
    pub(crate) fn new(dir: &Path) -> Self {
        let socket = dir.join("agent.nbd");
        Self {
            server: Some(Server::bind(&socket).unwrap()),
            socket,
        }
    }

    /// Exports the disk's file, as an agent does before it adopts the disk.
    pub(crate) fn export(&self, disk: &Disk) -> (Export, Arc<Volume>) {
        disk.grow_file().unwrap();
        self.export_file(&disk.file, &format!("vm.{}", disk.id))
    }

    pub(crate) fn export_file(&self, file: &Path, name: &str) -> (Export, Arc<Volume>) {
        let options = OpenOptions {
            lock: false,
            ..OpenOptions::default()
        };
        let device = FileDevice::open(file, &options).unwrap();
        let volume = Volume::ephemeral("disk".parse().unwrap(), Arc::new(device), Mode::Owner);
        let server = self.server.as_ref().unwrap();
        server.export(name, Arc::clone(&volume));
        (self.named(name), volume)
    }

    pub(crate) fn named(&self, name: &str) -> Export {
        Export {
            socket: self.socket.clone(),
            name: name.to_owned(),
            reconnect_delay_s: 60,
        }
    }

    /// Ends the server as a killed agent does, and starts it again without exports.
    pub(crate) fn restart(&mut self) {
        drop(self.server.take());
        self.server = Some(Server::bind(&self.socket).unwrap());
    }
}

const BLOCK: usize = 4096;
/// Blocks that the load uses.
const BLOCKS: usize = 2048;

/// Writes, flushes and reads back, without a pause, until it is stopped.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<LoadReport>,
}

/// What a load did.
#[derive(Debug)]
pub(crate) struct LoadReport {
    pub(crate) requests: u64,
    pub(crate) stall_max: Duration,
    /// The last stamp of every block.
    pub(crate) stamps: Vec<u64>,
}

impl Load {
    pub(crate) fn start(socket: &Path, export: &str) -> Self {
        let mut client = Client::connect_unix(socket, export).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut report = LoadReport {
                requests: 0,
                stall_max: Duration::ZERO,
                stamps: vec![0; BLOCKS],
            };
            let mut state = 1u64;
            while !stopping.load(Ordering::Relaxed) {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let index = usize::try_from(state >> 33).unwrap() % BLOCKS;
                let begin = Instant::now();
                let offset = u64::try_from(index * BLOCK).unwrap();
                match report.requests % 8 {
                    7 => client.flush().unwrap(),
                    6 => {
                        let mut found = vec![0; BLOCK];
                        client.read(offset, &mut found).unwrap();
                        assert_eq!(found, content(index, report.stamps[index]));
                    }
                    _ => {
                        let stamp = report.requests + 1;
                        client.write(offset, &content(index, stamp), false).unwrap();
                        report.stamps[index] = stamp;
                    }
                }
                report.stall_max = report.stall_max.max(begin.elapsed());
                report.requests += 1;
            }
            report
        });
        Self { stop, thread }
    }

    /// Stops it; panics if it met an error.
    pub(crate) fn stop(self) -> LoadReport {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

impl LoadReport {
    /// Compares all that was written with what is read at an export.
    pub(crate) fn verify(&self, socket: &Path, export: &str) {
        let mut client = Client::connect_unix(socket, export).unwrap();
        let mut found = vec![0; BLOCK];
        for (index, stamp) in self.stamps.iter().enumerate() {
            client
                .read(u64::try_from(index * BLOCK).unwrap(), &mut found)
                .unwrap();
            assert!(
                found == content(index, *stamp),
                "block {index}, stamp {stamp}"
            );
        }
    }
}

fn content(index: usize, stamp: u64) -> Vec<u8> {
    if stamp == 0 {
        return vec![0; BLOCK];
    }
    let word = (u64::try_from(index).unwrap() << 40 | stamp).to_le_bytes();
    word.repeat(BLOCK / 8)
}
