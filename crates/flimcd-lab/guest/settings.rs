//! Settings from the kernel's command line.

/// What the load does. Everything has a default, so that an empty command line works.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Settings {
    /// Writes per second; 0 is none.
    pub(crate) writes_per_sec: f64,
    /// Checked reads per second; 0 is none.
    pub(crate) reads_per_sec: f64,
    /// Writes to the data between two `fdatasync`.
    pub(crate) sync_every: u64,
    /// Pages of memory that are in use.
    pub(crate) ram_pages: usize,
    /// Pages of memory touched with each write.
    pub(crate) ram_pages_per_write: usize,
    /// Whether the load runs from the start, or waits for `start`.
    pub(crate) is_started: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            writes_per_sec: 20.0,
            reads_per_sec: 20.0,
            sync_every: 8,
            ram_pages: 16 << 8,
            ram_pages_per_write: 4,
            is_started: true,
        }
    }
}

impl Settings {
    /// Reads `flimcd.NAME=VALUE` words; what is not understood is printed and passed over.
    pub(crate) fn parse(command_line: &str) -> Self {
        let mut settings = Self::default();
        for word in command_line.split_whitespace() {
            let Some((name, value)) = word
                .strip_prefix("flimcd.")
                .and_then(|word| word.split_once('='))
            else {
                continue;
            };
            if settings.set(name, value).is_none() {
                println!("BAD setting {word}");
            }
        }
        settings
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "writes" => self.writes_per_sec = value.parse().ok()?,
            "reads" => self.reads_per_sec = value.parse().ok()?,
            "sync_every" => self.sync_every = value.parse().ok().filter(|n| *n > 0)?,
            "ram_mib" => self.ram_pages = value.parse::<usize>().ok()? << 8,
            "ram_pages_per_write" => self.ram_pages_per_write = value.parse().ok()?,
            "start" => self.is_started = value != "0",
            // For the guest's init.
            "ip" | "gateway" | "drivers" | "shell" => {}
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_ours_count_and_others_do_not() {
        let text = "console=ttyS0 flimcd.writes=200 flimcd.ram_mib=64 flimcd.start=0 flimcd.x=1 \
                    flimcd.sync_every=0 flimcd.ip=10.0.2.15/24";
        let want = Settings {
            writes_per_sec: 200.0,
            ram_pages: 16384,
            is_started: false,
            ..Settings::default()
        };
        assert_eq!(Settings::parse(text), want);
        assert_eq!(Settings::parse(""), Settings::default());
    }
}
