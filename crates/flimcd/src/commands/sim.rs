//! `flimcd sim`: simulated migrations, each from its seed.

use std::{io::IsTerminal as _, process::ExitCode, time::Duration};

use flimcd_sim::{SimOptions, run, run_range};
use indicatif::ProgressBar;

use crate::{args::SimArgs, outcome::advise};

/// With a trace every run prints hundreds of lines, so that more seeds than this are a mistake.
const TRACED_MAX: u64 = 100;

pub(crate) fn run_seeds(args: &SimArgs) -> anyhow::Result<ExitCode> {
    let options = SimOptions {
        trace: args.trace,
        faults: !args.no_faults,
        #[cfg(feature = "mutations")]
        mutation: args.mutation,
    };
    if args.trace {
        return traced(args, &options);
    }
    let jobs = match args.jobs {
        Some(jobs) => jobs,
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let spinner = std::io::stderr().is_terminal().then(|| {
        let spinner = ProgressBar::new_spinner();
        spinner.set_message(format!("seeds {:?} on {jobs} threads", args.seeds));
        spinner.enable_steady_tick(Duration::from_millis(100));
        spinner
    });
    let report = run_range(args.seeds.clone(), jobs, &options);
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    print!("{report}");
    if report.failed == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    let again = match report.failures.first() {
        Some(failure) => format!("flimcd sim --seeds {} --trace", failure.seed),
        None => "flimcd sim --trace with one of them".into(),
    };
    Err(advise(
        format!(
            "a check failed in {} of {} seeds",
            report.failed, report.seeds
        ),
        format!("see one happen with: {again}"),
    ))
}

/// Runs a few seeds one after the other and prints everything that happened.
fn traced(args: &SimArgs, options: &SimOptions) -> anyhow::Result<ExitCode> {
    let count = args.seeds.end - args.seeds.start;
    if count > TRACED_MAX {
        return Err(advise(
            format!("{count} seeds with a trace would print millions of lines"),
            "run them without --trace first, then a failing one with it",
        ));
    }
    let mut failed = 0;
    for seed in args.seeds.clone() {
        match run(seed, options) {
            Ok(summary) => {
                print_trace(&summary.trace);
                println!(
                    "seed {seed}: {} with {}, {:.3} s of virtual time, {} guest requests, every check held",
                    summary.outcome,
                    summary.strategy,
                    summary.virtual_time.as_secs_f64(),
                    summary.guest_requests
                );
            }
            Err(failure) => {
                print_trace(&failure.trace);
                println!("{failure}");
                failed += 1;
            }
        }
    }
    if failed == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    Err(anyhow::anyhow!(
        "a check failed in {failed} of {count} seeds"
    ))
}

fn print_trace(trace: &[String]) {
    for line in trace {
        println!("{line}");
    }
}

/// A mutation by its name in kebab case.
#[cfg(feature = "mutations")]
pub(crate) fn parse_mutation(text: &str) -> Result<flimcd_sim::Mutation, String> {
    use flimcd_sim::Mutation;
    Mutation::all()
        .into_iter()
        .find(|mutation| mutation.name() == text)
        .ok_or_else(|| {
            let names: Vec<String> = Mutation::all().into_iter().map(Mutation::name).collect();
            format!(
                "there is no rule '{text}' to break; there are {}",
                names.join(", ")
            )
        })
}
