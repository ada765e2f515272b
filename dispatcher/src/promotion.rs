//! Moving scheduled messages to the outbox when they are due. Why nothing is overlooked is in docs/internals/time.md.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use postbox_core::link::in_time;
use sqlx::postgres::PgListener;
use uuid::Uuid;

/// Most messages that one call moves: some ten milliseconds, so that a burst does not keep others waiting for long.
const BATCH: i32 = 1_000;
/// Payloads may be large, and locks in the way.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Messages that an open transaction cancels are looked at again so soon, in case it rolls back.
const HELD_AGAIN: Duration = Duration::from_millis(20);
/// Where they are many, that costs something.
const MANY_HELD: usize = 1_000;
const MANY_HELD_AGAIN: Duration = Duration::from_secs(1);

const PROMOTE: &str = "SELECT last_look::text, start_at::text, start_n, held, promoted, is_full, is_fresh, due_in, postbox.clock() \
     FROM postbox.promote($1::pg_snapshot, $2::timestamptz, $3, $4, $5)";

/// What the last call returned, which the next one goes on from.
#[derive(Default)]
pub(crate) struct Promotion {
    last_look: Option<String>,
    /// As text, because it may be infinite.
    start_at: Option<String>,
    start_n: Option<i64>,
    held: Vec<Uuid>,
    held_checked: Option<Instant>,
}

/// What a call found.
pub(crate) struct Look {
    pub(crate) promoted: i64,
    /// There may be more that is due.
    pub(crate) is_full: bool,
    /// Something was scheduled that is due soon.
    pub(crate) is_fresh: bool,
    /// When the next one is due, as far as is known now.
    pub(crate) due_in: Option<Duration>,
    /// What the database's clock said.
    pub(crate) now: DateTime<Utc>,
}

type Row = (
    String,
    String,
    i64,
    Vec<Uuid>,
    i64,
    bool,
    bool,
    Option<f64>,
    DateTime<Utc>,
);

impl Promotion {
    pub(crate) async fn step(&mut self, connection: &mut PgListener) -> Result<Look, sqlx::Error> {
        let again = match self.held.len() {
            ..=MANY_HELD => HELD_AGAIN,
            _ => MANY_HELD_AGAIN,
        };
        let checks_held = self.held_checked.is_none_or(|at| at.elapsed() >= again);
        let held: &[Uuid] = if checks_held { &self.held } else { &[] };
        let promote = sqlx::query_as(PROMOTE)
            .bind(&self.last_look)
            .bind(&self.start_at)
            .bind(self.start_n)
            .bind(held)
            .bind(BATCH)
            .fetch_one(connection);
        let (look, start_at, start_n, held, promoted, is_full, is_fresh, due_in, now): Row =
            in_time(TIMEOUT, "promoting what is due", promote).await?;
        self.last_look = Some(look);
        self.start_at = Some(start_at);
        self.start_n = Some(start_n);
        if checks_held {
            self.held = held;
            self.held_checked = (!self.held.is_empty()).then(Instant::now);
        } else {
            self.held.extend(held);
        }
        let due_in = due_in.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let held_in = (!self.held.is_empty()).then_some(again);
        Ok(Look {
            promoted,
            is_full,
            is_fresh,
            due_in: due_in.into_iter().chain(held_in).min(),
            now,
        })
    }
}
