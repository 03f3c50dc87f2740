//! One forwarded connection: two sockets, and what could not be written yet.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::TcpStream,
};

use flimcd_core::Time;
use socket2::SockRef;

use crate::wan::Side;

/// Bytes that arrived for a reader that does not read. Beyond it the connection's other end is
/// not read any more, as a closed receive window would have it.
const UNREAD_BYTES_MAX: usize = 1 << 20;

/// What travels over the link for one connection.
#[derive(Debug)]
pub(super) enum Segment {
    /// Bytes.
    Data(Vec<u8>),
    /// The sender has shut its side down.
    Fin,
    /// The sender is gone.
    Reset,
}

/// What came of an attempt to read.
pub(super) enum Received {
    /// Something to send over the link.
    Segment(Segment),
    /// Nothing is there now.
    Empty,
}

/// One end of a connection.
#[derive(Debug, Default)]
struct End {
    /// `None` before it is connected and after it is closed.
    socket: Option<TcpStream>,
    /// May have bytes to read; cleared when a read finds none.
    is_readable: bool,
    /// Has sent its `Fin` or `Reset`: nothing more is read from it.
    is_read_done: bool,
    /// Has been told `Fin`.
    is_write_done: bool,
    /// Arrived for this end and not written yet, with the offset in the first.
    unwritten: VecDeque<Segment>,
    written_of_first: usize,
    unwritten_bytes: usize,
}

/// A forwarded connection.
#[derive(Debug)]
pub(super) struct Conn {
    ends: [End; 2],
    /// The site that connected.
    pub(super) from: Side,
    /// Which route it came by.
    pub(super) route: usize,
    /// When the handshake would be through for the side that connects: its bytes count from then.
    pub(super) read_from: Time,
    /// When it is for the other: the relay connects then. `None` once it did.
    pub(super) connect_at: Option<Time>,
}

impl Conn {
    pub(super) fn new(
        client: TcpStream,
        from: Side,
        route: usize,
        read_from: Time,
        connect_at: Time,
    ) -> Self {
        let mut ends = [End::default(), End::default()];
        ends[from.index()].socket = Some(client);
        ends[from.index()].is_readable = true;
        Self {
            ends,
            from,
            route,
            read_from,
            connect_at: Some(connect_at),
        }
    }

    /// The socket towards `side`.
    pub(super) fn socket(&self, side: Side) -> Option<&TcpStream> {
        self.ends[side.index()].socket.as_ref()
    }

    /// The target's socket is there (its connection may still be under way).
    pub(super) fn set_connected(&mut self, target: TcpStream) {
        let end = &mut self.ends[self.from.other().index()];
        end.socket = Some(target);
        self.connect_at = None;
    }

    /// Whether `side` may be read now: it has bytes, and the other end reads too.
    pub(super) fn wants_read(&self, side: Side, now: Time) -> bool {
        self.ends[side.index()].is_readable && self.may_read(side, now)
    }

    /// Whether the poll should say when `side` has bytes.
    pub(super) fn wants_poll_read(&self, side: Side, now: Time) -> bool {
        !self.ends[side.index()].is_readable && self.may_read(side, now)
    }

    fn may_read(&self, side: Side, now: Time) -> bool {
        let end = &self.ends[side.index()];
        let other = &self.ends[side.other().index()];
        end.socket.is_some()
            && !end.is_read_done
            && other.unwritten_bytes < UNREAD_BYTES_MAX
            && (side != self.from || now >= self.read_from)
    }

    /// Whether bytes wait for `side` to take them.
    pub(super) fn wants_write(&self, side: Side) -> bool {
        let end = &self.ends[side.index()];
        end.socket.is_some() && !end.unwritten.is_empty()
    }

    pub(super) fn set_readable(&mut self, side: Side) {
        self.ends[side.index()].is_readable = true;
    }

    /// Both ends are closed or have nothing more to say.
    pub(super) fn is_over(&self) -> bool {
        self.ends.iter().all(|end| {
            end.socket.is_none() && end.is_read_done
                || end.is_read_done && end.is_write_done && end.unwritten.is_empty()
        })
    }

    /// Reads at most `max` bytes from `side` into a vector from `spare`.
    pub(super) fn read(&mut self, side: Side, max: usize, spare: &mut Vec<Vec<u8>>) -> Received {
        let end = &mut self.ends[side.index()];
        let Some(mut socket) = end.socket.as_ref() else {
            return Received::Empty;
        };
        let mut buffer = spare.pop().unwrap_or_default();
        buffer.resize(max, 0);
        match socket.read(&mut buffer) {
            Ok(0) => {
                end.is_read_done = true;
                end.is_readable = false;
                Received::Segment(Segment::Fin)
            }
            Ok(n) => {
                buffer.truncate(n);
                Received::Segment(Segment::Data(buffer))
            }
            Err(error) if is_retry(&error) => {
                end.is_readable = false;
                spare.push(buffer);
                Received::Empty
            }
            Err(error) => {
                tracing::debug!(%error, ?side, "relayed connection broke");
                self.close(side);
                Received::Segment(Segment::Reset)
            }
        }
    }

    /// A segment arrived for `side`. Returns a `Reset` to send back when that end is gone.
    pub(super) fn deliver(
        &mut self,
        side: Side,
        segment: Segment,
        spare: &mut Vec<Vec<u8>>,
    ) -> Option<Segment> {
        let end = &mut self.ends[side.index()];
        if matches!(segment, Segment::Reset) {
            self.abort(side);
            return None;
        }
        end.socket.as_ref()?;
        if let Segment::Data(bytes) = &segment {
            end.unwritten_bytes += bytes.len();
        }
        end.unwritten.push_back(segment);
        self.flush(side, spare)
    }

    /// Writes what waits for `side`. Returns a `Reset` to send back when that end is gone.
    pub(super) fn flush(&mut self, side: Side, spare: &mut Vec<Vec<u8>>) -> Option<Segment> {
        let end = &mut self.ends[side.index()];
        while let (Some(mut socket), Some(first)) = (end.socket.as_ref(), end.unwritten.front()) {
            let bytes = match first {
                Segment::Data(bytes) => bytes,
                Segment::Fin | Segment::Reset => {
                    let _ = socket.shutdown(std::net::Shutdown::Write);
                    end.is_write_done = true;
                    end.unwritten.pop_front();
                    continue;
                }
            };
            match socket.write(&bytes[end.written_of_first..]) {
                Ok(n) => {
                    end.written_of_first += n;
                    end.unwritten_bytes -= n;
                    if end.written_of_first == bytes.len() {
                        end.written_of_first = 0;
                        if let Some(Segment::Data(buffer)) = end.unwritten.pop_front() {
                            spare.push(buffer);
                        }
                    }
                }
                Err(error) if is_retry(&error) => return None,
                Err(error) => {
                    tracing::debug!(%error, ?side, "relayed connection broke");
                    let was_open = !end.is_read_done;
                    self.close(side);
                    return was_open.then_some(Segment::Reset);
                }
            }
        }
        None
    }

    /// Resets the socket towards `side`, as a router's user would see a peer vanish.
    pub(super) fn abort(&mut self, side: Side) {
        if let Some(socket) = self.socket(side) {
            let _ = SockRef::from(socket).set_linger(Some(std::time::Duration::ZERO));
        }
        self.close(side);
    }

    fn close(&mut self, side: Side) {
        let end = &mut self.ends[side.index()];
        end.socket = None;
        end.is_readable = false;
        end.is_read_done = true;
        end.unwritten.clear();
        end.unwritten_bytes = 0;
        end.written_of_first = 0;
    }
}

fn is_retry(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
