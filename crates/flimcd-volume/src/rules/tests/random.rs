//! Runs the worlds: the rules hold under every interleaving tried, and each broken rule is noticed.

use proptest::prelude::*;

use super::{Choices, source_world, target_world};
use crate::rules::Mutation;

const STEPS: usize = 600;

/// Short and long runs: in a long one later writes hide what an early one lost.
fn choices(seed: u64) -> Choices {
    let part = usize::try_from(seed % 20).unwrap() + 1;
    Choices::seeded(seed, STEPS / 20 * part)
}

fn run(choices: impl Fn() -> Choices, mutation: Option<Mutation>) -> Result<(), String> {
    target_world::run(choices(), mutation)?;
    source_world::run(choices(), mutation)
}

#[test]
fn the_rules_hold_for_many_seeds() {
    for seed in 0..3000 {
        run(|| choices(seed), None).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[test]
fn every_broken_rule_is_noticed() {
    for mutation in Mutation::ALL {
        let found = (0..3000).find_map(|seed| run(|| choices(seed), Some(mutation)).err());
        assert!(
            found.is_some(),
            "{mutation:?} was not noticed in 3000 seeds"
        );
    }
}

proptest! {
    /// The same, so that a failure is shrunk to a short one.
    #[test]
    fn the_rules_hold(numbers in prop::collection::vec(any::<u32>(), 0..STEPS)) {
        if let Err(error) = run(|| Choices::new(numbers.clone()), None) {
            prop_assert!(false, "{}", error);
        }
    }
}
