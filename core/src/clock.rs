//! Whether a clock is set: its progress is compared with the monotonic time of this process.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};

/// Less than this is drift, or the clock is being adjusted smoothly.
const TOLERANCE: Duration = Duration::from_secs(1);
/// Of the time between two looks, so much may be drift too.
const DRIFT: u32 = 500;

/// What was read of a clock last.
#[derive(Debug, Default)]
pub struct ClockWatch(Option<Sight>);

#[derive(Debug, Clone, Copy)]
struct Sight {
    now: DateTime<Utc>,
    asked: Instant,
    told: Instant,
}

impl ClockWatch {
    /// What the clock says, when it was asked and when the answer came; by how much it was set since the last time, if it was. (Or this machine
    /// slept, and its monotonic time with it: then it seems set forward.)
    pub fn look(&mut self, now: DateTime<Utc>, asked: Instant, told: Instant) -> Option<TimeDelta> {
        let before = self.0.replace(Sight { now, asked, told })?;
        let least = asked.saturating_duration_since(before.told);
        let most = told.saturating_duration_since(before.asked);
        let tolerance = TOLERANCE + most / DRIFT;
        let passed = now - before.now;
        let least = TimeDelta::from_std(least.saturating_sub(tolerance)).unwrap_or(TimeDelta::MAX);
        let most = TimeDelta::from_std(most + tolerance).unwrap_or(TimeDelta::MAX);
        match passed {
            passed if passed > most => Some(passed - most),
            passed if passed < least => Some(passed - least),
            _ => None,
        }
    }
}

/// A span in words, with its sign.
#[must_use]
pub fn in_words(step: TimeDelta) -> String {
    let seconds = step.num_milliseconds() as f64 / 1_000.0;
    match step < TimeDelta::zero() {
        true => format!("back by {:.1} s", -seconds),
        false => format!("forward by {seconds:.1} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_is_noticed_and_slow_answers_are_no_step() {
        let (start, mut watch) = (Instant::now(), ClockWatch::default());
        let noon = Utc::now();
        let second = Duration::from_secs(1);
        let mut look = |clock: i64, asked: u32, told: u32| {
            let now = noon + TimeDelta::seconds(clock);
            watch.look(now, start + second * asked, start + second * told)
        };
        assert_eq!(look(0, 0, 0), None);
        assert_eq!(look(1, 1, 1), None);
        assert_eq!(look(2, 2, 20), None, "told late");
        assert_eq!(look(21, 21, 21), None);
        assert!(look(3_622, 22, 22).is_some_and(|step| step > TimeDelta::seconds(3_590)));
        assert!(look(23, 23, 23).is_some_and(|step| step < TimeDelta::seconds(-3_590)));
        assert_eq!(look(86_423, 86_423, 86_423), None);
    }
}
