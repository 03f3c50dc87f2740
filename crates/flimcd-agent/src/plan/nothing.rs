//! An image of zeroes that cannot be written: what stands at the target where a planned volume has no copy.

use flimcd_core::{ByteRange, VolumeSize};
use flimcd_volume::device::{BlockDevice, DataExtent, IoQueue};
use std::io;

/// See the module.
pub(super) struct Nothing(pub(super) VolumeSize);

fn refused<T>() -> io::Result<T> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "a plan writes nothing",
    ))
}

impl BlockDevice for Nothing {
    fn size(&self) -> VolumeSize {
        self.0
    }

    fn read_at(&self, _offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        refused()
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _range: ByteRange, _punch: bool) -> io::Result<()> {
        refused()
    }

    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        refused()
    }

    fn data_extents(&self, range: ByteRange, _max: usize) -> io::Result<Vec<DataExtent>> {
        Ok(vec![DataExtent {
            range,
            is_hole: true,
        }])
    }

    fn open_queue(&self, _depth: u32) -> io::Result<Box<dyn IoQueue>> {
        refused()
    }
}
