//! Seeds in which nothing may fail.

use flimcd_sim::{Outcome, SimOptions, run, run_range};

#[test]
fn without_faults_every_migration_ends_well() {
    let options = SimOptions {
        faults: false,
        ..SimOptions::default()
    };
    let report = run_range(0..60, 2, &options);
    assert_eq!(report.failed, 0, "{report}");
    assert!(report.outcomes[&Outcome::Completed] > 40, "{report}");
}

#[test]
fn with_faults_no_check_fails_and_everything_is_met() {
    let report = run_range(0..300, 2, &SimOptions::default());
    assert_eq!(report.failed, 0, "{report}");
    assert_eq!(report.seeds, 300);
    for what in [
        "link break",
        "flapping link",
        "partition",
        "stall of one direction",
        "kill of the source's agent",
        "kill of the target's agent",
        "power loss at the source",
        "power loss at the target",
        "power loss at the end",
        "disk errors at the source",
        "disk errors at the target",
        "target's disk full",
        "cancelled at the source",
        "cancelled at the target",
        "blocks demanded",
        "fetched content dropped",
        "missing blocks overwritten by the guest",
        "guest request parked",
        "guest request abandoned",
        "stale content at the switch",
        "target Refusing",
        "source Draining",
        "source Returning",
        "sent as the same",
        "lacking at the target",
        "asked what the target has",
        "the target has something of it",
        "sent as copies",
        "prefixes collided",
        "places forgotten",
        "changed under the index",
        "onto zeroes",
        "onto a copy that is known",
        "onto a copy of some time",
        "kept in place",
        "write held",
        "the source's guest reads",
        "the target's guest reads",
        "heat of reads kept",
        "heat of writes kept",
    ] {
        assert!(
            report.coverage.contains_key(what),
            "never met: {what}\n{report}"
        );
    }
    assert_eq!(
        report.strategies.len(),
        flimcd_migrate::policy::STRATEGIES.len()
    );
    assert_eq!(report.outcomes.len(), 3, "{report}");
}

#[test]
fn a_seed_is_the_same_run_every_time() {
    let options = SimOptions {
        trace: true,
        ..SimOptions::default()
    };
    for seed in [3, 14, 15] {
        let trace = |seed| run(seed, &options).expect("no check fails").trace;
        let first = trace(seed);
        assert!(first.len() > 100);
        assert!(first == trace(seed), "seed {seed} took two courses");
    }
}
