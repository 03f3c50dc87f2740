//! What the API can ask of the library, and the task that reads its images one after the other.

use flimcd_core::VolumeName;
use std::sync::Arc;

use crate::{
    agent::Agent,
    api::{AddLibraryImage, ErrorBody, LibraryImage},
    ops::blocking,
};

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
        let added = blocking(move || agent.library.add(&request)).await?;
        tracing::info!(image = %added.name, path = %added.path.display(), "an image is in the library");
        self.scan_image(added.name.clone());
        Ok(added)
    }

    /// Reads an image anew.
    pub(crate) async fn verify_library_image(
        self: &Arc<Self>,
        name: VolumeName,
    ) -> Result<LibraryImage, ErrorBody> {
        let (agent, image) = (self.clone(), name.clone());
        let begun = blocking(move || agent.library.begin_verify(&image)).await?;
        self.scan_image(name);
        Ok(begun)
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

    /// Goes on with the images that an earlier agent was reading.
    pub(crate) fn resume_scans(self: &Arc<Self>) {
        for name in self.library.unfinished() {
            self.scan_image(name);
        }
    }

    /// Reads an image when it is its turn: one at a time, so that disks are read in order.
    fn scan_image(self: &Arc<Self>, name: VolumeName) {
        let (agent, mut stop) = (self.clone(), self.stop_signal());
        self.spawn(async move {
            let turn = tokio::select! {
                turn = agent.scan_turn.acquire() => turn,
                _ = stop.wait_for(|&stop| stop) => return,
            };
            let Ok(_turn) = turn else { return };
            let (library, stop) = (agent.library.clone(), agent.stop_signal());
            let scan = move || library.scan(&name, || !*stop.borrow());
            if let Err(error) = tokio::task::spawn_blocking(scan).await {
                tracing::error!("reading an image of the library has failed: {error}");
            }
        });
    }
}
