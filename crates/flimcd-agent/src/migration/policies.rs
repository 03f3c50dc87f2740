//! From what was asked for to a policy.

use flimcd_core::BlockRange;
use flimcd_migrate::policy::{Policy, PolicyOptions, View, by_name};

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
    let policy = by_name(name, &PolicyOptions::default()).ok()?;
    let compress = compress.unwrap_or(policy.compress());
    let library = library.unwrap_or(policy.uses_library());
    Some(Box::new(WithChoices {
        policy,
        compress,
        library,
    }))
}

/// A policy with its opinions on content replaced.
struct WithChoices {
    policy: Box<dyn Policy>,
    compress: bool,
    library: bool,
}

impl Policy for WithChoices {
    fn name(&self) -> &'static str {
        self.policy.name()
    }

    fn compress(&self) -> bool {
        self.compress
    }

    fn uses_library(&self) -> bool {
        self.library
    }

    fn allows_postcopy(&self) -> bool {
        self.policy.allows_postcopy()
    }

    fn next_precopy(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.policy.next_precopy(view)
    }

    fn is_ready(&mut self, view: &View<'_>) -> bool {
        self.policy.is_ready(view)
    }

    fn begin_push(&mut self, view: &View<'_>) {
        self.policy.begin_push(view);
    }

    fn next_push(&mut self, view: &View<'_>) -> Option<BlockRange> {
        self.policy.next_push(view)
    }

    fn on_demand(&mut self, range: BlockRange) {
        self.policy.on_demand(range);
    }
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
