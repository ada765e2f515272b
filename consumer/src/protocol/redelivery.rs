//! Reading `postbox.redelivery` and `postbox.parked_key`: what a lane's new owner finds, and what operators put back.

use std::sync::Arc;
use std::time::Duration;

use postbox::log::{Filters, StoredMessage};
use postbox::{Headers, MaybeTimestamptz, MessageId, Offset, StoredJson, Timestamptz};
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{PgExecutor, Postgres, Row};
use uuid::Uuid;

use crate::ids::{Lane, SubscriptionId};

/// Copies of parked messages read at once.
pub(crate) const COPIES: i64 = 128;

/// Decisions of operators read at once.
pub(crate) const DECIDED: i64 = 256;

/// A message of a lane that passed it without success.
pub(crate) struct Held {
    pub(crate) lane: Lane,
    pub(crate) state: HeldState,
    /// Attempts made.
    pub(crate) attempts: u32,
    pub(crate) due_in: Duration,
    /// Since when it fails.
    pub(crate) failing_for: Option<Duration>,
    pub(crate) message: StoredMessage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeldState {
    Retry,
    Parked,
    Waiting,
    Trying,
    Halted,
    Redriven,
    Released,
}

/// A key with parked messages: first those that were copied, then those in the log.
pub(crate) struct ParkedKey {
    pub(crate) key: i32,
    pub(crate) parked: Parked,
}

/// Where the parked messages of a key are, from which offsets on; one of the two is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parked {
    /// Copied to `redelivery` before their slot was truncated.
    pub(crate) copies: Option<i64>,
    /// In the log.
    pub(crate) log: Option<i64>,
}

impl Parked {
    /// Nothing that is parked has an offset below this.
    pub(crate) fn first(&self) -> i64 {
        let first = [self.copies, self.log].into_iter().flatten().min();
        first.unwrap_or(i64::MAX)
    }
}

/// No wait is longer than it was when it was written, so one that was written while the clock was ahead ends. What was copied before it met a
/// filter ($2, and whether they are to be given the payload, $3) meets it now.
macro_rules! columns {
    ($rest:literal) => {
        concat!(
            "SELECT \"offset\", lane, state, attempt, extract(epoch FROM least(due_at - postbox.clock(), due_at - noted_at))::float8, \
             extract(epoch FROM postbox.clock() - failed_at)::float8, seq, id, type, key, key_hash, headers, content_type, payload, \
             published_at, expires_at, \
             CASE WHEN state IN ('parked', 'waiting') OR state = 'redriven' AND headers ? 'postbox-replayed' AND NOT headers ? 'postbox-redriven' \
                 THEN postbox.refused_by((SELECT $2::text[]::jsonpath[]), type, key, headers, content_type, CASE WHEN $3 THEN payload END) \
                 ELSE '{}' END \
             FROM postbox.redelivery WHERE subscription_id = $1 AND ",
            $rest
        )
    };
}

/// Everything that holds a key or runs again; what is parked behind it is read when its turn comes, and so is what waits without a key.
const OF_LANES: &str = columns!(
    "lane = ANY ($4) AND state <> 'parked' AND (state <> 'waiting' OR $5 = 'topic' OR $5 = 'key' AND key_hash IS NOT NULL) ORDER BY \"offset\""
);

/// What waits without holding a key, in no order.
const WAITING: &str = columns!(
    "lane = ANY ($5) AND coalesce(type, '') = ANY ($6) AND state = 'waiting' AND ($7 = 'none' OR $7 = 'key' AND key_hash IS NULL) LIMIT $4"
);

const OF_OPERATORS: &str =
    columns!("lane = ANY ($5) AND state IN ('redriven', 'released') ORDER BY \"offset\" LIMIT $4");

const COPIES_OF_KEY: &str =
    columns!("key_hash = $4 AND \"offset\" >= $5 AND state = 'parked' ORDER BY \"offset\" LIMIT $6");

const PARKED_KEYS: &str = "SELECT key_hash, c.\"offset\", k.\"offset\" FROM ( \
         SELECT key_hash, min(\"offset\") AS \"offset\" FROM postbox.redelivery \
         WHERE subscription_id = $1 AND lane = ANY ($2) AND state = 'parked' GROUP BY key_hash) c \
     FULL JOIN (SELECT key_hash, \"offset\" FROM postbox.parked_key WHERE subscription_id = $1 AND lane = ANY ($2)) k USING (key_hash)";

/// What is held of lanes that were just claimed, by offset.
pub(crate) async fn of_lanes(
    executor: impl PgExecutor<'_>,
    subscription: SubscriptionId,
    filters: &Filters,
    lanes: &[Lane],
    order: &str,
) -> Result<Vec<Held>, sqlx::Error> {
    let query = held(OF_LANES, subscription, filters).bind(lanes).bind(order);
    decode_all(&query.fetch_all(executor).await?)
}

