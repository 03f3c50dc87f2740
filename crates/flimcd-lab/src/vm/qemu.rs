//! QEMU's command line for a guest of the lab.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use super::{GuestImage, ImageError, Qemu, QemuError, Tools};

/// A guest's virtual machine.
#[derive(Clone, Debug)]
pub struct QemuSpec {
    /// The machine's name, `-name`.
    pub name: String,
    /// Where its sockets and logs are; made when it is spawned.
    pub dir: PathBuf,
    /// The kernel to boot.
    pub kernel: PathBuf,
    /// Its first root.
    pub initramfs: PathBuf,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The disks.
    pub disks: Vec<DiskSpec>,
    /// The network.
    pub net: Net,
    /// What the load in the guest does.
    pub load: LoadSettings,
    /// `-incoming defer`: waits for a migration.
    pub is_incoming: bool,
    /// `-S`: does not run until told to.
    pub is_paused: bool,
    /// `tcg,thread=multi` unless somebody knows better.
    pub accelerator: String,
    /// A shell on the first serial line, which then is the terminal.
    pub has_shell: bool,
    /// More arguments at the end.
    pub more: Vec<String>,
}

/// How a disk is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// `virtio-blk-pci`.
    VirtioBlk,
    /// `scsi-hd` on `virtio-scsi-pci`.
    VirtioScsi,
    /// `ide-hd` on the machine's AHCI. The guest's kernel needs a driver: [`Tools::has_sata`].
    Sata,
}

/// An image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskFormat {
    /// Raw.
    Raw,
    /// Qcow2.
    Qcow2,
}

impl DiskFormat {
    /// As QEMU calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Which options name the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// `-blockdev`, with node names `ID` (format) and `ID-file` (protocol).
    Blockdev,
    /// `-drive if=none,id=ID`: QEMU generates the node names.
    Drive,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In a file.
    File(PathBuf),
    /// At an NBD server's unix socket.
    Nbd {
        /// The socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
        /// How long QEMU waits for a server that went away.
        reconnect_delay_s: u32,
    },
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Name of node or drive; the device is called `ID-dev`.
    pub id: String,
    /// Where its bytes are.
    pub storage: Storage,
    /// Their format.
    pub format: DiskFormat,
    /// How it is attached.
    pub bus: Bus,
    /// Which options name it.
    pub style: Style,
    /// `cache.direct`.
    pub is_direct: bool,
    /// `discard=unmap,detect-zeroes=unmap`.
    pub has_discard: bool,
    /// The device's volatile write cache (cache=writeback as against writethrough).
    pub has_write_cache: bool,
}

impl DiskSpec {
    /// A raw file on virtio-blk by `-blockdev`, opened with `O_DIRECT` and discard.
    #[must_use]
    pub fn new(id: &str, file: &Path) -> Self {
        Self {
            id: id.to_owned(),
            storage: Storage::File(file.to_owned()),
            format: DiskFormat::Raw,
            bus: Bus::VirtioBlk,
            style: Style::Blockdev,
            is_direct: true,
            has_discard: true,
            has_write_cache: true,
        }
    }

    /// Checks the ext4 file system on it, once nobody uses it; see [`Tools::check_file_system`]. A disk that
    /// is no file is passed over.
    ///
    /// # Errors
    /// What e2fsck found, or when a qcow2 file cannot be read.
    pub fn check_file_system(&self, tools: &Tools) -> Result<(), ImageError> {
        let Storage::File(path) = &self.storage else {
            return Ok(());
        };
        match self.format {
            DiskFormat::Raw => tools.check_file_system(path),
            DiskFormat::Qcow2 => {
                let raw = path.with_extension("check.raw");
                tools.raw_copy(path, &raw)?;
                let checked = tools.check_file_system(&raw);
                let _ = std::fs::remove_file(raw);
                checked
            }
        }
    }

    fn protocol(&self) -> String {
        match &self.storage {
            Storage::File(path) => format!("driver=file,filename={}", escape(path)),
            Storage::Nbd {
                socket,
                export,
                reconnect_delay_s,
            } => format!(
                "driver=nbd,server.type=unix,server.path={},export={export},\
                 reconnect-delay={reconnect_delay_s}",
                escape(socket)
            ),
        }
    }

