//! The volume at the source: what changed, and the way to the switch.

use std::io;

use flimcd_core::{BlockRange, BlockSet, ByteRange};

use super::Volume;

impl Volume {
    /// Records durably that the target may lack what a write to `range`, newly marked dirty, is about to change.
    pub(crate) fn note_dirty(&self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    /// Starts to mark what the guest writes.
    pub fn start_tracking(&self) {
        self.core.change(|core| core.rules.start_tracking());
    }

    /// Stops marking and drops the marks.
    pub fn stop_tracking(&self) {
        self.core.change(|core| core.rules.stop_tracking());
    }

    /// Hands over the blocks that the guest wrote since the last call, as [`Rules::take_dirty`](crate::rules::Rules::take_dirty).
    #[must_use]
    pub fn take_dirty(&self) -> BlockSet {
        self.core.lock().rules.take_dirty()
    }

    /// Reads `range` to be sent. A block that the guest writes meanwhile is dirty afterwards. `buf` takes the blocks' bytes;
    /// what lies beyond the end of the volume is left alone.
    ///
    /// # Errors
    /// What the device reports.
    ///
    /// # Panics
    /// When `buf` is smaller than the range.
    pub fn read_for_send(&self, range: BlockRange, buf: &mut [u8]) -> io::Result<()> {
        self.core.lock().rules.begin_send(range);
        let bytes = range.bytes(self.size());
        let length = usize::try_from(bytes.len()).map_err(io::Error::other)?;
        let result = self.device.read_at(bytes.start, &mut buf[..length]);
        self.core.lock().rules.end_send(range);
        result
    }

    /// Parks guest requests from now on; whether nothing is in flight any more. If something is,
    /// [`on_drained`](super::VolumeObserver::on_drained) tells when that has ended.
    ///
    /// # Panics
    /// As [`Rules::freeze`](crate::rules::Rules::freeze).
    pub fn freeze(&self) -> bool {
        self.core.change(|core| {
            core.rules.freeze();
            let drained = core.rules.is_drained();
            core.draining = !drained;
            drained
        })
    }

    /// Whether no admitted guest request is in flight.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.core.lock().rules.is_drained()
    }

    /// Takes [`freeze`](Self::freeze) back: parked requests run.
    ///
    /// # Panics
    /// As [`Rules::thaw`](crate::rules::Rules::thaw).
    pub fn thaw(&self) {
        self.core.change(|core| {
            core.draining = false;
            core.rules.thaw();
        });
    }

    /// The volume has moved: guest requests are refused from now on.
    ///
    /// # Panics
    /// As [`Rules::release`](crate::rules::Rules::release).
    pub fn release(&self) {
        self.core.change(|core| core.rules.release());
    }
}
