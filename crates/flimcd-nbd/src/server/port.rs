//! TEMPORARY: the shape of flimcd_volume's GuestPort over a bare device.
#![allow(missing_docs)]
use flimcd_core::{ByteRange, VolumeSize};
use flimcd_volume::device::{BlockDevice, DataExtent, IoBuf, IoDone, IoKind, IoOp, IoQueue};
use std::{collections::HashMap, io, os::fd::BorrowedFd, sync::Arc};

pub struct Volume {
    device: Arc<dyn BlockDevice>,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    Read,
    Write,
    WriteZeroes { punch: bool },
    Trim,
    Flush,
    Cache,
}
pub struct GuestRequest {
    pub id: u64,
    pub kind: RequestKind,
    pub offset: u64,
    pub length: u64,
    pub fua: bool,
    pub buf: IoBuf,
}
#[derive(Debug)]
pub enum GuestError {
    Io(io::Error),
    Moved,
}
pub struct GuestReply {
    pub id: u64,
    pub result: Result<(), GuestError>,
    pub buf: IoBuf,
}
impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Volume")
    }
}
impl Volume {
    pub fn new(device: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(Self { device })
    }
    pub fn size(&self) -> VolumeSize {
        self.device.size()
    }
    pub fn zeroes_fast(&self) -> bool {
        self.device.zeroes_fast()
    }
    pub fn data_extents(&self, range: ByteRange, max: usize) -> io::Result<Vec<DataExtent>> {
        self.device.data_extents(range, max)
    }
    pub fn guest_port(self: &Arc<Self>) -> io::Result<GuestPort> {
        Ok(GuestPort {
            queue: self.device.open_queue(128)?,
            fua: HashMap::new(),
            done: Vec::new(),
            out: Vec::new(),
            wake: rustix::event::eventfd(0, rustix::event::EventfdFlags::empty())?,
        })
    }
}
pub struct GuestPort {
    queue: Box<dyn IoQueue>,
    fua: HashMap<u64, Option<IoBuf>>,
    done: Vec<IoDone>,
    out: Vec<GuestReply>,
    wake: rustix::fd::OwnedFd,
}
impl GuestPort {
    pub fn submit(&mut self, r: GuestRequest) {
        let kind = match r.kind {
            RequestKind::Read => IoKind::Read,
            RequestKind::Write => IoKind::Write,
            RequestKind::WriteZeroes { punch } => IoKind::WriteZeroes { punch },
            RequestKind::Trim => IoKind::Discard,
            RequestKind::Flush => IoKind::Sync,
            RequestKind::Cache => {
                self.out.push(GuestReply {
                    id: r.id,
                    result: Ok(()),
                    buf: r.buf,
                });
                return;
            }
        };
        if r.fua {
            self.fua.insert(r.id, None);
        }
        self.queue.push(IoOp {
            id: r.id,
            kind,
            offset: r.offset,
            length: r.length,
            buf: r.buf,
        });
    }
    pub fn kick(&mut self) -> io::Result<()> {
        self.queue.submit()
    }
    pub fn kick_inline(&mut self) -> io::Result<()> {
        self.queue.submit_inline()
    }
    pub fn poll(&mut self, out: &mut Vec<GuestReply>) -> io::Result<()> {
        out.append(&mut self.out);
        loop {
            self.queue.completions(&mut self.done);
            let mut again = false;
            for d in self.done.drain(..) {
                if !self.fua.is_empty() {
                    match self.fua.get_mut(&d.id) {
                        Some(buf @ None) if d.result.is_ok() => {
                            *buf = Some(d.buf);
                            self.queue.push(IoOp {
                                id: d.id,
                                kind: IoKind::Sync,
                                offset: 0,
                                length: 0,
                                buf: IoBuf::empty(),
                            });
                            again = true;
                            continue;
                        }
                        _ => {
                            self.fua.remove(&d.id);
                        }
                    }
                }
                out.push(GuestReply {
                    id: d.id,
                    result: d.result.map_err(GuestError::Io),
                    buf: d.buf,
                });
            }
            if !again {
                return Ok(());
            }
            self.queue.submit()?;
        }
    }
    pub fn wait_fds(&self) -> (Option<BorrowedFd<'_>>, BorrowedFd<'_>) {
        use std::os::fd::AsFd;
        (self.queue.poll_fd(), self.wake.as_fd())
    }
}
