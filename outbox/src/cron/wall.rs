//! Where clocks change: which instants a time on a zone's wall clock is.

use chrono::{DateTime, LocalResult, NaiveDateTime, TimeDelta, TimeZone, Utc};
use chrono_tz::{GapInfo, Tz};

/// When the clocks of a zone show a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    Once(DateTime<Utc>),
    /// They go back over it.
    Twice(DateTime<Utc>, DateTime<Utc>),
    /// They go forward over it, at this instant.
    Never(DateTime<Utc>),
}

impl Shown {
    /// When they first show this time or a later one.
    pub(crate) fn first(self) -> DateTime<Utc> {
        match self {
            Shown::Once(at) | Shown::Twice(at, _) | Shown::Never(at) => at,
        }
    }
}

/// When a zone's clocks show a time. `None`: outside of what can be computed with.
pub(crate) fn shown(zone: Tz, wall: NaiveDateTime) -> Option<Shown> {
    match zone.from_local_datetime(&wall) {
        LocalResult::Single(at) => Some(Shown::Once(at.to_utc())),
        LocalResult::Ambiguous(earlier, later) => Some(Shown::Twice(earlier.to_utc(), later.to_utc())),
        LocalResult::None => {
            let (begin, offset) = GapInfo::new(&wall, &zone)?.begin?;
            let offset = chrono::Offset::fix(&offset).local_minus_utc();
            let begin = begin.checked_sub_signed(TimeDelta::seconds(offset.into()))?;
            Some(Shown::Never(begin.and_utc()))
        }
    }
}

/// What a zone's clocks show at an instant.
pub(crate) fn wall(zone: Tz, at: DateTime<Utc>) -> NaiveDateTime {
    at.with_timezone(&zone).naive_local()
}
