//! Spans as one says them.

use std::time::Duration;

/// Spans of time, for [`Kit::advance`](crate::Kit::advance): `1.hours()`.
///
/// ```
/// use std::time::Duration;
///
/// use postbox_testkit::Span;
///
/// assert_eq!(90.minutes(), Duration::from_secs(90 * 60));
/// assert_eq!(1.days() + 1.hours(), 25.hours());
/// ```
pub trait Span {
    /// So many milliseconds.
    fn milliseconds(self) -> Duration;
    /// So many seconds.
    fn seconds(self) -> Duration;
    /// So many minutes.
    fn minutes(self) -> Duration;
    /// So many hours.
    fn hours(self) -> Duration;
    /// So many times 24 hours.
    fn days(self) -> Duration;
}

// For one type, so that a number without a type is of that.
impl Span for u64 {
    fn milliseconds(self) -> Duration {
        Duration::from_millis(self)
    }

    fn seconds(self) -> Duration {
        Duration::from_secs(self)
    }

    fn minutes(self) -> Duration {
        Duration::from_secs(self.saturating_mul(60))
    }

    fn hours(self) -> Duration {
        Duration::from_secs(self.saturating_mul(3600))
    }

    fn days(self) -> Duration {
        Duration::from_secs(self.saturating_mul(24 * 3600))
    }
}
