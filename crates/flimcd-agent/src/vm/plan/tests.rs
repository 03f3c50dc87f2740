use super::*;
use crate::vm::record::tests::disk;

fn found(name: Option<&str>, disks: Vec<Disk>) -> Inspected {
    Inspected {
        version: serde_json::from_value(serde_json::json!({
            "major": 10, "minor": 0, "micro": 2, "package": "",
        }))
        .unwrap(),
        vm_name: name.map(str::to_owned),
        status: RunState::Running,
        memory_bytes: 1 << 30,
        disks,
    }
}

fn plan(name: Option<&str>, found: &Inspected) -> Result<Plan, ErrorBody> {
    let request = AdoptVm {
        qmp: "/run/vm.qmp".into(),
        name: name.map(|name| name.parse().unwrap()),
        tenant: None,
        dry_run: true,
    };
    Plan::new(&request, found, |volume| volume.as_str() == "taken-vda")
}

/// Why a plan cannot be done.
fn refusal(plan: Result<Plan, ErrorBody>) -> String {
    plan.and_then(|plan| plan.check()).unwrap_err().to_string()
}

#[test]
fn disks_become_volumes_named_after_the_machine() {
    let mut cdrom = disk("cdrom");
    cdrom.problem = Some(Problem::ReadOnly);
    let found = found(Some("web"), vec![disk("vda"), cdrom, disk("vdb")]);
    let plan = plan(None, &found).unwrap();
    plan.check().unwrap();
    let volumes: Vec<_> = plan
        .record
        .disks
        .iter()
        .map(|disk| disk.volume.to_string())
        .collect();
    assert_eq!(volumes, ["web-vda", "web-vdb"]);
    let shown = &plan.info.disks;
    assert!(shown[1].volume.is_none() && shown[1].left_out.is_some());
    assert_eq!(
        shown[0].options,
        "cache writeback, discard unmap, detect-zeroes off, aio threads"
    );
}

#[test]
fn what_is_in_the_way_is_said_with_the_way_out() {
    let one = || vec![disk("vda")];
    let check = |plan, words: &str| {
        let refusal = refusal(plan);
        assert!(refusal.contains(words), "{refusal}");
    };
    check(plan(None, &found(None, one())), "--name");
    check(plan(None, &found(Some("a b"), one())), "--name");
    check(
        plan(None, &found(Some("taken"), one())),
        "there is a volume taken-vda already",
    );
    check(
        plan(Some(&"x".repeat(64)), &found(None, one())),
        "shorter name with --name",
    );
    check(
        plan(Some("web"), &found(None, Vec::new())),
        "no disk that could be adopted",
    );
    let mut other = one();
    other[0].problem = Some(Problem::Format("vmdk".to_owned()));
    check(plan(Some("web"), &found(None, other)), "qemu-img convert");
    let mut incoming = found(None, one());
    incoming.status = RunState::Inmigrate;
    check(plan(Some("web"), &incoming), "waits for a machine");
}
