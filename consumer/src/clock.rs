//! The database's clock, as far as this process knows it: what expires, expires by it.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

/// A later time that is off by less is the clocks' drift, not a clock that was moved.
const MOVED: Duration = Duration::from_secs(1);

/// How far the database's clock is ahead of this process's.
#[derive(Debug, Default)]
pub(crate) struct DatabaseClock {
    ahead_us: AtomicI64,
}

impl DatabaseClock {
    pub(crate) fn now(&self) -> DateTime<Utc> {
        Utc::now() + TimeDelta::microseconds(self.ahead_us.load(Ordering::Relaxed))
    }

    /// What the database just said; returns by how much its clock was moved forward since the last time, if it was.
    pub(crate) fn learn(&self, now: DateTime<Utc>) -> Option<Duration> {
        let ahead = (now - Utc::now()).num_microseconds().unwrap_or(0);
        let before = self.ahead_us.swap(ahead, Ordering::Relaxed);
        let moved = Duration::from_micros(u64::try_from(ahead - before).unwrap_or(0));
        (moved >= MOVED).then_some(moved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_moved_is_followed_and_drift_is_no_move() {
        let clock = DatabaseClock::default();
        assert_eq!(clock.learn(Utc::now() + TimeDelta::milliseconds(300)), None);
        let moved = clock.learn(Utc::now() + TimeDelta::seconds(3600));
        assert!(moved.is_some_and(|span| span > Duration::from_secs(3598)));
        assert!(clock.now() > Utc::now() + TimeDelta::seconds(3598));
        assert_eq!(clock.learn(Utc::now()), None, "backwards");
    }
}
