//! Where a message is, for each group.

use chrono::{DateTime, TimeDelta, Utc};
use postbox::{MaybeJson, MaybeTimestamptz, Timestamptz};
use serde::Serialize;
use serde_json::Value;
use sqlx::{FromRow, PgPool};
use uuid::Uuid;

/// A message and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Whereabouts {
    /// Message id.
    pub id: Uuid,
    /// Topic.
    pub topic: String,
    /// When it is due, if it is one for later that is not yet in the log.
    pub deliver_at: Option<DateTime<Utc>>,
    /// Its place in the topic; `None`: no dispatcher has given it one yet.
    pub offset: Option<i64>,
    /// Why it was set aside instead of being given one (see [`crate::rejects`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
    /// Message type, if it has one.
    #[serde(rename = "type")]
    pub message_type: Option<String>,
    /// Ordering key, if it has one.
    pub key: Option<String>,
    /// Headers, a JSON object; `None`: none.
    pub headers: Option<Value>,
    /// Media type of the payload; `None`: `application/json`.
    pub content_type: Option<String>,
    /// When it was inserted into the outbox; of one for later that is not yet due: when it was scheduled.
    pub published_at: DateTime<Utc>,
    /// Length of its payload.
    pub bytes: i64,
    /// Whether it is still in the log; what failed outlives it there.
    pub in_log: bool,
    /// Each group that has subscribed to its topic.
    pub groups: Vec<GroupState>,
}

/// Where a message is for a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
#[non_exhaustive]
pub enum MessageState {
    /// It is not yet due.
    Scheduled,
    /// It has no offset yet.
    Unsequenced,
    /// It is to be run, or is running.
    Waiting,
    /// It failed, and waits for its next attempt.
    Retrying,
    /// It waits for a message of its key that failed.
    Parked,
    /// It waits, and its key with it, for an instance that handles its type.
    Unhandled,
    /// Its attempts are exhausted, and its key waits for an operator.
    Halted,
    /// An operator has had it put back, to be run again.
    Redriven,
    /// It was given up, and is a dead letter.
    Dead,
    /// The group has passed it, and the filter that it had when it came there does not want it.
    Filtered,
    /// The group has passed it. It was handled or discarded, or the group does not take its type, or began after it.
    Delivered,
}

impl std::fmt::Display for MessageState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            MessageState::Scheduled => "scheduled",
            MessageState::Unsequenced => "unsequenced",
            MessageState::Waiting => "waiting",
            MessageState::Retrying => "retrying",
            MessageState::Parked => "parked",
            MessageState::Unhandled => "unhandled",
            MessageState::Halted => "halted",
            MessageState::Redriven => "redriven",
            MessageState::Dead => "dead",
            MessageState::Filtered => "filtered",
            MessageState::Delivered => "delivered",
        })
    }
}

/// A group, and where a message is for it.
#[derive(Debug, Clone, PartialEq, Serialize, FromRow)]
#[non_exhaustive]
pub struct GroupState {
    /// Group.
    #[serde(rename = "group")]
    #[sqlx(rename = "group_name")]
    pub group: String,
    /// Where it is.
    pub state: MessageState,
    /// Attempts made, where it failed.
    pub attempt: Option<i32>,
    /// When the next attempt is due, where it waits for one.
    #[sqlx(try_from = "MaybeTimestamptz")]
    pub due_at: Option<DateTime<Utc>>,
    /// What went wrong last, where it failed.
    pub last_error: Option<String>,
    /// Number of the dead letter, where it is one.
    pub dead_letter: Option<i64>,
}

/// A message as one of the places that may have it tells of it.
#[derive(Debug, FromRow)]
struct Found {
    topic: String,
    offset: Option<i64>,
    message_type: Option<String>,
    key: Option<String>,
    #[sqlx(try_from = "MaybeJson")]
    headers: Option<Value>,
    content_type: Option<String>,
    #[sqlx(try_from = "Timestamptz")]
    published_at: DateTime<Utc>,
    bytes: i64,
    #[sqlx(default, try_from = "MaybeTimestamptz")]
    deliver_at: Option<DateTime<Utc>>,
}

const FOR_LATER: &str = "SELECT s.topic, NULL::bigint AS \"offset\", s.type AS message_type, s.key, s.headers, s.content_type, \
         s.scheduled_at AS published_at, octet_length(s.payload)::bigint AS bytes, s.deliver_at \
     FROM postbox.scheduled s WHERE s.id = $1";

