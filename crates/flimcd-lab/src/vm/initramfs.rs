//! The guest's first root: busybox, the modules for its disks, and a script that finds the root disk
//! by its label. The same for every guest; the kernel's command line says which drivers to load.

use std::{fs, io};

use super::{Tools, cpio::Archive, modules::Index};

/// Directories of modules in the archive and the modules that each is for.
const GROUPS: &[(&str, &[&str])] = &[
    (
        "base",
        &[
            "virtio_pci",
            "virtio_blk",
            "virtio_net",
            "virtio_rng",
            // Ext4 asks for it by name only.
            "crc32c_generic",
            "ext4",
        ],
    ),
    ("scsi", &["virtio_scsi", "sd_mod"]),
    ("sata", &["ahci", "sd_mod"]),
];

const INIT: &[u8] = br#"#!/bin/sh
export PATH=/bin
busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
groups=base
for word in $(busybox cat /proc/cmdline); do
    case $word in flimcd.drivers=*) groups="$groups $(echo "${word#*=}" | busybox tr , ' ')" ;; esac
done
for group in $groups; do
    for module in /m/$group/*.ko; do busybox insmod "$module" 2>/dev/null; done
done
tries=0
until root=$(busybox findfs LABEL=flimcd-root 2>/dev/null); do
    tries=$((tries + 1))
    [ $tries -lt 200 ] || { echo "BAD no root disk: $(busybox ls -d /dev/[sv]d*)"; exec sh; }
    busybox usleep 50000
done
busybox mount -o rw "$root" /root || { echo "BAD root disk $root cannot be mounted"; exec sh; }
exec busybox switch_root /root /sbin/init
"#;

/// Makes the archive.
pub(super) fn build(tools: &Tools) -> io::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for dir in ["bin", "dev", "proc", "sys", "root", "m"] {
        archive.directory(dir);
    }
    archive.file("bin/busybox", &fs::read(&tools.busybox)?);
    archive.link("bin/sh", "busybox");
    let index = Index::read(&tools.modules)?;
    for (group, names) in GROUPS {
        archive.directory(&format!("m/{group}"));
        for (number, path) in index.closure(names)?.iter().enumerate() {
            // Numbered, because the script inserts them in the order of their names. A module that
            // two groups have is refused the second time, which does no harm.
            archive.file(&format!("m/{group}/{number:02}.ko"), &fs::read(path)?);
        }
    }
    archive.file("init", INIT);
    Ok(archive.finish())
}
