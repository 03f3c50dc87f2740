//! The HTTP server of the API: routes, and the OpenAPI document.
//!
//! Handlers only translate; what is asked for is done in [`crate::agent`]. Every error, including
//! those of the HTTP layer itself, has an [`ErrorBody`].

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use flimcd_core::{MigrationId, VolumeName};
use serde::{Serialize, de::DeserializeOwned};
use std::{str::FromStr, sync::Arc};
use utoipa::OpenApi;

use super::{
    heat_server, plan_server, replicate_server,
    types::{
        AddLibraryImage, ApiCode, CreateVolume, DropQuery, ErrorBody, ExportInfo, ImportVolume,
        LibraryImage, MigrateRequest, MigrateTogether, MigrationStatus, RemoveQuery, RemovedVolume,
        Status, VolumeInfo,
    },
    vm_server,
};
use crate::agent::Agent;

pub(super) type App = State<Arc<Agent>>;
pub(super) type Answer<T> = Result<Json<T>, ErrorBody>;

impl IntoResponse for ErrorBody {
    fn into_response(self) -> Response {
        let status = match self.code {
            ApiCode::BadRequest | ApiCode::Image => StatusCode::BAD_REQUEST,
            ApiCode::UnknownVolume
            | ApiCode::UnknownVm
            | ApiCode::UnknownMigration
            | ApiCode::UnknownImage
            | ApiCode::UnknownSite
            | ApiCode::UnknownPath => StatusCode::NOT_FOUND,
            ApiCode::NotAllowed => StatusCode::FORBIDDEN,
            ApiCode::Exists | ApiCode::Busy | ApiCode::TooLate => StatusCode::CONFLICT,
            ApiCode::Io => StatusCode::INTERNAL_SERVER_ERROR,
            ApiCode::Qemu => StatusCode::BAD_GATEWAY,
            ApiCode::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        };
        (status, Json(self)).into_response()
    }
}

/// The document that describes the API, as JSON.
///
/// # Panics
/// Never: the document is made of constants.
#[must_use]
pub fn openapi_json() -> String {
    Document::openapi().to_pretty_json().expect("constants")
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "flimcd agent",
        description = "Control of one flimcd agent, over its unix socket RUNTIME_DIR/api.sock."
    ),
    paths(
        status,
        volumes,
        create_volume,
        import_volume,
        volume,
        remove_volume,
        drop_replica,
        export,
        migrate,
        switchover,
        cancel,
        migrations,
        migrate_together,
        migration,
        check,
        heat_server::heat,
        vm_server::vms,
        vm_server::adopt_vm,
        vm_server::vm,
        vm_server::release_vm,
        vm_server::move_vm,
        vm_server::vm_move,
        vm_server::cancel_vm_move,
        library,
        add_library_image,
        library_image,
        remove_library_image,
        verify_library_image,
        plan_server::plans,
        plan_server::make_plan,
        plan_server::plan,
        plan_server::cancel_plan,
        replicate_server::replications,
        replicate_server::replication,
        replicate_server::replicate,
        replicate_server::stop,
        replicate_server::restore
    ),
    components(schemas(ErrorBody))
)]
struct Document;

pub(crate) fn router(agent: Arc<Agent>) -> Router {
    Router::new()
        .route("/openapi.json", get(document))
        .route("/v1/status", get(status))
        .route("/v1/volumes", get(volumes).post(create_volume))
        .route("/v1/volumes/import", post(import_volume))
        .route("/v1/volumes/{name}", get(volume).delete(remove_volume))
        .route("/v1/replicas/{name}", axum::routing::delete(drop_replica))
        .route("/v1/volumes/{name}/export", post(export))
        .route("/v1/volumes/{name}/migrate", post(migrate))
        .route("/v1/volumes/{name}/switchover", post(switchover))
        .route("/v1/volumes/{name}/cancel", post(cancel))
        .route("/v1/migrations", get(migrations).post(migrate_together))
        .route("/v1/library", get(library).post(add_library_image))
        .route(
            "/v1/library/{name}",
            get(library_image).delete(remove_library_image),
        )
        .route("/v1/library/{name}/verify", post(verify_library_image))
        .route("/v1/migrations/{id}", get(migration))
        .route("/v1/migrations/{id}/check", post(check))
        .merge(heat_server::routes())
        .merge(plan_server::routes())
        .merge(replicate_server::routes())
        .merge(vm_server::routes())
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_path)
        .with_state(agent)
}

