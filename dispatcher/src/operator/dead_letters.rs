//! Dead letters, for operators: messages that a group has given up, whole, with the history of their errors.
//!
//! A letter is **redriven** (its group runs the message again, with its id and a header `postbox-redriven` that counts), **discarded** (deleted
//! for good), or, where its key is halted, **released** (the key goes on without it, and the letter stays).
//!
//! Lists are read page by page: the last id of one page is where the next begins, so a page costs the same however many letters there are.

use chrono::{DateTime, Utc};
use postbox::{MaybeJson, Timestamptz};
use serde::Serialize;
use serde_json::Value;
use sqlx::{FromRow, PgPool};
use uuid::Uuid;

/// Which letters; those that fit everything that is given. The default is all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Filter {
    /// Of this group.
    pub group: Option<String>,
    /// Of this topic.
    pub topic: Option<String>,
    /// Of this message type.
    pub message_type: Option<String>,
    /// Of this key.
    pub key: Option<String>,
    /// Of this message.
    pub message: Option<Uuid>,
    /// Given up at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Given up before this time.
    pub until: Option<DateTime<Utc>>,
    /// With this text in the reason, in any case of letters.
    pub reason: Option<String>,
    /// Only those whose keys wait for an operator.
    pub halted: bool,
}

/// A message that a group has given up.
#[derive(Debug, Clone, PartialEq, FromRow)]
#[non_exhaustive]
pub struct DeadLetter {
    /// Number of the letter.
    pub id: i64,
    /// Group that gave it up.
    pub group_name: String,
    /// Topic.
    pub topic: String,
    /// Its place in the topic.
    pub offset: i64,
    /// Message id.
    pub message_id: Uuid,
    /// Message type, if it has one.
    pub message_type: Option<String>,
    /// Ordering key, if it has one.
    pub key: Option<String>,
    /// Headers, a JSON object; `None`: none.
    #[sqlx(try_from = "MaybeJson")]
    pub headers: Option<Value>,
    /// Media type of the payload; `None`: `application/json`.
    pub content_type: Option<String>,
    /// When it was inserted into the outbox.
    #[sqlx(try_from = "Timestamptz")]
    pub published_at: DateTime<Utc>,
    /// When it was given up.
    #[sqlx(try_from = "Timestamptz")]
    pub died_at: DateTime<Utc>,
    /// Attempts made.
    pub attempts: i32,
    /// Why it was given up, in words.
    pub reason: String,
    /// Whether its key waits for an operator.
    pub halted: bool,
    /// The instance that gave it up.
    pub instance: Option<String>,
    /// The last twenty failures, the newest last: an array of objects with attempt, at, error, instance.
    pub errors: Value,
    /// The payload; `None` in lists.
    pub payload: Option<Vec<u8>>,
}

/// How many letters of a subscription a filter finds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, FromRow)]
#[non_exhaustive]
pub struct Tally {
    /// Group.
    #[serde(rename = "group")]
    pub group_name: String,
    /// Topic.
    pub topic: String,
    /// Letters.
    pub letters: i64,
    /// Letters among them whose keys wait for an operator.
    pub halted: i64,
    /// The greatest id among them.
    pub newest: i64,
}

/// The conditions of a [`Filter`], bound as $1 to $9. Groups are few, so which subscriptions are meant is found first.
macro_rules! filtered {
    ($select:expr, $end:literal) => {
        concat!(
            "SELECT ",
            $select,
            " FROM postbox.dead_letter d JOIN postbox.subscription s ON s.id = d.subscription_id \
             WHERE d.subscription_id = ANY (ARRAY(SELECT w.id FROM postbox.subscription w \
                 WHERE ($1::text IS NULL OR w.group_name = $1) AND ($2::text IS NULL OR w.topic = $2))) \
             AND ($3::text IS NULL OR d.type = $3) AND ($4::text IS NULL OR d.key = $4) \
             AND ($5::uuid IS NULL OR d.message_id = $5) \
             AND ($6::timestamptz IS NULL OR d.died_at >= $6) AND ($7::timestamptz IS NULL OR d.died_at < $7) \
             AND ($8::text IS NULL OR strpos(lower(d.reason), lower($8)) > 0) AND (NOT $9 OR d.halted) ",
            $end
        )
    };
}

/// All columns of a letter but the payload.
macro_rules! letter {
    ($payload:literal) => {
        concat!(
            "d.id, s.group_name, s.topic, d.\"offset\", d.message_id, d.type AS message_type, d.key, d.headers, d.content_type, \
             d.published_at, d.died_at, d.attempts, d.reason, d.halted, d.instance, d.errors, ",
            $payload,
            " AS payload"
        )
    };
}

