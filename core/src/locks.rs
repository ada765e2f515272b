//! Who holds a lock that Postbox needs, and the statement that ends it.

use std::time::{Duration, Instant};

use serde::Serialize;
use sqlx::postgres::types::PgInterval;
use sqlx::{FromRow, PgExecutor};
use tracing::warn;

use crate::link::in_time;

/// Somebody who has held a lock that Postbox needs for long.
#[derive(Debug, Clone, PartialEq, Serialize, FromRow)]
#[non_exhaustive]
pub struct LockHolder {
    /// The lock: `advisory lock (1347571761, 1)`, or the table.
    pub lock: String,
    /// The server's process; `None`: a prepared transaction.
    pub pid: Option<i32>,
    /// Role, application and address.
    pub who: String,
    /// What its session does: `idle`, `active`, `prepared`, …
    pub state: String,
    /// For how long it has held it, in seconds, at least.
    pub held_seconds: f64,
    /// How many wait for it.
    pub waiting: i64,
    /// What comes of it.
    pub consequence: String,
    /// The statement that ends it.
    pub hint: String,
}

const HOLDERS: &str = "SELECT lock, pid, who, state, extract(epoch FROM held_for)::float8 AS held_seconds, waiting, consequence, hint \
     FROM postbox.lock_holders($1)";

/// Those who have held theirs for longer than that.
///
/// # Errors
/// What the database reports.
pub async fn holders(
    connection: impl PgExecutor<'_>,
    for_longer_than: Duration,
) -> Result<Vec<LockHolder>, sqlx::Error> {
    let span = PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(for_longer_than.as_micros()).unwrap_or(i64::MAX),
    };
    sqlx::query_as(HOLDERS).bind(span).fetch_all(connection).await
}

/// Says in the log who is in the way; the same not more often than every ten seconds.
#[derive(Debug, Default)]
pub struct Complaints {
    last: Option<Instant>,
}

const AGAIN_AFTER: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(3);

impl Complaints {
    /// After a lock was not had in time, by `waiting`.
    ///
    /// # Errors
    /// The connection is lost.
    pub async fn complain(
        &mut self,
        waiting: &str,
        connection: impl PgExecutor<'_>,
    ) -> Result<(), sqlx::Error> {
        if self.last.is_some_and(|last| last.elapsed() < AGAIN_AFTER) {
            return Ok(());
        }
        self.last = Some(Instant::now());
        let holders = holders(connection, Duration::ZERO);
        let holders = in_time(TIMEOUT, "who holds a lock", holders).await?;
        if holders.is_empty() {
            warn!(waiting, "a lock was not had in time; trying again");
        }
        for holder in holders {
            warn!(
                waiting,
                lock = holder.lock,
                pid = holder.pid,
                who = holder.who,
                state = holder.state,
                consequence = holder.consequence,
                hint = holder.hint,
                "a lock that Postbox needs is held by somebody else"
            );
        }
        Ok(())
    }
}
