//! The database's clock, as far as this process knows it: what expires, expires by it.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

/// A later time that is off by less is the clocks' drift, not a clock that was moved.
const MOVED: Duration = Duration::from_secs(1);

/// No wait is longer: an instant that cannot be told is none.
const LONGEST: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

/// So long after an instant, or never in practice: a wait is what a handler says, so it may be anything.
pub(crate) fn later(from: Instant, wait: Duration) -> Instant {
    from + wait.min(LONGEST)
}

/// What the database said last, and the time since then by this process's monotonic clock: how its host's is set does not matter.
#[derive(Debug)]
pub(crate) struct DatabaseClock {
    origin: Instant,
    /// What it said at the origin, in microseconds since 1970.
    at_origin_us: AtomicI64,
    /// By how much it was moved forward since it was read first, as far as that was noticed.
    followed_us: AtomicI64,
    was_read: AtomicBool,
}

/// A clock that a test moves is followed by as little as this.
const LITTLE: Duration = Duration::from_millis(20);

impl Default for DatabaseClock {
    fn default() -> Self {
        Self {
            origin: Instant::now(),
            at_origin_us: AtomicI64::new(Utc::now().timestamp_micros()),
            followed_us: AtomicI64::new(0),
            was_read: AtomicBool::new(false),
        }
    }
}

impl DatabaseClock {
    pub(crate) fn now(&self) -> DateTime<Utc> {
        let us = self
            .at_origin_us
            .load(Ordering::Relaxed)
            .saturating_add(self.elapsed_us());
        DateTime::from_timestamp_micros(us).unwrap_or(DateTime::<Utc>::MAX_UTC)
    }

    /// What the database just said; returns by how much its clock was moved forward since the last time, if it was.
    pub(crate) fn learn(&self, now: DateTime<Utc>) -> Option<Duration> {
        let at_origin = now.timestamp_micros() - self.elapsed_us();
        let before = self.at_origin_us.swap(at_origin, Ordering::Relaxed);
        let moved = Duration::from_micros(u64::try_from(at_origin - before).unwrap_or(0));
        // What it was before the first time was a guess.
        let was_read = self.was_read.swap(true, Ordering::Relaxed);
        if moved < MOVED || !was_read {
            return None;
        }
        self.followed_us.fetch_add(at_origin - before, Ordering::Relaxed);
        Some(moved)
    }

    /// A test has moved it by so much in all since this process asked it first: what of that was not noticed, since it came in small steps.
    pub(crate) fn catch_up(&self, moved: Duration) -> Option<Duration> {
        let moved_us = i64::try_from(moved.as_micros()).unwrap_or(i64::MAX);
        let followed_us = self.followed_us.load(Ordering::Relaxed);
        let missing = Duration::from_micros(u64::try_from(moved_us.saturating_sub(followed_us)).unwrap_or(0));
        if missing < LITTLE {
            return None;
        }
        self.followed_us.store(moved_us, Ordering::Relaxed);
        Some(missing)
    }

    fn elapsed_us(&self) -> i64 {
        i64::try_from(self.origin.elapsed().as_micros()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    #[test]
    fn a_clock_that_is_moved_is_followed_and_drift_is_no_move() {
        let clock = DatabaseClock::default();
        assert_eq!(clock.learn(Utc::now() + TimeDelta::milliseconds(300)), None);
        let moved = clock.learn(Utc::now() + TimeDelta::seconds(3600));
        assert!(moved.is_some_and(|span| span > Duration::from_secs(3598)));
        assert!(clock.now() > Utc::now() + TimeDelta::seconds(3598));
        assert_eq!(clock.catch_up(Duration::from_secs(3590)), None, "it was noticed");
        // In steps that are too small to be noticed.
        let caught_up = clock.catch_up(Duration::from_secs(3610));
        assert!(caught_up.is_some_and(|span| span >= Duration::from_secs(9)));
        assert_eq!(clock.catch_up(Duration::from_secs(3610)), None);
        assert_eq!(clock.learn(Utc::now()), None, "backwards");
        assert!(clock.now() < Utc::now() + TimeDelta::seconds(2));
    }
}
