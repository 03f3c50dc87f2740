//! The API as programs see it that were not written by us.

use flimcd_agent::api::{ApiCode, ErrorBody};
use std::{
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
};

use crate::site::World;

/// One request, as text; the status and the body of the answer.
fn call(socket: &Path, request: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    write!(
        stream,
        "{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_has_a_body_and_the_document_is_complete() {
    let world = World::new();
    let agent = world.target.start().await.unwrap();
    let socket = agent.api_socket().to_owned();
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    tokio::task::spawn_blocking(move || {
        let check = |request: &str, body: &str, status: u16, code: ApiCode| {
            let (got, answer) = call(&socket, request, body);
            assert_eq!(got, status, "{request}: {answer}");
            let error: ErrorBody = serde_json::from_str(&answer).unwrap();
            assert_eq!(error.code, code, "{request}");
        };
        check("GET /v2", "", 404, ApiCode::UnknownPath);
        check("PUT /v1/status", "", 404, ApiCode::UnknownPath);
        check("GET /v1/volumes/..", "", 400, ApiCode::BadRequest);
        check("GET /v1/volumes/x", "", 404, ApiCode::UnknownVolume);
        check("GET /v1/migrations/xyz", "", 400, ApiCode::BadRequest);
        check(
            "GET /v1/migrations/0123456789abcdef",
            "",
            404,
            ApiCode::UnknownMigration,
        );
        check("POST /v1/volumes", "{", 400, ApiCode::BadRequest);
        check(
            "POST /v1/volumes",
            "{\"name\":\"x\",\"size_bytes\":1,\"z\":0}",
            400,
            ApiCode::BadRequest,
        );
        check(
            "DELETE /v1/volumes/x?delete_image=maybe",
            "",
            400,
            ApiCode::BadRequest,
        );
        let (status, body) = call(&socket, "GET /v1/status", "");
        assert!(
            status == 200 && body.contains("\"site\":\"beta\""),
            "{body}"
        );
        let (status, document) = call(&socket, "GET /openapi.json", "");
        assert_eq!(status, 200);
        let document: serde_json::Value = serde_json::from_str(&document).unwrap();
        let paths = document["paths"].as_object().unwrap();
        assert_eq!(paths.len(), 28, "{:?}", paths.keys());
        assert!(document["components"]["schemas"]["MigrationStatus"].is_object());
    })
    .await
    .unwrap();
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_says_when_no_agent_runs() {
    let world = World::new();
    let error = world.target.client().status().await.unwrap_err();
    assert!(error.is_not_running());
    assert!(
        error.to_string().contains("flimcd agent --config"),
        "{error}"
    );
}
