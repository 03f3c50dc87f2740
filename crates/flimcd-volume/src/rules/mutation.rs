//! Rules broken on purpose, to show that the checkers notice. Without the feature `mutations` (and outside of tests)
//! nothing can be broken and the checks cost nothing.

/// A rule to break.
#[cfg_attr(
    not(any(test, feature = "mutations")),
    expect(unreachable_pub, reason = "only the feature makes it reachable")
)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mutation {
    /// The dirty mark is set when a write ends, not before it starts.
    MarkDirtyAfterWrite,
    /// Fetched content is written whether or not the guest wrote the block.
    FetchedOverwritesGuestWrite,
    /// A flush is acknowledged before the presence of its blocks is durable.
    FlushBeforePresence,
    /// Dirty marks are cleared after the read for sending, not before.
    ClearAfterRead,
    /// Dirty marks are cleared although a write to the block is in flight.
    IgnoreWriteInFlight,
}

impl Mutation {
    /// All of them.
    #[cfg(any(test, feature = "mutations"))]
    pub const ALL: [Self; 5] = [
        Self::MarkDirtyAfterWrite,
        Self::FetchedOverwritesGuestWrite,
        Self::FlushBeforePresence,
        Self::ClearAfterRead,
        Self::IgnoreWriteInFlight,
    ];
}

/// Which rule is broken.
#[derive(Debug, Default)]
pub(super) struct Broken {
    #[cfg(any(test, feature = "mutations"))]
    mutation: Option<Mutation>,
}

impl Broken {
    #[cfg(any(test, feature = "mutations"))]
    pub(super) fn new(mutation: Option<Mutation>) -> Self {
        Self { mutation }
    }

    #[cfg(any(test, feature = "mutations"))]
    #[inline]
    pub(super) fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    #[cfg(not(any(test, feature = "mutations")))]
    #[expect(clippy::unused_self, reason = "the same call as with the feature")]
    #[inline]
    pub(super) fn is(&self, _: Mutation) -> bool {
        false
    }
}
