//! Client of the agent's API.
//!
//! Each call opens the unix socket anew, so a client never notices an agent's restart between calls.

use bytes::Bytes;
use flimcd_core::{MigrationId, VolumeName};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    io,
    path::{Path, PathBuf},
};
use tokio::net::UnixStream;

use super::{
    heat::HeatReport,
    plan::{PlanRequest, PlanStatus},
    replicate::{ReplicateRequest, ReplicationStatus, RestoreReplica, RestoredReplica},
    types::{
        AddLibraryImage, CreateVolume, ErrorBody, ExportInfo, ImportVolume, LibraryImage,
        MigrateRequest, MigrateTogether, MigrationStatus, RemovedVolume, Status, VolumeInfo,
    },
    vm::{AdoptVm, VmInfo},
    vm_move::{MoveVm, VmMoveStatus},
};

/// Longest answer that is read: thousands of volumes fit.
const BODY_MAX: usize = 64 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens on the socket.
    #[error(
        "no flimcd agent is running at {}; start it with `flimcd agent --config FILE`, or name \
         another socket with --api", socket.display()
    )]
    NotRunning {
        /// The socket that was tried.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The socket may not be opened.
    #[error(
        "the agent's socket {} may not be used by this user; use the user that the agent runs \
         as", socket.display()
    )]
    Forbidden {
        /// The socket that was tried.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The socket cannot be connected to for another reason.
    #[error("connecting to the agent's socket {} failed: {source}", socket.display())]
    Connect {
        /// The socket that was tried.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The agent refused or failed.
    #[error(transparent)]
    Refused(#[from] ErrorBody),
    /// The connection broke before the answer was there; the agent may have stopped.
    #[error(
        "the agent's answer did not arrive ({0}); see whether the agent still runs, and its log"
    )]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer is not what this version expects.
    #[error(
        "the agent's answer (status {status}) is not understood; are the agent and this command \
         of the same version?"
    )]
    Answer {
        /// HTTP status of the answer.
        status: u16,
        /// What does not decode.
        source: serde_json::Error,
    },
}

impl ClientError {
    /// Whether nothing runs at the socket.
    #[must_use]
    pub const fn is_not_running(&self) -> bool {
        matches!(self, Self::NotRunning { .. })
    }
}

