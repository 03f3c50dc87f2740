//! The task that owns a monitor's socket.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt},
    net::unix::OwnedWriteHalf,
    sync::{broadcast, mpsc, oneshot, watch},
};

use super::{
    QmpError,
    decode::{DecodeError, Incoming, MAX_LINE_BYTES, decode_line},
    event::{Event, EventKind},
};

/// A command on its way.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) command: &'static str,
    pub(super) arguments: Value,
    pub(super) answer: oneshot::Sender<Result<Value, QmpError>>,
}

#[derive(Debug)]
struct Waiting {
    command: &'static str,
    answer: oneshot::Sender<Result<Value, QmpError>>,
}

pub(super) struct Task {
    inbox: mpsc::Receiver<Request>,
    events: broadcast::Sender<Event>,
    /// Set to true when the task ends, whatever the way.
    closing: watch::Sender<bool>,
    waiting: BTreeMap<u64, Waiting>,
    next_id: u64,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.closing.send_replace(true);
    }
}

impl Task {
    pub(super) const fn new(
        inbox: mpsc::Receiver<Request>,
        events: broadcast::Sender<Event>,
        closing: watch::Sender<bool>,
    ) -> Self {
        Self {
            inbox,
            events,
            closing,
            waiting: BTreeMap::new(),
            next_id: 1,
        }
    }

    pub(super) async fn run(
        mut self,
        mut read: impl AsyncBufRead + Unpin,
        mut write: OwnedWriteHalf,
    ) {
        // Kept across iterations, because a cancelled `read_line` leaves what it has read here.
        let mut line = Vec::new();
        loop {
            tokio::select! {
                request = self.inbox.recv() => {
                    let Some(request) = request else { return };
                    let bytes = self.encode(request);
                    if let Err(error) = write.write_all(&bytes).await {
                        tracing::debug!(%error, "the monitor's connection ended");
                        return;
                    }
                }
                done = read_line(&mut read, &mut line) => {
                    match done {
                        Ok(true) => {}
                        Ok(false) => return,
                        Err(error) => {
                            tracing::warn!(%error, "reading from the monitor failed");
                            return;
                        }
                    }
                    if let Err(error) = self.handle(&line) {
                        tracing::warn!(%error, "the monitor sent what is no message");
                        return;
                    }
                    line.clear();
                }
            }
        }
    }

    fn encode(&mut self, request: Request) -> Vec<u8> {
        let id = self.next_id;
        self.next_id += 1;
        let mut object = Map::new();
        object.insert("execute".into(), request.command.into());
        // QEMU refuses `null`.
        if !request.arguments.is_null() {
            object.insert("arguments".into(), request.arguments);
        }
        object.insert("id".into(), id.into());
        // Who does not wait any more has dropped the receiver.
        self.waiting
            .retain(|_, waiting| !waiting.answer.is_closed());
        self.waiting.insert(
            id,
            Waiting {
                command: request.command,
                answer: request.answer,
            },
        );
        let mut bytes = Value::Object(object).to_string().into_bytes();
        bytes.push(b'\n');
        bytes
    }

    fn handle(&mut self, line: &[u8]) -> Result<(), DecodeError> {
        match decode_line(line)? {
            Incoming::Greeting(_) => {}
            Incoming::Event {
                time_us,
                name,
                data,
            } => {
                let kind = EventKind::new(name, data);
                tracing::trace!(?kind, "event");
                // An error only says that nobody listens.
                let _ = self.events.send(Event { time_us, kind });
            }
            Incoming::Return { id, value } => {
                if let Some(waiting) = self.take(id) {
                    let _ = waiting.answer.send(Ok(value));
                }
            }
            Incoming::Error { id, class, text } => match self.take(id) {
                Some(waiting) => {
                    let _ = waiting.answer.send(Err(QmpError::Command {
                        command: waiting.command,
                        class,
                        text,
                    }));
                }
                None => tracing::warn!(class, text, "the monitor refused what nobody waits for"),
            },
        }
        Ok(())
    }

    fn take(&mut self, id: Option<u64>) -> Option<Waiting> {
        self.waiting.remove(&id?)
    }
}

/// Appends to `line` up to and with its end. False at the end of the stream. Cancel safe: what was
/// read so far is in `line`.
async fn read_line(
    read: &mut (impl AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
) -> std::io::Result<bool> {
    loop {
        let chunk = read.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(false);
        }
        let end = chunk.iter().position(|b| *b == b'\n');
        let used = end.map_or(chunk.len(), |at| at + 1);
        line.extend_from_slice(&chunk[..used]);
        read.consume(used);
        if end.is_some() {
            return Ok(true);
        }
        if line.len() > MAX_LINE_BYTES {
            return Err(std::io::Error::other(DecodeError::TooLong(line.len())));
        }
    }
}
