//! What the database says of topics, subscriptions, instances and dispatchers.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use postbox::{MaybeTimestamptz, Timestamptz};
use postbox_core::locks;
pub use postbox_core::locks::LockHolder;
use serde::Serialize;
use sqlx::{FromRow, PgPool};

use super::oddities;

/// Everything at one look.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// Version of the schema.
    pub schema_version: i32,
    /// How many dispatchers are connected.
    pub dispatchers: i64,
    /// When the newest messages were sequenced.
    pub last_tick_at: Option<DateTime<Utc>>,
    /// How long messages are kept at least, in seconds.
    pub keep_seconds: f64,
    /// Committed messages that no dispatcher has put in order yet.
    pub unsequenced: Unsequenced,
    /// Who has held a lock that Postbox needs for more than five seconds.
    pub locks: Vec<LockHolder>,
    /// Messages that were committed, could not be sequenced, and are set aside (see [`crate::rejects`]).
    pub rejects: i64,
    /// The slots of the ring, 0 to 7.
    pub slots: Vec<SlotStatus>,
    /// Topics by name.
    pub topics: Vec<TopicStatus>,
    /// Subscriptions by group and topic.
    pub subscriptions: Vec<SubscriptionStatus>,
    /// Consumer instances, the newest first.
    pub consumers: Vec<ConsumerStatus>,
}

/// Committed messages that no dispatcher has put in order yet.
#[derive(Debug, Default, Serialize, FromRow)]
#[non_exhaustive]
pub struct Unsequenced {
    /// How many, up to a million.
    pub messages: i64,
    /// When the oldest was published; `None`: there is none.
    pub oldest_at: Option<DateTime<Utc>>,
}

/// A slot of the ring.
#[derive(Debug, Serialize, FromRow)]
#[non_exhaustive]
pub struct SlotStatus {
    /// Slot.
    pub slot: i16,
    /// Whether it is being filled.
    pub current: bool,
    /// When the newest of its messages were sequenced; `None`: it has none.
    #[sqlx(try_from = "MaybeTimestamptz")]
    pub newest_at: Option<DateTime<Utc>>,
    /// Topics with messages in it.
    pub topics: i64,
    /// What its tables and indexes take, in bytes.
    pub bytes: i64,
    /// Whether all its messages are older than they are kept.
    pub overdue: bool,
    /// Which subscriptions keep it from being truncated (`group on topic`, …).
    pub held_by: Option<String>,
}

/// A topic.
#[derive(Debug, Serialize, FromRow)]
#[non_exhaustive]
pub struct TopicStatus {
    /// Topic.
    pub topic: String,
    /// The earliest retained offset.
    pub first_offset: i64,
    /// The offset that the next message gets.
    pub next_offset: i64,
}

/// What runs one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
#[non_exhaustive]
pub enum OrderMode {
    /// The messages of one key.
    Key,
    /// All messages of the topic.
    Topic,
    /// Nothing.
    None,
}

impl std::fmt::Display for OrderMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            OrderMode::Key => "key",
            OrderMode::Topic => "topic",
            OrderMode::None => "none",
        })
    }
}

/// Whether a subscription's intake is stopped by its failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
#[non_exhaustive]
pub enum BreakerState {
    /// Messages fail broadly, so intake stopped and probes go on.
    Open,
    /// As many failed messages wait as may, so intake stopped.
    Full,
    /// All is well.
    Closed,
}

impl std::fmt::Display for BreakerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BreakerState::Open => "open",
            BreakerState::Full => "full",
            BreakerState::Closed => "closed",
        })
    }
}

