//! A volume: one disk image under an agent's care, and the only way to it.
//!
//! [`Volume`] puts the [`Rules`] over a real [`BlockDevice`]. Guests come in through [`GuestPort`]s, transfers through the calls
//! below, which block and may be made from any thread. Nothing here knows of links or machines: whoever drives a
//! migration tells the volume what to do, and hears through a [`VolumeObserver`] when to look.

mod check;
mod core;
mod error;
mod flusher;
mod heat;
mod lifecycle;
mod replica;
#[cfg(test)]
mod restart_tests;
mod source;
mod target;
mod undo;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use flimcd_core::{ByteRange, VolumeName, VolumeSize};

pub(crate) use self::{
    core::SharedCore,
    flusher::FlushJob,
    heat::{HeatBook, Touch},
};
pub use self::{
    core::VolumeObserver,
    error::VolumeError,
    heat::{HEAT_HALF_LIFE, HeatSnapshot},
    lifecycle::NewVolume,
    replica::Standing,
    source::{Begun, Sending},
    target::{Applied, ApplyData},
};
use crate::{
    device::{BlockDevice, DataExtent, FileDevice, lock::LockError},
    port::GuestPort,
    rules::{GuestStats, Mode, Rules},
};

/// A disk image under an agent's care. See the module.
pub struct Volume {
    name: VolumeName,
    device: Arc<dyn BlockDevice>,
    /// The same device, where it is an image file of ours.
    image: Option<FileDevice>,
    core: SharedCore,
    ports: AtomicUsize,
    syncs: target::SyncHealth,
    /// How the device does its I/O, for people.
    backend: String,
    durable: Option<lifecycle::Durable>,
    flusher: flusher::Flusher,
    heat: HeatBook,
    /// Content arrives over a copy, and nobody but this process can have touched it since that was looked at.
    came_in_place: AtomicBool,
}

impl Volume {
    /// A volume without durable state on `device`, owned here: for benchmarks and tests. It cannot take part in a
    /// migration that survives a restart.
    #[must_use]
    pub fn ephemeral(name: VolumeName, device: Arc<dyn BlockDevice>, mode: Mode) -> Arc<Self> {
        let rules = Rules::new(device.size(), mode);
        let heat = HeatBook::new(device.size(), None);
        Arc::new(Self {
            name,
            device,
            image: None,
            core: SharedCore::new(rules),
            ports: AtomicUsize::new(0),
            syncs: target::SyncHealth::default(),
            backend: "ephemeral".into(),
            durable: None,
            flusher: flusher::Flusher::default(),
            heat,
            came_in_place: AtomicBool::new(false),
        })
    }

    /// The volume's name.
    #[must_use]
    pub fn name(&self) -> &VolumeName {
        &self.name
    }

    /// Size in bytes. Never changes.
    #[must_use]
    pub fn size(&self) -> VolumeSize {
        self.device.size()
    }

    /// What happens with guest requests at the moment.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.core.lock().rules.mode()
    }

    /// Counts since the volume was opened.
    #[must_use]
    pub fn stats(&self) -> GuestStats {
        self.core.lock().rules.stats()
    }

    /// Bytes of memory that the volume's sets and tables hold.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.core.lock().rules.memory_bytes() + self.heat.memory_bytes()
    }

    /// How the image is read and written, for people: direct or through the page cache, by which calls.
    #[must_use]
    pub fn backend(&self) -> &str {
        &self.backend
    }

    /// Takes the locks on the image that QEMU and its tools respect, for a volume that was opened without. Blocks for up to
    /// a second. Nothing happens where they are held already, or where the device is no image file.
    ///
    /// # Errors
    /// When somebody else uses the image.
    pub fn take_image_locks(&self) -> Result<(), LockError> {
        self.image.as_ref().map_or(Ok(()), FileDevice::take_locks)
    }

    /// Gives the image's locks up, so that a hypervisor can open the image while it is still served here.
    pub fn give_up_image_locks(&self) {
        if let Some(image) = &self.image {
            image.give_up_locks();
        }
    }

    /// Whether the image's locks are held.
    #[must_use]
    pub fn has_image_locks(&self) -> bool {
        self.image.as_ref().is_some_and(FileDevice::has_locks)
    }

    /// A guest connection's access.
    ///
    /// # Errors
    /// When a queue or a descriptor cannot be had from the system.
    pub fn guest_port(self: &Arc<Self>) -> io::Result<GuestPort> {
        GuestPort::new(self.clone())
    }

    /// Number of guest ports that are open.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.ports.load(Ordering::Acquire)
    }

    /// Who is told what happens here from now on.
    pub fn set_observer(&self, observer: Arc<dyn VolumeObserver>) {
        self.core.set_observer(observer);
    }

    /// Whether zeroing a range is much faster than writing zero bytes.
    #[must_use]
    pub fn zeroes_fast(&self) -> bool {
        self.device.zeroes_fast()
    }

    /// Where data and holes lie, as [`BlockDevice::data_extents`] has it. Blocks whose content is not here count as data.
    ///
    /// # Errors
    /// What the device reports.
    pub fn data_extents(&self, range: ByteRange, max: usize) -> io::Result<Vec<DataExtent>> {
        let is_here = {
            let core = self.core.lock();
            let missing = core.rules.missing();
            core.rules.mode() != Mode::Incoming && !missing.intersects(range.blocks_touched())
        };
        if is_here {
            return self.device.data_extents(range, max);
        }
        let data = DataExtent {
            range,
            is_hole: false,
        };
        Ok(vec![data])
    }

    pub(crate) fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    pub(crate) fn core(&self) -> &SharedCore {
        &self.core
    }

    pub(crate) fn heat_book(&self) -> &HeatBook {
        &self.heat
    }

    /// Runs what is left of a flush elsewhere.
    pub(crate) fn finish_flush(&self, job: FlushJob) {
        self.flusher.run(job);
    }

    pub(crate) fn port_opened(&self) {
        self.ports.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn port_closed(&self) {
        if self.ports.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.core.observe(|observer| observer.on_guests_gone());
        }
    }
}
