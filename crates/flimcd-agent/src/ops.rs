//! What the API can ask of an agent.

use flimcd_core::{Epoch, MigrationId, SiteName, VolumeName, VolumeSize, limits};
use std::{collections::BTreeSet, sync::Arc};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    agent::Agent,
    api::{
        ApiCode, CreateVolume, ErrorBody, ExportInfo, ImportVolume, MigrateRequest,
        MigrationStatus, OwnershipState, RemovedVolume, Role, VolumeInfo,
    },
    error::{io_error, refuse},
    hosting::Hosted,
    migration::{
        Command, CommandAnswer, CommandError,
        hooks::DisksEvent,
        progress::{add_note, fresh_status},
        store::{MigrationRecord, MovedVolume},
        volumes::VolumeSet,
    },
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
        self.note_in_library(hosted.name()).await;
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
        self.note_in_library(hosted.name()).await;
        Ok(self.describe(&hosted))
    }

    /// Gives a volume up; with `only_replica`, only a copy that stayed when it moved away.
    pub(crate) async fn remove_volume(
        self: &Arc<Self>,
        name: &VolumeName,
        delete_image: bool,
        only_replica: bool,
    ) -> Result<RemovedVolume, ErrorBody> {
        let (agent, name) = (self.clone(), name.clone());
        let removed = blocking(move || {
            agent.hosting.remove(&name, delete_image, only_replica, || {
                agent.check_not_of_vm(&name)?;
                match agent.registry.running_on(&name) {
                    Some((id, _)) => Err(busy(&name, id)),
                    None => Ok(()),
                }
            })
        })
        .await?;
        let (library, gone) = (self.library.clone(), removed.name.clone());
        let told = tokio::task::spawn_blocking(move || library.volume_gone(&gone));
        if let Err(panic) = told.await {
            tracing::error!(volume = %removed.name, "the library was not told that it is gone: {panic}");
        }
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

    /// Begins a migration of one or more volumes, which move together. With a `session` they are the disks of a
    /// machine whose move decides about the switch: see [`hooks`](crate::migration::hooks).
    pub(crate) async fn begin_migration(
        self: &Arc<Self>,
        names: Vec<VolumeName>,
        request: MigrateRequest,
        session: Option<MigrationId>,
    ) -> Result<MigrationStatus, ErrorBody> {
        self.end_increments(&names).await;
        self.begin_sending(names, request, session, false).await
    }

    /// Begins a migration, or with `increment` what brings a replica up to date and never switches.
    pub(crate) async fn begin_sending(
        self: &Arc<Self>,
        names: Vec<VolumeName>,
        request: MigrateRequest,
        session: Option<MigrationId>,
        increment: bool,
    ) -> Result<MigrationStatus, ErrorBody> {
        let (volumes, epoch) = self.volumes_to_migrate(&names, &request.to)?;
        let id = MigrationId(rand::random());
        let all = volumes.all().iter();
        let bytes = all.map(|volume| volume.size().bytes()).sum();
        let moved = volumes.all().iter().map(|volume| MovedVolume {
            id: volume.id(),
            name: volume.name().clone(),
        });
        let mut status = fresh_status(id, names, Role::Source, request.to.clone(), bytes);
        status.strategy = Some(request.strategy);
        status.switchover = Some(request.switchover);
        status.session = session;
        status.planned = self.plans.planned(&status.volumes, &request);
        if increment {
            add_note(
                &mut status,
                format!("an increment of the replica at {}", request.to),
            );
        }
        let mut record = MigrationRecord::new(
            Role::Source,
            moved.collect(),
            epoch,
            Some(request),
            status.clone(),
        );
        record.increment = increment;
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
            migration = %id, volumes = %record.names(), to = %record.peer,
            strategy = ?status.strategy, "migration begins"
        );
        tasks::spawn_source(self, volumes, record, begun, true);
        Ok(status)
    }

    /// The volumes of a migration that may begin, and the highest of their epochs.
    pub(crate) fn volumes_to_migrate(
        &self,
        names: &[VolumeName],
        to: &SiteName,
    ) -> Result<(Arc<VolumeSet>, Epoch), ErrorBody> {
        let bad = |message: String, hint: &str| Err(refuse(ApiCode::BadRequest, message, hint));
        if names.is_empty() {
            return bad("no volume is named".to_owned(), "name what is to move");
        }
        if names.len() > limits::MAX_VOLUMES_PER_MIGRATION {
            let message = format!(
                "{} volumes are too many for one migration, which takes {}",
                names.len(),
                limits::MAX_VOLUMES_PER_MIGRATION
            );
            return bad(message, "migrate them in several");
        }
        if names.iter().collect::<BTreeSet<_>>().len() < names.len() {
            return bad("a volume is named twice".to_owned(), "name each once");
        }
        let mut volumes = Vec::new();
        let mut epoch = Epoch::FIRST;
        for name in names {
            let hosted = self.hosting.get(name)?;
            self.check_peer(name, to)?;
            epoch = epoch.max(hosted.epoch_to_migrate()?);
            volumes.push(hosted.volume().clone());
        }
        match VolumeSet::new(volumes) {
            Ok(volumes) => Ok((volumes, epoch)),
            Err(error) => bad(
                format!("the volumes together: {error}"),
                "migrate them in several",
            ),
        }
    }

    /// Notes that a migration runs from now on.
    pub(crate) fn begin(&self, record: &MigrationRecord) -> Result<Begin, ErrorBody> {
        let (commands_in, commands) = mpsc::channel(COMMANDS);
        let (status, status_out) = watch::channel(record.status.clone());
        let running = Running {
            volumes: record.status.volumes.clone(),
            role: record.role,
            peer: record.peer.clone(),
            commands: commands_in,
            status: status_out,
        };
        let begun = self.registry.begin(record.id, running);
        begun.map_err(|other| {
            let other = other.status.borrow();
            let shared = other
                .volumes
                .iter()
                .find(|volume| record.status.volumes.contains(volume));
            busy(shared.unwrap_or(&record.status.volumes[0]), other.id)
        })?;
        let hook = record.session.map(|session| self.sessions.begin(session));
        Ok(Begin {
            commands,
            status,
            hook,
        })
    }

    fn check_peer(&self, name: &VolumeName, to: &SiteName) -> Result<(), ErrorBody> {
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
        make: impl FnOnce(CommandAnswer) -> Command,
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
        let (id, _) = self.registry.running_on(name).ok_or_else(not_migrating)?;
        self.command_migration(id, make).await?;
        self.migration(id)
    }

    /// Passes a command on to the driver of a migration.
    pub(crate) async fn command_migration(
        &self,
        id: MigrationId,
        make: impl FnOnce(CommandAnswer) -> Command,
    ) -> Result<(), ErrorBody> {
        let not_running = || {
            let message = format!("migration {id} does not run here any more");
            refuse(
                ApiCode::UnknownMigration,
                message,
                "`flimcd status` shows what does",
            )
        };
        let running = self.registry.running(id).ok_or_else(not_running)?;
        let (answer, answered) = oneshot::channel();
        let sent = running.commands.send(make(answer)).await;
        if sent.is_err() {
            return Err(not_running());
        }
        let names = || running.status.borrow().names();
        match answered.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(CommandError::OtherSide)) => Err(refuse(
                ApiCode::BadRequest,
                format!("the source decides about the switch of {}", names()),
                format!("ask the agent at site {}", running.peer),
            )),
            Ok(Err(CommandError::WithMachine)) => Err(refuse(
                ApiCode::BadRequest,
                format!("{} moves with a machine, and switches with it", names()),
                "the machine's move decides when",
            )),
            Ok(Err(CommandError::TooLate)) => Err(refuse(
                ApiCode::TooLate,
                format!(
                    "{} is owned by the target already, so its migration cannot be ended",
                    names()
                ),
                "let it complete, and migrate the volume back if it should not be there",
            )),
            Ok(Err(CommandError::Io(error))) => Err(io_error("recording the request", &error)),
            Err(_) => Err(not_running()),
        }
    }

    /// What happens to the disks of a machine that moves: see [`hooks`](crate::migration::hooks).
    #[allow(dead_code, reason = "asked for by the move of a machine")]
    pub(crate) fn disks_of(&self, session: MigrationId) -> mpsc::UnboundedReceiver<DisksEvent> {
        self.sessions.listen(session)
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

pub(crate) fn busy(name: &VolumeName, id: MigrationId) -> ErrorBody {
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
    peer: Option<&SiteName>,
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
