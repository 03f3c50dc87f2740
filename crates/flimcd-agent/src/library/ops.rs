//! What the API can ask of the library, and the tasks that read its files.

use flimcd_core::VolumeName;
use flimcd_volume::VolumeRecord;
use std::{fs::File, os::unix::fs::MetadataExt, path::Path, sync::Arc, time::Duration};

use super::Key;
use crate::{
    agent::Agent,
    api::{AddLibraryImage, ErrorBody, LibraryImage},
    ops::blocking,
};

/// How often it is looked which volumes there are. Nothing waits for it: it is so that what came or went unnoticed is noticed.
const LOOK: Duration = Duration::from_secs(10);

impl Agent {
    /// All images, by name.
    pub(crate) async fn library_images(self: &Arc<Self>) -> Result<Vec<LibraryImage>, ErrorBody> {
        let agent = self.clone();
        blocking(move || Ok(agent.library.list())).await
    }

    /// One image.
    pub(crate) async fn library_image(
        self: &Arc<Self>,
        name: VolumeName,
    ) -> Result<LibraryImage, ErrorBody> {
        let agent = self.clone();
        blocking(move || agent.library.get(&name)).await
    }

    /// Takes an image in, and begins to read it.
    pub(crate) async fn add_library_image(
        self: &Arc<Self>,
        request: AddLibraryImage,
    ) -> Result<LibraryImage, ErrorBody> {
        let agent = self.clone();
        let volume_of = move |agent: &Self, file: &File| {
            let all = agent.hosting.all();
            let mut records = all.iter().filter_map(|hosted| hosted.volume().record());
            let has = |image: &Path| Some(same_file(file, &File::open(image).ok()?));
            let found = records.find(|record| has(&record.image).unwrap_or_default());
            found.map(|record| record.name.clone())
        };
        let added =
            blocking(move || agent.library.add(&request, |file| volume_of(&agent, file))).await?;
        tracing::info!(image = %added.name, path = %added.path.display(), "an image is in the library");
        Ok(added)
    }

    /// Reads an image anew.
    pub(crate) async fn verify_library_image(
        self: &Arc<Self>,
        name: VolumeName,
    ) -> Result<LibraryImage, ErrorBody> {
        let agent = self.clone();
        blocking(move || agent.library.begin_verify(&name)).await
    }

    /// Gives an image up.
    pub(crate) async fn remove_library_image(
        self: &Arc<Self>,
        name: VolumeName,
    ) -> Result<LibraryImage, ErrorBody> {
        let agent = self.clone();
        let removed = blocking(move || agent.library.remove(&name)).await?;
        tracing::info!(image = %removed.name, "an image is no longer in the library");
        Ok(removed)
    }

    /// Reads what is to be read from now on, what an earlier agent has left first; and takes note of the volumes that are here.
    pub(crate) fn resume_scans(self: &Arc<Self>) {
        let Some(mut requests) = self.library.requests() else {
            return;
        };
        for key in self.library.unfinished() {
            self.scan(key);
        }
        let (agent, mut stop) = (self.clone(), self.stop_signal());
        self.spawn(async move {
            let stopped = async move {
                // An error means that the agent is gone, which is a stop as well.
                let _ = stop.wait_for(|&stop| stop).await;
            };
            tokio::pin!(stopped);
            let mut look = tokio::time::interval(LOOK);
            loop {
                tokio::select! {
                    key = requests.recv() => match key {
                        Some(key) => agent.scan(key),
                        None => return,
                    },
                    _ = look.tick() => agent.reconcile_library().await,
                    () = &mut stopped => return,
                }
            }
        });
    }

    /// Lets the library know which volumes are here.
    pub(crate) async fn reconcile_library(self: &Arc<Self>) {
        let agent = self.clone();
        let reconciled = blocking(move || {
            let all = agent.hosting.all();
            let records: Vec<VolumeRecord> = all
                .iter()
                .filter_map(|hosted| hosted.volume().record())
                .collect();
            agent.library.reconcile(&records);
            Ok(())
        });
        if let Err(error) = reconciled.await {
            tracing::error!("looking after the volumes in the library failed: {error:?}");
        }
    }

    /// Reads a file when it is its turn: one image at a time, so that disks are read in order, and beside that one volume,
    /// slowly.
    fn scan(self: &Arc<Self>, key: Key) {
        let (agent, mut stop) = (self.clone(), self.stop_signal());
        self.spawn(async move {
            let turn = tokio::select! {
                turn = agent.library.turn_of(&key).acquire() => turn,
                _ = stop.wait_for(|&stop| stop) => return,
            };
            let Ok(_turn) = turn else { return };
            let (library, stop) = (agent.library.clone(), agent.stop_signal());
            let scan = move || library.scan(&key, || !*stop.borrow());
            if let Err(error) = tokio::task::spawn_blocking(scan).await {
                tracing::error!("reading a file for the library has failed: {error}");
            }
        });
    }
}

fn same_file(a: &File, b: &File) -> bool {
    let id = |file: &File| file.metadata().map(|data| (data.dev(), data.ino())).ok();
    id(a).is_some() && id(a) == id(b)
}
