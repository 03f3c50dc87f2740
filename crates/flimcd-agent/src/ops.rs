//! What the API can ask of an agent.

use flimcd_core::{MigrationId, VolumeName, VolumeSize};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    agent::Agent,
    api::{
        ApiCode, CreateVolume, ErrorBody, ExportInfo, ImportVolume, MigrateRequest,
        MigrationStatus, OwnershipState, RemovedVolume, Role, VolumeInfo,
    },
    error::{io_error, refuse},
    hosting::Hosted,
    migration::{Command, CommandError, progress::fresh_status, store::MigrationRecord},
    registry::Running,
    tasks::{self, Begin},
};

/// Commands that may wait for a driver.
const COMMANDS: usize = 8;

impl Agent {
    /// All volumes, by name.
    pub(crate) fn list_volumes(&self) -> Vec<VolumeInfo> {
        let hosted = self.hosting.all();
        hosted.iter().map(|hosted| self.describe(hosted)).collect()
    }

    /// One volume.
    pub(crate) fn volume_info(&self, name: &VolumeName) -> Result<VolumeInfo, ErrorBody> {
        let hosted = self.hosting.get(name)?;
        Ok(self.describe(&hosted))
    }

    fn describe(&self, hosted: &Hosted) -> VolumeInfo {
        let running = self.registry.running_on(hosted.name());
        hosted.describe(running.map(|(id, _)| id))
    }

    /// Makes an empty volume.
    pub(crate) async fn create_volume(
        self: &Arc<Self>,
        request: CreateVolume,
    ) -> Result<VolumeInfo, ErrorBody> {
        let size = VolumeSize::new(request.size_bytes)
            .map_err(|error| refuse(ApiCode::BadRequest, error.to_string(), ""))?;
        let agent = self.clone();
        let hosted = blocking(move || {
            agent
                .hosting
                .create(&request.name, size, request.tenant.as_deref())
        })
        .await?;
        tracing::info!(volume = %hosted.name(), size = size.bytes(), "volume created");
        Ok(self.describe(&hosted))
    }

    /// Takes an image under care.
    pub(crate) async fn import_volume(
        self: &Arc<Self>,
        request: ImportVolume,
    ) -> Result<VolumeInfo, ErrorBody> {
        if !request.path.is_absolute() {
            let message = format!("the path {} is not absolute", request.path.display());
            let hint = "the agent has another working directory: give the whole path";
            return Err(refuse(ApiCode::BadRequest, message, hint));
        }
        let agent = self.clone();
        let hosted = blocking(move || {
            agent
                .hosting
                .import(&request.name, &request.path, request.tenant.as_deref())
        })
        .await?;
        tracing::info!(volume = %hosted.name(), "volume imported");
        Ok(self.describe(&hosted))
    }

    /// Gives a volume up.
    pub(crate) async fn remove_volume(
        self: &Arc<Self>,
        name: &VolumeName,
        delete_image: bool,
    ) -> Result<RemovedVolume, ErrorBody> {
        let (agent, name) = (self.clone(), name.clone());
        let removed = blocking(move || {
            agent.hosting.remove(&name, delete_image, || {
                match agent.registry.running_on(&name) {
                    Some((id, _)) => Err(busy(&name, id)),
                    None => Ok(()),
                }
            })
        })
        .await?;
        tracing::info!(
            volume = %removed.name, image = %removed.image.display(),
            image_deleted = removed.image_deleted, "volume removed"
        );
        Ok(removed)
    }

    /// Where a guest finds the volume.
    pub(crate) fn export(&self, name: &VolumeName) -> Result<ExportInfo, ErrorBody> {
        Ok(self.hosting.get(name)?.export())
    }

    /// Begins a migration.
    pub(crate) async fn migrate(
        self: &Arc<Self>,
        name: &VolumeName,
        request: MigrateRequest,
    ) -> Result<MigrationStatus, ErrorBody> {
        let hosted = self.hosting.get(name)?;
        self.check_peer(name, &request)?;
        let epoch = hosted.epoch_to_migrate()?;
        let id = MigrationId(rand::random());
        let size = hosted.volume().size().bytes();
        let mut status = fresh_status(id, name.clone(), Role::Source, request.to.clone(), size);
        status.strategy = Some(request.strategy);
        status.switchover = Some(request.switchover);
        let record = MigrationRecord::new(
            Role::Source,
            hosted.volume().id(),
            epoch,
            Some(request),
            status.clone(),
        );
        let store = self.store.clone();
        let to_save = record.clone();
        let begun = self.begin(&record)?;
        let saved = blocking(move || {
            store
                .save(&to_save)
                .map_err(|error| io_error("recording the migration", &error))
        })
        .await;
        if let Err(error) = saved {
            self.registry.forget(id);
            return Err(error);
        }
        tracing::info!(
            migration = %id, volume = %name, to = %record.peer, strategy = ?status.strategy,
            "migration begins"
        );
        tasks::spawn_source(self, hosted, record, begun, true);
        Ok(status)
    }

    /// Notes that a migration runs from now on.
    pub(crate) fn begin(&self, record: &MigrationRecord) -> Result<Begin, ErrorBody> {
        let (commands_in, commands) = mpsc::channel(COMMANDS);
        let (status, status_out) = watch::channel(record.status.clone());
        let running = Running {
            volume: record.volume.clone(),
            role: record.role,
            peer: record.peer.clone(),
            commands: commands_in,
            status: status_out,
        };
        let begun = self.registry.begin(record.id, running);
        begun.map_err(|other| busy(&record.volume, other.status.borrow().id))?;
        Ok(Begin { commands, status })
    }

