//! The library over real files and volumes.

mod find;
mod qcow2;
mod volumes;

use super::*;
use crate::{
    api::{AddLibraryImage, LibraryState},
    migration::volumes::VolumeSet,
};
use flimcd_core::{CHUNK_SIZE, ChunkIndex, Epoch, MigrationId, VolumeId, VolumeSize};
use flimcd_volume::{NewVolume, Ownership, Volume, VolumesDir, device::OpenOptions};
use flimcd_wire::{Base, ChunkPrefix, SampleChunk};
use std::{fs, path::Path};

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
        let name = self.library.add(request, |_| None).unwrap().name;
        self.read_all();
        assert_eq!(self.library.get(&name).unwrap().state, LibraryState::Ready);
        name
    }

    /// Reads whatever is to be read.
    fn read_all(&self) {
        for key in self.library.unfinished() {
            self.library.scan(&key, || true);
        }
    }

    /// Volumes of so many chunks that arrive.
    fn arriving(&self, chunks: &[u64]) -> Arc<VolumeSet> {
        let dir = self.dir.path().join("arriving");
        if dir.exists() {
            fs::remove_dir_all(&dir).unwrap();
        }
        let volumes = VolumesDir::open(dir.clone()).unwrap();
        let make = |(number, &chunks): (usize, &u64)| {
            let new = NewVolume {
                id: VolumeId(number as u128 + 1),
                image: dir.join(format!("{number}.raw")),
                name: format!("v{number}").parse().unwrap(),
                tenant: DEFAULT_TENANT.to_owned(),
                epoch: Epoch::FIRST,
                ownership: Ownership::Incoming {
                    migration: MigrationId(9),
                    peer: "beta".parse().unwrap(),
                },
            };
            let size = VolumeSize::new(chunks * CHUNK_SIZE).unwrap();
            Volume::create(&volumes, new, size, &OpenOptions::default()).unwrap()
        };
        VolumeSet::new(chunks.iter().enumerate().map(make).collect()).unwrap()
    }

    fn choose(&self, tenant: &str, sample: &[SampleChunk]) -> Option<(String, Chosen)> {
        let volumes = self.arriving(&[CHUNKS]);
        let tenants = [tenant.to_owned()];
        let chosen = self
            .library
            .choose(&volumes, &[Base::Zeroes], &tenants, sample)?;
        assert!(!chosen.choice.in_place);
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
    assert_eq!(
        at.library.add(&both, |_| None).unwrap_err().code,
        ApiCode::BadRequest
    );
}

#[test]
fn each_volume_has_its_own_image() {
    let at = Fixture::new();
    write_image(&at.path("root"), &[1; 10]);
    write_image(&at.path("data"), &[2; 30]);
    at.add(&at.request("root"));
    at.add(&at.request("data"));
    let volumes = at.arriving(&[10, 5, 20]);
    let layout = volumes.layout();
    let starts: Vec<_> = layout
        .all_blocks()
        .map(|blocks| blocks.start / 16)
        .collect();
    let sample = sample(&[(starts[0] + 3, 1), (starts[2] + 4, 2)]);
    let tenants = vec!["default".to_owned(); 3];
    let chosen = at.library.choose(&volumes, &[], &tenants, &sample).unwrap();
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
    at.read_all();
    let now = at.library.get(&name).unwrap();
    assert_eq!(now.state, LibraryState::Ready);
    assert!(now.root.is_some() && now.root != root);
    assert!(at.choose("default", &sample(&[(1, 2)])).is_some());
}

/// A table or index that cannot be what was made is found out, not used, and made anew by itself.
#[test]
fn damage_is_found_and_made_good() {
    let at = Fixture::new();
    let chunks: Vec<u8> = (1..=40).collect();
    write_image(&at.path("base"), &chunks);
    let name = at.add(&at.request("base"));
    let mut requests = at.library.requests().unwrap();
    assert_eq!(
        requests.try_recv().unwrap(),
        Key::image(&name),
        "when added"
    );
    let table = record::table_path(&at.library.dir, &Key::image(&name));
    let index = record::index_path(&at.library.dir, &Key::image(&name));
    for path in [&table, &index] {
        let sound = fs::read(path).unwrap();
        let flipped = |at: usize| {
            let mut bytes = sound.clone();
            bytes[at] ^= 4;
            bytes
        };
        let mut damage = vec![
            ("short", sound[..sound.len() - 1].to_vec()),
            ("nothing", Vec::new()),
            ("no header", vec![0; sound.len()]),
            ("wrong count", flipped(17)),
        ];
        if path == &table {
            damage.push(("flipped", flipped(4096 + 32 * 20 + 5)));
        }
        for (what, bytes) in damage {
            fs::write(path, bytes).unwrap();
            let used = match path == &table {
                true => at.choose("default", &sample(&[(1, 2)])).is_some(),
                false => !at.library.indexed(&["default".to_owned()]).is_empty(),
            };
            assert!(!used, "{what}");
            let state = at.library.get(&name).unwrap().state;
            assert_eq!(state, LibraryState::Scanning, "{what}");
            assert_eq!(requests.try_recv().unwrap(), Key::image(&name), "{what}");
            at.read_all();
            assert!(at.choose("default", &sample(&[(1, 2)])).is_some());
            assert_eq!(at.library.indexed(&["default".to_owned()]).len(), 1);
        }
        assert_eq!(fs::read(path).unwrap(), sound);
    }
}

#[test]
fn a_restart_goes_on_and_removal_leaves_nothing_but_the_image() {
    let at = Fixture::new();
    write_image(&at.path("base"), &[1; 40]);
    let request = AddLibraryImage {
        copy: true,
        ..at.request("base")
    };
    let name = at.library.add(&request, |_| None).unwrap().name;
    let again = at.library.add(&request, |_| None);
    assert_eq!(again.unwrap_err().code, ApiCode::Exists);
    at.library.scan(&Key::image(&name), || false);
    let library = Library::open(at.library.dir.clone()).unwrap();
    assert_eq!(library.get(&name).unwrap().state, LibraryState::Scanning);
    assert_eq!(library.unfinished(), [Key::image(&name)]);
    library.scan(&Key::image(&name), || true);
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
    let left = fs::read_dir(&library.dir).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["volumes"]);
    assert!(at.path("base").exists());
}

#[test]
fn what_cannot_be_in_the_library_is_refused_with_the_way_out() {
    let at = Fixture::new();
    write_image(&at.path("disk"), &[1; 3]);
    let request = at.request("disk");
    let volume = "vm1".parse().unwrap();
    let refused = at
        .library
        .add(&request, |_| Some(VolumeName::clone(&volume)));
    let refused = refused.unwrap_err();
    assert_eq!(refused.code, ApiCode::Image);
    assert!(refused.message.contains("vm1"), "{refused:?}");
    let relative = AddLibraryImage {
        path: "base.raw".into(),
        ..at.request("disk")
    };
    let refused = at.library.add(&relative, |_| None).unwrap_err();
    assert_eq!(refused.code, ApiCode::BadRequest);
    fs::write(at.path("disk"), b"").unwrap();
    let refused = at.library.add(&request, |_| None).unwrap_err();
    assert_eq!(refused.code, ApiCode::Image);
    assert!(at.library.list().is_empty());
}
