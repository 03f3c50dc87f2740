//! The library from the command line.

use std::fs;

use crate::util::Lab;

#[test]
fn an_image_is_added_used_verified_and_removed() {
    let lab = Lab::new();
    let (source, target) = lab.pair();
    let image = lab.image("vm1.raw", 8 << 20);
    let before = fs::read(&image).unwrap();
    let base = lab.path().join("base.raw");
    fs::copy(&image, &base).unwrap();
    let base = base.to_str().unwrap();

    assert!(target.run(&["library", "list"]).ok().contains("no images"));
    let said = target.run(&["library", "add", base]).ok();
    assert!(said.contains("added base"), "{said}");
    let shown = target.json(&["library", "show", "base", "--json"]);
    assert_eq!(shown["state"], "ready");
    assert_eq!(shown["tenant"], "default");
    assert!(target.run(&["library", "list"]).ok().contains("ready"));

    source
        .run(&["volume", "import", "vm1", image.to_str().unwrap()])
        .ok();
    let said = source
        .run(&["migrate", "vm1", "--to", "lisbon", "--wait"])
        .ok();
    assert!(
        said.contains("same place") && said.contains("library image base"),
        "{said}"
    );
    let status = source.run(&["status"]).ok();
    assert!(status.contains("same place"), "{status}");
    let arrived = target.dir.join("state/images/vm1.raw");
    assert!(fs::read(arrived).unwrap() == before);

    let said = target.run(&["library", "verify", "base"]).ok();
    assert!(said.contains("is what it was"), "{said}");
    let mut other = before.clone();
    other[4 << 20] ^= 1;
    fs::write(base, other).unwrap();
    assert!(target.run(&["library", "list"]).ok().contains("stale"));
    let said = target.run(&["library", "verify", "base"]).ok();
    assert!(said.contains("had changed"), "{said}");
    assert!(
        target
            .run(&["library", "remove", "base"])
            .ok()
            .contains("stays")
    );
    let left = target.json(&["library", "list", "--json"]);
    let left = left.as_array().unwrap();
    // Volumes are there by themselves.
    assert!(
        left.iter().all(|image| image["kind"] != "image"),
        "{left:?}"
    );
}

#[test]
fn what_is_no_image_is_refused_with_the_way_out() {
    let lab = Lab::new();
    let (_source, target) = lab.pair();
    let disk = lab.path().join("disk.qcow2");
    fs::write(&disk, b"QFI\xfb\0\0\0\x03").unwrap();
    let disk = disk.to_str().unwrap();
    target
        .run(&["library", "add", disk])
        .fails_with(&["disk.qcow2", "qemu-img"]);
    target
        .run(&["library", "add", "/nowhere/at-all.raw"])
        .fails_with(&["/nowhere/at-all.raw", "check the path"]);
    target
        .run(&["library", "verify", "none"])
        .fails_with(&["no image none", "flimcd library list"]);
    let copy = lab.image("tiny.raw", 70_001);
    let said = target.run(&[
        "library",
        "add",
        copy.to_str().unwrap(),
        "--copy",
        "--public",
        "--name",
        "own",
    ]);
    assert!(said.ok().contains("added own"));
    let shown = target.json(&["library", "show", "own", "--json"]);
    assert!(
        shown["is_copy"] == true && shown["tenant"].is_null(),
        "{shown}"
    );
    assert!(
        target
            .run(&["library", "remove", "own"])
            .ok()
            .contains("deleted")
    );
}
