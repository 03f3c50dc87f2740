use super::*;

/// A raw disk as QEMU might have it.
pub(crate) fn disk(id: &str) -> Disk {
    let node = serde_json::json!({
        "cache_direct": false, "cache_no_flush": false, "detect_zeroes": "off",
    });
    serde_json::from_value(serde_json::json!({
        "id": id, "qdev": id, "qom_path": null, "drive": null, "format": "raw",
        "file": format!("/images/{id}.raw"), "backing": [], "size_bytes": 4096, "file_bytes": 4096,
        "export_bytes": 4096, "read_only": false,
        "options": {
            "writeback": true, "format": node,
            "protocol": {
                "node": node, "discard": "unmap", "aio": "threads", "locking": "auto", "seen": true,
            },
        },
        "nodes": { "root": id, "format": id, "protocol": "file" },
        "problem": null,
    }))
    .unwrap()
}

fn record(name: &str, state: CareState) -> VmRecord {
    let disk = VmDisk {
        volume: format!("{name}-vda").parse().unwrap(),
        image: "/images/vda.raw".into(),
        found: disk("vda"),
        adopted: None,
    };
    VmRecord::new(
        name.parse().unwrap(),
        format!("/run/{name}.qmp").into(),
        state,
        vec![disk],
    )
}

fn name(text: &str) -> VolumeName {
    text.parse().unwrap()
}

#[test]
fn records_survive_and_broken_ones_do_not_stop_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vms");
    let vms = Vms::open(path.clone()).unwrap();
    vms.save(record("one", CareState::Adopting)).unwrap();
    vms.save(record("one", CareState::InCare)).unwrap();
    vms.save(record("two", CareState::Releasing)).unwrap();
    fs::write(path.join("three.json"), "{").unwrap();
    fs::write(path.join("four.tmp"), "half").unwrap();
    let vms = Vms::open(path.clone()).unwrap();
    let all: Vec<_> = vms
        .all()
        .into_iter()
        .map(|record| (record.name.to_string(), record.state))
        .collect();
    assert_eq!(
        all,
        [
            ("one".to_owned(), CareState::InCare),
            ("two".to_owned(), CareState::Releasing)
        ]
    );
    assert_eq!(vms.of_volume(&name("two-vda")).unwrap().name, name("two"));
    assert!(vms.of_volume(&name("vda")).is_none());
    vms.remove(&name("one")).unwrap();
    vms.remove(&name("one")).unwrap();
    assert_eq!(vms.get(&name("one")).unwrap_err().code, ApiCode::UnknownVm);
    assert_eq!(Vms::open(path).unwrap().all().len(), 1);
}

#[test]
fn one_thing_at_a_time_is_done_with_a_machine() {
    let dir = tempfile::tempdir().unwrap();
    let vms = Vms::open(dir.path().join("vms")).unwrap();
    let begin = |work| vms.begin(&name("one"), work);
    let code = |work| begin(work).unwrap_err().code;
    assert_eq!(code(Work::Releasing), ApiCode::UnknownVm);
    let adopting = begin(Work::Adopting).unwrap();
    assert_eq!(code(Work::Adopting), ApiCode::Busy);
    vms.save(record("one", CareState::InCare)).unwrap();
    assert_eq!(code(Work::Leaving), ApiCode::Busy);
    drop(adopting);
    assert_eq!(code(Work::Adopting), ApiCode::Exists);
    assert_eq!(code(Work::Arriving), ApiCode::Exists);
    let leaving = begin(Work::Leaving).unwrap();
    let refusal = begin(Work::Releasing).unwrap_err().to_string();
    assert!(refusal.contains("flimcd vm cancel one"), "{refusal}");
    drop(leaving);
    drop(begin(Work::Releasing).unwrap());
}

#[tokio::test]
async fn a_machine_whose_qemu_is_not_there_says_how_to_start_one() {
    let dir = tempfile::tempdir().unwrap();
    let vms = Vms::open(dir.path().join("vms")).unwrap();
    let mut record = record("one", CareState::InCare);
    record.qmp = dir.path().join("none.qmp");
    vms.save(record).unwrap();
    let error = vms.qmp(&name("one")).await.unwrap_err();
    assert_eq!(error.code, ApiCode::Qemu);
    assert!(error.message.contains("none.qmp"), "{error}");
    assert_eq!(
        vms.qmp(&name("two")).await.unwrap_err().code,
        ApiCode::UnknownVm
    );
}
