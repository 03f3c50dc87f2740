//! Each rule that can be broken on purpose is missed by some seed soon. Needs `--features mutations`.

#[cfg(feature = "mutations")]
mod with_mutations {
    use flimcd_sim::{Failure, Mutation, Rule, SimOptions, run};

    /// Seeds to try for each rule.
    const SEEDS_MAX: u64 = 2000;

    /// The first seed that notices, and what it noticed.
    fn first_failure(mutation: Mutation) -> (u64, Failure) {
        let options = SimOptions {
            mutation: Some(mutation),
            ..SimOptions::default()
        };
        let found = (0..SEEDS_MAX).find_map(|seed| Some((seed, run(seed, &options).err()?)));
        let (seed, failure) = found.unwrap_or_else(|| panic!("nobody misses {mutation:?}"));
        let again = run(seed, &SimOptions::default());
        assert!(again.is_ok(), "seed {seed} fails anyway: {again:?}");
        (seed, failure)
    }

    fn check(mutation: Mutation) {
        let (seed, failure) = first_failure(mutation);
        // Shown with --nocapture: how many seeds it takes.
        #[expect(clippy::print_stdout, reason = "a figure for people")]
        {
            println!("{mutation:?} is found by seed {seed}: {}", failure.what);
        }
    }

    #[test]
    fn marks_after_the_write_are_missed() {
        check(Mutation::Volume(Rule::MarkDirtyAfterWrite));
    }

    #[test]
    fn fetched_content_over_guest_writes_is_noticed() {
        check(Mutation::Volume(Rule::FetchedOverwritesGuestWrite));
    }

    #[test]
    fn a_flush_before_the_presence_is_noticed() {
        check(Mutation::Volume(Rule::FlushBeforePresence));
    }

    #[test]
    fn marks_cleared_after_the_read_are_missed() {
        check(Mutation::Volume(Rule::ClearAfterRead));
    }

    #[test]
    fn marks_of_writes_in_flight_are_missed() {
        check(Mutation::Volume(Rule::IgnoreWriteInFlight));
    }
    #[test]
    fn a_copy_that_nobody_checked_is_noticed() {
        check(Mutation::UncheckedCopy);
    }

    #[test]
    fn a_copy_that_somebody_wrote_to_is_noticed() {
        check(Mutation::TouchedBase);
    }
}
