//! How machines and their disks look in a terminal.

use std::fmt::Write as _;

use flimcd_agent::api::{VmCare, VmDiskInfo, VmInfo};
use flimcd_lab::report::{Align, Table};

use crate::format;

fn none() -> String {
    "–".to_owned()
}

/// All machines, one line each.
pub(super) fn table(vms: &[VmInfo]) -> String {
    if vms.is_empty() {
        return "no machines under care; `flimcd vm adopt --qmp SOCKET` takes one\n".into();
    }
    let mut table = Table::new([
        ("VM", Align::Left),
        ("CARE", Align::Left),
        ("GUEST", Align::Left),
        ("QEMU", Align::Left),
        ("DISKS", Align::Right),
        ("SIZE", Align::Right),
        ("MIGRATION", Align::Left),
        ("VOLUMES", Align::Left),
    ]);
    for vm in vms {
        let volumes: Vec<_> = vm
            .disks
            .iter()
            .filter_map(|disk| disk.volume.as_ref().map(ToString::to_string))
            .collect();
        table.row([
            vm.name.to_string(),
            vm.care.to_string(),
            vm.status.clone(),
            vm.qemu_version.clone().unwrap_or_else(none),
            vm.disks.len().to_string(),
            format::bytes(vm.disks.iter().map(|disk| disk.size_bytes).sum()),
            vm.migration.map_or_else(none, |id| id.to_string()),
            volumes.join(", "),
        ]);
    }
    let mut text = table.to_string();
    for vm in vms {
        if let Some(problem) = &vm.problem {
            let _ = writeln!(text, "{}: {problem}", vm.name);
        }
    }
    text
}

/// One machine.
pub(super) fn details(vm: &VmInfo) -> String {
    let lines = [
        ("name", vm.name.to_string()),
        ("care", vm.care.to_string()),
        ("guest", vm.status.clone()),
        ("qemu", vm.qemu_version.clone().unwrap_or_else(none)),
        ("memory", vm.memory_bytes.map_or_else(none, format::bytes)),
        ("monitor", vm.qmp.display().to_string()),
        (
            "migration",
            vm.migration.map_or_else(none, |id| id.to_string()),
        ),
    ];
    let mut text = lines
        .map(|(key, value)| format!("{key:<10} {value}\n"))
        .concat();
    if let Some(problem) = &vm.problem {
        let _ = writeln!(text, "problem    {problem}");
    }
    text.push_str(&disks(vm));
    text
}

/// What `adopt` has done, or would do.
pub(super) fn adopted(vm: &VmInfo) -> String {
    let taken = vm.disks.iter().filter(|disk| disk.volume.is_some()).count();
    let refused = vm.problem.is_some() || vm.disks.iter().any(|disk| disk.refused.is_some());
    let head = match vm.care {
        VmCare::Found if refused => format!("{} cannot be adopted as it is", vm.name),
        VmCare::Found => format!("{} can be adopted; nothing was changed", vm.name),
        _ => format!("adopted {}; its guest goes on", vm.name),
    };
    let version = vm.qemu_version.as_deref().unwrap_or("of unknown version");
    format!(
        "{head}\nQEMU {version}, guest {}, {} of memory, {taken} of {} disks\n{}",
        vm.status,
        vm.memory_bytes.map_or_else(none, format::bytes),
        vm.disks.len(),
        vm.problem
            .as_ref()
            .map_or_else(String::new, |problem| format!("problem: {problem}\n"))
            + &disks(vm)
    )
}

/// What `release` has done.
pub(super) fn released(vm: &VmInfo) -> String {
    let mut text = if vm.status == "gone" {
        format!("forgot {}; its QEMU is gone, its images stay\n", vm.name)
    } else {
        format!("released {}; its guest runs on plain files\n", vm.name)
    };
    for disk in &vm.disks {
        let _ = writeln!(text, "  {:<10} {}", disk.id, disk.image.display());
    }
    text
}

fn disks(vm: &VmInfo) -> String {
    let mut text = String::new();
    for disk in &vm.disks {
        one_disk(&mut text, disk, vm.care);
    }
    text
}

fn one_disk(text: &mut String, disk: &VmDiskInfo, care: VmCare) {
    let _ = writeln!(
        text,
        "\ndisk {}\n  format     {}, {} in a file of {}\n  image      {}",
        disk.id,
        disk.format,
        format::bytes(disk.size_bytes),
        format::bytes(disk.file_bytes),
        disk.image.display()
    );
    for backing in &disk.backing {
        let _ = writeln!(text, "  backing    {} (stays here)", backing.display());
    }
    if !disk.options.is_empty() {
        let _ = writeln!(text, "  options    {}", disk.options);
    }
    if let Some(volume) = &disk.volume {
        let would = if care == VmCare::Found {
            " (would be)"
        } else {
            ""
        };
        let _ = writeln!(text, "  volume     {volume}{would}");
    }
    if let Some(why) = &disk.left_out {
        let _ = writeln!(text, "  left as it is: {why}");
    }
    if let Some(why) = &disk.refused {
        let _ = writeln!(text, "  refused: {why}");
    }
}
