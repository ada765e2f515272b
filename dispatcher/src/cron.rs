//! Firing cron schedules at their due times.

use std::collections::HashSet;
use std::time::Duration;

use chrono::{DateTime, Utc};
use postbox::cron::{CronError, Missed, Schedule};
use postbox_consumer::link::in_time;
use sqlx::postgres::PgListener;
use tracing::{info, warn};

const TIMEOUT: Duration = Duration::from_secs(30);

/// What is due, the longest due first, and one row for the next that is not.
const DUE: &str = "SELECT name, schedule, time_zone, missed, next_at, postbox.clock() AS now FROM postbox.cron \
     WHERE NOT paused AND next_at IS NOT NULL ORDER BY next_at LIMIT 100";

/// Compares next_at with what was read and moves it on, in the transaction that publishes, so that a due time fires once.
const FIRE: &str = "SELECT postbox.fire($1, $2, $3, $4, $5, $6)";

#[derive(sqlx::FromRow)]
struct Row {
    name: String,
    schedule: String,
    time_zone: String,
    missed: String,
    next_at: DateTime<Utc>,
    now: DateTime<Utc>,
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
        let rows: Vec<Row> = in_time(TIMEOUT, sqlx::query_as(DUE).fetch_all(&mut *connection)).await?;
        for row in rows {
            if row.next_at > row.now {
                return Ok((fired, (row.next_at - row.now).to_std().ok()));
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
            self.told.remove(&row.name);
            let firings = schedule.firings(row.next_at, row.now, missed);
            let fire = sqlx::query_scalar(FIRE)
                .bind(&row.name)
                .bind(&row.schedule)
                .bind(&row.time_zone)
                .bind(row.next_at)
                .bind(&firings)
                .bind(schedule.after(row.now))
                .fetch_one(&mut *connection);
            // Another dispatcher may have been first.
            if in_time(TIMEOUT, fire).await? {
                fired += firings.len() as u64;
                let late = (row.now - row.next_at).num_seconds();
                if late > 60 {
                    info!(
                        cron = row.name,
                        late_s = late,
                        missed = row.missed,
                        firings = firings.len(),
                        "fired late"
                    );
                }
            }
        }
        // Each moved on, so there may be more; otherwise there is none at all.
        Ok((fired, (fired > 0).then_some(Duration::ZERO)))
    }
}

impl Row {
    fn read(&self) -> Result<(Schedule, Missed), CronError> {
        Ok((
            Schedule::parse(&self.schedule, &self.time_zone)?,
            self.missed.parse()?,
        ))
    }
}
