//! The order that a topic got, read from its tables and checked on the way.

use std::collections::HashSet;

use postbox_testkit::TestDatabase;
use sqlx::PgPool;
use uuid::Uuid;

/// One offset of a topic.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct Entry {
    pub(crate) offset: i64,
    pub(crate) id: Option<Uuid>,
    pub(crate) payload: Option<Vec<u8>>,
    is_hashed_right: bool,
    is_counted_right: bool,
}

impl Entry {
    /// The payload, of messages that are published as JSON texts.
    #[allow(dead_code)]
    pub(crate) fn text(&self) -> String {
        let payload = self.payload.as_deref().expect("its row");
        serde_json::from_slice(payload).expect("a JSON text")
    }
}

/// Each offset with the row that its segment points at.
const ENTRIES: &str = "SELECT s.base + a.n - 1 AS \"offset\", o.id, o.payload, \
         s.keys[a.n] IS NOT DISTINCT FROM postbox.key_hash(o.key) AS is_hashed_right, \
         s.count BETWEEN 1 AND 1024 AND s.count = cardinality(s.xids) AND s.count = cardinality(s.seqs) \
             AND s.count = coalesce(cardinality(s.keys), s.count) AS is_counted_right \
     FROM postbox.segment s \
     CROSS JOIN LATERAL unnest(s.xids, s.seqs) WITH ORDINALITY AS a (xid, seq, n) \
     LEFT JOIN postbox.outbox o ON o.slot = s.slot AND o.xid = a.xid AND o.seq = a.seq AND o.topic = s.topic \
     WHERE s.topic = $1 ORDER BY s.base, a.n";

/// All offsets of a topic, the first first.
///
/// Panics unless they are 0, 1, 2, … without gap or double, each with a message of its own of this topic,
/// in the segment's slot and with the hash of its key.
pub(crate) async fn entries(pool: &PgPool, topic: &str) -> Vec<Entry> {
    let entries: Vec<Entry> = sqlx::query_as(ENTRIES)
        .bind(topic)
        .fetch_all(pool)
        .await
        .expect("the segments");
    let mut ids = HashSet::new();
    for (n, entry) in entries.iter().enumerate() {
        assert_eq!(entry.offset, n as i64, "offsets of {topic} are dense");
        let id = entry.id.unwrap_or_else(|| panic!("no row at {entry:?}"));
        assert!(ids.insert(id), "{topic}: message {id} has two offsets");
        assert!(entry.is_hashed_right, "key hash of {entry:?}");
        assert!(entry.is_counted_right, "count of the segment of {entry:?}");
    }
    entries
}

/// As [`entries`], and every message of the topic that is committed is among them.
#[allow(dead_code)]
pub(crate) async fn complete(db: &TestDatabase, topic: &str) -> Vec<Entry> {
    let entries = entries(db.pool(), topic).await;
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM postbox.outbox WHERE topic = $1")
        .bind(topic)
        .fetch_one(db.pool())
        .await
        .expect("the outbox");
    assert_eq!(entries.len() as i64, rows, "messages of {topic} with an offset");
    entries
}

/// Takes a step of the sequencer; returns how many messages got an offset.
#[allow(dead_code)]
pub(crate) async fn step(executor: impl sqlx::PgExecutor<'_>) -> i64 {
    sqlx::query_scalar("SELECT coalesce(sum(messages), 0)::bigint FROM postbox.sequence()")
        .fetch_one(executor)
        .await
        .expect("a step")
}
