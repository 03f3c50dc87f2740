//! How large a file an image may need.

use std::{fs, io};

use flimcd_core::limits::MAX_VOLUME_BYTES;

use super::Disk;
use crate::commands::ImageInfo;

/// Sizes are rounded to this.
const ROUND_BYTES: u64 = 1 << 20;

/// Length of the file that a qcow2 image of `virtual_bytes` can need, all clusters written, without
/// snapshots: content, mapping and reference counts.
fn qcow2_full_bytes(virtual_bytes: u64, cluster_bytes: u64) -> u64 {
    let clusters = virtual_bytes.div_ceil(cluster_bytes);
    // 8 bytes to find a cluster, 16 with subclusters; up to 8 for its reference count, which mapping and
    // counts need too. Twice the larger of these is more than all of it.
    let metadata = clusters.saturating_mul(2 * (16 + 8)) + 64 * cluster_bytes;
    virtual_bytes.saturating_add(metadata)
}

/// Length that the file needs before it is exported. QEMU extends a qcow2 file when it finds no free
/// run of clusters of the length it wants, which can be while there are free ones: hence twice the
/// room, all of it a hole. The result depends on the image alone, so that adopting again adds nothing.
pub(super) fn qcow2_export_bytes(image: &ImageInfo, file_bytes: u64) -> u64 {
    let cluster_bytes = image.cluster_size.unwrap_or(1 << 16).max(512);
    let full = qcow2_full_bytes(image.virtual_size, cluster_bytes);
    let snapshots = u64::try_from(image.snapshots.len()).unwrap_or(u64::MAX);
    let wanted = full.saturating_mul(2 + snapshots.min(64));
    wanted
        .next_multiple_of(ROUND_BYTES)
        .min(MAX_VOLUME_BYTES)
        .max(file_bytes)
}

impl Disk {
    /// Extends the image file to [`export_bytes`](Self::export_bytes), by a hole. To be called before the
    /// file is opened for its export; QEMU may have it open and does not mind. The file is never made
    /// shorter, and one that is long enough is left as it is.
    ///
    /// # Errors
    /// When the file cannot be opened or extended.
    pub fn grow_file(&self) -> io::Result<()> {
        let file = fs::OpenOptions::new().write(true).open(&self.file)?;
        if file.metadata()?.len() < self.export_bytes {
            file.set_len(self.export_bytes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(virtual_size: u64, cluster_size: u64, snapshots: usize) -> ImageInfo {
        let json = serde_json::json!({
            "virtual-size": virtual_size, "cluster-size": cluster_size, "format": "qcow2",
            "snapshots": vec![0; snapshots],
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn room_for_all_and_the_same_the_second_time() {
        for (size, cluster, snapshots) in [
            (1 << 20, 512, 0),
            (1 << 30, 1 << 16, 0),
            (1 << 40, 1 << 16, 1),
            (1 << 40, 1 << 21, 3),
        ] {
            let image = image(size, cluster, snapshots);
            let first = qcow2_export_bytes(&image, 200_000);
            assert!(first > 2 * size, "{size} {cluster}");
            assert_eq!(qcow2_export_bytes(&image, first), first);
        }
        assert_eq!(
            qcow2_export_bytes(&image(1 << 20, 512, 0), 1 << 50),
            1 << 50
        );
    }
}
