//! The steps of a swap.

use std::{path::Path, time::Duration};

use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::{AdoptError, Export, Method, error::during};
use crate::{
    commands::{
        BlockJobCancel, BlockdevAdd, BlockdevDel, BlockdevMirror, HumanMonitor, JobComplete,
        JobDismiss, JobInfo, QueryJobs,
    },
    inspect::{Disk, Graph, NodeOptions, ProtocolOptions},
    qmp::{Event, EventKind, Events, Qmp, QmpError},
};

/// How long a mirror that copies nothing may take.
const MIRROR_PATIENCE: Duration = Duration::from_secs(20);
/// How often a job is asked for beside the events.
const JOB_POLL: Duration = Duration::from_millis(50);

/// Name of our node on an export. At most 31 bytes, QEMU's limit, since ids have at most 20.
pub(super) fn export_node_name(id: &str) -> String {
    format!("flimcd-nbd-{id}")
}

/// Name of our node on a file whose node had none.
pub(super) fn file_node_name(id: &str) -> String {
    format!("flimcd-img-{id}")
}

fn cache(node: &NodeOptions) -> Value {
    json!({"direct": node.cache_direct, "no-flush": node.cache_no_flush})
}

/// Adds a node on the export, with the options of the node that it replaces.
pub(super) async fn add_export(
    qmp: &Qmp,
    disk: &Disk,
    export: &Export,
    node: &str,
) -> Result<(), AdoptError> {
    let protocol = &disk.options.protocol;
    let options = json!({
        "driver": "nbd",
        "node-name": node,
        "server": {"type": "unix", "path": export.socket},
        "export": export.name,
        "reconnect-delay": export.reconnect_delay_s,
        "discard": protocol.discard,
        "detect-zeroes": protocol.node.detect_zeroes,
        "cache": cache(&protocol.node),
    });
    match qmp.execute(BlockdevAdd { options }).await {
        Ok(_) => Ok(()),
        Err(source) => Err(AdoptError::Export {
            disk: disk.id.clone(),
            socket: export.socket.clone(),
            name: export.name.clone(),
            source,
        }),
    }
}

/// Adds a node on a file.
pub(super) async fn add_file(
    qmp: &Qmp,
    id: &str,
    options: &ProtocolOptions,
    file: &Path,
    node: &str,
) -> Result<(), AdoptError> {
    let all = json!({
        "driver": "file",
        "node-name": node,
        "filename": file,
        "aio": options.aio,
        "locking": options.locking,
        "discard": options.discard,
        "detect-zeroes": options.node.detect_zeroes,
        "cache": cache(&options.node),
    });
    match qmp.execute(BlockdevAdd { options: all }).await {
        Ok(_) => Ok(()),
        Err(source) => Err(AdoptError::File {
            disk: id.to_owned(),
            file: file.to_owned(),
            source,
        }),
    }
}

/// Removes a node if it is there, has a name of its own, and nothing uses it. A failure is logged: an
/// unused node does no harm.
pub(super) async fn remove_unused(qmp: &Qmp, node: &str) {
    if node.starts_with('#') {
        return;
    }
    let node_name = node.to_owned();
    match qmp.execute(BlockdevDel { node_name }).await {
        Ok(_) => {}
        // It was a child of another node, and went with it.
        Err(QmpError::Command { text, .. }) if text.contains("Failed to find node") => {}
        Err(error) => tracing::warn!(node, %error, "an unused node could not be removed"),
    }
}

/// Puts the node `to` in the place of `from`, and sees that it is there.
pub(super) async fn swap(
    qmp: &Qmp,
    disk: &Disk,
    method: Method,
    from: &str,
    to: &str,
) -> Result<(), AdoptError> {
    let refused = |reason: String| AdoptError::Swap {
        disk: disk.id.clone(),
        from: from.to_owned(),
        to: to.to_owned(),
        reason,
    };
    let begin = Instant::now();
    let parent = match (method, &disk.nodes.format) {
        (Method::Child, Some(format)) => {
            let options = disk.options.format.as_ref();
            let zeroes = options.map_or("off", |o| o.detect_zeroes.as_str());
            reopen(qmp, &disk.id, format, to, zeroes)
                .await?
                .map_err(refused)?;
            Some(format.as_str())
        }
        _ => {
            mirror(qmp, &disk.id, from, to).await?.map_err(refused)?;
            None
        }
    };
    // The guest's requests to this disk waited at most so long.
    let elapsed_us = begin.elapsed().as_micros();
    tracing::debug!(disk = disk.id, ?method, elapsed_us, to, "nodes swapped");
    let graph = Graph::query(qmp).await;
    let graph = graph.map_err(during(&disk.id, "seeing whether it was moved"))?;
    let there = match parent {
        Some(format) => graph.child(format) == Some(to),
        None => graph.is_used(to),
    };
    if !there {
        return Err(refused("QEMU did nothing".to_owned()));
    }
    let now = parent.and_then(|f| graph.node(f)).map(NodeOptions::of);
    if parent.is_some() && now != disk.options.format {
        return Err(AdoptError::Odd {
            disk: disk.id.clone(),
            to: to.to_owned(),
            reason: format!("its options are {now:?} and were {:?}", disk.options.format),
        });
    }
    Ok(())
}

