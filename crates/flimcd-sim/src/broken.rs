//! Rules broken on purpose, to show that the checkers notice.

#[cfg(feature = "mutations")]
use crate::Rule;
use crate::world::World;

/// A rule to break.
#[cfg(feature = "mutations")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// One of a volume's.
    Volume(Rule),
    /// What the target has is taken without a look at its fingerprint.
    UncheckedCopy,
    /// A copy that somebody has written to is said to be the one that the source knows.
    TouchedBase,
}

#[cfg(feature = "mutations")]
impl Mutation {
    /// All of them.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let of_volume = Rule::ALL.map(Self::Volume);
        let mut all = of_volume.to_vec();
        all.extend([Self::UncheckedCopy, Self::TouchedBase]);
        all
    }

    /// How people call it: lower case, with hyphens.
    #[must_use]
    pub fn name(self) -> String {
        let name = match self {
            Self::Volume(mutation) => format!("{mutation:?}"),
            other => format!("{other:?}"),
        };
        let mut text = String::new();
        for letter in name.chars() {
            if letter.is_uppercase() && !text.is_empty() {
                text.push('-');
            }
            text.push(letter.to_ascii_lowercase());
        }
        text
    }
}

#[cfg(feature = "mutations")]
impl World {
    pub(crate) fn breaks_unchecked_copy(&self) -> bool {
        self.options.mutation == Some(Mutation::UncheckedCopy)
    }

    pub(crate) fn breaks_touched_base(&self) -> bool {
        self.options.mutation == Some(Mutation::TouchedBase)
    }
}

#[cfg(not(feature = "mutations"))]
#[expect(clippy::unused_self, reason = "the same calls as with the feature")]
impl World {
    pub(crate) fn breaks_unchecked_copy(&self) -> bool {
        false
    }

    pub(crate) fn breaks_touched_base(&self) -> bool {
        false
    }
}
