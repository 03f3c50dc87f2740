//! Routes of the API that are about running machines.

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    routing::{get, post},
};
use std::sync::Arc;

use super::{
    server::{Answer, App, answer, body, parse},
    types::ErrorBody,
    vm::{AdoptVm, VmInfo},
    vm_move::{MoveVm, VmMoveStatus},
};
use crate::agent::Agent;

pub(super) fn routes() -> Router<Arc<Agent>> {
    Router::new()
        .route("/v1/vms", get(vms).post(adopt_vm))
        .route("/v1/vms/{name}", get(vm))
        .route("/v1/vms/{name}/release", post(release_vm))
        .route("/v1/vms/{name}/migrate", post(move_vm))
        .route("/v1/vms/{name}/migration", get(vm_move))
        .route("/v1/vms/{name}/cancel", post(cancel_vm_move))
}

/// All machines under care.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, body = Vec<VmInfo>)))]
pub(super) async fn vms(State(agent): App) -> Answer<Vec<VmInfo>> {
    answer(Ok(agent.list_vms().await))
}

/// Takes a running machine's disks under care, all or none, or only looks at them.
#[utoipa::path(
    post, path = "/v1/vms", request_body = AdoptVm,
    responses(
        (status = 200, body = VmInfo), (status = 400, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 502, body = ErrorBody)
    )
)]
pub(super) async fn adopt_vm(State(agent): App, bytes: Bytes) -> Answer<VmInfo> {
    answer(agent.adopt_vm(body::<AdoptVm>(&bytes)?).await)
}

/// One machine under care.
#[utoipa::path(
    get, path = "/v1/vms/{name}", params(("name" = String, Path)),
    responses((status = 200, body = VmInfo), (status = 404, body = ErrorBody))
)]
pub(super) async fn vm(State(agent): App, Path(name): Path<String>) -> Answer<VmInfo> {
    answer(agent.vm_info(&parse(&name)?).await)
}

/// Gives a machine's disks back as plain files. A machine whose QEMU is gone is forgotten.
#[utoipa::path(
    post, path = "/v1/vms/{name}/release", params(("name" = String, Path)),
    responses(
        (status = 200, body = VmInfo), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 502, body = ErrorBody)
    )
)]
pub(super) async fn release_vm(State(agent): App, Path(name): Path<String>) -> Answer<VmInfo> {
    answer(agent.release_vm(&parse(&name)?).await)
}

/// Begins to move a machine under care, with its disks, to another site.
#[utoipa::path(
    post, path = "/v1/vms/{name}/migrate", params(("name" = String, Path)), request_body = MoveVm,
    responses(
        (status = 200, body = VmMoveStatus), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 502, body = ErrorBody)
    )
)]
pub(super) async fn move_vm(
    State(agent): App,
    Path(name): Path<String>,
    bytes: Bytes,
) -> Answer<VmMoveStatus> {
    answer(agent.move_vm(&parse(&name)?, body::<MoveVm>(&bytes)?).await)
}

/// The last move of a machine.
#[utoipa::path(
    get, path = "/v1/vms/{name}/migration", params(("name" = String, Path)),
    responses((status = 200, body = VmMoveStatus), (status = 404, body = ErrorBody))
)]
pub(super) async fn vm_move(State(agent): App, Path(name): Path<String>) -> Answer<VmMoveStatus> {
    answer(agent.vm_move(&parse(&name)?))
}

/// Ends the move of a machine before its switch.
#[utoipa::path(
    post, path = "/v1/vms/{name}/cancel", params(("name" = String, Path)),
    responses(
        (status = 200, body = VmMoveStatus), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)
    )
)]
pub(super) async fn cancel_vm_move(
    State(agent): App,
    Path(name): Path<String>,
) -> Answer<VmMoveStatus> {
    answer(agent.cancel_vm_move(&parse(&name)?).await)
}
