//! The register of recurring messages, from which dispatchers fire.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgConnection, Row};

use super::schedule::Fired;
use super::schedule::{Missed, Schedule};
use crate::error::{CronError, Result};
use crate::instant::MaybeTimestamptz;
use crate::outgoing::{Outgoing, When};
use crate::publish::interval;
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

    /// Registers it, or changes the one of that name; takes effect when the transaction commits. Returns its next due time.
    ///
    /// Registering what is there already changes nothing: it keeps its next due time and stays paused if it is. A changed expression or time zone
    /// counts from now. It begins with the first due time after now.
    ///
    /// # Errors
    ///
    /// A name that is not allowed, a message that is refused, or one with an option that a schedule cannot have; the database's.
    pub async fn register(self, connection: &mut PgConnection) -> Result<Option<DateTime<Utc>>> {
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
        let next_at = next(&mut *connection, &self.name, &self.schedule).await?;
        Ok(sqlx::query_scalar(REGISTER)
            .bind(&self.name)
            .bind(self.schedule.expression())
            .bind(self.schedule.time_zone())
            .bind(self.missed.as_str())
            .bind(message.topic.as_ref())
            .bind(message.message_type.as_deref())
            .bind(message.key.as_deref())
            .bind(message.headers)
            .bind(message.content_type.as_deref())
            .bind(message.payload)
            .bind(message.expiry.and_then(When::span).map(interval))
            .bind(next_at)
            .fetch_one(connection)
            .await?)
    }
}

/// The first due time after now that has not fired: each fires once, even if the clock is set back in between.
async fn next(
    connection: &mut PgConnection,
    name: &str,
    schedule: &Schedule,
) -> Result<Option<DateTime<Utc>>> {
    let (now, from, to) = sqlx::query_as(FIRED).bind(name).fetch_one(connection).await?;
    Ok(schedule.unfired_after(now, &Fired::new(from, to)))
}

const FIRED: &str = "SELECT postbox.clock(), coalesce(array_agg(lower(f.span)) FILTER (WHERE f.span IS NOT NULL), '{}'), \
         coalesce(array_agg(upper(f.span)) FILTER (WHERE f.span IS NOT NULL), '{}') \
     FROM (SELECT) AS one LEFT JOIN postbox.cron c ON c.name = $1 LEFT JOIN LATERAL unnest(c.fired) AS f (span) ON true";

/// What is the same is not written, so that a restart of many consumers is none of many updates.
const REGISTER: &str = "WITH given AS ( \
         INSERT INTO postbox.cron AS c (name, schedule, time_zone, missed, topic, type, key, headers, content_type, payload, \
             expires_in, next_at) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) \
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
     SELECT next_at FROM given UNION ALL SELECT c.next_at FROM postbox.cron c WHERE c.name = $1 LIMIT 1";

/// A schedule as it is registered.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Registered {
    /// Its name.
    pub name: String,
    /// Cron expression.
    pub schedule: String,
    /// IANA time zone.
    pub time_zone: String,
    /// What becomes of missed due times: `skip`, `once` or `all`.
    pub missed: String,
    /// Whether it does not fire.
    pub paused: bool,
    /// Topic of its messages.
    pub topic: String,
    /// Their message type.
    pub message_type: Option<String>,
    /// Their key.
    pub key: Option<String>,
    /// The next due time.
    pub next_at: Option<DateTime<Utc>>,
    /// The due time of the last firing.
    pub last_at: Option<DateTime<Utc>>,
}

const LIST: &str = "SELECT name, schedule, time_zone, missed, paused, topic, type, key, next_at, last_at FROM postbox.cron \
     WHERE name = coalesce($1, name) ORDER BY name";

async fn read_register(connection: &mut PgConnection, name: Option<&str>) -> Result<Vec<Registered>> {
    let rows = sqlx::query(LIST).bind(name).fetch_all(connection).await?;
    rows.iter()
        .map(|row| {
            Ok(Registered {
                name: row.try_get(0)?,
                schedule: row.try_get(1)?,
                time_zone: row.try_get(2)?,
                missed: row.try_get(3)?,
                paused: row.try_get(4)?,
                topic: row.try_get(5)?,
                message_type: row.try_get(6)?,
                key: row.try_get(7)?,
                next_at: row.try_get::<MaybeTimestamptz, _>(8)?.0,
                last_at: row.try_get::<MaybeTimestamptz, _>(9)?.0,
            })
        })
        .collect()
}

/// All schedules, by name.
///
/// # Errors
///
/// The database's.
pub async fn list(connection: &mut PgConnection) -> Result<Vec<Registered>> {
    read_register(connection, None).await
}

/// The schedule of this name.
///
/// # Errors
///
/// The database's.
pub async fn find(connection: &mut PgConnection, name: &str) -> Result<Option<Registered>> {
    Ok(read_register(connection, Some(name)).await?.pop())
}

/// Stops a schedule from firing, from the commit on. `false`: there is none of that name.
///
/// # Errors
///
/// The database's.
pub async fn pause(connection: &mut PgConnection, name: &str) -> Result<bool> {
    let paused = sqlx::query("UPDATE postbox.cron SET paused = true WHERE name = $1")
        .bind(name)
        .execute(connection)
        .await?;
    Ok(paused.rows_affected() > 0)
}

/// Lets a paused schedule fire again, beginning with the first due time after now: what was due while it was paused is not made up for.
/// `false`: there is none of that name.
///
/// # Errors
///
/// The database's; a schedule that is stored and cannot be read.
pub async fn resume(connection: &mut PgConnection, name: &str) -> Result<bool> {
    loop {
        let Some(found) = find(connection, name).await? else {
            return Ok(false);
        };
        let schedule = Schedule::parse(&found.schedule, &found.time_zone)?;
        let next_at = next(&mut *connection, name, &schedule).await?;
        let resumed = sqlx::query(RESUME)
            .bind(name)
            .bind(&found.schedule)
            .bind(&found.time_zone)
            .bind(next_at)
            .execute(&mut *connection)
            .await?;
        if resumed.rows_affected() > 0 {
            return Ok(true);
        }
        // It was changed in between: with what it is now.
    }
}

/// One that is not paused keeps its next due time.
const RESUME: &str = "UPDATE postbox.cron SET next_at = CASE WHEN paused THEN $4 ELSE next_at END, \
         computed_at = CASE WHEN paused THEN postbox.clock() ELSE computed_at END, paused = false \
     WHERE name = $1 AND schedule = $2 AND time_zone = $3";

/// Removes a schedule; messages that it published stay. `false`: there was none of that name.
///
/// # Errors
///
/// The database's.
pub async fn remove(connection: &mut PgConnection, name: &str) -> Result<bool> {
    let removed = sqlx::query("DELETE FROM postbox.cron WHERE name = $1")
        .bind(name)
        .execute(connection)
        .await?;
    Ok(removed.rows_affected() > 0)
}
