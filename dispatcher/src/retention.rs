//! Turns the ring: truncates slots that are old enough and consumed, and watches for subscriptions that nobody serves.
//!
//! What may be truncated, and in which order locks are taken, is in the SQL functions (`outbox/migrations/functions/retention.sql`) and in
//! docs/internals/ring.md. Here is only when to try.

use std::collections::HashSet;
use std::time::Duration;

use chrono::{DateTime, Utc};
use postbox::__private::Transaction;
use postbox_core::link::in_time;
use serde::Serialize;
use sqlx::postgres::PgArguments;
use sqlx::postgres::types::PgInterval;
use sqlx::query::Query;
use sqlx::{FromRow, PgPool, Postgres};
use tracing::{info, warn};

use crate::steady::Steady;

/// The pause between two turns: a slot is truncated in thousands of them.
const EVERY: Duration = Duration::from_secs(60);
/// Short slots turn faster, and what was busy is tried again soon.
const SOON: Duration = Duration::from_secs(1);
/// The connection may be dead.
const TURN_TIMEOUT: Duration = Duration::from_secs(300);
const SLOTS: i16 = 8;

/// Checks are newer than locks only if every statement has a snapshot of its own.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

const TRUNCATE_LOG: &str =
    "SELECT $1 AS slot, outcome, messages, bytes, detail FROM postbox.truncate_log($1)";

const TRUNCATE_RECORDS: &str = "SELECT postbox.truncate_records($1, $2)";
/// So that what a key has parked holds no slot for as long as the key waits.
const COPY_PARKED: &str = "SELECT postbox.copy_parked($1)";

/// Which slots hold any records, and of which kind: about the others the database need not be asked.
const FILLED: &str = "SELECT s.slot::smallint, k.kind FROM generate_series(0, 7) AS s (slot) \
     CROSS JOIN unnest('{checkpoint,heartbeat,segment,settlement,tick}'::text[]) AS k (kind) \
     WHERE pg_relation_size(format('postbox.%s_%s', k.kind, s.slot)::regclass) > 0 ORDER BY s.slot";

const SLOT_SECONDS: &str = "SELECT extract(epoch FROM keep)::float8 / 6 FROM postbox.retention";

/// A lock that was not had in time (`lock_not_available`): others would have had to wait.
const LOCK_NOT_AVAILABLE: &str = "55P03";

/// What became of the ring at one look.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct Turn {
    /// The slots with their messages, in order.
    pub slots: Vec<SlotTurn>,
    /// Subscriptions that were dropped because they had been abandoned for too long (`group on topic`).
    pub expired: Vec<String>,
}

impl Turn {
    /// How many slots of messages were truncated.
    pub fn truncated(&self) -> usize {
        self.slots
            .iter()
            .filter(|slot| slot.outcome == "truncated")
            .count()
    }

    fn is_busy(&self) -> bool {
        self.slots.iter().any(|slot| slot.outcome == "busy")
    }
}

/// What became of a slot.
#[derive(Debug, Clone, Serialize, FromRow)]
#[non_exhaustive]
pub struct SlotTurn {
    /// Slot, 0 to 7.
    pub slot: i16,
    /// `in use`, `empty`, `carried` (the topics' offsets, so that they never restart; truncated at a later turn), `young`, `held`, `unsequenced`,
    /// `busy` or `truncated`.
    pub outcome: String,
    /// Messages truncated.
    pub messages: i64,
    /// Bytes given back to the file system.
    pub bytes: i64,
    /// Which subscriptions hold it, or which transaction keeps it busy.
    pub detail: Option<String>,
}

/// Turns the ring once: truncates whatever slots are due. A dispatcher does it every minute by itself.
///
/// Nobody waits for it longer than 100 ms: a lock that it cannot have is left, and the slot is `busy`.
///
/// # Errors
///
/// Missing privileges (it needs the owner of the tables, or `TRUNCATE`); a lost connection.
pub async fn turn(pool: &PgPool) -> Result<Turn, postbox::Error> {
    let mut turn = Turn::default();
    let filled: Vec<(i16, String)> = sqlx::query_as(FILLED).fetch_all(pool).await?;
    // Each alone: none depends on another.
    for (slot, kind) in filled {
        let records = match kind.as_str() {
            "segment" => sqlx::query(COPY_PARKED).bind(slot),
            _ => sqlx::query(TRUNCATE_RECORDS).bind(slot).bind(kind),
        };
        unless_busy(pool, records).await?;
    }
    for slot in 0..SLOTS {
        let log = log(pool, slot).await?;
        if log.outcome == "truncated" {
            info!(
                slot,
                messages = log.messages,
                bytes = log.bytes,
                "truncated a slot"
            );
        }
        turn.slots.push(log);
    }
    turn.expired = sqlx::query_scalar("SELECT expired FROM postbox.watch_subscriptions()")
        .fetch_all(pool)
        .await?;
    for subscription in &turn.expired {
        warn!(
            subscription,
            "dropped a subscription that had no live consumer for longer than the policy allows"
        );
    }
    Ok(turn)
}

