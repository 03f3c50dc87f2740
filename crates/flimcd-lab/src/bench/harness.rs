//! Medians and ratios of repeated measurements.
//!
//! The machine's speed drifts while a benchmark runs, so candidates take turns, round by round, and
//! a ratio is the median of the ratios within each round, not the ratio of two medians.

use serde::Serialize;

/// Repeated measurements of one candidate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Samples {
    /// Whose.
    pub name: String,
    /// One per round, in order.
    pub values: Vec<f64>,
}

impl Samples {
    /// Median of the rounds; NaN without any.
    #[must_use]
    pub fn median(&self) -> f64 {
        median(&self.values)
    }

    /// Smallest and largest.
    #[must_use]
    pub fn range(&self) -> (f64, f64) {
        let fold = |f: fn(f64, f64) -> f64, start| self.values.iter().copied().fold(start, f);
        (
            fold(f64::min, f64::INFINITY),
            fold(f64::max, f64::NEG_INFINITY),
        )
    }

    /// Median over the rounds of this candidate's value divided by the other's.
    #[must_use]
    pub fn ratio_to(&self, other: &Self) -> f64 {
        let ratios: Vec<f64> = self
            .values
            .iter()
            .zip(&other.values)
            .map(|(own, base)| own / base)
            .collect();
        median(&ratios)
    }
}

/// Median; the mean of the middle two of an even number, NaN of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// A candidate: a name and a way to measure it once.
pub struct Candidate<'a, E> {
    /// Name in the results.
    pub name: String,
    /// One measurement.
    pub measure: Box<dyn FnMut() -> Result<f64, E> + 'a>,
}

impl<'a, E> Candidate<'a, E> {
    /// A candidate called `name`.
    pub fn new(name: &str, measure: impl FnMut() -> Result<f64, E> + 'a) -> Self {
        Self {
            name: name.to_owned(),
            measure: Box::new(measure),
        }
    }
}

/// Measures all candidates `rounds` times, in turns; every other round goes backwards, so that no
/// candidate always comes after the same one. `progress` gets each value as it comes.
///
/// # Errors
/// The first error of a measurement.
pub fn compare<E>(
    candidates: &mut [Candidate<'_, E>],
    rounds: u32,
    mut progress: impl FnMut(&str, u32, f64),
) -> Result<Vec<Samples>, E> {
    let mut samples: Vec<Samples> = candidates
        .iter()
        .map(|candidate| Samples {
            name: candidate.name.clone(),
            values: Vec::new(),
        })
        .collect();
    for round in 0..rounds {
        let count = candidates.len();
        for turn in 0..count {
            let index = if round % 2 == 0 {
                turn
            } else {
                count - 1 - turn
            };
            let value = (candidates[index].measure)()?;
            progress(&candidates[index].name, round, value);
            samples[index].values.push(value);
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
        assert!(median(&[]).is_nan());
        let samples = |values: &[f64]| Samples {
            name: String::new(),
            values: values.to_vec(),
        };
        // The machine gets ten times faster in between: the ratio within a round stays.
        let (own, base) = (samples(&[2.0, 20.0, 21.0]), samples(&[1.0, 10.0, 10.0]));
        assert_eq!(own.ratio_to(&base), 2.0);
        assert_eq!(own.range(), (2.0, 21.0));
    }

    #[test]
    fn candidates_take_turns_and_errors_end_it() {
        let order = std::cell::RefCell::new(String::new());
        let mut candidates: Vec<Candidate<'_, ()>> = ["a", "b"]
            .map(|name| {
                let order = &order;
                Candidate::new(name, move || {
                    order.borrow_mut().push_str(name);
                    Ok(1.0)
                })
            })
            .into();
        let samples = compare(&mut candidates, 3, |_, _, _| {}).unwrap();
        assert_eq!(*order.borrow(), "abbaab");
        assert_eq!(samples[1].values.len(), 3);
        let mut failing = [Candidate::new("bad", || Err("broken"))];
        assert_eq!(compare(&mut failing, 1, |_, _, _| {}), Err("broken"));
    }
}
