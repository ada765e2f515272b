//! Registering recurring messages, whatever client does.

use chrono::{DateTime, Utc};
#[cfg(feature = "sqlx")]
use sqlx::PgConnection;

use super::schedule::Fired;
use super::schedule::{Missed, Schedule};
#[cfg(feature = "sqlx")]
use crate::adapters::sqlx::run as sqlx_run;
use crate::error::{CronError, Result};
use crate::outgoing::{Outgoing, Valid, When};
use crate::publish::{Answer, Bind, Query, instant, instant_of, interval, unexpected};
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

    /// Registers it by a statement of its own, outside of a transaction or in one. In a transaction of any client,
    /// [`Publish::register`](crate::Publish::register) does the same.
    ///
    /// Registering what is there already changes nothing: it keeps its next due time and stays paused if it is. A changed expression or time zone
    /// counts from now. It begins with the first due time after now, which is returned.
    ///
    /// # Errors
    ///
    /// A name that is not allowed, a message that is refused, or one with an option that a schedule cannot have; the database's.
    #[cfg(feature = "sqlx")]
    pub async fn register(self, connection: &mut PgConnection) -> Result<Option<DateTime<Utc>>> {
        let valid = self.validate()?;
        let fired = sqlx_run(connection, valid.fired()).await?;
        sqlx_run(connection, valid.register(&fired)?).await?.instant()
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
    name: String,
    schedule: Schedule,
    missed: Missed,
    message: Valid,
}

impl ValidCron {
    /// Asks what of it has fired.
    pub(crate) fn fired(&self) -> Query {
        fired(&self.name)
    }

    /// Registers it, that known.
    pub(crate) fn register(&self, fired: &Answer) -> Result<Query> {
        let message = &self.message;
        let next = next(fired, &self.schedule)?;
        let text = |text: Option<&str>| Bind::Text(text.map(str::to_owned));
        let parameters = vec![
            Bind::Text(Some(self.name.clone())),
            Bind::Text(Some(self.schedule.expression().to_string())),
            Bind::Text(Some(self.schedule.time_zone().to_string())),
            text(Some(self.missed.as_str())),
            text(Some(&message.topic)),
            text(message.message_type.as_deref()),
            text(message.key.as_deref()),
            Bind::Text(message.headers.as_ref().map(ToString::to_string)),
            text(message.content_type.as_deref()),
            Bind::Bytes(message.payload.clone()),
            Bind::Text(message.expiry.and_then(When::span).map(interval)),
            Bind::Text(next.map(instant)),
        ];
        Ok(Query::new(REGISTER, parameters))
    }
}

pub(super) fn fired(name: &str) -> Query {
    Query::new(FIRED, vec![Bind::Text(Some(name.to_owned()))])
}

/// The first due time after now that has not fired: each fires once, even if the clock is set back in between.
pub(super) fn next(fired: &Answer, schedule: &Schedule) -> Result<Option<DateTime<Utc>>> {
    let mut times = fired.0.iter().map(|micros| match micros {
        Some(micros) => instant_of(micros),
        None => Err(unexpected("no time where one was to come".to_owned())),
    });
    let now = times.next().ok_or_else(|| unexpected("no time".to_owned()))??;
    let ends = times.collect::<Result<Vec<_>>>()?;
    let (from, to) = ends.chunks_exact(2).map(|span| (span[0], span[1])).unzip();
    Ok(schedule.unfired_after(now, &Fired::new(from, to)))
}

/// Now, and then the first and last due time of each span that has fired; in microseconds since 1970.
const FIRED: &str = "SELECT (EXTRACT(epoch FROM t.at) * 1000000)::bigint::text AS answer FROM ( \
         SELECT 0 AS n, postbox.clock() AS at \
         UNION ALL SELECT 2 * f.n - 1 + e.n, CASE e.n WHEN 0 THEN lower(f.span) ELSE upper(f.span) END \
         FROM postbox.cron c CROSS JOIN unnest(c.fired) WITH ORDINALITY AS f (span, n) CROSS JOIN generate_series(0, 1) AS e (n) \
         WHERE c.name = $1::text AND f.span IS NOT NULL \
     ) AS t ORDER BY t.n";

/// What is the same is not written, so that a restart of many consumers is none of many updates.
const REGISTER: &str = "WITH given AS ( \
         INSERT INTO postbox.cron AS c (name, schedule, time_zone, missed, topic, type, key, headers, content_type, payload, \
             expires_in, next_at) \
         VALUES ($1::text, $2::text, $3::text, $4::text, $5::text, $6::text, $7::text, $8::text::jsonb, $9::text, $10::bytea, \
             $11::text::interval, $12::text::timestamptz) \
         ON CONFLICT (name) DO UPDATE \
         SET schedule = excluded.schedule, time_zone = excluded.time_zone, missed = excluded.missed, topic = excluded.topic, \
             type = excluded.type, key = excluded.key, headers = excluded.headers, content_type = excluded.content_type, \
             payload = excluded.payload, expires_in = excluded.expires_in, \
             next_at = CASE WHEN (c.schedule, c.time_zone) = (excluded.schedule, excluded.time_zone) THEN c.next_at \
                 ELSE excluded.next_at END, \
             computed_at = CASE WHEN (c.schedule, c.time_zone) = (excluded.schedule, excluded.time_zone) THEN c.computed_at \
                 ELSE excluded.computed_at END \
         WHERE (c.schedule, c.time_zone, c.missed, c.topic, c.type, c.key, c.headers, c.content_type, c.payload, c.expires_in) \
             IS DISTINCT FROM (excluded.schedule, excluded.time_zone, excluded.missed, excluded.topic, excluded.type, excluded.key, \
                 excluded.headers, excluded.content_type, excluded.payload, excluded.expires_in) \
         RETURNING c.next_at \
     ) \
     SELECT CASE WHEN isfinite(next_at) THEN (EXTRACT(epoch FROM next_at) * 1000000)::bigint::text END AS answer \
     FROM (SELECT next_at FROM given UNION ALL SELECT c.next_at FROM postbox.cron c WHERE c.name = $1::text LIMIT 1) AS registered";
