//! qcow2 images and their backing chains, made by the real tool.
#![expect(clippy::print_stderr, reason = "a test that cannot test says so")]

use super::*;
use std::process::Command;

fn tool(args: &[&str], files: &[&Path]) -> bool {
    let ran = Command::new("qemu-img").args(args).args(files).output();
    match ran {
        Ok(output) => {
            let problem = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "qemu-img {args:?}: {problem}");
            true
        }
        Err(error) => {
            eprintln!("SKIPPED: needs qemu-img: {error}");
            false
        }
    }
}

fn request(path: &Path) -> AddLibraryImage {
    AddLibraryImage {
        name: None,
        path: path.to_owned(),
        tenant: None,
        public: false,
        copy: false,
    }
}

/// The places of blocks that are found in the library.
fn finds(at: &Fixture, value: u8) -> bool {
    let wanted = Fingerprint::of_block(&vec![value; 4096]).block_prefix();
    let files = at.library.indexed(&[DEFAULT_TENANT.to_owned()]);
    files.iter().any(|file| file.index.lookup(wanted).is_some())
}

/// A raw image, and a qcow2 image over it that has some more.
fn chain(at: &Fixture) -> Option<PathBuf> {
    let (base, middle, top) = (
        at.path("base"),
        at.dir.path().join("middle.qcow2"),
        at.dir.path().join("top.qcow2"),
    );
    write_image(&base, &[1; 40]);
    write_image(&at.path("new"), &[2; 40]);
    if !tool(&["convert", "-O", "qcow2"], &[&at.path("new"), &middle]) {
        return None;
    }
    let backing = format!("backing_file={},backing_fmt=qcow2", middle.display());
    tool(&["create", "-f", "qcow2", "-o", &backing], &[&top]);
    let rebase = ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b"];
    tool(&rebase, &[&base, &middle]);
    Some(top)
}

#[test]
fn the_files_of_a_backing_chain_are_taken_in_and_given_up_together() {
    let at = Fixture::new();
    let Some(top) = chain(&at) else { return };
    let name = at.add(&request(&top));
    let list = at.library.list();
    let names: Vec<_> = list.iter().map(|image| image.name.to_string()).collect();
    assert_eq!(names, ["top", "top.1", "top.2"]);
    assert!(list.iter().all(|image| image.state == LibraryState::Ready));
    assert_eq!(list[2].part_of.as_ref(), Some(&name));
    assert!(finds(&at, 1) && finds(&at, 2) && !finds(&at, 3));
    let again = AddLibraryImage {
        name: Some("again".parse().unwrap()),
        ..request(&top)
    };
    at.add(&again);
    assert_eq!(
        at.library.list().len(),
        4,
        "what is there already is not taken in twice"
    );
    at.library.remove(&name).unwrap();
    at.library.remove(&"again".parse().unwrap()).unwrap();
    assert!(at.library.list().is_empty());
}

#[test]
fn a_compressed_image_is_converted_and_the_copy_goes_with_it() {
    let at = Fixture::new();
    write_image(&at.path("base"), &[7; 40]);
    let packed = at.dir.path().join("packed.qcow2");
    if !tool(
        &["convert", "-c", "-O", "qcow2"],
        &[&at.path("base"), &packed],
    ) {
        return;
    }
    let name = at.add(&request(&packed));
    let image = at.library.get(&name).unwrap();
    assert!(image.is_copy && image.path != packed);
    assert_eq!(
        fs::read(&image.path).unwrap(),
        fs::read(at.path("base")).unwrap()
    );
    assert!(finds(&at, 7));
    at.library.remove(&name).unwrap();
    assert!(!image.path.exists() && packed.exists());
}

#[test]
fn what_qemu_img_does_not_understand_is_refused() {
    let at = Fixture::new();
    if !tool(&["--version"], &[]) {
        return;
    }
    let path = at.dir.path().join("broken.qcow2");
    fs::write(&path, b"QFI\xfb0000").unwrap();
    let refused = at.library.add(&request(&path), |_| None).unwrap_err();
    assert_eq!(refused.code, ApiCode::Image);
    assert!(refused.hint.unwrap().contains("qemu-img info"));
    assert!(at.library.list().is_empty());
    // A volume's image under an image is a volume's image, too.
    let Some(top) = chain(&at) else { return };
    let base = fs::metadata(at.path("base")).unwrap().len();
    let in_use = |file: &File| {
        let is_base = file.metadata().unwrap().len() == base;
        is_base.then(|| "vm".parse().unwrap())
    };
    let refused = at.library.add(&request(&top), in_use).unwrap_err();
    assert!(refused.message.contains("volume vm"), "{refused:?}");
}
