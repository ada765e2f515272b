//! When a failed message runs again.

use std::time::Duration;

/// How long to wait before each further attempt.
///
/// The default is exponential from 1 s to 10 min. Every wait is lengthened by up to a quarter at random, so that messages that
/// failed together do not come back together; it is never shortened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    backoff: Backoff,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backoff {
    Fixed(Duration),
    Linear { step: Duration, cap: Duration },
    Exponential { first: Duration, cap: Duration },
}

impl Default for Retry {
    fn default() -> Self {
        Self::exponential(Duration::from_secs(1), Duration::from_secs(600))
    }
}

impl Retry {
    /// The same wait before each attempt.
    pub const fn fixed(wait: Duration) -> Self {
        Self {
            backoff: Backoff::Fixed(wait),
        }
    }

    /// `step`, 2 × `step`, 3 × `step`, … up to `cap`.
    pub const fn linear(step: Duration, cap: Duration) -> Self {
        Self {
            backoff: Backoff::Linear { step, cap },
        }
    }

    /// `first`, 2 × `first`, 4 × `first`, … up to `cap`.
    pub const fn exponential(first: Duration, cap: Duration) -> Self {
        Self {
            backoff: Backoff::Exponential { first, cap },
        }
    }

    /// The wait after the attempt of this number (from 1) failed; `chance` from 0 to 1 is how much of the jitter is added.
    pub(crate) fn wait(&self, attempt: u32, chance: f64) -> Duration {
        let wait = match self.backoff {
            Backoff::Fixed(wait) => wait,
            Backoff::Linear { step, cap } => step.saturating_mul(attempt).min(cap),
            Backoff::Exponential { first, cap } => first
                .saturating_mul(2_u32.saturating_pow(attempt.saturating_sub(1)))
                .min(cap),
        };
        wait + wait.mul_f64(0.25 * chance.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_jitter_only_lengthens() {
        let s = Duration::from_secs;
        let waits = |retry: Retry| [1, 2, 3, 4, 200].map(|attempt| retry.wait(attempt, 0.0).as_secs());
        assert_eq!(waits(Retry::fixed(s(5))), [5, 5, 5, 5, 5]);
        assert_eq!(waits(Retry::linear(s(2), s(7))), [2, 4, 6, 7, 7]);
        assert_eq!(waits(Retry::exponential(s(1), s(6))), [1, 2, 4, 6, 6]);
        assert_eq!(Retry::fixed(s(4)).wait(1, 1.0), s(5));
    }
}