async fn unknown_path() -> ErrorBody {
    ErrorBody {
        code: ApiCode::UnknownPath,
        message: "there is nothing at this path, or not with this method".to_owned(),
        hint: Some("GET /openapi.json describes what there is".to_owned()),
    }
}

async fn document() -> Response {
    let kind = [("content-type", "application/json")];
    (kind, openapi_json()).into_response()
}

pub(super) fn bad_request(message: String) -> ErrorBody {
    ErrorBody {
        code: ApiCode::BadRequest,
        message,
        hint: None,
    }
}

pub(super) fn parse<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, ErrorBody> {
    text.parse()
        .map_err(|error: T::Err| bad_request(error.to_string()))
}

pub(super) fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ErrorBody> {
    serde_json::from_slice(bytes)
        .map_err(|error| bad_request(format!("the request's body is not understood: {error}")))
}

pub(super) fn answer<T: Serialize>(result: Result<T, ErrorBody>) -> Answer<T> {
    result.map(Json)
}

/// The agent and everything it has at hand.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
async fn status(State(agent): App) -> Answer<Status> {
    answer(Ok(agent.status()))
}

/// All volumes.
#[utoipa::path(get, path = "/v1/volumes", responses((status = 200, body = Vec<VolumeInfo>)))]
async fn volumes(State(agent): App) -> Answer<Vec<VolumeInfo>> {
    answer(Ok(agent.list_volumes()))
}

