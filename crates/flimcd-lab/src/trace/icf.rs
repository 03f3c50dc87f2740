//! Access specifications in Iometer's configuration files (`.icf`):
//!
//! ```text
//! 'ACCESS SPECIFICATIONS =====
//! 'Access specification name,default assignment
//!     Database,NONE
//! 'size,% of size,% reads,% random,delay,burst,align,reply
//!     8192,100,67,100,0,1,0,0
//! 'END access specifications
//! ```
//! Sizes, alignment and replies are in bytes, the delay in milliseconds. Other sections of the file (manager,
//! worker, disks) are not looked at. Replies go over a network, so they are nothing to a disk.

use std::time::Duration;

use flimcd_core::limits::MAX_NBD_REQUEST_BYTES;

use super::collect::excerpt;
use crate::load::{AccessLine, AccessSpec};

pub(super) const FORMAT: &str = "Iometer .icf access specification";
/// Problems that are described.
const DESCRIBED_MAX: usize = 8;
/// Specifications and lines of a file at most.
const LINES_MAX: usize = 4096;

/// What a configuration file held.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IcfFile {
    /// Its specifications with at least one usable line, in order.
    pub specs: Vec<AccessSpec>,
    /// Lines of the section that cannot be used.
    pub bad_lines: u64,
    /// What is wrong with the first of them.
    pub first_bad: Vec<String>,
}

/// Whether this is such a file.
pub(super) fn is_start(line: &str) -> bool {
    let text = line.trim_start_matches(['\'', ' ', '\t']);
    text.get(..21)
        .is_some_and(|start| start.eq_ignore_ascii_case("ACCESS SPECIFICATIONS"))
        && line.trim_start().starts_with('\'')
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Expects {
    Nothing,
    Name,
    Lines,
}

/// Reads a file's text. Never fails: what cannot be used is counted and named.
#[must_use]
pub fn parse(text: &str) -> IcfFile {
    let mut file = IcfFile::default();
    let mut is_inside = false;
    let mut expects = Expects::Nothing;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if is_start(line) {
            is_inside = true;
        } else if !is_inside || line.is_empty() {
            // Another section.
        } else if let Some(comment) = line.strip_prefix('\'') {
            let comment = comment.trim().to_ascii_lowercase();
            if comment.starts_with("end access specifications") {
                is_inside = false;
            } else if comment.starts_with("access specification name") {
                expects = Expects::Name;
            } else if comment.starts_with("size") {
                expects = Expects::Lines;
            }
        } else if let Err(problem) = take(line, &mut expects, &mut file) {
            file.bad_lines += 1;
            if file.first_bad.len() < DESCRIBED_MAX {
                file.first_bad.push(format!("line {number}: {problem}"));
            }
        }
    }
    // Lines of no share say nothing.
    file.specs
        .retain(|spec| spec.lines.iter().any(|line| line.share > 0.0));
    file
}

fn take(line: &str, expects: &mut Expects, file: &mut IcfFile) -> Result<(), String> {
    if *expects == Expects::Nothing {
        return Err("it stands before any name".to_owned());
    }
    if *expects == Expects::Name {
        if file.specs.len() >= LINES_MAX {
            return Err(format!("more than {LINES_MAX} specifications"));
        }
        // The name may hold commas; what it is assigned to does not.
        let name = line.rsplit_once(',').map_or(line, |(name, _)| name);
        file.specs.push(AccessSpec {
            name: excerpt(name.trim()),
            lines: Vec::new(),
        });
        *expects = Expects::Lines;
        return Ok(());
    }
    let spec = file.specs.last_mut().ok_or("it has no name before it")?;
    if spec.lines.len() >= LINES_MAX {
        return Err(format!("more than {LINES_MAX} lines"));
    }
    spec.lines.push(access_line(line)?);
    Ok(())
}

fn access_line(line: &str) -> Result<AccessLine, String> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let &[size, of, reads, random, delay, burst, align, reply] = fields.as_slice() else {
        return Err(format!("{} fields instead of 8", fields.len()));
    };
    let number = |what: &str, text: &str| -> Result<u32, String> {
        text.parse()
            .map_err(|_| format!("{what} {:?} is no number", excerpt(text)))
    };
    let percent = |what: &str, text: &str| -> Result<f64, String> {
        match number(what, text)? {
            percent @ 0..=100 => Ok(f64::from(percent) / 100.0),
            more => Err(format!("{what} {more} is more than 100%")),
        }
    };
    let bytes = number("size", size)?;
    if bytes == 0 || !bytes.is_multiple_of(512) || bytes > MAX_NBD_REQUEST_BYTES {
        return Err(format!(
            "size {bytes} is not a positive multiple of 512 up to {MAX_NBD_REQUEST_BYTES}"
        ));
    }
    number("reply", reply)?;
    Ok(AccessLine {
        bytes,
        share: percent("% of size", of)?,
        read_share: percent("% reads", reads)?,
        random_share: percent("% random", random)?,
        delay: Duration::from_millis(number("delay", delay)?.into()),
        burst: number("burst", burst)?,
        align_bytes: number("align", align)?.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "Version 2006.07.27 \n\
        'TEST SETUP ====\n'Test Description\n\t\n\
        'ACCESS SPECIFICATIONS =========\n\
        'Access specification name,default assignment\n\tDatabase, small,NONE\n\
        'size,% of size,% reads,% random,delay,burst,align,reply\n\t8192,100,67,100,0,1,0,0\n\
        'Access specification name,default assignment\n\tMixed,ALL\n\
        'size,% of size,% reads,% random,delay,burst,align,reply\n\
        \t512,10,80,100,5,2,4096,0\n\t4096,90,80,50,0,1,0,0\n\t1000,5,80,50,0,1,0,0\n\t1,2,3\n\t4096,101,0,0,0,1,0,0\n\
        'END access specifications\n'MANAGER LIST ====\n\t1,2\n";

    #[test]
    fn specifications_are_read_and_bad_lines_named() {
        let file = parse(FILE);
        assert_eq!(file.specs.len(), 2, "{file:?}");
        assert_eq!(file.specs[0].name, "Database, small");
        assert_eq!(file.specs[0].lines, AccessSpec::database().lines);
        let mixed = &file.specs[1];
        assert_eq!(mixed.lines.len(), 2);
        let first = mixed.lines[0];
        assert_eq!(
            (first.bytes, first.burst, first.align_bytes),
            (512, 2, 4096)
        );
        assert_eq!(first.delay, Duration::from_millis(5));
        assert_eq!(mixed.lines[1].random_share, 0.5);
        assert_eq!(file.bad_lines, 3);
        let check = |index: usize, parts: &[&str]| {
            let text = &file.first_bad[index];
            assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        };
        check(0, &["line 15", "size 1000"]);
        check(1, &["line 16", "3 fields"]);
        check(2, &["line 17", "more than 100%"]);
    }
}