    fn arguments(&self) -> Vec<String> {
        let Self { id, .. } = self;
        let format = self.format.name();
        let discard = if self.has_discard { "unmap" } else { "ignore" };
        let zeroes = if self.has_discard { "unmap" } else { "off" };
        let direct = on_off(self.is_direct);
        let protocol = self.protocol();
        match self.style {
            Style::Blockdev => vec![
                "-blockdev".into(),
                format!("{protocol},node-name={id}-file,cache.direct={direct},discard={discard}"),
                "-blockdev".into(),
                format!(
                    "driver={format},node-name={id},file={id}-file,cache.direct={direct},\
                     discard={discard},detect-zeroes={zeroes}"
                ),
            ],
            Style::Drive => vec![
                "-drive".into(),
                format!(
                    "if=none,id={id},format={format},file.{protocol},cache.direct={direct},\
                     cache.writeback={},discard={discard},detect-zeroes={zeroes}",
                    on_off(self.has_write_cache)
                )
                .replacen(",filename=", ",file.filename=", 1)
                .replace(",server.", ",file.server.")
                .replace(",export=", ",file.export=")
                .replace(",reconnect-delay=", ",file.reconnect-delay="),
            ],
        }
    }

    fn device(&self, number: usize) -> Vec<String> {
        let Self { id, .. } = self;
        let device = match self.bus {
            Bus::VirtioBlk => format!("virtio-blk-pci,drive={id},id={id}-dev"),
            Bus::VirtioScsi => format!("scsi-hd,bus=scsi0.0,drive={id},id={id}-dev"),
            Bus::Sata => format!("ide-hd,bus=ide.{number},drive={id},id={id}-dev"),
        };
        let cache = match self.style {
            Style::Blockdev => format!(",write-cache={}", on_off(self.has_write_cache)),
            // There the drive's options say it.
            Style::Drive => String::new(),
        };
        vec!["-device".into(), device + &cache]
    }
}

/// The guest's network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Net {
    /// None.
    None,
    /// On a TAP device that is there already, in the namespace that QEMU runs in.
    Tap {
        /// The device.
        device: String,
        /// The guest's address with its prefix length.
        address: String,
    },
}

/// What the load in the guest does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadSettings {
    /// Random 4 KiB writes per second.
    pub writes_per_sec: f64,
    /// Random checked 4 KiB reads per second.
    pub reads_per_sec: f64,
    /// Writes between two `fdatasync`.
    pub sync_every: u64,
    /// Memory in use, checked page by page.
    pub ram_mib: u32,
    /// Pages of it changed with each write.
    pub ram_pages_per_write: u32,
    /// Whether it runs from the start, or waits for the command `start`.
    pub is_started: bool,
}

impl Default for LoadSettings {
    fn default() -> Self {
        Self {
            writes_per_sec: 20.0,
            reads_per_sec: 20.0,
            sync_every: 8,
            ram_mib: 16,
            ram_pages_per_write: 4,
            is_started: true,
        }
    }
}

impl QemuSpec {
    /// A machine with 192 MiB of memory and neither disks nor network yet.
    #[must_use]
    pub fn new(name: &str, dir: &Path, image: &GuestImage) -> Self {
        Self {
            name: name.to_owned(),
            dir: dir.to_owned(),
            kernel: image.kernel.clone(),
            initramfs: image.initramfs.clone(),
            memory_mib: 192,
            disks: Vec::new(),
            net: Net::None,
            load: LoadSettings::default(),
            is_incoming: false,
            is_paused: false,
            accelerator: "tcg,thread=multi".to_owned(),
            has_shell: false,
            more: Vec::new(),
        }
    }

    /// The monitor for whoever is tested.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// A second monitor, for whoever tests.
    #[must_use]
    pub fn lab_qmp(&self) -> PathBuf {
        self.dir.join("qmp-lab.sock")
    }

    /// What the guest prints.
    #[must_use]
    pub fn serial_log(&self) -> PathBuf {
        self.dir.join("serial.log")
    }

    /// The guest's second serial line, which takes commands.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// What QEMU itself prints.
    #[must_use]
    pub fn qemu_log(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }

