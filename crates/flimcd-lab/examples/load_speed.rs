//! How fast the lab's own parts are: `cargo run --release -p flimcd-lab --example load_speed -- DIR`.
//! It makes an image of 1 GiB in DIR, surveys it, and runs the checked load on a disk in memory.

use std::{path::PathBuf, time::Instant};

use flimcd_lab::{
    image::{self, ImageOptions},
    load::{Baseline, Load, LoadOptions, MemoryDisk, Synthetic},
};

#[expect(clippy::print_stdout, reason = "an example talks to people")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| ".".into()));
    let path = dir.join("flimcd-load-speed.img");
    let start = Instant::now();
    let report = image::create(&path, &ImageOptions::default())?;
    let per_sec =
        |bytes: u64, start: Instant| u128::from(bytes) / start.elapsed().as_millis().max(1) / 1000;
    println!(
        "image: {} MB/s of image, {report:?}",
        per_sec(report.size_bytes, start)
    );
    let start = Instant::now();
    let baseline = Baseline::of_file(&path, 4096)?;
    println!("survey: {} MB/s of image", per_sec(baseline.size(), start));
    let bytes = std::fs::read(&path)?;
    std::fs::remove_file(&path)?;
    let disk = Box::new(MemoryDisk::new(bytes));
    let load = Load::start(disk, baseline, Synthetic::default(), LoadOptions::default())?;
    std::thread::sleep(std::time::Duration::from_secs(3));
    let mut paused = load.pause()?;
    let stats = load.snapshot();
    let per_sec = stats.all.ops * 1000 / stats.end_ms.max(1);
    println!("load: {per_sec} requests/s, {} wrong", stats.reads_wrong);
    let start = Instant::now();
    let disk = paused.disk.as_mut().ok_or("the disk is gone")?;
    let check = load.final_check(&mut **disk)?;
    let rate = u128::from(check.bytes) / start.elapsed().as_millis().max(1) / 1000;
    println!("final check: {rate} MB/s, {} wrong", check.wrong_granules);
    Ok(())
}
