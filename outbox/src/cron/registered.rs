//! The register of recurring messages, from which dispatchers fire.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgConnection, Row};

use super::register::{FIRED, next};
use super::schedule::Schedule;
use crate::error::Result;
use crate::instant::MaybeTimestamptz;

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
        let fired: Vec<Option<String>> = sqlx::query_scalar(FIRED)
            .bind(name)
            .fetch_all(&mut *connection)
            .await?;
        let next_at = next(&fired, &schedule)?;
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
