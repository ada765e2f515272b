//! Messages that were committed and could not be sequenced: what the sequencer set aside, and what an operator decides of it.

use chrono::{DateTime, Utc};
use postbox::{MaybeTimestamptz, MessageId, Timestamptz};
use serde::Serialize;
use sqlx::{FromRow, PgPool};
use uuid::Uuid;

/// A message that was set aside. Nobody gets it until it is admitted again.
#[derive(Debug, Clone, Serialize, FromRow)]
#[non_exhaustive]
pub struct Reject {
    /// Its insertion number, which names it here.
    pub seq: i64,
    /// Message id. This and what follows is `None` where its row could not even be copied.
    pub id: Option<Uuid>,
    /// Topic.
    pub topic: Option<String>,
    /// Message type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub message_type: Option<String>,
    /// Ordering key.
    pub key: Option<String>,
    /// Length of the payload.
    pub bytes: Option<i32>,
    /// When it was published.
    #[sqlx(try_from = "MaybeTimestamptz")]
    pub published_at: Option<DateTime<Utc>>,
    /// When it was set aside.
    #[sqlx(try_from = "Timestamptz")]
    pub rejected_at: DateTime<Utc>,
    /// Why.
    pub reason: String,
}

/// What is to be different when a message is admitted again.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Another topic.
    pub topic: Option<String>,
    /// Another type.
    pub message_type: Option<String>,
    /// Another key.
    pub key: Option<String>,
    /// Another payload.
    pub payload: Option<Vec<u8>>,
}

/// What somebody put there may be of any length.
const LIST: &str = "SELECT seq, id, left(topic, 300) AS topic, left(type, 300) AS type, left(key, 300) AS key, octet_length(payload) AS bytes, \
         published_at, rejected_at, left(reason, 1000) AS reason \
     FROM postbox.reject WHERE seq > $1 ORDER BY seq LIMIT $2";

const READMIT: &str = "SELECT postbox.readmit($1, topic => $2, type => $3, key => $4, payload => $5)";

const DISCARD: &str = "SELECT postbox.discard_rejects($1)";

const COUNT: &str = "SELECT count(*) FROM postbox.reject";

/// Those after a number, in the order of their numbers, `limit` at most.
///
/// # Errors
///
/// The database's.
pub async fn list(pool: &PgPool, after: i64, limit: i64) -> Result<Vec<Reject>, postbox::Error> {
    Ok(sqlx::query_as(LIST)
        .bind(after)
        .bind(limit)
        .fetch_all(pool)
        .await?)
}

/// How many there are.
///
/// # Errors
///
/// The database's.
pub async fn count(pool: &PgPool) -> Result<i64, postbox::Error> {
    Ok(sqlx::query_scalar(COUNT).fetch_one(pool).await?)
}

/// Publishes one again, under its id; `None`: it is not there.
///
/// # Errors
///
/// It still breaks a rule, which the error names; then it stays where it is.
pub async fn readmit(
    pool: &PgPool,
    seq: i64,
    changes: &Changes,
) -> Result<Option<MessageId>, postbox::Error> {
    let id: Option<Uuid> = sqlx::query_scalar(READMIT)
        .bind(seq)
        .bind(&changes.topic)
        .bind(&changes.message_type)
        .bind(&changes.key)
        .bind(&changes.payload)
        .fetch_one(pool)
        .await?;
    Ok(id.map(MessageId::from))
}

/// Deletes these for good; returns how many were there.
///
/// # Errors
///
/// The database's; then nothing was deleted.
pub async fn discard(pool: &PgPool, seqs: &[i64]) -> Result<i64, postbox::Error> {
    Ok(sqlx::query_scalar(DISCARD).bind(seqs).fetch_one(pool).await?)
}
