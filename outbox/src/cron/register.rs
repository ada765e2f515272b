//! Recurring messages, as they are registered.

use chrono::{DateTime, Utc};

use super::schedule::{Fired, Missed, Schedule};
use crate::error::{CronError, DatabaseError, Error, Result};
use crate::outgoing::{Outgoing, Valid, When};
use crate::rules::is_name;

/// A recurring message, to be registered under a name.
#[derive(Debug)]
#[must_use = "it does nothing until it is registered"]
pub struct Cron {
    name: String,
    schedule: Schedule,
    missed: Missed,
    message: Outgoing,
}

impl Cron {
    /// The message that is published at each due time of the schedule. Of what can be said about publishing, `expires_in` counts from each
    /// firing; `deliver_at`, `delay`, `expires_at`, `dedup_key` and `ordered` are refused.
    pub fn new(name: impl Into<String>, schedule: Schedule, message: impl Into<Outgoing>) -> Self {
        Self {
            name: name.into(),
            schedule,
            missed: Missed::default(),
            message: message.into(),
        }
    }

    /// What becomes of missed due times (default: [`Missed::Once`]).
    pub fn missed(mut self, missed: Missed) -> Self {
        self.missed = missed;
        self
    }

    pub(crate) fn validate(self) -> Result<ValidCron> {
        if !is_name(&self.name) {
            return Err(CronError::Name(self.name).into());
        }
        let message = self.message.validate()?;
        let refused = match (&message.due, &message.expiry) {
            (Some(_), _) => Some("deliver_at or delay"),
            (_, Some(When::At(_))) => Some("expires_at"),
            _ if message.dedup.is_some() => Some("dedup_key"),
            _ if message.ordered => Some("ordered"),
            _ => None,
        };
        if let Some(option) = refused {
            return Err(CronError::Option(option).into());
        }
        Ok(ValidCron {
            name: self.name,
            schedule: self.schedule,
            missed: self.missed,
            message,
        })
    }
}

/// A [`Cron`] that can be registered.
pub(crate) struct ValidCron {
    pub(crate) name: String,
    pub(crate) schedule: Schedule,
    pub(crate) missed: Missed,
    pub(crate) message: Valid,
}

/// The first due time after now that has not fired: each fires once, even if the clock is set back in between. From the rows of [`FIRED`].
pub(crate) fn next(fired: &[Option<String>], schedule: &Schedule) -> Result<Option<DateTime<Utc>>> {
    let mut times = fired.iter().map(|time| instant_of(time.as_deref()));
    let now = times.next().unwrap_or_else(|| instant_of(None))?;
    let ends = times.collect::<Result<Vec<_>>>()?;
    let (from, to) = ends.chunks_exact(2).map(|span| (span[0], span[1])).unzip();
    Ok(schedule.unfired_after(now, &Fired::new(from, to)))
}

/// An instant that the server gives as microseconds since 1970.
pub(crate) fn instant_of(micros: Option<&str>) -> Result<DateTime<Utc>> {
    (micros.and_then(|micros| micros.parse().ok()))
        .and_then(DateTime::from_timestamp_micros)
        .ok_or_else(|| {
            Error::Database(DatabaseError::answer(&format!(
                "{micros:?} where microseconds were to come"
            )))
        })
}

/// Now, and then the first and last due time of each span that has fired; in microseconds since 1970.
pub(crate) const FIRED: &str = "SELECT (EXTRACT(epoch FROM t.at) * 1000000)::bigint::text AS answer FROM ( \
         SELECT 0 AS n, postbox.clock() AS at \
         UNION ALL SELECT 2 * f.n - 1 + e.n, CASE e.n WHEN 0 THEN lower(f.span) ELSE upper(f.span) END \
         FROM postbox.cron c CROSS JOIN unnest(c.fired) WITH ORDINALITY AS f (span, n) CROSS JOIN generate_series(0, 1) AS e (n) \
         WHERE c.name = $1::text AND f.span IS NOT NULL \
     ) AS t ORDER BY t.n";