/// What operators decided of messages of these lanes and their owner has not taken up, by offset, at most [`DECIDED`].
pub(crate) async fn of_operators(
    executor: impl PgExecutor<'_>,
    subscription: SubscriptionId,
    filters: &Filters,
    lanes: &[Lane],
) -> Result<Vec<Held>, sqlx::Error> {
    let query = held(OF_OPERATORS, subscription, filters)
        .bind(DECIDED)
        .bind(lanes);
    decode_all(&query.fetch_all(executor).await?)
}

/// What waits in these lanes, without holding a key, for an instance that handles one of these types; at most [`DECIDED`].
pub(crate) async fn waiting(
    executor: impl PgExecutor<'_>,
    subscription: SubscriptionId,
    filters: &Filters,
    lanes: &[Lane],
    types: &[String],
    order: &str,
) -> Result<Vec<Held>, sqlx::Error> {
    let query = held(WAITING, subscription, filters)
        .bind(DECIDED)
        .bind(lanes)
        .bind(types)
        .bind(order);
    decode_all(&query.fetch_all(executor).await?)
}

/// Copies of parked messages of a key from an offset on, in order, at most [`COPIES`].
pub(crate) async fn copies(
    executor: impl PgExecutor<'_>,
    subscription: SubscriptionId,
    filters: &Filters,
    key: i32,
    from: i64,
) -> Result<Vec<Held>, sqlx::Error> {
    let query = held(COPIES_OF_KEY, subscription, filters)
        .bind(key)
        .bind(from)
        .bind(COPIES);
    decode_all(&query.fetch_all(executor).await?)
}

/// Which keys of these lanes have parked messages.
pub(crate) async fn parked_keys(
    executor: impl PgExecutor<'_>,
    subscription: SubscriptionId,
    lanes: &[Lane],
) -> Result<Vec<ParkedKey>, sqlx::Error> {
    let rows: Vec<(i32, Option<i64>, Option<i64>)> = sqlx::query_as(PARKED_KEYS)
        .bind(subscription)
        .bind(lanes)
        .fetch_all(executor)
        .await?;
    Ok(rows
        .into_iter()
        .map(|(key, copies, log)| ParkedKey {
            key,
            parked: Parked { copies, log },
        })
        .collect())
}

fn held<'q>(
    sql: &'static str,
    subscription: SubscriptionId,
    filters: &'q Filters,
) -> Query<'q, Postgres, PgArguments> {
    sqlx::query(sql)
        .bind(subscription)
        .bind(filters.texts())
        .bind(filters.read_payload())
}

fn decode_all(rows: &[PgRow]) -> Result<Vec<Held>, sqlx::Error> {
    rows.iter().map(decode).collect()
}

fn decode(row: &PgRow) -> Result<Held, sqlx::Error> {
    let span = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
    let headers: Option<StoredJson<'_>> = row.try_get(11)?;
    let state = match row.try_get(2)? {
        "parked" => HeldState::Parked,
        "waiting" => HeldState::Waiting,
        "trying" => HeldState::Trying,
        "halted" => HeldState::Halted,
        "redriven" => HeldState::Redriven,
        "released" => HeldState::Released,
        _ => HeldState::Retry,
    };
    Ok(Held {
        lane: row.try_get(1)?,
        state,
        attempts: row.try_get::<i32, _>(3)?.max(0) as u32,
        due_in: span(row.try_get(4)?),
        failing_for: row.try_get::<Option<f64>, _>(5)?.map(span),
        message: StoredMessage {
            id: MessageId::from(row.try_get::<Uuid, _>(7)?),
            offset: Offset::new(row.try_get(0)?),
            seq: row.try_get(6)?,
            message_type: row.try_get::<Option<&str>, _>(8)?.map(Arc::from),
            key: row.try_get::<Option<&str>, _>(9)?.map(Box::from),
            key_hash: row.try_get(10)?,
            headers: headers.map(|stored| Box::new(Headers::from_stored(stored.0))),
            content_type: row.try_get::<Option<&str>, _>(12)?.map(Box::from),
            payload: row.try_get::<&[u8], _>(13)?.into(),
            published_at: row.try_get::<Timestamptz, _>(14)?.0,
            // Once it has been tried, it is seen through.
            expires_at: row.try_get::<MaybeTimestamptz, _>(15)?.0,
            refused_by: row.try_get::<Vec<i16>, _>(16)?.into(),
            unreadable: None,
        },
    })
}
