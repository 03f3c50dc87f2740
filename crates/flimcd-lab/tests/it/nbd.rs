//! The load over NBD against a server that others wrote: `qemu-nbd`. Without it the tests say so
//! and pass.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use flimcd_lab::{
    image::{self, ImageOptions},
    load::{Baseline, FileDisk, Load, LoadOptions, LoadPhase, NbdDisk, Synthetic},
};

/// A server of one image; killed and waited for when dropped.
struct Server(Child, PathBuf);

impl Server {
    #[expect(clippy::print_stderr, reason = "a skipped test says so")]
    fn start(folder: &Path, image: &Path) -> Option<Self> {
        let socket = folder.join("nbd.sock");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("qemu-nbd");
        command.args(["--format=raw", "--persistent", "--shared=8", "--socket"]);
        command.arg(&socket).arg(image).stderr(Stdio::null());
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                eprintln!("SKIPPED: needs qemu-nbd: {error}");
                return None;
            }
        };
        let mut server = Self(child, socket);
        while UnixStream::connect(&server.1).is_err() {
            assert!(server.0.try_wait().unwrap().is_none(), "qemu-nbd ended");
            std::thread::yield_now();
        }
        Some(server)
    }

    fn connect(&self) -> Box<NbdDisk> {
        Box::new(NbdDisk::connect(&self.1, "").unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_load_survives_the_death_of_its_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let options = ImageOptions {
        size_bytes: 16 << 20,
        ..ImageOptions::default()
    };
    image::create(&path, &options).unwrap();
    let baseline = Baseline::of_file(&path, 4096).unwrap();
    let Some(mut server) = Server::start(folder.path(), &path) else {
        return;
    };
    let synthetic = Synthetic {
        zero_share: 0.1,
        ..Synthetic::default()
    };
    let load = Load::start(
        server.connect(),
        baseline,
        synthetic,
        LoadOptions::default(),
    )
    .unwrap();
    for _ in 0..3 {
        let goal = load.snapshot().all.ops + 2000;
        while load.snapshot().all.ops < goal {
            assert_eq!(load.phase(), LoadPhase::Running, "{:?}", load.broken_by());
            std::thread::yield_now();
        }
        drop(server);
        while load.phase() != LoadPhase::Broken {
            std::thread::yield_now();
        }
        server = Server::start(folder.path(), &path).unwrap();
        load.resume_on(server.connect()).unwrap();
    }
    let mut disk = load.pause().unwrap().disk.unwrap();
    let stats = load.snapshot();
    assert_eq!((stats.reads_wrong, stats.errors), (0, 0), "{stats:?}");
    let check = load.final_check(&mut *disk).unwrap();
    assert!(check.is_right(), "{check:?}");
    drop((disk, server));
    let mut file = FileDisk::open(&path, false).unwrap();
    assert!(load.final_check(&mut file).unwrap().is_right());
}

#[test]
fn no_server_is_a_clear_error() {
    let error = NbdDisk::connect("/no/such/socket".as_ref(), "disk")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/no/such/socket") && error.contains("disk"),
        "{error}"
    );
}
