//! Rings that nobody's message is behind: anybody who may connect can ring, and any number of times.
//!
//! A ring costs a look at most, and many of them no more than polling does. This tells of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox_core::link::in_time;
use sqlx::postgres::PgListener;
use tracing::warn;

/// How often it is asked whether there are too many.
const EVERY: Duration = Duration::from_secs(5);
/// So many in that time may come of whatever was begun before it.
const FEW: u64 = 500;
/// It is said once, and again when it has lasted for so long.
const SAY_EVERY: Duration = Duration::from_secs(600);
const TIMEOUT: Duration = Duration::from_secs(10);

/// Whoever rings for a message takes a number for it.
const NUMBERS: &str = "SELECT ARRAY[coalesce(pg_sequence_last_value('postbox.outbox_seq'), 0), \
     coalesce(pg_sequence_last_value('postbox.scheduled_n'), 0)]";
const NOTE: &str = "SELECT postbox.note_incident('notifications', $1, $2, $3)";

/// How often each channel was heard.
#[derive(Debug, Clone, Default)]
pub(crate) struct Heard(Arc<[AtomicU64; 3]>);

impl Heard {
    pub(crate) fn count(&self, channel: usize) {
        self.0[channel].fetch_add(1, Ordering::Relaxed);
    }

    fn now(&self) -> [u64; 3] {
        std::array::from_fn(|channel| self.0[channel].load(Ordering::Relaxed))
    }
}

/// What was heard and published by the last look.
struct Seen {
    heard: [u64; 3],
    /// Of the outbox and of what is scheduled; read only where there is reason to.
    numbers: Option<[u64; 2]>,
}

pub(crate) struct Floods {
    channels: [&'static str; 3],
    heard: Heard,
    since: Instant,
    seen: Seen,
    said: Option<Instant>,
}

impl Floods {
    /// The channels are those of the outbox, of what is scheduled and of schedules.
    pub(crate) fn new(channels: [&'static str; 3], heard: Heard) -> Self {
        Self {
            channels,
            since: Instant::now(),
            seen: Seen {
                heard: heard.now(),
                numbers: None,
            },
            heard,
            said: None,
        }
    }

    /// Now and then asks whether more rang than published, and tells of it.
    pub(crate) async fn watch(&mut self, connection: &mut PgListener) -> Result<(), sqlx::Error> {
        if self.since.elapsed() < EVERY {
            return Ok(());
        }
        self.since = Instant::now();
        let heard = self.heard.now();
        let rang: [u64; 3] = std::array::from_fn(|n| heard[n].wrapping_sub(self.seen.heard[n]));
        let numbers = match rang.iter().any(|rang| *rang > FEW) {
            true => Some(numbers(connection).await?),
            false => None,
        };
        let before = std::mem::replace(&mut self.seen, Seen { heard, numbers }).numbers;
        // Nothing is known of the first span in which there were many.
        let (Some(now), Some(before)) = (numbers, before) else {
            return Ok(());
        };
        let published = [
            now[0].saturating_sub(before[0]),
            now[1].saturating_sub(before[1]),
            0,
        ];
        let excess: Vec<(&str, u64)> = (0..3)
            .map(|n| (self.channels[n], rang[n].saturating_sub(published[n])))
            .filter(|(_, excess)| *excess > FEW)
            .collect();
        if excess.is_empty() {
            return Ok(());
        }
        let what: Vec<String> = excess
            .iter()
            .map(|(channel, count)| format!("{count} on {channel}"))
            .collect();
        let what = format!(
            "in {} s, with nothing behind them: {}",
            EVERY.as_secs(),
            what.join(", ")
        );
        if self.said.is_none_or(|said| said.elapsed() > SAY_EVERY) {
            self.said = Some(Instant::now());
            warn!(
                what,
                "somebody sends notifications of Postbox's channels; they cost looks and change nothing"
            );
        }
        let count: u64 = excess.iter().map(|(_, count)| count).sum();
        let note = sqlx::query(NOTE)
            .bind("a dispatcher")
            .bind(what)
            .bind(i64::try_from(count).unwrap_or(i64::MAX))
            .execute(connection);
        in_time(TIMEOUT, "noting what is odd", note).await?;
        Ok(())
    }
}

async fn numbers(connection: &mut PgListener) -> Result<[u64; 2], sqlx::Error> {
    let numbers: Vec<i64> = in_time(
        TIMEOUT,
        "how far numbers are given",
        sqlx::query_scalar(NUMBERS).fetch_one(connection),
    )
    .await?;
    Ok(std::array::from_fn(|n| {
        numbers.get(n).map_or(0, |n| n.unsigned_abs())
    }))
}
