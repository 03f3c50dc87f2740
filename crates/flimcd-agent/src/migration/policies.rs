//! From what was asked for to a policy.

use flimcd_migrate::policy::{Policy, PolicyOptions, by_name};

use crate::api::Strategy;

/// The policy of a strategy; `compress` and `library` override its defaults.
pub(crate) fn choose_policy(
    strategy: Strategy,
    compress: Option<bool>,
    library: Option<bool>,
) -> Option<Box<dyn Policy>> {
    let name = match (strategy, compress) {
        (Strategy::Precopy, Some(true)) => "precopy-zstd",
        (strategy, _) => strategy.name(),
    };
    let options = PolicyOptions {
        compress,
        library,
        ..PolicyOptions::default()
    };
    by_name(name, &options).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_strategy_has_a_policy_and_compression_can_be_chosen() {
        for strategy in Strategy::ALL {
            assert!(choose_policy(strategy, None, None).is_some(), "{strategy}");
            for compress in [true, false] {
                let policy = choose_policy(strategy, Some(compress), Some(compress)).unwrap();
                let choices = (policy.compress(), policy.uses_library());
                assert_eq!(choices, (compress, compress), "{strategy}");
            }
        }
        let precopy = choose_policy(Strategy::Precopy, None, None).unwrap();
        assert!(!precopy.compress() && !precopy.uses_library());
        let flimcd = choose_policy(Strategy::Flimcd, None, None).unwrap();
        assert!(flimcd.compress() && flimcd.uses_library());
    }
}
