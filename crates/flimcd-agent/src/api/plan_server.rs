//! Routes of the API for plans.

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    routing::get,
};
use flimcd_core::MigrationId;
use std::sync::Arc;

use super::{
    plan::{PlanRequest, PlanStatus},
    server::{Answer, App, answer, body, parse},
    types::ErrorBody,
};
use crate::agent::Agent;

pub(super) fn routes() -> Router<Arc<Agent>> {
    Router::new()
        .route("/v1/plans", get(plans).post(make_plan))
        .route("/v1/plans/{id}", get(plan).delete(cancel_plan))
}

/// Plans that run or are remembered, oldest first.
#[utoipa::path(get, path = "/v1/plans", responses((status = 200, body = Vec<PlanStatus>)))]
pub(super) async fn plans(State(agent): App) -> Answer<Vec<PlanStatus>> {
    answer(Ok(agent.plans.statuses()))
}

/// Finds out what a migration would cost; nothing moves.
#[utoipa::path(
    post, path = "/v1/plans", request_body = PlanRequest,
    responses(
        (status = 200, body = PlanStatus), (status = 400, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody)
    )
)]
pub(super) async fn make_plan(State(agent): App, bytes: Bytes) -> Answer<PlanStatus> {
    answer(agent.begin_plan(body::<PlanRequest>(&bytes)?))
}

/// One plan.
#[utoipa::path(
    get, path = "/v1/plans/{id}", params(("id" = String, Path)),
    responses((status = 200, body = PlanStatus), (status = 404, body = ErrorBody))
)]
pub(super) async fn plan(State(agent): App, Path(id): Path<String>) -> Answer<PlanStatus> {
    let id: MigrationId = parse(&id)?;
    answer(agent.plans.status(id))
}

/// Ends a plan.
#[utoipa::path(
    delete, path = "/v1/plans/{id}", params(("id" = String, Path)),
    responses((status = 200, body = PlanStatus), (status = 404, body = ErrorBody))
)]
pub(super) async fn cancel_plan(State(agent): App, Path(id): Path<String>) -> Answer<PlanStatus> {
    let id: MigrationId = parse(&id)?;
    answer(agent.plans.cancel(id))
}