    fn check_peer(&self, name: &VolumeName, request: &MigrateRequest) -> Result<(), ErrorBody> {
        let to = &request.to;
        if *to == self.config.site {
            let message = format!("{name} is at site {to} already: it is this agent's own");
            return Err(refuse(ApiCode::BadRequest, message, "name another site"));
        }
        let Some(peer) = self.config.peer(to) else {
            let known: Vec<_> = self
                .config
                .peers
                .iter()
                .map(|peer| peer.site.as_str())
                .collect();
            let message = format!("there is no site {to} in the configuration");
            let hint = if known.is_empty() {
                "add a [[peer]] table for it and restart the agent".to_owned()
            } else {
                format!(
                    "known sites: {}; others need a [[peer]] table",
                    known.join(", ")
                )
            };
            return Err(refuse(ApiCode::UnknownSite, message, hint));
        };
        if !peer.allows_receiving(name) {
            let message = format!("the configuration does not let {name} go to site {to}");
            let hint = format!("add it to may_receive of peer {to} and restart the agent");
            return Err(refuse(ApiCode::NotAllowed, message, hint));
        }
        let is_up = self
            .link_to(to)
            .is_some_and(|link| link.handle().status().is_up);
        if peer.address.is_none() && !is_up {
            let message = format!("site {to} is not connected, and has no address to dial");
            let hint = format!("add its address to peer {to} and restart the agent");
            return Err(refuse(ApiCode::UnknownSite, message, hint));
        }
        Ok(())
    }

    /// Lets a volume's migration switch.
    pub(crate) async fn switchover(&self, name: &VolumeName) -> Result<MigrationStatus, ErrorBody> {
        self.command(name, Command::Switchover).await
    }

    /// Ends a volume's migration before the switch.
    pub(crate) async fn cancel(&self, name: &VolumeName) -> Result<MigrationStatus, ErrorBody> {
        self.command(name, Command::Cancel).await
    }

    async fn command(
        &self,
        name: &VolumeName,
        make: impl FnOnce(oneshot::Sender<Result<(), CommandError>>) -> Command,
    ) -> Result<MigrationStatus, ErrorBody> {
        self.hosting.get(name)?;
        let not_migrating = || {
            let message = format!("{name} is not migrating");
            refuse(
                ApiCode::UnknownMigration,
                message,
                "`flimcd status` shows what is",
            )
        };
        let (id, running) = self.registry.running_on(name).ok_or_else(not_migrating)?;
        let (answer, answered) = oneshot::channel();
        let sent = running.commands.send(make(answer)).await;
        if sent.is_err() {
            return Err(not_migrating());
        }
        match answered.await {
            Ok(Ok(())) => self.migration(id),
            Ok(Err(CommandError::OtherSide)) => Err(refuse(
                ApiCode::BadRequest,
                format!("the source decides about the switch of {name}"),
                format!("ask the agent at site {}", running.peer),
            )),
            Ok(Err(CommandError::TooLate)) => Err(refuse(
                ApiCode::TooLate,
                format!("{name} is owned by the target already, so its migration cannot be ended"),
                "let it complete, and migrate the volume back if it should not be there",
            )),
            Ok(Err(CommandError::Io(error))) => Err(io_error("recording the request", &error)),
            Err(_) => Err(not_migrating()),
        }
    }

    /// All migrations.
    pub(crate) fn migrations(&self) -> Vec<MigrationStatus> {
        self.registry.statuses()
    }

    /// One migration.
    pub(crate) fn migration(&self, id: MigrationId) -> Result<MigrationStatus, ErrorBody> {
        self.registry.status(id).ok_or_else(|| {
            let message = format!("there is no migration {id}");
            refuse(
                ApiCode::UnknownMigration,
                message,
                "GET /v1/migrations lists what is known",
            )
        })
    }
}

fn busy(name: &VolumeName, id: MigrationId) -> ErrorBody {
    let message = format!("{name} is migrating already (migration {id})");
    let hint = format!("wait for its end, or end it with `flimcd cancel {name}`");
    refuse(ApiCode::Busy, message, hint)
}

/// Runs something that may wait for a disk.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ErrorBody> + Send + 'static,
) -> Result<T, ErrorBody> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => Err(io_error("the agent", &std::io::Error::other(panic))),
    }
}

/// What may not be done with a volume in this state, and why.
pub(crate) fn not_owner(
    name: &VolumeName,
    state: OwnershipState,
    peer: Option<&flimcd_core::SiteName>,
) -> ErrorBody {
    let peer = peer.map_or_else(|| "another site".to_owned(), |peer| format!("site {peer}"));
    let (message, hint) = match state {
        OwnershipState::Owner => (format!("{name} is owned here"), ""),
        OwnershipState::Prepared => (
            format!("the hand-over of {name} to {peer} is under way"),
            "wait for its end; `flimcd status` shows what it waits for",
        ),
        OwnershipState::Released => (
            format!("{name} has moved to {peer}; what is here is an old copy"),
            "ask the agent there",
        ),
        OwnershipState::Incoming => (
            format!("{name} is on its way here from {peer}"),
            "wait for its arrival, or end it with `flimcd cancel`",
        ),
        OwnershipState::Arriving => (
            format!("{name} has arrived from {peer}, but not all of its blocks"),
            "wait for the end of the migration",
        ),
    };
    refuse(ApiCode::Busy, message, hint)
}
