//! Names: of disks, of devices, of exports.

use std::path::PathBuf;

use super::MAX_DISK_ID_BYTES;
use crate::commands::NodeInfo;

/// Socket and name of the export that an `nbd` node is on, from its address:
/// `nbd+unix:///NAME?socket=PATH` or, when that cannot say all, `json:{…}`.
pub(super) fn export_of(node: &NodeInfo) -> Option<(PathBuf, String)> {
    if node.drv != "nbd" {
        return None;
    }
    if let Some(json) = node.file.strip_prefix("json:") {
        let value: serde_json::Value = serde_json::from_str(json).ok()?;
        let text = |keys: [&str; 2]| {
            let nested = value.get(keys[0]).and_then(|v| v.get(keys[1]));
            let flat = value.get(format!("{}.{}", keys[0], keys[1]));
            Some(nested.or(flat)?.as_str()?.to_owned())
        };
        let socket = text(["server", "path"])?;
        let name = value.get("export").and_then(|e| e.as_str());
        return Some((socket.into(), name.unwrap_or_default().to_owned()));
    }
    let rest = node.file.strip_prefix("nbd+unix://")?;
    let (name, socket) = rest.split_once("?socket=")?;
    let name = name.strip_prefix('/').unwrap_or(name);
    Some((unescape(socket).into(), unescape(name)))
}

/// `%41` is `A`.
fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes
            .get(at + 1..at + 3)
            .and_then(|hex| std::str::from_utf8(hex).ok());
        let code = code.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(byte) if bytes[at] == b'%' => {
                plain.push(byte);
                at += 3;
            }
            _ => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// The id that a person gave a device, and its path, from what `query-block` calls `qdev`: either.
pub(super) fn device_names(qdev: Option<&str>) -> (Option<String>, Option<String>) {
    let Some(qdev) = qdev else {
        return (None, None);
    };
    if let Some(inside) = qdev.strip_prefix("/machine/peripheral/") {
        let id = inside.split('/').next().unwrap_or_default();
        return (Some(id.to_owned()), Some(qdev.to_owned()));
    }
    if qdev.starts_with('/') {
        return (None, Some(qdev.to_owned()));
    }
    let path = format!("/machine/peripheral/{qdev}");
    (Some(qdev.to_owned()), Some(path))
}

pub(super) fn disk_id(qdev: Option<&str>, drive: Option<&str>, node: &str) -> String {
    let given = Some(node).filter(|n| !n.starts_with('#'));
    let name = qdev.or(drive).or(given).unwrap_or_default();
    let mut id = String::new();
    for c in name.chars() {
        let c = c.to_ascii_lowercase();
        if c.is_ascii_alphanumeric() {
            id.push(c);
        } else if !id.is_empty() && !id.ends_with('-') {
            id.push('-');
        }
    }
    id.truncate(MAX_DISK_ID_BYTES);
    id.trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_short_and_plain() {
        let check = |qdev, drive, node, expected| {
            assert_eq!(disk_id(qdev, drive, node), expected);
        };
        check(Some("Disk_0"), Some("drv"), "node", "disk-0");
        check(None, Some("virtio0"), "#block12", "virtio0");
        check(None, None, "libvirt-1-format", "libvirt-1-format");
        check(None, None, "#block12", "");
        check(
            Some("ua-0c9d0d9b-3a8e-4d0e-9b0e"),
            None,
            "",
            "ua-0c9d0d9b-3a8e-4d0",
        );
    }

    #[test]
    fn devices_by_id_or_path() {
        let check = |qdev, id: Option<&str>, path: Option<&str>| {
            let expected = (id.map(str::to_owned), path.map(str::to_owned));
            assert_eq!(device_names(qdev), expected);
        };
        check(None, None, None);
        check(Some("sd0"), Some("sd0"), Some("/machine/peripheral/sd0"));
        let virtio = "/machine/peripheral/vd0/virtio-backend";
        check(Some(virtio), Some("vd0"), Some(virtio));
        let anonymous = "/machine/peripheral-anon/device[0]";
        check(Some(anonymous), None, Some(anonymous));
    }

    #[test]
    fn export_of_an_address() {
        let check = |file: &str, expected: Option<(&str, &str)>| {
            let node: NodeInfo = serde_json::from_value(serde_json::json!({
                "drv": "nbd", "file": file, "image": {"virtual-size": 1, "format": "nbd"},
                "cache": {"writeback": true, "direct": false, "no-flush": false},
            }))
            .unwrap();
            let found = export_of(&node);
            let expected = expected.map(|(s, n)| (PathBuf::from(s), n.to_owned()));
            assert_eq!(found, expected, "{file}");
        };
        check(
            "nbd+unix:///vm.disk?socket=/run/a.sock",
            Some(("/run/a.sock", "vm.disk")),
        );
        check("nbd+unix://?socket=/run/a.sock", Some(("/run/a.sock", "")));
        check(
            "nbd+unix:///a%2fb?socket=/run/x%20y",
            Some(("/run/x y", "a/b")),
        );
        check(
            r#"json:{"driver":"nbd","export":"e","server":{"type":"unix","path":"/s"}}"#,
            Some(("/s", "e")),
        );
        check(
            r#"json:{"driver":"nbd","server.path":"/s","server.type":"unix"}"#,
            Some(("/s", "")),
        );
        check("nbd://host:10809/e", None);
    }
}
