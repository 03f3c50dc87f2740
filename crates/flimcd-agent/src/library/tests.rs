use super::*;
use flimcd_core::ChunkIndex;
use flimcd_core::{VolumeLayout, VolumeSize};
use flimcd_wire::{ChunkPrefix, SampleChunk};

const CHUNKS: u64 = 40;

struct Fixture {
    dir: tempfile::TempDir,
    library: Library,
}

/// An image whose chunks hold these numbers; zero is a hole.
fn write_image(path: &Path, chunks: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = File::create(path).unwrap();
    file.set_len(chunks.len() as u64 * CHUNK_SIZE).unwrap();
    for (at, &value) in chunks.iter().enumerate().filter(|(_, value)| **value > 0) {
        file.write_all_at(&chunk(value), at as u64 * CHUNK_SIZE)
            .unwrap();
    }
}

fn chunk(value: u8) -> Vec<u8> {
    vec![value; usize::try_from(CHUNK_SIZE).unwrap()]
}

fn sample(chunks: &[(u64, u8)]) -> Vec<SampleChunk> {
    let one = |&(at, value): &(u64, u8)| SampleChunk {
        chunk: ChunkIndex(at),
        prefix: Fingerprint::of_run(&chunk(value)).prefix(),
    };
    chunks.iter().map(one).collect()
}

fn layout(chunks: &[u64]) -> VolumeLayout {
    VolumeLayout::new(
        chunks
            .iter()
            .map(|c| VolumeSize::new(c * CHUNK_SIZE).unwrap()),
    )
    .unwrap()
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let library = Library::open(dir.path().join("library")).unwrap();
        Self { dir, library }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.raw"))
    }

    fn request(&self, name: &str) -> AddLibraryImage {
        AddLibraryImage {
            name: None,
            path: self.path(name),
            tenant: None,
            public: false,
            copy: false,
        }
    }

    fn add(&self, request: &AddLibraryImage) -> VolumeName {
        let name = self.library.add(request).unwrap().name;
        self.library.scan(&name, || true);
        assert_eq!(self.library.get(&name).unwrap().state, LibraryState::Ready);
        name
    }

    fn choose(&self, tenant: &str, sample: &[SampleChunk]) -> Option<(String, Chosen)> {
        let chosen = self
            .library
            .choose(&layout(&[CHUNKS]), &[tenant.to_owned()], sample)?;
        Some((chosen.choice.name.clone(), chosen))
    }
}

#[test]
fn the_image_with_most_in_common_is_chosen_and_read() {
    let at = Fixture::new();
    write_image(&at.path("old"), &[1; 40]);
    write_image(&at.path("new"), &[[1; 20], [2; 20]].concat());
    at.add(&at.request("old"));
    at.add(&at.request("new"));
    let (name, chosen) = at
        .choose("default", &sample(&[(1, 1), (25, 2), (30, 9)]))
        .unwrap();
    assert_eq!(name, "new");
    let table = &chosen.choice.table;
    assert_eq!(
        table.get(ChunkIndex(30)),
        Some(Fingerprint::of_run(&chunk(2)).prefix())
    );
    let mut buffer = Vec::new();
    let place = ChunkIndex(30).blocks();
    let right = Fingerprint::of_run(&chunk(2));
    assert!(chosen.seeds.read(place, right, &mut buffer).is_some());
    assert_eq!(buffer, chunk(2));
    assert!(
        chosen
            .seeds
            .read(place, Fingerprint::of(b"other"), &mut buffer)
            .is_none()
    );
    assert!(
        at.choose("default", &sample(&[(1, 7)])).is_none(),
        "nothing in common"
    );
}

/// A colliding prefix proposes, and the whole fingerprint refuses.
#[test]
fn a_prefix_that_collides_does_no_harm() {
    let at = Fixture::new();
    write_image(&at.path("base"), &[1; 40]);
    at.add(&at.request("base"));
    let (_, chosen) = at.choose("default", &sample(&[(1, 1)])).unwrap();
    let mut forged = *Fingerprint::of_run(&chunk(1)).as_bytes();
    forged[31] ^= 1;
    assert_eq!(
        ChunkPrefix::of(&forged),
        Fingerprint::of_run(&chunk(1)).prefix()
    );
    let forged = Fingerprint::from_bytes(forged);
    assert!(
        chosen
            .seeds
            .read(ChunkIndex(3).blocks(), forged, &mut Vec::new())
            .is_none()
    );
}

#[test]
fn content_is_shared_inside_a_tenant_and_with_public_images_only() {
    let at = Fixture::new();
    write_image(&at.path("theirs"), &[3; 40]);
    write_image(&at.path("everybody"), &[4; 40]);
    at.add(&AddLibraryImage {
        tenant: Some("acme".to_owned()),
        ..at.request("theirs")
    });
    at.add(&AddLibraryImage {
        public: true,
        ..at.request("everybody")
    });
    let name = |tenant: &str, value| {
        at.choose(tenant, &sample(&[(5, value)]))
            .map(|(name, _)| name)
    };
    assert_eq!(name("default", 3), None);
    assert_eq!(name("acme", 3).as_deref(), Some("theirs"));
    assert_eq!(name("default", 4).as_deref(), Some("everybody"));
    let both = AddLibraryImage {
        public: true,
        tenant: Some("a".into()),
        ..at.request("theirs")
    };
    assert_eq!(at.library.add(&both).unwrap_err().code, ApiCode::BadRequest);
}