/// A message's id has the time of its making, and its row is inserted within moments; as far apart as this are the clocks of whoever
/// published it and of the database, and the two ends of a slow transaction's statement. The slots are for the planner: it reads only these.
const IN_LOG: &str = "SELECT o.topic, p.\"offset\", o.type AS message_type, o.key, o.headers, o.content_type, o.published_at, \
         octet_length(o.payload)::bigint AS bytes \
     FROM postbox.outbox o \
     LEFT JOIN LATERAL ( \
         SELECT s.base + array_position(s.seqs, o.seq) - 1 AS \"offset\" FROM postbox.segment s \
         WHERE s.slot = o.slot AND s.topic = o.topic AND s.seqs[1] <= o.seq AND s.seqs[s.count] >= o.seq \
             AND array_position(s.seqs, o.seq) IS NOT NULL LIMIT 1) p ON true \
     WHERE ($2::smallint[] IS NULL OR o.slot = ANY ($2)) AND ($3::timestamptz IS NULL OR o.published_at BETWEEN $3 AND $4) \
         AND o.id = $1";
const CLOCKS_APART: TimeDelta = TimeDelta::hours(1);

const SLOTS: &str = "SELECT ARRAY[postbox.slot_of($1), postbox.slot_of($2)]";

/// Exceptions have copies. They are few, but for dead letters, which have an index.
const IN_EXCEPTIONS: &str = "SELECT s.topic, e.\"offset\", e.message_type, e.key, e.headers, e.content_type, e.published_at, \
         octet_length(e.payload)::bigint AS bytes \
     FROM ( \
         SELECT r.subscription_id, r.\"offset\", r.type AS message_type, r.key, r.headers, r.content_type, r.published_at, r.payload \
         FROM postbox.redelivery r WHERE r.id = $1 \
         UNION ALL \
         SELECT d.subscription_id, d.\"offset\", d.type, d.key, d.headers, d.content_type, d.published_at, d.payload \
         FROM postbox.dead_letter d WHERE d.message_id = $1) e \
     JOIN postbox.subscription s ON s.id = e.subscription_id LIMIT 1";

/// $1 topic, $2 offset, $3 key, $4 when it is due if it is not in the log. Which lane it is in says `lane_of` in the consumer: the hash of the key, or else the offset, modulo
/// the number of lanes. An exception counts more than the lane's position, since the lane has passed it.
const GROUPS: &str = "SELECT s.group_name, \
         CASE \
             WHEN $4::timestamptz IS NOT NULL THEN 'scheduled' \
             WHEN $2::bigint IS NULL THEN 'unsequenced' \
             WHEN d.halted THEN 'halted' \
             WHEN r.state IN ('retry', 'trying') THEN 'retrying' \
             WHEN r.state = 'released' THEN 'dead' \
             WHEN r.state = 'waiting' OR (k.waits_for IS NOT NULL AND k.\"offset\" = $2) THEN 'unhandled' \
             WHEN r.state IS NOT NULL THEN r.state \
             WHEN d.id IS NOT NULL THEN 'dead' \
             WHEN k.\"offset\" <= $2 THEN CASE WHEN l.position > $2 THEN 'parked' ELSE 'waiting' END \
             WHEN l.position > $2 AND NOT $2 = ANY (l.pending) THEN 'delivered' \
             WHEN EXISTS (SELECT FROM postbox.settlement t \
                 WHERE t.subscription_id = s.id AND t.lane = n.lane AND t.\"offset\" = $2) THEN 'delivered' \
             ELSE 'waiting' \
         END AS state, \
         coalesce(r.attempt, d.attempts) AS attempt, \
         CASE WHEN r.state = 'retry' THEN r.due_at END AS due_at, \
         coalesce(r.errors -> -1 ->> 'error', d.errors -> -1 ->> 'error', d.reason) AS last_error, \
         d.id AS dead_letter \
     FROM postbox.subscription s \
     CROSS JOIN LATERAL (SELECT (coalesce(postbox.key_hash($3::text)::bigint, $2) % s.lanes)::smallint AS lane) n \
     LEFT JOIN LATERAL postbox.lane_state(s.id, n.lane) l ON true \
     LEFT JOIN postbox.parked_key k ON k.subscription_id = s.id AND k.key_hash = postbox.key_hash($3::text) \
     LEFT JOIN postbox.redelivery r ON r.subscription_id = s.id AND r.\"offset\" = $2 \
     LEFT JOIN postbox.dead_letter d ON d.subscription_id = s.id AND d.\"offset\" = $2 \
     WHERE s.topic = $1 ORDER BY s.group_name";

