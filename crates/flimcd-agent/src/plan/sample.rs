//! From a sample of a volume's pieces to the whole volume, and how far that may be off.
//!
//! Pieces are drawn without replacement, each as likely as any other. A figure of the whole is estimated by the ratio of the figure to
//! the blocks of the sample; its error is 1.96 standard deviations of that (95% of samples are nearer), made smaller
//! by what share of all pieces was looked at. A figure that is the same in every piece of a small sample says little about the others:
//! the error is therefore never less than that of the rule of three, a share of 3/n.

/// What one piece has of each of `N` figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Piece<const N: usize> {
    /// Its size, in any unit.
    pub(crate) size: f64,
    /// Its figures; none exceeds what `most` says of it, per unit of size.
    pub(crate) figures: [f64; N],
}

/// A figure of the whole volume.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Scaled {
    pub(crate) figure: f64,
    /// Half of the interval that has the truth in 95% of samples.
    pub(crate) error_95: f64,
}

/// Scales a sample to a whole of `size` in `pieces` pieces. `most` is what a unit of size can have of each figure.
pub(crate) fn scale<const N: usize>(
    sample: &[Piece<N>],
    size: f64,
    pieces: u64,
    most: [f64; N],
) -> [Scaled; N] {
    let sampled: f64 = sample.iter().map(|piece| piece.size).sum();
    if sampled <= 0.0 {
        return [Scaled::default(); N];
    }
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let (n, all) = (sample.len() as f64, (pieces as f64).max(1.0));
    let unseen = (1.0 - n / all).max(0.0).sqrt();
    std::array::from_fn(|at| {
        let total: f64 = sample.iter().map(|piece| piece.figures[at]).sum();
        let ratio = total / sampled;
        let square = |piece: &Piece<N>| (piece.figures[at] - ratio * piece.size).powi(2);
        let squares: f64 = sample.iter().map(square).sum();
        let deviation = (squares / (n - 1.0).max(1.0)).sqrt();
        let mean_size = sampled / n;
        let spread = 1.96 * deviation / n.sqrt() / mean_size;
        let floor = (3.0 / n).min(1.0) * most[at];
        Scaled {
            figure: ratio * size,
            error_95: spread.max(floor) * size * unseen,
        }
    })
}

#[cfg(test)]
#[expect(clippy::cast_precision_loss, reason = "figures of estimates")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A small generator of numbers from 0 to 1.
    fn draws(seed: u64) -> impl FnMut() -> f64 {
        let mut state = seed | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    /// Draws 200 samples of 64 and counts those whose interval has the truth.
    fn coverage(population: &mut [f64], mut draw: impl FnMut() -> f64) -> u32 {
        let truth: f64 = population.iter().sum();
        let mut covered = 0;
        for _ in 0..200 {
            for at in 0..64 {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "below the number of pieces"
                )]
                let other = at + (draw() * (population.len() - at) as f64) as usize;
                population.swap(at, other);
            }
            let sample: Vec<_> = population[..64]
                .iter()
                .map(|figure| Piece {
                    size: 64.0,
                    figures: [*figure],
                })
                .collect();
            let size = 64.0 * population.len() as f64;
            let [scaled] = scale(&sample, size, population.len() as u64, [1.0]);
            covered += u32::from((scaled.figure - truth).abs() <= scaled.error_95);
        }
        covered
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn the_truth_is_in_the_interval(share in 0.0f64..1.0, all_or_nothing: bool, seed: u64) {
            let mut draw = draws(seed);
            let mut population: Vec<f64> = (0..4000)
                .map(|_| match all_or_nothing {
                    true => if draw() < share { 64.0 } else { 0.0 },
                    false => (64.0 * share * 2.0 * draw()).min(64.0),
                })
                .collect();
            // 95% of 200 are 190; fewer than 180 has a chance of one in a hundred.
            prop_assert!(coverage(&mut population, draw) >= 176, "share {}", share);
        }

        #[test]
        fn a_sample_of_everything_is_exact(values in prop::collection::vec(0u32..=64, 1..50)) {
            let sample: Vec<_> = values
                .iter()
                .map(|v| Piece { size: 64.0, figures: [f64::from(*v)] })
                .collect();
            let size = 64.0 * values.len() as f64;
            let [scaled] = scale(&sample, size, values.len() as u64, [1.0]);
            let truth: u32 = values.iter().sum();
            prop_assert!((scaled.figure - f64::from(truth)).abs() < 1e-6);
            prop_assert!(scaled.error_95.abs() < 1e-9);
        }
    }

    #[test]
    fn what_was_not_seen_may_be_there() {
        let sample = [Piece {
            size: 64.0,
            figures: [0.0],
        }; 30];
        let [scaled] = scale(&sample, 64_000.0, 1000, [1.0]);
        assert!(scaled.figure.abs() < 1e-9);
        assert!((6_000.0..6_500.0).contains(&scaled.error_95), "{scaled:?}");
        assert_eq!(scale::<1>(&[], 10.0, 5, [1.0]), [Scaled::default()]);
    }
}