/// Gives the format's node another child. The inner error is QEMU's words.
async fn reopen(
    qmp: &Qmp,
    id: &str,
    format: &str,
    child: &str,
    detect_zeroes: &str,
) -> Result<Result<(), String>, AdoptError> {
    let command_line =
        format!("qemu-io {format} \"reopen -o file={child},detect-zeroes={detect_zeroes}\"");
    let said = qmp.execute(HumanMonitor { command_line }).await;
    let said = said.map_err(during(id, "moving it"))?;
    // It says nothing when all is well.
    let said = said.trim();
    Ok(if said.is_empty() {
        Ok(())
    } else {
        Err(said.to_owned())
    })
}

/// Replaces the node under the device. The inner error is QEMU's words.
async fn mirror(
    qmp: &Qmp,
    id: &str,
    from: &str,
    to: &str,
) -> Result<Result<(), String>, AdoptError> {
    let job = format!("flimcd-{id}");
    let mut events = qmp.events();
    let start = BlockdevMirror {
        job_id: job.clone(),
        device: from.to_owned(),
        target: to.to_owned(),
        sync: "none",
        copy_mode: "write-blocking",
        auto_dismiss: false,
    };
    let started = qmp.execute(start).await;
    if let Err(error) = started {
        return match error {
            QmpError::Command { text, .. } => Ok(Err(text)),
            error => Err(during(id, "moving it")(error)),
        };
    }
    let result = finish_mirror(qmp, &job, &mut events).await;
    let failed = !matches!(result, Ok(Ok(())));
    if failed {
        // It may have ended already, in which case this is refused.
        let device = job.clone();
        let _ = qmp
            .execute(BlockJobCancel {
                device,
                force: true,
            })
            .await;
        let ended = |j: Option<&JobInfo>| j.is_none_or(|j| j.status == "concluded");
        let _ = wait_job(qmp, &job, &mut events, ended).await;
    }
    let _ = qmp.execute(JobDismiss { id: job }).await;
    result.map_err(during(id, "moving it"))
}

async fn finish_mirror(
    qmp: &Qmp,
    job: &str,
    events: &mut Events,
) -> Result<Result<(), String>, QmpError> {
    let settled =
        |j: Option<&JobInfo>| j.is_none_or(|j| j.status == "ready" || j.status == "concluded");
    let ready = wait_job(qmp, job, events, settled).await?;
    if ready.is_none_or(|j| j.status != "ready") {
        return Ok(Err("the job ended before it was ready".to_owned()));
    }
    qmp.execute(JobComplete { id: job.to_owned() }).await?;
    let ended = |j: Option<&JobInfo>| j.is_none_or(|j| j.status == "concluded");
    let end = wait_job(qmp, job, events, ended).await?;
    Ok(match end {
        Some(JobInfo {
            error: Some(error), ..
        }) => Err(error),
        Some(j) if j.status != "concluded" => Err(format!("the job is {}", j.status)),
        _ => Ok(()),
    })
}

/// Asks for the job whenever an event may concern it, and now and then, until `done` or time is up.
async fn wait_job(
    qmp: &Qmp,
    job: &str,
    events: &mut Events,
    done: impl Fn(Option<&JobInfo>) -> bool,
) -> Result<Option<JobInfo>, QmpError> {
    let end = Instant::now() + MIRROR_PATIENCE;
    loop {
        let jobs = qmp.execute(QueryJobs {}).await?;
        let found = jobs.into_iter().find(|j| j.id == job);
        if done(found.as_ref()) || Instant::now() >= end {
            return Ok(found);
        }
        let news = async {
            loop {
                match events.next().await {
                    Some(Event {
                        kind: EventKind::JobStatus { .. } | EventKind::Missed(_),
                        ..
                    })
                    | None => return,
                    Some(_) => {}
                }
            }
        };
        let _ = timeout_at((Instant::now() + JOB_POLL).min(end), news).await;
    }
}
