//! Measurements that take turns, so that what disturbs the machine disturbs all of them.

/// The figures of some measurements, a round after another.
pub(crate) struct Rounds<const N: usize>(Vec<[f64; N]>);

impl<const N: usize> Rounds<N> {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn add(&mut self, round: [f64; N]) {
        self.0.push(round);
    }

    /// Of one measurement.
    pub(crate) fn median(&self, of: usize) -> f64 {
        median(self.0.iter().map(|round| round[of]).collect())
    }

    /// Of the rounds' ratios, not the ratio of the medians: a slow moment slows both of a pair.
    pub(crate) fn ratio(&self, of: usize, to: usize) -> f64 {
        median(self.0.iter().map(|round| round[of] / round[to]).collect())
    }
}

/// Not a number where there are none.
pub(crate) fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

pub(crate) fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (values.len().saturating_sub(1) as f64 * q).round() as usize;
    values.get(at).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_of_figures_of_the_same_round() {
        let mut rounds = Rounds::<2>::new();
        for round in [[1.0, 2.0], [10.0, 20.0], [90.0, 100.0]] {
            rounds.add(round);
        }
        assert_eq!(rounds.ratio(0, 1), 0.5);
        assert_eq!(rounds.median(1), 20.0);
    }

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(values.clone(), 0.99), 99.0);
        assert_eq!(quantile(values, 1.0), 100.0);
        assert!(median(Vec::new()).is_nan());
    }
}