#[test]
fn each_volume_has_its_own_image() {
    let at = Fixture::new();
    write_image(&at.path("root"), &[1; 10]);
    write_image(&at.path("data"), &[2; 30]);
    at.add(&at.request("root"));
    at.add(&at.request("data"));
    let layout = layout(&[10, 5, 20]);
    let starts: Vec<_> = layout
        .all_blocks()
        .map(|blocks| blocks.start / 16)
        .collect();
    let sample = sample(&[(starts[0] + 3, 1), (starts[2] + 4, 2)]);
    let tenants = vec!["default".to_owned(); 3];
    let chosen = at.library.choose(&layout, &tenants, &sample).unwrap();
    assert_eq!(chosen.choice.name, "root, data");
    let table = &chosen.choice.table;
    let has = |chunk| table.get(ChunkIndex(chunk)).is_some();
    assert!(has(starts[0] + 9) && !has(starts[1]) && has(starts[2]) && has(starts[2] + 19));
    assert!(!has(starts[2] + 20), "not beyond the volume");
    let place = ChunkIndex(starts[2] + 4).blocks();
    let mut buffer = Vec::new();
    assert!(
        chosen
            .seeds
            .read(place, Fingerprint::of_run(&chunk(2)), &mut buffer)
            .is_some()
    );
}

#[test]
fn images_that_change_or_vanish_are_stale_until_they_are_verified() {
    let at = Fixture::new();
    write_image(&at.path("base"), &[1; 40]);
    let name = at.add(&at.request("base"));
    let root = at.library.get(&name).unwrap().root;
    fs::remove_file(at.path("base")).unwrap();
    assert_eq!(at.library.get(&name).unwrap().state, LibraryState::Stale);
    assert!(at.choose("default", &sample(&[(1, 1)])).is_none());
    write_image(&at.path("base"), &[2; 40]);
    assert_eq!(at.library.get(&name).unwrap().state, LibraryState::Stale);
    at.library.begin_verify(&name).unwrap();
    at.library.scan(&name, || true);
    let now = at.library.get(&name).unwrap();
    assert_eq!(now.state, LibraryState::Ready);
    assert!(now.root.is_some() && now.root != root);
    assert!(at.choose("default", &sample(&[(1, 2)])).is_some());
}

#[test]
fn damaged_tables_are_put_aside_and_made_anew() {
    let at = Fixture::new();
    write_image(&at.path("base"), &[1; 40]);
    let name = at.add(&at.request("base"));
    let table = record::table_path(&at.library.dir, &name);
    let sound = fs::read(&table).unwrap();
    let damage: [(&str, Vec<u8>); 3] = [
        ("flipped", {
            let mut bytes = sound.clone();
            bytes[4096 + 32 * 20 + 5] ^= 4;
            bytes
        }),
        ("short", sound[..5000].to_vec()),
        ("no header", vec![0; sound.len()]),
    ];
    for (what, bytes) in damage {
        fs::write(&table, bytes).unwrap();
        assert!(at.choose("default", &sample(&[(1, 1)])).is_none(), "{what}");
        assert_eq!(
            at.library.get(&name).unwrap().state,
            LibraryState::Failed,
            "{what}"
        );
        at.library.begin_verify(&name).unwrap();
        at.library.scan(&name, || true);
        assert!(at.choose("default", &sample(&[(1, 1)])).is_some(), "{what}");
    }
    assert_eq!(fs::read(&table).unwrap(), sound);
}

#[test]
fn a_restart_goes_on_and_removal_leaves_nothing_but_the_image() {
    let at = Fixture::new();
    write_image(&at.path("base"), &[1; 40]);
    let request = AddLibraryImage {
        copy: true,
        ..at.request("base")
    };
    let name = at.library.add(&request).unwrap().name;
    assert_eq!(at.library.add(&request).unwrap_err().code, ApiCode::Exists);
    at.library.scan(&name, || false);
    let library = Library::open(at.library.dir.clone()).unwrap();
    assert_eq!(library.get(&name).unwrap().state, LibraryState::Scanning);
    assert_eq!(library.unfinished(), std::slice::from_ref(&name));
    library.scan(&name, || true);
    let image = library.get(&name).unwrap();
    assert_eq!(
        (image.state, image.data_bytes),
        (LibraryState::Ready, Some(40 * CHUNK_SIZE))
    );
    assert!(image.is_copy && image.path != at.path("base"));
    assert_eq!(
        fs::read(&image.path).unwrap(),
        fs::read(at.path("base")).unwrap()
    );
    let library = Library::open(at.library.dir.clone()).unwrap();
    assert_eq!(
        (library.unfinished(), library.get(&name).unwrap()),
        (vec![], image)
    );
    library.remove(&name).unwrap();
    assert_eq!(
        library.remove(&name).unwrap_err().code,
        ApiCode::UnknownImage
    );
    assert_eq!(fs::read_dir(&library.dir).unwrap().count(), 0);
    assert!(at.path("base").exists());
}

#[test]
fn what_cannot_be_in_the_library_is_refused_with_the_way_out() {
    let at = Fixture::new();
    fs::write(at.path("disk"), b"QFI\xfb0000").unwrap();
    let refused = at.library.add(&at.request("disk")).unwrap_err();
    assert_eq!(refused.code, ApiCode::Image);
    assert!(refused.hint.unwrap().contains("qemu-img convert -O raw"));
    let relative = AddLibraryImage {
        path: "base.raw".into(),
        ..at.request("disk")
    };
    assert_eq!(
        at.library.add(&relative).unwrap_err().code,
        ApiCode::BadRequest
    );
    assert!(at.library.list().is_empty());
}
