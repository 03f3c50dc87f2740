//! Runs a range of seeds and prints what it came to: `seeds A B [THREADS] [quiet|MUTATION]`; with `B` = `A + 1` the trace of one.
#![allow(clippy::print_stdout, reason = "it talks to a terminal")]

use flimcd_sim::{SimOptions, run, run_range};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, or| {
        args.get(at)
            .and_then(|text| text.parse().ok())
            .unwrap_or(or)
    };
    let (from, to) = (number(0, 0), number(1, 100));
    let mut options = SimOptions {
        faults: args.get(3).is_none_or(|text| text != "quiet"),
        ..SimOptions::default()
    };
    #[cfg(feature = "mutations")]
    if let Some(name) = args.get(3) {
        options.mutation = flimcd_sim::Mutation::all()
            .into_iter()
            .find(|mutation| mutation.name() == *name);
    }
    if to == from + 1 {
        options.trace = true;
        match run(from, &options) {
            Ok(summary) => println!("{}\n{:?}", summary.trace.join("\n"), summary.outcome),
            Err(failure) => println!("{}\n{failure}", failure.trace.join("\n")),
        }
        return;
    }
    let threads = usize::try_from(number(2, 2)).unwrap_or(2);
    println!("{}", run_range(from..to, threads, &options));
}
