//! The load: what is asked for, and how fast it is answered.

use std::time::{Duration, Instant};

use flimcd_nbd::{
    Client, ClientError,
    client::{Op, Reply},
};
use serde::Serialize;

/// Longest request of a cell.
pub(super) const REQUEST_BYTES_MAX: u32 = 1 << 20;

/// One kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// Name in the table.
    pub name: &'static str,
    /// Whether it writes.
    pub writes: bool,
    /// Whether places are random.
    pub random: bool,
    /// Bytes per request.
    pub request_bytes: u32,
    /// Requests in flight.
    pub depth: usize,
}

/// All cells.
pub const CELLS: [Cell; 6] = [
    Cell {
        name: "4 KiB random read, 1 in flight",
        writes: false,
        random: true,
        request_bytes: 4096,
        depth: 1,
    },
    Cell {
        name: "4 KiB random read, 32 in flight",
        writes: false,
        random: true,
        request_bytes: 4096,
        depth: 32,
    },
    Cell {
        name: "4 KiB random write, 1 in flight",
        writes: true,
        random: true,
        request_bytes: 4096,
        depth: 1,
    },
    Cell {
        name: "4 KiB random write, 32 in flight",
        writes: true,
        random: true,
        request_bytes: 4096,
        depth: 32,
    },
    Cell {
        name: "1 MiB sequential read, 4 in flight",
        writes: false,
        random: false,
        request_bytes: 1 << 20,
        depth: 4,
    },
    Cell {
        name: "1 MiB sequential write, 4 in flight",
        writes: true,
        random: false,
        request_bytes: 1 << 20,
        depth: 4,
    },
];

impl Cell {
    pub(super) fn show(&self, requests_per_sec: f64) -> String {
        if self.request_bytes >= REQUEST_BYTES_MAX {
            format!("{requests_per_sec:.0} MiB/s")
        } else {
            format!("{:.1} k/s", requests_per_sec / 1000.0)
        }
    }
}

/// The load client.
pub(super) struct Load {
    pub(super) client: Client,
    pub(super) cell: Cell,
    pub(super) size_bytes: u64,
    pub(super) random: Random,
    pub(super) next: u64,
    pub(super) content: Vec<u8>,
}

impl Load {
    /// Requests per second over `runtime`.
    pub(super) fn run(&mut self, runtime: Duration) -> Result<f64, ClientError> {
        let mut content = std::mem::take(&mut self.content);
        self.random.fill(&mut content);
        self.content = content;
        let passes = self.cell.writes && !self.cell.random;
        let requests_per_pass = self.size_bytes / u64::from(self.cell.request_bytes);
        let begin = Instant::now();
        let mut done = 0u64;
        let mut sent = 0;
        while sent < self.cell.depth {
            self.send()?;
            sent += 1;
        }
        loop {
            let reply = self.client.recv()?;
            done += self.ended(reply)?;
            while let Some(reply) = self.client.recv_buffered()? {
                done += self.ended(reply)?;
            }
            let time_is_up = begin.elapsed() >= runtime;
            if time_is_up && self.client.in_flight() == 0 {
                break;
            }
            if passes
                && done > 0
                && done.is_multiple_of(requests_per_pass)
                && self.client.in_flight() == 0
            {
                self.client.flush()?;
            }
            while !time_is_up && self.client.in_flight() < self.cell.depth {
                // A pass of writes ends before its flush.
                let at_end =
                    (done + self.client.in_flight() as u64).is_multiple_of(requests_per_pass);
                if passes && at_end && self.client.in_flight() > 0 {
                    break;
                }
                self.send()?;
            }
        }
        if self.cell.writes {
            self.client.flush()?;
        }
        #[expect(clippy::cast_precision_loss, reason = "far from 2^52 requests")]
        Ok(done as f64 / begin.elapsed().as_secs_f64())
    }

    fn ended(&mut self, reply: Reply) -> Result<u64, ClientError> {
        reply.result?;
        self.client.recycle(reply.data);
        Ok(1)
    }

    fn send(&mut self) -> Result<(), ClientError> {
        let length = self.cell.request_bytes;
        let places = self.size_bytes / u64::from(length);
        let place = if self.cell.random {
            self.random.next()
        } else {
            self.next
        };
        self.next += 1;
        let offset = place % places * u64::from(length);
        let op = if self.cell.writes {
            // Every block gets content of its own.
            self.content[..8].copy_from_slice(&self.next.to_le_bytes());
            Op::Write {
                offset,
                data: &self.content,
                fua: false,
            }
        } else {
            Op::Read { offset, length }
        };
        self.client.submit(op).map(drop)
    }
}

/// A xorshift generator: only speed matters here.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}