/// Makes an empty volume.
#[utoipa::path(
    post, path = "/v1/volumes", request_body = CreateVolume,
    responses(
        (status = 200, body = VolumeInfo), (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
async fn create_volume(State(agent): App, bytes: Bytes) -> Answer<VolumeInfo> {
    answer(agent.create_volume(body::<CreateVolume>(&bytes)?).await)
}

/// Takes an image file under care, where it lies, without copying.
#[utoipa::path(
    post, path = "/v1/volumes/import", request_body = ImportVolume,
    responses(
        (status = 200, body = VolumeInfo), (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
async fn import_volume(State(agent): App, bytes: Bytes) -> Answer<VolumeInfo> {
    answer(agent.import_volume(body::<ImportVolume>(&bytes)?).await)
}

/// One volume.
#[utoipa::path(
    get, path = "/v1/volumes/{name}", params(("name" = String, Path)),
    responses((status = 200, body = VolumeInfo), (status = 404, body = ErrorBody))
)]
async fn volume(State(agent): App, Path(name): Path<String>) -> Answer<VolumeInfo> {
    answer(agent.volume_info(&parse(&name)?))
}

/// Gives a volume up; its image stays unless asked otherwise.
#[utoipa::path(
    delete, path = "/v1/volumes/{name}",
    params(("name" = String, Path), ("delete_image" = Option<bool>, Query)),
    responses(
        (status = 200, body = RemovedVolume), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
async fn remove_volume(
    State(agent): App,
    Path(name): Path<String>,
    query: Result<Query<RemoveQuery>, QueryRejection>,
) -> Answer<RemovedVolume> {
    let Query(query) = query.map_err(|error| bad_request(error.to_string()))?;
    let name: VolumeName = parse(&name)?;
    answer(agent.remove_volume(&name, query.delete_image, false).await)
}

/// Drops the copy that stayed here of a volume that has moved away.
#[utoipa::path(
    delete, path = "/v1/replicas/{name}",
    params(("name" = String, Path), DropQuery),
    responses(
        (status = 200, body = RemovedVolume), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
async fn drop_replica(
    State(agent): App,
    Path(name): Path<String>,
    query: Result<Query<DropQuery>, QueryRejection>,
) -> Answer<RemovedVolume> {
    let Query(query) = query.map_err(|error| bad_request(error.to_string()))?;
    let name: VolumeName = parse(&name)?;
    answer(agent.drop_replica(&name, query.keep_image).await)
}

/// Where a guest finds the volume.
#[utoipa::path(
    post, path = "/v1/volumes/{name}/export", params(("name" = String, Path)),
    responses((status = 200, body = ExportInfo), (status = 404, body = ErrorBody))
)]
async fn export(State(agent): App, Path(name): Path<String>) -> Answer<ExportInfo> {
    answer(agent.export(&parse(&name)?))
}

/// Begins a migration.
#[utoipa::path(
    post, path = "/v1/volumes/{name}/migrate", params(("name" = String, Path)),
    request_body = MigrateRequest,
    responses(
        (status = 200, body = MigrationStatus), (status = 400, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
async fn migrate(
    State(agent): App,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<MigrationStatus> {
    let request = body::<MigrateRequest>(&bytes)?;
    let volume = parse(&name)?;
    agent.check_not_of_vm(&volume)?;
    let volumes = vec![volume];
    answer(agent.begin_migration(volumes, request, None).await)
}

/// Lets the volume's migration switch as soon as it is ready.
#[utoipa::path(
    post, path = "/v1/volumes/{name}/switchover", params(("name" = String, Path)),
    responses(
        (status = 200, body = MigrationStatus), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
async fn switchover(State(agent): App, Path(name): Path<String>) -> Answer<MigrationStatus> {
    answer(agent.switchover(&parse(&name)?).await)
}

/// Ends the volume's migration before the switch.
#[utoipa::path(
    post, path = "/v1/volumes/{name}/cancel", params(("name" = String, Path)),
    responses(
        (status = 200, body = MigrationStatus), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
async fn cancel(State(agent): App, Path(name): Path<String>) -> Answer<MigrationStatus> {
    answer(agent.cancel(&parse(&name)?).await)
}

/// All migrations that run or are remembered, oldest first.
#[utoipa::path(
    get, path = "/v1/migrations", responses((status = 200, body = Vec<MigrationStatus>))
)]
async fn migrations(State(agent): App) -> Answer<Vec<MigrationStatus>> {
    answer(Ok(agent.migrations()))
}

/// Begins a migration of several volumes, which move together.
#[utoipa::path(
    post, path = "/v1/migrations", request_body = MigrateTogether,
    responses(
        (status = 200, body = MigrationStatus), (status = 400, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
async fn migrate_together(State(agent): App, bytes: Bytes) -> Answer<MigrationStatus> {
    let asked = body::<MigrateTogether>(&bytes)?;
    for volume in &asked.volumes {
        agent.check_not_of_vm(volume)?;
    }
    answer(
        agent
            .begin_migration(asked.volumes, asked.request, None)
            .await,
    )
}

/// One migration.
#[utoipa::path(
    get, path = "/v1/migrations/{id}", params(("id" = String, Path)),
    responses((status = 200, body = MigrationStatus), (status = 404, body = ErrorBody))
)]
async fn migration(State(agent): App, Path(id): Path<String>) -> Answer<MigrationStatus> {
    let id: MigrationId = parse(&id)?;
    answer(agent.migration(id))
}

/// Compares the copy that a completed migration left here with what arrived. Answered at once.
#[utoipa::path(
    post, path = "/v1/migrations/{id}/check", params(("id" = String, Path)),
    responses(
        (status = 200, body = MigrationStatus), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)
    )
)]
async fn check(State(agent): App, Path(id): Path<String>) -> Answer<MigrationStatus> {
    let id: MigrationId = parse(&id)?;
    answer(agent.begin_check(id))
}

/// All images of the library.
#[utoipa::path(get, path = "/v1/library", responses((status = 200, body = Vec<LibraryImage>)))]
async fn library(State(agent): App) -> Answer<Vec<LibraryImage>> {
    answer(agent.library_images().await)
}

/// Takes an image into the library.
#[utoipa::path(
    post, path = "/v1/library", request_body = AddLibraryImage,
    responses(
        (status = 200, body = LibraryImage), (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
async fn add_library_image(State(agent): App, bytes: Bytes) -> Answer<LibraryImage> {
    let request = body::<AddLibraryImage>(&bytes)?;
    answer(agent.add_library_image(request).await)
}

/// One image of the library.
#[utoipa::path(
    get, path = "/v1/library/{name}", params(("name" = String, Path)),
    responses((status = 200, body = LibraryImage), (status = 404, body = ErrorBody))
)]
async fn library_image(State(agent): App, Path(name): Path<String>) -> Answer<LibraryImage> {
    answer(agent.library_image(parse(&name)?).await)
}

/// Gives an image up. The file stays, unless it is the library's own copy.
#[utoipa::path(
    delete, path = "/v1/library/{name}", params(("name" = String, Path)),
    responses((status = 200, body = LibraryImage), (status = 404, body = ErrorBody))
)]
async fn remove_library_image(State(agent): App, Path(name): Path<String>) -> Answer<LibraryImage> {
    answer(agent.remove_library_image(parse(&name)?).await)
}

/// Reads an image again and makes its fingerprints anew.
#[utoipa::path(
    post, path = "/v1/library/{name}/verify", params(("name" = String, Path)),
    responses((status = 200, body = LibraryImage), (status = 404, body = ErrorBody))
)]
async fn verify_library_image(State(agent): App, Path(name): Path<String>) -> Answer<LibraryImage> {
    answer(agent.verify_library_image(parse(&name)?).await)
}