    /// The arguments, without the program.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut out = Vec::new();
        let mut push = |words: &[&str]| out.extend(words.iter().map(|&word| word.to_owned()));
        push(&[
            "-name",
            &self.name,
            "-M",
            "q35",
            "-accel",
            &self.accelerator,
        ]);
        push(&["-smp", "1", "-m", &self.memory_mib.to_string()]);
        push(&["-nodefaults", "-no-user-config", "-display", "none"]);
        push(&[
            "-kernel",
            &path(&self.kernel),
            "-initrd",
            &path(&self.initramfs),
        ]);
        push(&["-append", &self.kernel_arguments()]);
        if self.has_shell {
            push(&["-serial", "mon:stdio"]);
        } else {
            push(&["-serial", &format!("file:{}", path(&self.serial_log()))]);
        }
        let server =
            |kind: &str, socket: PathBuf| format!("{kind}:{},server=on,wait=off", escape(&socket));
        push(&["-serial", &server("unix", self.control_socket())]);
        push(&["-qmp", &server("unix", self.qmp())]);
        push(&["-qmp", &server("unix", self.lab_qmp())]);
        push(&["-device", "virtio-rng-pci"]);
        if let Net::Tap { device, .. } = &self.net {
            let tap = format!("tap,id=net0,ifname={device},script=no,downscript=no");
            let card = "virtio-net-pci,netdev=net0,id=net0-dev,mac=52:54:00:12:34:56,romfile=,\
                        host_mtu=1450";
            push(&["-netdev", &tap, "-device", card]);
        }
        if self.has(Bus::VirtioScsi) {
            push(&["-device", "virtio-scsi-pci,id=scsi0"]);
        }
        let mut ports = 0;
        for disk in &self.disks {
            out.extend(disk.arguments());
            out.extend(disk.device(ports));
            ports += usize::from(disk.bus == Bus::Sata);
        }
        if self.is_incoming {
            out.extend(["-incoming", "defer"].map(str::to_owned));
        }
        if self.is_paused {
            out.push("-S".to_owned());
        }
        out.extend(self.more.iter().cloned());
        out
    }

    /// Starts it in the caller's network namespace.
    ///
    /// # Errors
    /// When QEMU cannot be started or refuses its arguments.
    pub fn spawn(&self, tools: &Tools) -> Result<Qemu, QemuError> {
        self.spawn_with(tools, |_| Ok(()))
    }

    /// Starts it after `prepare` had a look at the command, for instance to put it into a namespace.
    ///
    /// # Errors
    /// As [`QemuSpec::spawn`].
    pub fn spawn_with(
        &self,
        tools: &Tools,
        prepare: impl FnOnce(&mut Command) -> std::io::Result<()>,
    ) -> Result<Qemu, QemuError> {
        let mut command = Command::new(&tools.qemu);
        command.args(self.arguments());
        Qemu::start(command, self.clone(), prepare)
    }

    fn has(&self, bus: Bus) -> bool {
        self.disks.iter().any(|disk| disk.bus == bus)
    }

    fn kernel_arguments(&self) -> String {
        let LoadSettings {
            writes_per_sec,
            reads_per_sec,
            sync_every,
            ram_mib,
            ram_pages_per_write,
            is_started,
        } = self.load;
        let mut words = vec![
            "console=ttyS0 quiet panic=-1".to_owned(),
            format!("flimcd.writes={writes_per_sec} flimcd.reads={reads_per_sec}"),
            format!("flimcd.sync_every={sync_every} flimcd.ram_mib={ram_mib}"),
            format!("flimcd.ram_pages_per_write={ram_pages_per_write}"),
            format!("flimcd.start={}", u8::from(is_started)),
        ];
        let buses = [(Bus::VirtioScsi, "scsi"), (Bus::Sata, "sata")];
        let drivers: Vec<_> = buses.iter().filter(|(bus, _)| self.has(*bus)).collect();
        if !drivers.is_empty() {
            let names: Vec<_> = drivers.iter().map(|(_, name)| *name).collect();
            words.push(format!("flimcd.drivers={}", names.join(",")));
        }
        if let Net::Tap { address, .. } = &self.net {
            words.push(format!("flimcd.ip={address}"));
        }
        if self.has_shell {
            words.push("flimcd.shell=1".to_owned());
        }
        words.join(" ")
    }
}

const fn on_off(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A path as an option's value: QEMU takes a comma for the end unless it is doubled.
fn escape(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}
