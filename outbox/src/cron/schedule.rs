//! Schedules: a cron expression in a time zone, and the instants at which it is due.

mod fired;

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, TimeDelta, Utc};
use chrono_tz::Tz;
use serde::{Deserialize, Serialize};

pub use self::fired::Fired;
use super::expression::{Expression, Kind};
use super::wall::{Shown, shown, wall};
use crate::error::CronError;

/// A due time that is at most so old was not missed, only a little late.
const GRACE: TimeDelta = TimeDelta::minutes(1);
/// Most missed due times that are made up for by [`Missed::All`].
pub const MAX_MISSED: usize = 1_000;

/// A cron expression in a time zone.
#[derive(Clone)]
pub struct Schedule {
    expression: Expression,
    zone: Tz,
}

impl Schedule {
    /// Reads a cron expression and the name of an IANA time zone.
    ///
    /// ```
    /// use postbox::cron::Schedule;
    ///
    /// let error = Schedule::parse("0 25 * * *", "UTC").unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "cron expression \"0 25 * * *\", column 3: \"25\" is no hour (0 to 23, with * , - /)"
    /// );
    /// ```
    ///
    /// # Errors
    ///
    /// [`CronError`]: where the expression is wrong, or that there is no such time zone.
    pub fn parse(expression: &str, time_zone: &str) -> Result<Self, CronError> {
        let zone = Tz::from_str(time_zone).map_err(|_| CronError::TimeZone(time_zone.to_owned()))?;
        let schedule = Self {
            expression: Expression::parse(expression)?,
            zone,
        };
        match schedule.after(DateTime::UNIX_EPOCH) {
            Some(_) => Ok(schedule),
            None => Err(CronError::Never(schedule.expression().to_owned())),
        }
    }

    /// The cron expression.
    pub fn expression(&self) -> &str {
        self.expression.as_str()
    }

    /// The name of the time zone.
    pub fn time_zone(&self) -> &'static str {
        self.zone.name()
    }

    /// The first due time after an instant.
    pub fn after(&self, instant: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self.expression.kind() {
            Kind::TimesOfDay => self.time_of_day_after(instant),
            Kind::Rhythm => self.beat_after(instant),
        }
    }

    /// Each time of the day is due when the clocks first show it or a later one. That never decreases from one time to the next, so the first that is
    /// after the instant is the answer; those that the clocks show once more are passed.
    fn time_of_day_after(&self, instant: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let mut time = wall(self.zone, instant);
        loop {
            time = self.expression.after(time)?;
            let due = shown(self.zone, time)?.first();
            if due > instant {
                return Some(due);
            }
        }
    }

    /// A rhythm is due whenever the clocks show one of its times.
    fn beat_after(&self, instant: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let start = wall(self.zone, instant);
        let mut time = start;
        let forward = loop {
            time = self.expression.after(time)?;
            match shown(self.zone, time)? {
                // The clocks have not gone back yet, so what they show again is later.
                Shown::Twice(first, _) if first > instant => return Some(first),
                Shown::Once(at) | Shown::Twice(_, at) if at > instant => break at,
                Shown::Once(_) | Shown::Twice(..) => {}
                // On to what they show then.
                Shown::Never(end) => time = wall(self.zone, end) - TimeDelta::seconds(1),
            }
        };
        // Before they go back, there may be times to come that they have shown already.
        if let Some(Shown::Twice(first, second)) = shown(self.zone, start)
            && instant < second
        {
            let mut time = start - (second - first);
            while let Some(again) = self.expression.after(time).filter(|again| *again <= start) {
                if let Some(Shown::Twice(_, at)) = shown(self.zone, again) {
                    return Some(at.min(forward));
                }
                time = again;
            }
        }
        Some(forward)
    }

    /// The due times after an instant, one after another.
    pub fn upcoming(&self, after: DateTime<Utc>) -> impl Iterator<Item = DateTime<Utc>> {
        std::iter::successors(self.after(after), |due| self.after(*due))
    }

    /// The first due time after an instant that has not fired.
    pub fn unfired_after(&self, instant: DateTime<Utc>, fired: &Fired) -> Option<DateTime<Utc>> {
        let mut due = self.after(instant)?;
        while let Some(until) = fired.until(due) {
            due = self.after(until)?;
        }
        Some(due)
    }

    /// An instant as a clock in the schedule's time zone shows it, with its offset.
    pub fn local(&self, instant: DateTime<Utc>) -> String {
        instant
            .with_timezone(&self.zone)
            .format("%Y-%m-%d %H:%M:%S %z")
            .to_string()
    }

    /// Which of the due times from `first` to `now` fire, by the policy, without those that have fired; `first` is a due time.
    pub fn firings(
        &self,
        first: DateTime<Utc>,
        now: DateTime<Utc>,
        missed: Missed,
        fired: &Fired,
    ) -> Vec<DateTime<Utc>> {
        let mut due = self.latest(first, now, MAX_MISSED, fired);
        let recent = due.partition_point(|at| *at < now - GRACE);
        match missed {
            Missed::All => {}
            Missed::Skip => drop(due.drain(..recent)),
            Missed::Once if recent > 0 => drop(due.drain(..due.len() - 1)),
            Missed::Once => {}
        }
        due
    }

    /// The latest due times from `first` to `now`, at most `most`, in order. Searched in growing spans before `now`, so that it takes no longer
    /// after a year than after an hour.
    fn latest(
        &self,
        first: DateTime<Utc>,
        now: DateTime<Utc>,
        most: usize,
        fired: &Fired,
    ) -> Vec<DateTime<Utc>> {
        let spans = [1, 60, 24 * 60, 32 * 24 * 60, 367 * 24 * 60].map(TimeDelta::minutes);
        let starts = spans
            .map(|span| now - span)
            .into_iter()
            .filter(|start| *start > first);
        for start in starts.chain([first]) {
            // `first` itself: the rules of its zone may have changed since it was computed.
            let begin = (start == first && fired.until(first).is_none()).then_some(first);
            let mut due = VecDeque::new();
            let upcoming = std::iter::successors(self.unfired_after(start, fired), |due| {
                self.unfired_after(*due, fired)
            });
            let upcoming = begin.into_iter().chain(upcoming);
            for at in upcoming.take_while(|at| *at <= now) {
                if due.len() == most {
                    due.pop_front();
                }
                due.push_back(at);
            }
            if due.len() == most || start == first {
                return due.into();
            }
        }
        Vec::new()
    }
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in {}", self.expression(), self.zone.name())
    }
}

/// What becomes of due times that passed while no dispatcher ran. One that is at most a minute old is not missed, and always fires.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Missed {
    /// They do not fire.
    Skip,
    /// The latest one fires, for all of them.
    #[default]
    Once,
    /// Each fires, in order; of more than 1,000 the latest 1,000.
    All,
}

impl Missed {
    /// As it is stored and written: `skip`, `once` or `all`.
    pub fn as_str(self) -> &'static str {
        match self {
            Missed::Skip => "skip",
            Missed::Once => "once",
            Missed::All => "all",
        }
    }
}

impl FromStr for Missed {
    type Err = CronError;

    fn from_str(text: &str) -> Result<Self, CronError> {
        match text {
            "skip" => Ok(Missed::Skip),
            "once" => Ok(Missed::Once),
            "all" => Ok(Missed::All),
            other => Err(CronError::Missed(other.to_owned())),
        }
    }
}
