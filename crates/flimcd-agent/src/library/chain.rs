//! qcow2 images: the files of a backing chain, and conversion where their clusters do not hold what guests see.
//!
//! Clusters that are not compressed or encrypted lie in the file as the guest wrote them, at multiples of 4 KiB or more. So an
//! index of such a *file* finds the guest's content without any knowledge of the format.

use serde::Deserialize;
use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const TOOL: &str = "qemu-img";

/// What an image consists of.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chain {
    /// The files hold what the guest sees, the image itself first.
    Plain(Vec<PathBuf>),
    /// They do not; the reason.
    ToConvert(&'static str),
}

/// Why a qcow2 image cannot be taken in.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChainError {
    #[error("qemu-img is needed for qcow2 images and cannot be run: {0}")]
    NoTool(io::Error),
    #[error("qemu-img {what} failed: {problem}")]
    Failed { what: &'static str, problem: String },
    #[error("qemu-img answers what is not understood: {0}")]
    Answer(serde_json::Error),
    #[error("{0} is encrypted, and the agent does not have its key")]
    Encrypted(PathBuf),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    filename: PathBuf,
    format: String,
    #[serde(default)]
    encrypted: bool,
    cluster_size: Option<u64>,
    format_specific: Option<Specific>,
}

#[derive(Deserialize)]
struct Specific {
    #[serde(default)]
    data: SpecificData,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SpecificData {
    data_file: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Check {
    #[serde(default)]
    compressed_clusters: u64,
}

/// Looks at an image and what it is based on. Blocks.
pub(super) fn look(image: &Path) -> Result<Chain, ChainError> {
    let args = ["info", "-U", "--backing-chain", "--output=json"];
    let files: Vec<Info> = ask("info", &args, image, &[0])?;
    let mut paths = Vec::new();
    for file in files {
        if file.encrypted {
            return Err(ChainError::Encrypted(file.filename));
        }
        let data = file
            .format_specific
            .and_then(|specific| specific.data.data_file);
        let convert = match file.format.as_str() {
            "raw" => None,
            "qcow2" if data.is_some() => Some("its data is in another file"),
            "qcow2" if file.cluster_size.is_none_or(|size| size < 4096) => {
                Some("its clusters are smaller than 4 KiB")
            }
            "qcow2" if is_compressed(&file.filename)? => Some("it has compressed clusters"),
            "qcow2" => None,
            _ => Some("its format is another one"),
        };
        if let Some(why) = convert {
            return Ok(Chain::ToConvert(why));
        }
        paths.push(file.filename);
    }
    Ok(Chain::Plain(paths))
}

fn is_compressed(image: &Path) -> Result<bool, ChainError> {
    // 3: leaked clusters, which do no harm.
    let args = ["check", "-U", "--output=json", "-f", "qcow2"];
    let check: Check = ask("check", &args, image, &[0, 3])?;
    Ok(check.compressed_clusters > 0)
}

fn ask<T: for<'de> Deserialize<'de>>(
    what: &'static str,
    args: &[&str],
    image: &Path,
    fine: &[i32],
) -> Result<T, ChainError> {
    let mut command = Command::new(TOOL);
    command.args(args).arg(image).stdin(Stdio::null());
    let output = command.output().map_err(ChainError::NoTool)?;
    if !output
        .status
        .code()
        .is_some_and(|code| fine.contains(&code))
    {
        let problem = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(ChainError::Failed { what, problem });
    }
    serde_json::from_slice(&output.stdout).map_err(ChainError::Answer)
}

/// Writes what guests see in an image into a raw file, in the place of what may be there. Blocks, for long.
pub(super) fn convert(from: &Path, to: &Path) -> io::Result<()> {
    let mut command = Command::new(TOOL);
    command
        .args(["convert", "-U", "-O", "raw"])
        .arg(from)
        .arg(to);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| io::Error::other(ChainError::NoTool(error)))?;
    if output.status.success() {
        return std::fs::File::open(to)?.sync_all();
    }
    let problem = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let what = "convert";
    Err(io::Error::other(ChainError::Failed { what, problem }))
}
