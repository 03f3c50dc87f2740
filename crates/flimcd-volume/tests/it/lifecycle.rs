//! Making, importing, opening and removing volumes, and what is refused.

use std::fs;

use flimcd_core::{BLOCK_SIZE, Epoch, VolumeId};
use flimcd_volume::{
    StateError, Volume, VolumeError,
    device::{OpenOptions, lock},
    rules::Mode,
};

use super::{create, flush, new_volume, open, owner, read, size, volumes, write, write_all};

#[test]
fn a_new_volume_is_sparse_zero_and_keeps_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let volume = create(dir.path(), 1 << 20, owner(1));
    let mut port = volume.guest_port().unwrap();
    assert_eq!(read(&mut port, 77), 0);
    write(&mut port, 77, 5);
    flush(&mut port);
    assert_eq!(volume.data_blocks().unwrap().count(), 1);
    drop((port, volume));

    let volume = open(dir.path());
    let mut port = volume.guest_port().unwrap();
    assert_eq!((volume.mode(), volume.id()), (Mode::Owner, VolumeId(5)));
    assert_eq!(volume.record().unwrap().epoch, Epoch(1));
    assert_eq!(read(&mut port, 77), 5);
    let refused = volume.remove(&volumes(dir.path()), true).unwrap_err();
    assert!(
        refused.to_string().contains("stop the guests first"),
        "{refused}"
    );
    drop(port);
    volume.remove(&volumes(dir.path()), true).unwrap();
    assert!(!dir.path().join("vm.raw").exists());
    assert!(volumes(dir.path()).list().unwrap().is_empty());
}

#[test]
fn an_import_changes_nothing_and_an_odd_size_is_fine() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("vm.raw");
    let content = vec![7; 3 * 4096 + 123];
    fs::write(&image, &content).unwrap();
    let new = new_volume(dir.path(), owner(1));
    let volume = Volume::import(&volumes(dir.path()), new, &OpenOptions::default()).unwrap();
    assert_eq!(volume.size().bytes(), content.len() as u64);
    assert!(volume.record().unwrap().imported);
    volume.remove(&volumes(dir.path()), false).unwrap();
    drop(volume);
    assert_eq!(fs::read(&image).unwrap(), content);
}

#[track_caller]
fn refused(result: Result<std::sync::Arc<Volume>, VolumeError>, words: &str) {
    let error = result.err().unwrap().to_string();
    assert!(error.contains(words), "{error}");
}

#[test]
fn what_cannot_be_a_volume_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = volumes(dir.path());
    let image = dir.path().join("vm.raw");
    let options = OpenOptions::default();
    let new = || new_volume(dir.path(), owner(1));
    let _no_forks = super::no_forks();
    let import = || Volume::import(&volumes, new(), &options);

    refused(import(), "give the path of an existing raw disk image");
    fs::create_dir(&image).unwrap();
    refused(import(), "neither a regular file nor a block device");
    fs::remove_dir(&image).unwrap();
    fs::write(&image, b"").unwrap();
    refused(import(), "a volume of 0 bytes is not possible");
    fs::write(&image, b"QFI\xfb and so on").unwrap();
    refused(import(), "qemu-img convert -O raw");
    fs::write(&image, vec![0; 8192]).unwrap();
    refused(
        Volume::create(&volumes, new(), size(2), &options),
        "flimcd volume import",
    );
    let other = fs::File::options()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    lock::lock_image(&other, &image, false).unwrap();
    refused(import(), "in use by another process");
    drop(other);
    assert!(volumes.list().unwrap().is_empty());
    assert_eq!(fs::read(&image).unwrap(), vec![0; 8192]);

    drop(import().unwrap());
    refused(import(), "there is a volume named vm already");
    fs::write(&image, vec![0; 8193]).unwrap();
    let name = "vm".parse().unwrap();
    refused(
        Volume::open(&volumes, &name, &options),
        "put the right image back",
    );
}

#[test]
fn an_image_in_use_becomes_a_volume_and_its_locks_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = volumes(dir.path());
    let image = dir.path().join("vm.raw");
    fs::write(&image, b"QFI\xfb and so on").unwrap();
    let _no_forks = super::no_forks();
    let hypervisor = || {
        let file = fs::File::options().read(true).write(true).open(&image);
        let file = file.unwrap();
        lock::lock_image(&file, &image, false).map(|()| file)
    };
    let held = hypervisor().unwrap();
    let new = new_volume(dir.path(), owner(1));
    let volume = Volume::import_in_use(&volumes, new, &OpenOptions::default()).unwrap();
    let error = volume.take_image_locks().unwrap_err().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    assert!(!volume.has_image_locks());
    drop(held);
    for _ in 0..2 {
        volume.take_image_locks().unwrap();
        volume.take_image_locks().unwrap();
        assert!(volume.has_image_locks());
        hypervisor().unwrap_err();
        volume.give_up_image_locks();
        assert!(!volume.has_image_locks());
        hypervisor().unwrap();
    }
}

#[test]
fn a_failed_create_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let volumes = volumes(dir.path());
    // More than any file system here can hold as one file, or the volume's directory cannot be made: both end the same.
    fs::write(dir.path().join("volumes/.new-vm"), "in the way").unwrap();
    let new = new_volume(dir.path(), owner(1));
    let _no_forks = super::no_forks();
    let made = Volume::create(&volumes, new, size(2), &OpenOptions::default());
    assert!(made.is_err());
    assert!(!dir.path().join("vm.raw").exists());
    assert!(volumes.list().unwrap().is_empty());
}

#[test]
fn a_volume_is_opened_by_one_agent() {
    let dir = tempfile::tempdir().unwrap();
    let volume = create(dir.path(), 4, owner(1));
    let name = "vm".parse().unwrap();
    let again = Volume::open(&volumes(dir.path()), &name, &OpenOptions::default());
    assert!(matches!(
        again,
        Err(VolumeError::State(StateError::InUse(_)))
    ));
    drop(volume);
    open(dir.path());
}

#[test]
fn a_tebibyte_costs_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let blocks = (1u64 << 40) / BLOCK_SIZE;
    let volume = create(dir.path(), blocks, super::incoming());
    assert!(
        volume.memory_bytes() < 1 << 20,
        "idle: {}",
        volume.memory_bytes()
    );
    // Every page of every set mixed: missing, not durable, marked. What was overwritten is fetched away all the time.
    let mut missing = flimcd_core::BlockSet::full(blocks);
    for at in (0..blocks).step_by(30_000) {
        missing.remove(flimcd_core::BlockIndex(at));
    }
    volume.take_over(missing, super::arriving(2)).unwrap();
    let mut port = volume.guest_port().unwrap();
    let writes: Vec<u64> = (10_000..blocks).step_by(30_000).collect();
    write_all(&mut port, &writes);
    assert_eq!(volume.take_overwritten().count(), writes.len() as u64);
    let bytes = volume.memory_bytes();
    assert!(bytes > 90 << 20, "the sets are not mixed: {bytes}");
    assert!(bytes <= 128 << 20, "in post-copy: {bytes}");
}