/// A group's subscription to a topic.
#[derive(Debug, Serialize, FromRow)]
#[non_exhaustive]
pub struct SubscriptionStatus {
    /// Group.
    pub group_name: String,
    /// Topic.
    pub topic: String,
    /// What runs one after another.
    pub order_mode: OrderMode,
    /// How many lanes it has.
    pub lanes: i16,
    /// How many lanes a live instance owns.
    pub owned: i64,
    /// The least offset that is not settled.
    pub position: i64,
    /// The offset that the next message gets.
    pub next_offset: i64,
    /// Upper bound of the messages not settled: those from `position` on.
    pub lag: i64,
    /// Messages not settled, without those that failed and those that are parked.
    pub backlog: i64,
    /// Whether `backlog` is exact; else its lanes are more than 65,536 offsets apart, and it is estimated as if keys were spread evenly.
    pub backlog_exact: bool,
    /// When the oldest message that is not settled was published; `None`: there is none.
    #[sqlx(try_from = "MaybeTimestamptz")]
    pub oldest_at: Option<DateTime<Utc>>,
    /// Whether a live consumer serves it.
    pub live: bool,
    /// When a dispatcher last saw a live consumer of it, to the hour.
    #[sqlx(try_from = "Timestamptz")]
    pub last_live_at: DateTime<Utc>,
    /// When it is dropped if none comes; `None`: never, or it has one.
    pub expires_at: Option<DateTime<Utc>>,
    /// Messages older than they are kept that stay because it has not settled them.
    pub held_messages: i64,
    /// Their payloads, in bytes; whole segments.
    pub held_bytes: i64,
    /// Since when the oldest of them is there.
    #[sqlx(try_from = "MaybeTimestamptz")]
    pub held_since: Option<DateTime<Utc>>,
    /// Whether no message is started.
    pub paused: bool,
    /// Most messages started a second by all instances together, as an operator or else the code says.
    pub rate_limit: Option<f64>,
    /// Most messages started a second by each instance.
    pub instance_rate_limit: Option<f64>,
    /// When messages are started, such as `22:00-06:00 Europe/Berlin`; `None`: always.
    pub drain_window: Option<String>,
    /// Messages that failed and wait for their next attempt; those that an operator has put back are among them.
    pub retrying: i64,
    /// Messages that wait for a failed one of their key, and are not in memory; an estimate where the key is more than 65,536 offsets behind.
    pub parked: i64,
    /// Message types that its live instances handle. `*`: all. An empty name: untyped messages.
    pub types: Vec<String>,
    /// Messages that wait for an instance which handles their type, without those of their keys that wait behind them.
    pub waiting: i64,
    /// Types that messages wait for and no live instance handles. An empty name: untyped messages.
    pub waiting_types: Vec<String>,
    /// Messages that its live instances settled without handling them, because no instance handles their type and the policy says so; since they started.
    pub unknown: i64,
    /// The same by type.
    pub unknown_types: sqlx::types::Json<BTreeMap<String, i64>>,
    /// Messages that its live instances passed because their filters do not want them; since they started.
    pub filtered: i64,
    /// Its filters by message type, as they were noted last. `*`: all types that are not named. An empty name: untyped messages. Without a filter all
    /// are wanted.
    pub filters: sqlx::types::Json<BTreeMap<String, Option<String>>>,
    /// The offset from which on they apply, if it has any.
    pub filters_from: Option<i64>,
    /// Messages whose attempts are exhausted and whose keys wait for an operator. They are dead letters too.
    pub halted: i64,
    /// Dead letters.
    pub dead: i64,
    /// What the instances' circuit breakers are, the worst of them; `None` where no live instance says.
    pub breaker: Option<BreakerState>,
    /// For how many seconds a message has waited for a connection of its instance's pool, where for more than one.
    pub connection_wait: Option<f64>,
    /// What keeps it from going on, or slows it down, in words: that it is paused, outside its window, limited, that its breaker is open, that no
    /// instance is there. Empty: nothing.
    #[sqlx(skip)]
    pub kept_by: Vec<String>,
}