/// The row is looked for only where there is a filter.
const REFUSING: &str = "SELECT s.group_name FROM postbox.subscription s \
     CROSS JOIN LATERAL (SELECT postbox.filter_of(s.id, $2, $3) AS filter) f \
     CROSS JOIN LATERAL (SELECT g.slot, g.xids[$2 - g.base + 1] AS xid, g.seqs[$2 - g.base + 1] AS seq FROM postbox.segment_at($1, $2) g) p \
     JOIN postbox.outbox o ON o.slot = p.slot AND o.xid = p.xid AND o.seq = p.seq \
     WHERE s.topic = $1 AND f.filter IS NOT NULL \
         AND postbox.refuses(f.filter, o.type, o.key, o.headers, o.content_type, o.payload)";

const REJECTED: &str = "SELECT r.reason FROM postbox.reject r WHERE r.id = $1 LIMIT 1";

/// Looks for a message by its id, among those for later, in the log and among what failed; `None` if it is nowhere: never committed, cancelled, or no
/// longer retained.
///
/// # Errors
///
/// The database's.
pub async fn show(pool: &PgPool, id: Uuid) -> Result<Option<Whereabouts>, postbox::Error> {
    let look = async |place: &'static str| -> Result<Option<Found>, sqlx::Error> {
        sqlx::query_as(place).bind(id).fetch_optional(pool).await
    };
    // On its way: what is not in the first place any more is in the next.
    let mut in_log = false;
    let mut found = look(FOR_LATER).await?;
    if found.is_none() {
        found = find_in_log(pool, id).await?;
        in_log = found.is_some();
    }
    if found.is_none() {
        found = look(IN_EXCEPTIONS).await?;
    }
    let Some(found) = found else {
        return Ok(None);
    };
    let rejected = match (found.offset, found.deliver_at) {
        (None, None) => sqlx::query_scalar(REJECTED).bind(id).fetch_optional(pool).await?,
        _ => None,
    };
    let mut groups: Vec<GroupState> = sqlx::query_as(GROUPS)
        .bind(&found.topic)
        .bind(found.offset)
        .bind(&found.key)
        .bind(found.deliver_at)
        .fetch_all(pool)
        .await?;
    if in_log && let Some(offset) = found.offset {
        filtered(pool, &found, offset, &mut groups).await?;
    }
    Ok(Some(Whereabouts {
        id,
        topic: found.topic,
        deliver_at: found.deliver_at,
        offset: found.offset,
        rejected,
        message_type: found.message_type,
        key: found.key,
        headers: found.headers,
        content_type: found.content_type,
        published_at: found.published_at,
        bytes: found.bytes,
        in_log,
        groups,
    }))
}

/// Which of the groups that have passed a message in the log did so because their filters do not want it.
async fn filtered(
    pool: &PgPool,
    found: &Found,
    offset: i64,
    groups: &mut [GroupState],
) -> Result<(), sqlx::Error> {
    if !groups.iter().any(|group| group.state == MessageState::Delivered) {
        return Ok(());
    }
    let refusing: Vec<String> = sqlx::query_scalar(REFUSING)
        .bind(&found.topic)
        .bind(offset)
        .bind(&found.message_type)
        .fetch_all(pool)
        .await?;
    for group in groups {
        if group.state == MessageState::Delivered && refusing.contains(&group.group) {
            group.state = MessageState::Filtered;
        }
    }
    Ok(())
}

async fn find_in_log(pool: &PgPool, id: Uuid) -> Result<Option<Found>, postbox::Error> {
    let made_at = id
        .get_timestamp()
        .and_then(|at| DateTime::from_timestamp(i64::try_from(at.to_unix().0).ok()?, 0));
    let span = made_at.map(|at| (at - CLOCKS_APART, at + CLOCKS_APART));
    let slots: Option<Vec<i16>> = match span {
        // A slot is longer than the span, so its two ends are in all the slots there are in it.
        Some((from, to)) => {
            sqlx::query_scalar(SLOTS)
                .bind(from)
                .bind(to)
                .fetch_one(pool)
                .await?
        }
        None => None,
    };
    let look = async |slots: Option<Vec<i16>>, span: Option<(DateTime<Utc>, DateTime<Utc>)>| {
        sqlx::query_as(IN_LOG)
            .bind(id)
            .bind(slots)
            .bind(span.map(|(from, _)| from))
            .bind(span.map(|(_, to)| to))
            .fetch_optional(pool)
            .await
    };
    if let Some(found) = look(slots, span).await? {
        return Ok(Some(found));
    }
    // A publisher may give an id of its own, which says nothing of the time.
    match span {
        Some(_) => Ok(look(None, None).await?),
        None => Ok(None),
    }
}
