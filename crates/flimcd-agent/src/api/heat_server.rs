//! Route of the API for what is hot.

use axum::{
    Router,
    extract::{Path, Query, State, rejection::QueryRejection},
    routing::get,
};
use std::sync::Arc;

use super::{
    heat::{HeatQuery, HeatReport},
    server::{Answer, App, answer, bad_request, parse},
    types::ErrorBody,
};
use crate::agent::Agent;

pub(super) fn routes() -> Router<Arc<Agent>> {
    Router::new().route("/v1/volumes/{name}/heat", get(heat))
}

/// What is hot in a volume: rates, shares, a picture, and the hottest chunks.
#[utoipa::path(
    get, path = "/v1/volumes/{name}/heat",
    params(("name" = String, Path), ("cells" = Option<u32>, Query), ("top" = Option<u32>, Query)),
    responses(
        (status = 200, body = HeatReport), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody)
    )
)]
pub(super) async fn heat(
    State(agent): App,
    Path(name): Path<String>,
    query: Result<Query<HeatQuery>, QueryRejection>,
) -> Answer<HeatReport> {
    let Query(query) = query.map_err(|error| bad_request(error.to_string()))?;
    answer(agent.heat(&parse(&name)?, query).await)
}
