//! Case `mail`: a migration under a mail-like load, with a base at the target that has diverged, by flimcd and by
//! pre-copy as it is known.

use anyhow::Context as _;
use flimcd_lab::{
    changes::Pattern, load::Mail, report::StrategyReport, sparse::copy_sparse, wan::WanBytes,
};
use serde_json::json;

use super::{Bench, Case, blocking, images, moves::Stage, replica, report::Row};
use crate::demo::{
    args::DemoStrategy,
    guest::GuestPlan,
    image, report,
    run::{self, Setting},
};

/// Share of the blocks that are others at the target.
const DIVERGED: f64 = 0.1;
const STRATEGIES: [DemoStrategy; 3] = [
    DemoStrategy::FlimcdBase,
    DemoStrategy::Precopy,
    DemoStrategy::PrecopyZstd,
];
const VARIANT: &str = "library, random 10%";

pub(super) async fn run(bench: &Bench<'_>, case: Case) -> anyhow::Result<Vec<Row>> {
    let case = case.name();
    let mail = Mail::new(bench.args.size, bench.args.seed, bench.args.mail_dirty);
    let guest = GuestPlan::mail(&mail);
    let mut rows = Vec::new();
    for strategy in STRATEGIES {
        let name = strategy.name();
        if !bench.wants(&format!("{VARIANT}, {name}")) {
            continue;
        }
        eprintln!("{case}: {name}");
        let done = one(bench, &mail, &guest, strategy).await;
        rows.push(match done {
            Ok((row, report)) => filled(row(&case, name), &report),
            Err(error) => Row::failed(&case, VARIANT, name, &error),
        });
    }
    compare(&mut rows);
    Ok(rows)
}

/// A row without figures, once its names are known.
type MakeRow = Box<dyn FnOnce(&str, &str) -> Row>;

async fn one(
    bench: &Bench<'_>,
    mail: &Mail,
    guest: &GuestPlan,
    strategy: DemoStrategy,
) -> anyhow::Result<(MakeRow, StrategyReport)> {
    let base = bench.base().await?;
    let stage = Stage::start(bench).await?;
    // The image has the mail that came before; the base is an older state of it.
    let (image, old) = (stage.dir().join("mail.raw"), stage.dir().join("old.raw"));
    let changes = replica::changes(bench, bench.args.size, DIVERGED, Pattern::Random);
    let (mail, paths) = (mail.clone(), (image.clone(), old.clone()));
    let prepared = blocking(move || {
        let (image, old) = paths;
        copy_sparse(&base, &image).context("the image cannot be copied")?;
        mail.plant(&image)?;
        copy_sparse(&image, &old).context("the image cannot be copied")?;
        changes.apply(&image)?;
        let changed = images::changed(&old, &image)?;
        let surveyed = image::survey(image, "mail".to_owned(), 4096)?;
        Ok((changed, surveyed))
    });
    let (changed, surveyed) = prepared.await?;
    if strategy.uses_base() {
        stage.world.target.add_to_library(&old).await?;
    }
    let bytes_before = stage.world.wan.bytes();
    let bound = report::bound(surveyed.facts.encoded_bytes, &bench.args.link);
    let base_bound = report::bound(changed.compressed_bytes, &bench.args.link);
    let setting = Setting {
        world: &stage.world,
        image: &surveyed,
        guest,
        bound: &bound,
        base_bound: Some(&base_bound),
    };
    let report = run::run(&setting, strategy).await?;
    let bytes = stage.world.wan.bytes().since(&bytes_before);
    let (size, facts) = (surveyed.facts.size_bytes, guest.facts.clone());
    let row: MakeRow = Box::new(move |case, by| {
        let mut row = Row::new(case, VARIANT, by).with_changed(changed, size);
        row.late_packets = Some(bytes.late_packets);
        row.details = json!({ "load": facts });
        row
    });
    Ok((row, report))
}

fn filled(row: Row, report: &StrategyReport) -> Row {
    let content = serde_json::from_value(report.details["content"].clone()).unwrap_or_default();
    // Bytes of the migration alone; its directions are not apart in a strategy's report.
    let bytes = WanBytes {
        a_to_b: report.bytes_on_link,
        b_to_a: 0,
        late_packets: row.late_packets.unwrap_or(0),
    };
    let mut row = row.measured(report.migration_time_s, bytes.a_to_b, &bytes);
    row.bytes_forward = None;
    row.content = Some(content);
    // The load writes meanwhile, so the bound of what stood still does not hold.
    row.is_within_bound = None;
    row.image_is_right = Some(
        report.final_blocks_wrong == 0 && report.guest_reads_wrong == 0 && report.guest_errors == 0,
    );
    row.details["strategy"] = json!(report);
    row
}

/// Says how much less time flimcd took than each of the others.
fn compare(rows: &mut [Row]) {
    let Some(ours) = rows
        .iter()
        .find(|row| row.by == DemoStrategy::FlimcdBase.name())
        .and_then(|row| row.seconds)
    else {
        return;
    };
    for row in rows {
        if row.by == DemoStrategy::FlimcdBase.name() {
            continue;
        }
        if let Some(theirs) = row.seconds {
            let less = (1.0 - ours / theirs) * 100.0;
            row.details["flimcd_less_time_percent"] = json!(less);
            row.details["note"] = json!(format!("flimcd took {less:.1}% less time"));
        }
    }
}
