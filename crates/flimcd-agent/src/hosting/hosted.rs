//! One volume under care, with its export.

use flimcd_core::{Epoch, MigrationId, SiteName, VolumeName};
use flimcd_nbd::Server;
use flimcd_volume::{Ownership, Volume, VolumeRecord};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    api::{ErrorBody, ExportInfo, OwnershipState, VolumeInfo},
    ops::not_owner,
};

/// A volume under care, with its export.
pub(crate) struct Hosted {
    pub(super) volume: Arc<Volume>,
    /// Gone once the volume is being removed.
    server: Mutex<Option<Server>>,
    socket: PathBuf,
}

impl Hosted {
    /// Serves a volume's export.
    pub(super) fn serve(
        volume: Arc<Volume>,
        runtime_dir: &Path,
    ) -> Result<Arc<Self>, flimcd_nbd::BindError> {
        let name = volume.name().clone();
        let socket = socket_of(&name, runtime_dir);
        let server = Server::bind(&socket)?;
        server.export(name.as_str(), volume.clone());
        Ok(Arc::new(Self {
            volume,
            server: Mutex::new(Some(server)),
            socket,
        }))
    }

    /// A volume that no guest may use, because somebody else uses its image.
    pub(super) fn unserved(volume: Arc<Volume>, runtime_dir: &Path) -> Arc<Self> {
        let socket = socket_of(volume.name(), runtime_dir);
        Arc::new(Self {
            volume,
            server: Mutex::new(None),
            socket,
        })
    }

    /// Whether guests can find it.
    pub(crate) fn is_served(&self) -> bool {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.is_some()
    }

    pub(crate) fn volume(&self) -> &Arc<Volume> {
        &self.volume
    }

    pub(crate) fn name(&self) -> &VolumeName {
        self.volume.name()
    }

    /// Its durable record.
    pub(crate) fn record(&self) -> VolumeRecord {
        match self.volume.record() {
            Some(record) => record,
            None => unreachable!("volumes without a record are made by tests only"),
        }
    }

    /// Where a guest finds it.
    pub(crate) fn export(&self) -> ExportInfo {
        ExportInfo {
            socket: self.socket.clone(),
            export: self.name().to_string(),
            uri: format!(
                "nbd+unix:///{}?socket={}",
                self.name(),
                self.socket.display()
            ),
        }
    }

    /// What this agent is to it.
    pub(crate) fn state(&self) -> OwnershipState {
        state_of(&self.record().ownership).0
    }

    /// The epoch of an owned volume.
    pub(crate) fn epoch_to_migrate(&self) -> Result<Epoch, ErrorBody> {
        match self.record().ownership {
            Ownership::Owner { epoch } => Ok(epoch),
            other => {
                let (state, peer) = state_of(&other);
                Err(not_owner(self.name(), state, peer))
            }
        }
    }

    /// As the API shows it.
    pub(crate) fn describe(&self, migration: Option<MigrationId>) -> VolumeInfo {
        let record = self.record();
        let (ownership, peer) = state_of(&record.ownership);
        VolumeInfo {
            id: record.id,
            name: record.name.clone(),
            tenant: record.tenant.clone(),
            size_bytes: record.size.bytes(),
            allocated_bytes: allocated(&record.image),
            epoch: record.epoch.0,
            ownership,
            peer: peer.cloned(),
            image: record.image.clone(),
            export: self.is_served().then(|| self.export()),
            guest_connections: self.volume.connections(),
            migration,
            replica: crate::replicas::describe(self),
        }
    }

    /// Disconnects guests and removes the socket. Blocks until they are gone.
    pub(super) fn stop_serving(&self) {
        let server = self
            .server
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(server) = server {
            server.shutdown();
        }
    }
}

fn socket_of(name: &VolumeName, runtime_dir: &Path) -> PathBuf {
    runtime_dir.join(format!("{name}.sock"))
}

/// Bytes that an image takes on its file system.
pub(crate) fn allocated(image: &Path) -> u64 {
    fs::metadata(image).map_or(0, |metadata| metadata.blocks() * 512)
}

pub(super) fn state_of(ownership: &Ownership) -> (OwnershipState, Option<&SiteName>) {
    match ownership {
        Ownership::Owner { .. } => (OwnershipState::Owner, None),
        Ownership::Prepared { peer, .. } => (OwnershipState::Prepared, Some(peer)),
        Ownership::Released { peer, .. } => (OwnershipState::Released, Some(peer)),
        Ownership::Incoming { peer, .. } => (OwnershipState::Incoming, Some(peer)),
        Ownership::Arriving { peer, .. } => (OwnershipState::Arriving, Some(peer)),
    }
}