async fn log(pool: &PgPool, slot: i16) -> Result<SlotTurn, sqlx::Error> {
    let mut tx = Transaction::begin(pool, BEGIN).await?;
    let truncated = sqlx::query_as(TRUNCATE_LOG).bind(slot).fetch_one(&mut *tx).await;
    match truncated {
        Ok(row) => {
            tx.commit().await?;
            Ok(row)
        }
        Err(error) if is_busy(&error) => Ok(SlotTurn {
            slot,
            outcome: "busy".to_owned(),
            messages: 0,
            bytes: 0,
            detail: Some("a lock was not had in time".to_owned()),
        }),
        Err(error) => Err(error),
    }
}

async fn unless_busy(pool: &PgPool, statement: Query<'_, Postgres, PgArguments>) -> Result<(), sqlx::Error> {
    let mut tx = Transaction::begin(pool, BEGIN).await?;
    match statement.execute(&mut *tx).await {
        Ok(_) => tx.commit().await,
        Err(error) if is_busy(&error) => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_busy(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .is_some_and(|error| error.code().as_deref() == Some(LOCK_NOT_AVAILABLE))
}

/// How long messages are kept at least, one minute to ten years (3 days unless it was set). The ring's slots become a sixth of it.
///
/// # Errors
///
/// A span out of range; a role that does not own the schema.
pub async fn set_keep(pool: &PgPool, keep: Duration) -> Result<(), postbox::Error> {
    sqlx::query("SELECT postbox.set_retention($1)")
        .bind(interval(keep))
        .execute(pool)
        .await?;
    Ok(())
}

/// After how long without a live consumer a subscription is dropped, with its failed messages and dead letters; `None`, as it is unless it
/// was set: never. Counted in hours, and only while a dispatcher runs.
///
/// # Errors
///
/// The database's; a role that may not write `postbox.retention`.
pub async fn set_expiry(pool: &PgPool, after: Option<Duration>) -> Result<(), postbox::Error> {
    sqlx::query("UPDATE postbox.retention SET expire_abandoned_after = $1 WHERE expire_abandoned_after IS DISTINCT FROM $1")
        .bind(after.map(interval))
        .execute(pool)
        .await?;
    Ok(())
}

/// The same for the durable broadcasts of nodes, of which each has subscriptions of its own (7 days unless it was set).
///
/// # Errors
///
/// The database's; a role that may not write `postbox.retention`.
pub async fn set_node_expiry(pool: &PgPool, after: Option<Duration>) -> Result<(), postbox::Error> {
    sqlx::query(
        "UPDATE postbox.retention SET expire_nodes_after = $1 WHERE expire_nodes_after IS DISTINCT FROM $1",
    )
    .bind(after.map(interval))
    .execute(pool)
    .await?;
    Ok(())
}

/// Subscriptions that have been without a live consumer for more than half of the time after which they are dropped.
const EXPIRING: &str = "SELECT e.name, e.at FROM (SELECT format('%s on %s', s.group_name, s.topic) AS name, s.last_live_at, \
         postbox.expires_at(s.last_live_at, s.node) AS at, s.id FROM postbox.subscription s) e \
     WHERE e.at - (e.at - e.last_live_at) / 2 < postbox.clock() AND e.id NOT IN (SELECT * FROM postbox.live_subscriptions())";

/// Says once of each subscription that it will be dropped.
async fn warn_of_expiry(pool: &PgPool, told: &mut HashSet<String>) -> Result<(), sqlx::Error> {
    let expiring: Vec<(String, DateTime<Utc>)> = sqlx::query_as(EXPIRING).fetch_all(pool).await?;
    told.retain(|name| expiring.iter().any(|(expiring, _)| expiring == name));
    for (subscription, at) in expiring {
        if !told.contains(&subscription) {
            warn!(
                subscription,
                at = %at,
                "has no live consumer and will be dropped then; `postbox run --expire-nodes` and --expire-abandoned say after how long"
            );
            told.insert(subscription);
        }
    }
    Ok(())
}

fn interval(span: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(span.as_micros()).unwrap_or(i64::MAX),
    }
}

pub(crate) async fn run(pool: PgPool) {
    let mut busy = 0;
    let mut steady = Steady::default();
    let mut told = HashSet::new();
    loop {
        if let Err(error) = warn_of_expiry(&pool, &mut told).await {
            warn!(%error, "cannot see which subscriptions expire");
        }
        let turned = async {
            match steady.is_steady(&pool, "retention").await? {
                true => turn(&pool).await,
                false => Ok(Turn::default()),
            }
        };
        let wait = match in_time(TURN_TIMEOUT, "turning the ring", turned).await {
            Ok(turn) => {
                busy = if turn.is_busy() { busy + 1 } else { 0 };
                wait(&pool, busy).await
            }
            Err(error) => {
                warn!(%error, "cannot turn the ring; trying again in a minute");
                EVERY
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// A twentieth of a slot, a minute at most; after a busy slot soon, but ever less so.
async fn wait(pool: &PgPool, busy: u32) -> Duration {
    let slot = sqlx::query_scalar(SLOT_SECONDS).fetch_one(pool).await;
    let regular = slot.map_or(EVERY, |seconds: f64| {
        Duration::from_secs_f64((seconds / 20.0).max(0.0)).clamp(SOON, EVERY)
    });
    match busy {
        0 => regular,
        times => (SOON * 2_u32.saturating_pow(times.min(6))).min(regular),
    }
}