/// Talks to one agent through its API socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client for the agent at `socket`. Connects with each call.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The socket that it talks to.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The agent and everything it has at hand.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn status(&self) -> Result<Status, ClientError> {
        self.get("/v1/status").await
    }

    /// All volumes.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn volumes(&self) -> Result<Vec<VolumeInfo>, ClientError> {
        self.get("/v1/volumes").await
    }

    /// One volume.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn volume(&self, name: &VolumeName) -> Result<VolumeInfo, ClientError> {
        self.get(&format!("/v1/volumes/{name}")).await
    }

    /// What is hot in a volume: a picture of at most `cells` cells, and the `top` hottest chunks.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn heat(
        &self,
        name: &VolumeName,
        cells: u32,
        top: u32,
    ) -> Result<HeatReport, ClientError> {
        let path = format!("/v1/volumes/{name}/heat?cells={cells}&top={top}");
        self.get(&path).await
    }

    /// Makes an empty volume.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn create_volume(&self, request: &CreateVolume) -> Result<VolumeInfo, ClientError> {
        self.post("/v1/volumes", request).await
    }

    /// Takes an image file under care.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn import_volume(&self, request: &ImportVolume) -> Result<VolumeInfo, ClientError> {
        self.post("/v1/volumes/import", request).await
    }

    /// Gives a volume up, and deletes its image if asked.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn remove_volume(
        &self,
        name: &VolumeName,
        delete_image: bool,
    ) -> Result<RemovedVolume, ClientError> {
        let path = format!("/v1/volumes/{name}?delete_image={delete_image}");
        self.call(Method::DELETE, &path, Bytes::new()).await
    }

    /// Drops the copy that stayed here of a volume that has moved away.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn drop_replica(
        &self,
        name: &VolumeName,
        keep_image: bool,
    ) -> Result<RemovedVolume, ClientError> {
        let path = format!("/v1/replicas/{name}?keep_image={keep_image}");
        self.call(Method::DELETE, &path, Bytes::new()).await
    }

    /// Keeps a replica of a volume at another site.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn replicate(
        &self,
        name: &VolumeName,
        request: &ReplicateRequest,
    ) -> Result<ReplicationStatus, ClientError> {
        self.post(&format!("/v1/volumes/{name}/replicate"), request)
            .await
    }

    /// All volumes that a replica is kept of.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn replications(&self) -> Result<Vec<ReplicationStatus>, ClientError> {
        self.get("/v1/replications").await
    }

    /// One of them.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn replication(&self, name: &VolumeName) -> Result<ReplicationStatus, ClientError> {
        self.get(&format!("/v1/replications/{name}")).await
    }

    /// Keeps no replica of a volume any more; the one that is there stays.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn stop_replication(
        &self,
        name: &VolumeName,
    ) -> Result<ReplicationStatus, ClientError> {
        let path = format!("/v1/replications/{name}");
        self.call(Method::DELETE, &path, Bytes::new()).await
    }

    /// Puts a replica that stands here back to its last consistent moment.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn restore_replica(
        &self,
        name: &VolumeName,
        force: bool,
    ) -> Result<RestoredReplica, ClientError> {
        let request = RestoreReplica { force };
        self.post(&format!("/v1/replicas/{name}/restore"), &request)
            .await
    }

    /// Where a guest finds the volume.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn export(&self, name: &VolumeName) -> Result<ExportInfo, ClientError> {
        self.post(&format!("/v1/volumes/{name}/export"), &()).await
    }

    /// Begins a migration.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn migrate(
        &self,
        name: &VolumeName,
        request: &MigrateRequest,
    ) -> Result<MigrationStatus, ClientError> {
        self.post(&format!("/v1/volumes/{name}/migrate"), request)
            .await
    }

    /// Begins a migration of several volumes, which move together.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn migrate_together(
        &self,
        request: &MigrateTogether,
    ) -> Result<MigrationStatus, ClientError> {
        self.post("/v1/migrations", request).await
    }

    /// Lets the volume's migration switch as soon as it is ready.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn switchover(&self, name: &VolumeName) -> Result<MigrationStatus, ClientError> {
        self.post(&format!("/v1/volumes/{name}/switchover"), &())
            .await
    }

    /// Ends the volume's migration before the switch.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn cancel(&self, name: &VolumeName) -> Result<MigrationStatus, ClientError> {
        self.post(&format!("/v1/volumes/{name}/cancel"), &()).await
    }

    /// All migrations that run or are remembered, oldest first.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn migrations(&self) -> Result<Vec<MigrationStatus>, ClientError> {
        self.get("/v1/migrations").await
    }

    /// One migration.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn migration(&self, id: MigrationId) -> Result<MigrationStatus, ClientError> {
        self.get(&format!("/v1/migrations/{id}")).await
    }

    /// Compares the copy that a completed migration left here with what arrived, once more if need be. Answered at once;
    /// [`migration`](Self::migration) says what comes of it.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn check(&self, id: MigrationId) -> Result<MigrationStatus, ClientError> {
        self.post(&format!("/v1/migrations/{id}/check"), &()).await
    }

    /// All machines under care.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn vms(&self) -> Result<Vec<VmInfo>, ClientError> {
        self.get("/v1/vms").await
    }

    /// One machine under care.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn vm(&self, name: &VolumeName) -> Result<VmInfo, ClientError> {
        self.get(&format!("/v1/vms/{name}")).await
    }

    /// Takes a running machine's disks under care, or only looks at them.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn adopt_vm(&self, request: &AdoptVm) -> Result<VmInfo, ClientError> {
        self.post("/v1/vms", request).await
    }

    /// Gives a machine's disks back as plain files.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn release_vm(&self, name: &VolumeName) -> Result<VmInfo, ClientError> {
        self.post(&format!("/v1/vms/{name}/release"), &()).await
    }

    /// Begins to move a machine to another site.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn move_vm(
        &self,
        name: &VolumeName,
        request: &MoveVm,
    ) -> Result<VmMoveStatus, ClientError> {
        self.post(&format!("/v1/vms/{name}/migrate"), request).await
    }

    /// The last move of a machine.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn vm_move(&self, name: &VolumeName) -> Result<VmMoveStatus, ClientError> {
        self.get(&format!("/v1/vms/{name}/migration")).await
    }

    /// Ends the move of a machine before its switch.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn cancel_vm_move(&self, name: &VolumeName) -> Result<VmMoveStatus, ClientError> {
        self.post(&format!("/v1/vms/{name}/cancel"), &()).await
    }

    /// All images of the library.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn library(&self) -> Result<Vec<LibraryImage>, ClientError> {
        self.get("/v1/library").await
    }

    /// Takes an image into the library.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn add_library_image(
        &self,
        request: &AddLibraryImage,
    ) -> Result<LibraryImage, ClientError> {
        self.post("/v1/library", request).await
    }

    /// One image of the library.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn library_image(&self, name: &VolumeName) -> Result<LibraryImage, ClientError> {
        self.get(&format!("/v1/library/{name}")).await
    }

    /// Gives an image up.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn remove_library_image(
        &self,
        name: &VolumeName,
    ) -> Result<LibraryImage, ClientError> {
        let path = format!("/v1/library/{name}");
        self.call(Method::DELETE, &path, Bytes::new()).await
    }

    /// Reads an image again and makes its fingerprints anew.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn verify_library_image(
        &self,
        name: &VolumeName,
    ) -> Result<LibraryImage, ClientError> {
        self.post(&format!("/v1/library/{name}/verify"), &()).await
    }

    /// Begins to find out what a migration would cost.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn make_plan(&self, request: &PlanRequest) -> Result<PlanStatus, ClientError> {
        self.post("/v1/plans", request).await
    }

    /// Plans that run or are remembered, oldest first.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn plans(&self) -> Result<Vec<PlanStatus>, ClientError> {
        self.get("/v1/plans").await
    }

    /// One plan.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn plan(&self, id: MigrationId) -> Result<PlanStatus, ClientError> {
        self.get(&format!("/v1/plans/{id}")).await
    }

    /// Ends a plan.
    ///
    /// # Errors
    /// [`ClientError`], as for all calls.
    pub async fn cancel_plan(&self, id: MigrationId) -> Result<PlanStatus, ClientError> {
        let path = format!("/v1/plans/{id}");
        self.call(Method::DELETE, &path, Bytes::new()).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).expect("request types serialise");
        self.call(Method::POST, path, body.into()).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let (status, body) = self.exchange(method, path, body).await?;
        let not_understood = |source| ClientError::Answer {
            status: status.as_u16(),
            source,
        };
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(not_understood);
        }
        let refusal: ErrorBody = serde_json::from_slice(&body).map_err(not_understood)?;
        Err(refusal.into())
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| self.connect_error(source))?;
        let broken = |error: hyper::Error| ClientError::Broken(error.into());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        let driver = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "flimcd")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .expect("paths are made of names and ids");
        let answer = async {
            let response = sender.send_request(request).await.map_err(broken)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), BODY_MAX)
                .collect()
                .await
                .map_err(ClientError::Broken)?;
            Ok((status, body.to_bytes()))
        };
        let answer = answer.await;
        driver.abort();
        answer
    }

    fn connect_error(&self, source: io::Error) -> ClientError {
        let socket = self.socket.clone();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NotRunning { socket, source }
            }
            io::ErrorKind::PermissionDenied => ClientError::Forbidden { socket, source },
            _ => ClientError::Connect { socket, source },
        }
    }
}
