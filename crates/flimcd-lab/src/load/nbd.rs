//! A guest's disk over NBD.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use flimcd_nbd::client::{Client, ClientError, Op, Reply};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{DiskOp, DiskReply, DiskRequest, GuestDisk};

/// Why a guest could not connect.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot connect to export {export} at {socket}: {source}; is the agent running, and does it \
     export this volume?",
    socket = .socket.display()
)]
pub struct NbdDiskError {
    socket: PathBuf,
    export: String,
    source: ClientError,
}

/// A disk that an NBD server exports on a unix socket.
#[derive(Debug)]
pub struct NbdDisk {
    client: Client,
    /// By the client's cookie: the request's id and its buffer, if the answer brings none.
    sent: HashMap<u64, (u64, Vec<u8>)>,
}

impl NbdDisk {
    /// Connects to `export` of the server at `socket`.
    ///
    /// # Errors
    /// [`NbdDiskError`] when there is no such server or export.
    pub fn connect(socket: &Path, export: &str) -> Result<Self, NbdDiskError> {
        let client = Client::connect_unix(socket, export).map_err(|source| NbdDiskError {
            socket: socket.to_owned(),
            export: export.to_owned(),
            source,
        })?;
        Ok(Self {
            client,
            sent: HashMap::new(),
        })
    }

    fn reply(&mut self, reply: Reply) -> io::Result<DiskReply> {
        let unknown = || io::Error::other("the server answered a request that was never made");
        let (id, own) = self.sent.remove(&reply.cookie).ok_or_else(unknown)?;
        let data = if own.is_empty() { reply.data } else { own };
        Ok(DiskReply {
            id,
            result: reply.result.map_err(io::Error::other),
            data,
        })
    }
}

impl GuestDisk for NbdDisk {
    fn size(&self) -> u64 {
        self.client.size()
    }

    fn submit(&mut self, request: DiskRequest) -> io::Result<()> {
        let DiskRequest {
            id,
            op,
            offset,
            length,
            data,
        } = request;
        let op = match op {
            DiskOp::Read => Op::Read { offset, length },
            DiskOp::Write => Op::Write {
                offset,
                data: &data,
                fua: false,
            },
            DiskOp::WriteZeroes => Op::WriteZeroes {
                offset,
                length,
                punch: true,
                fast: false,
            },
            DiskOp::Flush => Op::Flush,
        };
        let is_read = matches!(op, Op::Read { .. });
        let cookie = self.client.submit(op).map_err(gone)?;
        let kept = if is_read {
            self.client.recycle(data);
            Vec::new()
        } else {
            data
        };
        self.sent.insert(cookie, (id, kept));
        Ok(())
    }

    fn receive(&mut self, timeout: Duration) -> io::Result<Option<DiskReply>> {
        self.client.flush_requests().map_err(gone)?;
        if let Some(reply) = self.client.recv_buffered().map_err(gone)? {
            return self.reply(reply).map(Some);
        }
        if !is_readable(&self.client, timeout)? {
            return Ok(None);
        }
        if self.sent.is_empty() {
            // A server says nothing unasked, so this is the end of the connection.
            return Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the server hung up",
            ));
        }
        let reply = self.client.recv().map_err(gone)?;
        self.reply(reply).map(Some)
    }
}

fn is_readable(client: &Client, timeout: Duration) -> io::Result<bool> {
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    let mut fds = [PollFd::new(client.socket(), PollFlags::IN)];
    match poll(&mut fds, Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whatever the client says at this level, no more answers come.
fn gone(error: ClientError) -> io::Error {
    match error {
        ClientError::Io(error) => error,
        other => io::Error::other(other),
    }
}