const NEWEST: &str = filtered!(
    letter!("NULL::bytea"),
    "AND d.id < $10 ORDER BY d.id DESC LIMIT $11"
);
const WHOLE: &str = filtered!(
    letter!("d.payload"),
    "AND d.id > $10 AND d.id <= $11 ORDER BY d.id LIMIT $12"
);
const IDS: &str = filtered!("d.id", "AND d.id > $10 AND d.id <= $11 ORDER BY d.id LIMIT $12");
const TALLY: &str = filtered!(
    "s.group_name, s.topic, count(*) AS letters, count(*) FILTER (WHERE d.halted) AS halted, max(d.id) AS newest",
    "GROUP BY s.group_name, s.topic ORDER BY s.group_name, s.topic"
);
const SHOW: &str = concat!(
    "SELECT ",
    letter!("d.payload"),
    " FROM postbox.dead_letter d JOIN postbox.subscription s ON s.id = d.subscription_id WHERE d.id = $1"
);
const TALLY_OF: &str = "SELECT s.group_name, s.topic, count(*) AS letters, count(*) FILTER (WHERE d.halted) AS halted, max(d.id) AS newest \
     FROM postbox.dead_letter d JOIN postbox.subscription s ON s.id = d.subscription_id WHERE d.id = ANY ($1) \
     GROUP BY s.group_name, s.topic ORDER BY s.group_name, s.topic";

/// Binds a [`Filter`] as $1 to $9.
macro_rules! bind {
    ($query:expr, $filter:expr) => {
        $query
            .bind(&$filter.group)
            .bind(&$filter.topic)
            .bind(&$filter.message_type)
            .bind(&$filter.key)
            .bind($filter.message)
            .bind($filter.since)
            .bind($filter.until)
            .bind(&$filter.reason)
            .bind($filter.halted)
    };
}

/// The newest letters first, without their payloads: at most `limit`, those with ids below `before` (the last id of the page before).
///
/// # Errors
///
/// The database's.
pub async fn list(
    pool: &PgPool,
    filter: &Filter,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<DeadLetter>, postbox::Error> {
    let query = bind!(sqlx::query_as(NEWEST), filter)
        .bind(before.unwrap_or(i64::MAX))
        .bind(limit);
    Ok(query.fetch_all(pool).await?)
}

/// Whole letters, the oldest first: at most `limit`, with ids above `after` (the last id of the page before) and up to `newest`.
///
/// # Errors
///
/// The database's.
pub async fn whole(
    pool: &PgPool,
    filter: &Filter,
    after: i64,
    newest: i64,
    limit: i64,
) -> Result<Vec<DeadLetter>, postbox::Error> {
    let query = bind!(sqlx::query_as(WHOLE), filter)
        .bind(after)
        .bind(newest)
        .bind(limit);
    Ok(query.fetch_all(pool).await?)
}

/// As [`whole`], the ids alone.
///
/// Whoever works through all letters takes `newest` from a [`tally`] first: a letter that is redriven and dies again comes back under a new
/// id, and would be met again and again.
///
/// # Errors
///
/// The database's.
pub async fn ids(
    pool: &PgPool,
    filter: &Filter,
    after: i64,
    newest: i64,
    limit: i64,
) -> Result<Vec<i64>, postbox::Error> {
    let query = bind!(sqlx::query_scalar(IDS), filter)
        .bind(after)
        .bind(newest)
        .bind(limit);
    Ok(query.fetch_all(pool).await?)
}

/// How many letters there are, by group and topic.
///
/// # Errors
///
/// The database's.
pub async fn tally(pool: &PgPool, filter: &Filter) -> Result<Vec<Tally>, postbox::Error> {
    Ok(bind!(sqlx::query_as(TALLY), filter).fetch_all(pool).await?)
}

/// The same for letters with these ids; what is not there is not counted.
///
/// # Errors
///
/// The database's.
pub async fn tally_of(pool: &PgPool, letters: &[i64]) -> Result<Vec<Tally>, postbox::Error> {
    Ok(sqlx::query_as(TALLY_OF).bind(letters).fetch_all(pool).await?)
}

/// One letter, whole.
///
/// # Errors
///
/// The database's.
pub async fn show(pool: &PgPool, letter: i64) -> Result<Option<DeadLetter>, postbox::Error> {
    Ok(sqlx::query_as(SHOW).bind(letter).fetch_optional(pool).await?)
}

/// Lets the group run the messages again, from their first attempt, each with its id and offset, after what is already waiting of its
/// key. Returns how many; a letter that is not there any more is not counted. Committed on return.
///
/// With a `payload`, that is the message from now on: for one that cannot be handled as it is.
///
/// # Errors
///
/// The database's; then nothing has changed.
pub async fn redrive(pool: &PgPool, letters: &[i64], payload: Option<&[u8]>) -> Result<i64, postbox::Error> {
    let query = sqlx::query_scalar("SELECT postbox.redrive($1, $2)")
        .bind(letters)
        .bind(payload);
    Ok(query.fetch_one(pool).await?)
}

/// Deletes letters for good; the keys of halted ones go on. Returns how many. Committed on return.
///
/// # Errors
///
/// The database's; then nothing has changed.
pub async fn discard(pool: &PgPool, letters: &[i64]) -> Result<i64, postbox::Error> {
    let query = sqlx::query_scalar("SELECT postbox.discard($1)").bind(letters);
    Ok(query.fetch_one(pool).await?)
}

/// Lets the keys of halted letters go on without them; the letters stay. Returns how many keys waited. Committed on return.
///
/// # Errors
///
/// The database's; then nothing has changed.
pub async fn release(pool: &PgPool, letters: &[i64]) -> Result<i64, postbox::Error> {
    let query = sqlx::query_scalar("SELECT postbox.release_key($1)").bind(letters);
    Ok(query.fetch_one(pool).await?)
}
