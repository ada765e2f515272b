//! Whether the database's clock can be trusted with what cannot be taken back: truncating, and forgetting deduplication keys.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use postbox_core::clock::{self, ClockWatch};
use sqlx::PgPool;
use tracing::warn;

/// A clock that was set on may be set back: for so long nothing is done by it.
const DOUBT: Duration = Duration::from_secs(600);
/// Less makes no difference to what is kept for days.
const MUCH: TimeDelta = TimeDelta::minutes(5);

const NOW: &str = "SELECT postbox.clock()";

#[derive(Debug, Default)]
pub(crate) struct Steady {
    watch: ClockWatch,
    doubt_until: Option<Instant>,
}

impl Steady {
    /// Whether what is old by the clock is old. `work` is what waits otherwise, for the log.
    pub(crate) async fn is_steady(&mut self, pool: &PgPool, work: &str) -> Result<bool, sqlx::Error> {
        let asked = Instant::now();
        let now: DateTime<Utc> = sqlx::query_scalar(NOW).fetch_one(pool).await?;
        let step = self.watch.look(now, asked, Instant::now());
        if let Some(step) = step.filter(|step| *step > MUCH) {
            self.doubt_until = Some(Instant::now() + DOUBT);
            warn!(
                step = clock::in_words(step),
                for_minutes = DOUBT.as_secs() / 60,
                "the database's clock was set; {work} waits, in case it is set back"
            );
        }
        // Set back: then that was it.
        if step.is_some_and(|step| step < -MUCH) {
            self.doubt_until = None;
        }
        Ok(self.doubt_until.is_none_or(|until| until <= Instant::now()))
    }
}
