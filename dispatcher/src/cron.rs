//! Firing cron schedules at their due times.

use std::collections::HashSet;
use std::time::Duration;

use chrono::{DateTime, Utc};
use postbox::cron::{CronError, Fired, Missed, Schedule};
use postbox::{MaybeTimestamptz, Timestamptz};
use postbox_core::link::in_time;
use sqlx::postgres::PgListener;
use tracing::{info, warn};

const TIMEOUT: Duration = Duration::from_secs(30);

/// What a clock computed that was ahead of what it is now, then what is due, the longest due first, and one row for the next that is not.
const DUE: &str = "SELECT c.name, c.schedule, c.time_zone, c.missed, c.next_at, c.computed_at, n.now, \
         ARRAY(SELECT lower(f.span) FROM unnest(c.fired) AS f (span)) AS fired_from, \
         ARRAY(SELECT upper(f.span) FROM unnest(c.fired) AS f (span)) AS fired_to \
     FROM postbox.cron c, (SELECT postbox.clock() AS now OFFSET 0) n \
     WHERE NOT c.paused AND (c.next_at IS NOT NULL OR c.computed_at > n.now) \
     ORDER BY c.computed_at > n.now DESC, c.next_at LIMIT 100";

/// Compares next_at with what was read and moves it on, in the transaction that publishes, so that a due time fires once.
const FIRE: &str = "SELECT postbox.fire($1, $2, $3, $4, $5, $6, $7, $8)";

/// Unless it has fired or was changed meanwhile.
const SET_RIGHT: &str = "UPDATE postbox.cron SET next_at = $5, computed_at = $6 \
     WHERE name = $1 AND schedule = $2 AND time_zone = $3 AND next_at IS NOT DISTINCT FROM $4 AND computed_at > $6";

#[derive(sqlx::FromRow)]
struct Row {
    name: String,
    schedule: String,
    time_zone: String,
    missed: String,
    #[sqlx(try_from = "MaybeTimestamptz")]
    next_at: Option<DateTime<Utc>>,
    #[sqlx(try_from = "Timestamptz")]
    computed_at: DateTime<Utc>,
    now: DateTime<Utc>,
    fired_from: Vec<DateTime<Utc>>,
    fired_to: Vec<DateTime<Utc>>,
}

#[derive(Default)]
pub(crate) struct Crons {
    /// Which were told of as not understood.
    told: HashSet<String>,
}

impl Crons {
    /// Fires what is due; returns how many firings that were, and when the next is due.
    pub(crate) async fn step(
        &mut self,
        connection: &mut PgListener,
    ) -> Result<(u64, Option<Duration>), sqlx::Error> {
        let mut fired = 0;
        let mut has_moved = false;
        let rows: Vec<Row> = in_time(
            TIMEOUT,
            "due schedules",
            sqlx::query_as(DUE).fetch_all(&mut *connection),
        )
        .await?;
        for row in rows {
            let is_due = row.next_at.is_some_and(|next_at| next_at <= row.now);
            let was_ahead = row.computed_at > row.now;
            if !is_due && !was_ahead {
                let next = row.next_at.and_then(|next_at| (next_at - row.now).to_std().ok());
                return Ok((fired, if has_moved { Some(Duration::ZERO) } else { next }));
            }
            let (schedule, missed) = match row.read() {
                Ok(read) => read,
                Err(error) => {
                    // By a newer version, or by hand. The others go on.
                    if self.told.insert(row.name.clone()) {
                        warn!(cron = row.name, %error, "cannot fire; register it again or remove it");
                    }
                    continue;
                }
            };
            match row.next_at {
                Some(next_at) if is_due => {
                    let firings = match fire(connection, &row, next_at, &schedule, missed).await {
                        // What it would publish cannot be published. The others go on.
                        Err(error) if error.as_database_error().is_some() => {
                            if self.told.insert(row.name.clone()) {
                                warn!(cron = row.name, %error, "cannot fire; register it again or remove it");
                            }
                            continue;
                        }
                        firings => firings?,
                    };
                    fired += firings.unwrap_or_default();
                    has_moved |= firings.is_some();
                }
                _ => has_moved |= set_right(connection, &row, &schedule).await?,
            }
            self.told.remove(&row.name);
        }
        // Each moved on, so there may be more; otherwise there is none at all.
        Ok((fired, has_moved.then_some(Duration::ZERO)))
    }
}

/// How many due times fired; `None`: another dispatcher was first.
async fn fire(
    connection: &mut PgListener,
    row: &Row,
    next_at: DateTime<Utc>,
    schedule: &Schedule,
    missed: Missed,
) -> Result<Option<u64>, sqlx::Error> {
    let firings = schedule.firings(next_at, row.now, missed, &row.fired());
    let fired = row.fired().and(schedule, &firings);
    let following = schedule.unfired_after(row.now, &fired);
    let (fired_from, fired_to) = fired.into_parts();
    let fire = sqlx::query_scalar(FIRE)
        .bind(&row.name)
        .bind(&row.schedule)
        .bind(&row.time_zone)
        .bind(next_at)
        .bind(&firings)
        .bind(following)
        .bind(fired_from)
        .bind(fired_to)
        .fetch_one(&mut *connection);
    if !in_time(TIMEOUT, "firing a schedule", fire).await? {
        return Ok(None);
    }
    let late = (row.now - next_at).num_seconds();
    if late > 60 {
        info!(
            cron = row.name,
            late_s = late,
            missed = row.missed,
            firings = firings.len(),
            "fired late"
        );
    }
    Ok(Some(firings.len() as u64))
}

/// The clock was ahead when the next due time was computed, so due times may have been passed over that are to come.
async fn set_right(connection: &mut PgListener, row: &Row, schedule: &Schedule) -> Result<bool, sqlx::Error> {
    let next_at = schedule.unfired_after(row.now, &row.fired());
    let set = sqlx::query(SET_RIGHT)
        .bind(&row.name)
        .bind(&row.schedule)
        .bind(&row.time_zone)
        .bind(row.next_at)
        .bind(next_at)
        .bind(row.now)
        .execute(&mut *connection);
    let is_set = in_time(TIMEOUT, "setting a schedule right", set)
        .await?
        .rows_affected()
        > 0;
    if is_set && next_at != row.next_at {
        warn!(
            cron = row.name,
            clock_was_ahead_s = (row.computed_at - row.now).num_seconds(),
            next = next_at.map(tracing::field::display),
            "the database's clock was ahead when this schedule's next time was computed, and was set back: it goes on from now"
        );
    }
    Ok(is_set)
}

impl Row {
    fn read(&self) -> Result<(Schedule, Missed), CronError> {
        Ok((
            Schedule::parse(&self.schedule, &self.time_zone)?,
            self.missed.parse()?,
        ))
    }

    fn fired(&self) -> Fired {
        Fired::new(self.fired_from.clone(), self.fired_to.clone())
    }
}
