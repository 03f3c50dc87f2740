//! Routes of the API for replicas that are kept up to date.

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    routing::{get, post},
};
use std::sync::Arc;

use super::{
    replicate::{ReplicateRequest, ReplicationStatus, RestoreReplica, RestoredReplica},
    server::{Answer, App, answer, body, parse},
    types::ErrorBody,
};
use crate::agent::Agent;

pub(super) fn routes() -> Router<Arc<Agent>> {
    Router::new()
        .route("/v1/replications", get(replications))
        .route("/v1/replications/{name}", get(replication).delete(stop))
        .route("/v1/volumes/{name}/replicate", post(replicate))
        .route("/v1/replicas/{name}/restore", post(restore))
}

/// All volumes that a replica is kept of.
#[utoipa::path(get, path = "/v1/replications", responses((status = 200, body = Vec<ReplicationStatus>)))]
pub(super) async fn replications(State(agent): App) -> Answer<Vec<ReplicationStatus>> {
    answer(Ok(agent.replications()))
}

/// The replication of one volume.
#[utoipa::path(
    get, path = "/v1/replications/{name}", params(("name" = String, Path)),
    responses((status = 200, body = ReplicationStatus), (status = 404, body = ErrorBody))
)]
pub(super) async fn replication(
    State(agent): App,
    Path(name): Path<String>,
) -> Answer<ReplicationStatus> {
    answer(agent.replication(&parse(&name)?))
}

/// Keeps a replica of a volume at another site.
#[utoipa::path(
    post, path = "/v1/volumes/{name}/replicate", params(("name" = String, Path)),
    request_body = ReplicateRequest,
    responses(
        (status = 200, body = ReplicationStatus), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)
    )
)]
pub(super) async fn replicate(
    State(agent): App,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<ReplicationStatus> {
    let request: ReplicateRequest = body(&bytes)?;
    answer(agent.replicate(parse(&name)?, request).await)
}

/// Keeps no replica any more. What is there stays.
#[utoipa::path(
    delete, path = "/v1/replications/{name}", params(("name" = String, Path)),
    responses((status = 200, body = ReplicationStatus), (status = 404, body = ErrorBody))
)]
pub(super) async fn stop(State(agent): App, Path(name): Path<String>) -> Answer<ReplicationStatus> {
    answer(agent.stop_replication(&parse(&name)?).await)
}

/// Puts a replica that stands here back to its last consistent moment.
#[utoipa::path(
    post, path = "/v1/replicas/{name}/restore", params(("name" = String, Path)),
    request_body = RestoreReplica,
    responses(
        (status = 200, body = RestoredReplica), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
pub(super) async fn restore(
    State(agent): App,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<RestoredReplica> {
    let request: RestoreReplica = body(&bytes)?;
    answer(agent.restore_replica(&parse(&name)?, request.force).await)
}
