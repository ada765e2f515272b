//! When a failed message runs again, and when it is given up.

use std::time::Duration;

/// How long to wait before each further attempt, how many attempts there are, and what becomes of the key when they are exhausted.
///
/// The default is exponential from 1 s to 10 min, 16 attempts (about an hour and a half), then the message goes to the dead letters and its key
/// goes on. A broadcast from memory has nowhere to put what it gives up, so there the attempts have no end. Every wait is lengthened by up to a quarter at random, so that messages that failed together do not come back
/// together; it is never shortened.
///
/// ```
/// use std::time::Duration;
/// use postbox_consumer::{Exhausted, Retry};
///
/// let retry = Retry::exponential(Duration::from_secs(1), Duration::from_secs(60))
///     .max_attempts(8)
///     .max_age(Duration::from_secs(3600))
///     .exhausted(Exhausted::Halt);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    backoff: Backoff,
    max_attempts: Option<u32>,
    max_age: Option<Duration>,
    exhausted: Exhausted,
}

/// What becomes of a key whose message exhausted its attempts. The message is among the dead letters in both cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exhausted {
    /// The next messages of the key run.
    #[default]
    Skip,
    /// The key waits until an operator redrives, discards or releases the dead letter (`postbox dead-letters`). With [`MessageOrder::Topic`](crate::MessageOrder::Topic)
    /// the group waits with the whole topic.
    Halt,
}

/// Attempts unless a policy says otherwise.
pub const DEFAULT_MAX_ATTEMPTS: u32 = 16;

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

/// Waits beyond get no more jitter.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

impl Retry {
    const fn new(backoff: Backoff) -> Self {
        Self {
            backoff,
            max_attempts: Some(DEFAULT_MAX_ATTEMPTS),
            max_age: None,
            exhausted: Exhausted::Skip,
        }
    }

    /// The same wait before each attempt.
    pub const fn fixed(wait: Duration) -> Self {
        Self::new(Backoff::Fixed(wait))
    }

    /// `step`, 2 × `step`, 3 × `step`, … up to `cap`.
    pub const fn linear(step: Duration, cap: Duration) -> Self {
        Self::new(Backoff::Linear { step, cap })
    }

    /// `first`, 2 × `first`, 4 × `first`, … up to `cap`.
    pub const fn exponential(first: Duration, cap: Duration) -> Self {
        Self::new(Backoff::Exponential { first, cap })
    }

    /// So many attempts in all, the first included (default 16, at least 1).
    pub const fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(if attempts == 0 { 1 } else { attempts });
        self
    }

    /// Attempts without end.
    pub const fn unlimited(mut self) -> Self {
        self.max_attempts = None;
        self
    }

    /// No further attempt when the first failure is longer ago than this (default: no limit).
    pub const fn max_age(mut self, age: Duration) -> Self {
        self.max_age = Some(age);
        self
    }

    /// What becomes of the key when the attempts are exhausted (default [`Exhausted::Skip`]).
    pub const fn exhausted(mut self, exhausted: Exhausted) -> Self {
        self.exhausted = exhausted;
        self
    }

    /// Why there is no further attempt, after the attempt of this number failed so long after the first failure.
    pub(crate) fn gives_up(&self, attempt: u32, failing_for: Duration) -> Option<String> {
        if self.max_attempts.is_some_and(|most| attempt >= most) {
            return Some(format!("failed {attempt} times"));
        }
        let age = self.max_age.filter(|age| failing_for >= *age)?;
        Some(format!("failing for longer than {age:?}"))
    }

    pub(crate) fn halts(&self) -> bool {
        self.exhausted == Exhausted::Halt
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
        // Far below what a multiplication cannot hold.
        let jitter = wait.min(LONGEST).mul_f64(0.25 * chance.clamp(0.0, 1.0));
        wait.saturating_add(jitter)
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

    #[test]
    fn attempts_and_age_are_limited() {
        let retry = Retry::fixed(Duration::from_secs(1)).max_attempts(3);
        assert_eq!(retry.gives_up(2, Duration::from_secs(9)), None);
        assert!(retry.gives_up(3, Duration::ZERO).is_some());
        assert_eq!(retry.unlimited().gives_up(u32::MAX, Duration::MAX), None);
        let aged = retry.unlimited().max_age(Duration::from_secs(60));
        assert_eq!(aged.gives_up(1, Duration::from_secs(59)), None);
        assert!(aged.gives_up(1, Duration::from_secs(60)).is_some());
    }
}