impl SubscriptionStatus {
    fn kept_by(&self, now: DateTime<Utc>) -> Vec<String> {
        let closed = self.drain_window.as_ref().filter(|window| {
            window
                .parse::<postbox_core::DailyWindow>()
                .is_ok_and(|window| !window.is_open(now))
        });
        let unowned = i64::from(self.lanes) - self.owned;
        [
            (!self.live).then(|| "no live consumer".to_owned()),
            (self.live && unowned > 0).then(|| format!("{unowned} of {} lanes have no owner", self.lanes)),
            self.paused.then(|| "paused".to_owned()),
            closed.map(|window| format!("outside its window {window}")),
            match self.breaker {
                Some(BreakerState::Open) => Some("its breaker is open: messages fail broadly".to_owned()),
                Some(BreakerState::Full) => {
                    Some("as many messages wait for another attempt as may".to_owned())
                }
                Some(BreakerState::Closed) | None => None,
            },
            self.connection_wait
                .map(|seconds| format!("a message has waited {seconds:.0} s for a connection of the pool")),
            (self.halted > 0).then(|| format!("{} halted keys wait for an operator", self.halted)),
            self.rate_limit
                .filter(|_| self.backlog > 0)
                .map(|rate| format!("limited to {rate}/s")),
            self.instance_rate_limit
                .filter(|_| self.backlog > 0)
                .map(|rate| format!("limited to {rate}/s an instance")),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// A consumer instance.
#[derive(Debug, Serialize, FromRow)]
#[non_exhaustive]
pub struct ConsumerStatus {
    /// Instance.
    pub id: i32,
    /// Its name.
    pub name: String,
    /// Process id on its host.
    pub pid: i32,
    /// Whether its session holds its lock.
    pub live: bool,
    /// Whether it is live and says nothing: its process is stopped, or its host gone. Others take its lanes after its lease.
    #[sqlx(default)]
    pub silent: bool,
    /// How many lanes it owns.
    pub lanes: i64,
    /// When it started.
    pub started_at: DateTime<Utc>,
    /// When it last said that it is alive.
    pub heartbeat_at: DateTime<Utc>,
    /// What it says of its subscriptions, broadcasts from memory among them.
    pub report: serde_json::Value,
}

const TOPICS: &str = "SELECT name AS topic, postbox.first_offset(name) AS first_offset, postbox.next_offset(name) AS next_offset \
     FROM postbox.topic ORDER BY name";

/// Redelivery is bounded, and dead letters are counted by an index. An instance that never had a heartbeat reports an empty object. What is held back is looked for only where the oldest message is older than messages are kept.
const SUBSCRIPTIONS: &str = "SELECT s.group_name, s.topic, s.order_mode, s.lanes, \
         (SELECT count(*) FROM postbox.lane l WHERE l.subscription_id = s.id AND postbox.is_live(l.consumer_id)) AS owned, \
         b.position, b.next_offset, b.next_offset - b.position AS lag, b.messages AS backlog, b.exact AS backlog_exact, b.oldest_at, \
         s.id IN (SELECT * FROM postbox.live_subscriptions()) AS live, s.last_live_at, \
         CASE WHEN s.id NOT IN (SELECT * FROM postbox.live_subscriptions()) THEN postbox.expires_at(s.last_live_at, s.node) END AS expires_at, \
         coalesce(h.messages, 0) AS held_messages, coalesce(h.bytes, 0) AS held_bytes, h.since AS held_since, \
         p.paused, p.rate_limit, p.instance_rate_limit, p.drain_window, \
         r.retrying, r.parked + postbox.parked(s.id) AS parked, r.halted, \
         ARRAY(SELECT DISTINCT t.type FROM postbox.live_types(s.id) t ORDER BY 1) AS types, \
         w.messages AS waiting, w.types AS waiting_types, u.messages AS unknown, u.types AS unknown_types, \
         (postbox.filtered(s.id)).messages AS filtered, coalesce(f.filters, '{}') AS filters, f.\"offset\" AS filters_from, \
         (SELECT count(*) FROM postbox.dead_letter d WHERE d.subscription_id = s.id) AS dead, \
         (SELECT b.breaker FROM postbox.consumer c CROSS JOIN LATERAL postbox.last_report(c.id) said \
             CROSS JOIN jsonb_array_elements(CASE jsonb_typeof(said.report) WHEN 'array' THEN said.report ELSE '[]' END) AS e (entry) \
             CROSS JOIN LATERAL (SELECT e.entry ->> 'breaker' AS breaker) b \
             WHERE s.id = ANY (c.subscriptions) AND e.entry ->> 'group' = s.group_name AND e.entry ->> 'topic' = s.topic \
                 AND b.breaker IS NOT NULL AND postbox.is_live(c.id) \
             ORDER BY array_position(ARRAY['open', 'full', 'closed'], b.breaker) LIMIT 1) AS breaker, \
         (SELECT max((e.entry ->> 'connection_wait')::float8) \
             FROM postbox.consumer c CROSS JOIN LATERAL postbox.last_report(c.id) said \
             CROSS JOIN jsonb_array_elements(CASE jsonb_typeof(said.report) WHEN 'array' THEN said.report ELSE '[]' END) AS e (entry) \
             WHERE s.id = ANY (c.subscriptions) AND e.entry ->> 'group' = s.group_name AND e.entry ->> 'topic' = s.topic \
                 AND postbox.is_live(c.id)) AS connection_wait \
     FROM postbox.subscription s \
     CROSS JOIN LATERAL postbox.pace(s.id) p \
     CROSS JOIN LATERAL postbox.backlog(s.id) b \
     CROSS JOIN LATERAL postbox.waiting(s.id) w \
     CROSS JOIN LATERAL postbox.settled_unknown(s.id) u \
     LEFT JOIN LATERAL (SELECT f.filters, f.\"offset\" FROM postbox.filter f WHERE f.subscription_id = s.id ORDER BY f.n DESC LIMIT 1) f ON true \
     CROSS JOIN LATERAL ( \
         SELECT count(*) FILTER (WHERE r.state IN ('retry', 'trying', 'redriven')) AS retrying, \
             count(*) FILTER (WHERE r.state = 'parked') AS parked, count(*) FILTER (WHERE r.state = 'halted') AS halted \
         FROM postbox.redelivery r WHERE r.subscription_id = s.id) r \
     CROSS JOIN LATERAL postbox.held_back( \
         CASE WHEN b.oldest_at <= postbox.clock() - (SELECT r.keep FROM postbox.retention r) THEN s.id END) h \
     ORDER BY s.group_name, s.topic";

const CONSUMERS: &str = "SELECT c.id, c.name, c.pid, s.consumer_id IS NOT NULL AS live, \
         (SELECT count(*) FROM postbox.lane l WHERE l.consumer_id = c.id) AS lanes, c.started_at, r.heartbeat_at, r.report \
     FROM postbox.consumer c LEFT JOIN postbox.sessions() s ON s.consumer_id = c.id CROSS JOIN LATERAL postbox.last_report(c.id) r \
     ORDER BY c.started_at DESC, c.id";

const DISPATCHERS: &str = "SELECT count(*) FROM pg_stat_activity \
     WHERE application_name = 'postbox dispatcher' AND datname = current_database()";

/// Transactions of Postbox's are shorter.
const HELD_FOR: Duration = Duration::from_secs(5);

/// Looks at the database.
///
/// # Errors
///
/// The database's.
pub async fn read(pool: &PgPool) -> Result<Status, postbox::Error> {
    postbox::check_schema(pool).await?;
    Ok(Status {
        schema_version: postbox::SCHEMA_VERSION,
        dispatchers: dispatchers(pool).await?,
        last_tick_at: sqlx::query_scalar("SELECT at FROM postbox.tick ORDER BY id DESC LIMIT 1")
            .fetch_optional(pool)
            .await?,
        keep_seconds: sqlx::query_scalar("SELECT extract(epoch FROM keep)::float8 FROM postbox.retention")
            .fetch_one(pool)
            .await?,
        unsequenced: sqlx::query_as("SELECT messages, oldest_at FROM postbox.unsequenced()")
            .fetch_one(pool)
            .await?,
        locks: locks::holders(pool, HELD_FOR).await?,
        rejects: crate::rejects::count(pool).await?,
        slots: sqlx::query_as("SELECT * FROM postbox.slots()")
            .fetch_all(pool)
            .await?,
        topics: sqlx::query_as(TOPICS).fetch_all(pool).await?,
        subscriptions: subscriptions(pool).await?,
        consumers: consumers(pool).await?,
    })
}

async fn consumers(pool: &PgPool) -> Result<Vec<ConsumerStatus>, sqlx::Error> {
    let mut consumers: Vec<ConsumerStatus> = sqlx::query_as(CONSUMERS).fetch_all(pool).await?;
    let silent = oddities::silent_instances(pool).await?;
    for consumer in &mut consumers {
        consumer.silent = silent.iter().any(|instance| instance.id == consumer.id);
    }
    Ok(consumers)
}

/// The subscriptions alone, by group and topic.
///
/// # Errors
///
/// The database's.
pub async fn subscriptions(pool: &PgPool) -> Result<Vec<SubscriptionStatus>, postbox::Error> {
    let mut subscriptions: Vec<SubscriptionStatus> = sqlx::query_as(SUBSCRIPTIONS).fetch_all(pool).await?;
    // Windows go by the database's clock.
    let now = sqlx::query_scalar("SELECT postbox.clock()")
        .fetch_one(pool)
        .await?;
    for subscription in &mut subscriptions {
        subscription.kept_by = subscription.kept_by(now);
    }
    Ok(subscriptions)
}

/// How many dispatchers are connected. While there is none, messages wait in the outbox.
///
/// # Errors
///
/// The database's.
pub async fn dispatchers(pool: &PgPool) -> Result<i64, postbox::Error> {
    Ok(sqlx::query_scalar(DISPATCHERS).fetch_one(pool).await?)
}
