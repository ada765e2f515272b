//! What was published.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use postbox::{DecodeError, Headers, JSON, MaybeTimestamptz, Message, MessageId, Timestamptz};
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::{Kit, locked};

/// A message of a topic, with what is known of it beside its payload.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PublishedMessage {
    /// Message id.
    pub id: MessageId,
    /// Topic.
    pub topic: String,
    /// Message type, if it has one.
    pub message_type: Option<String>,
    /// Ordering key, if it has one.
    pub key: Option<String>,
    /// Headers.
    pub headers: Headers,
    /// Media type of the payload.
    pub content_type: String,
    /// The payload.
    pub payload: Vec<u8>,
    /// When it was published, or is due if it was scheduled for later.
    pub at: DateTime<Utc>,
    /// From then on it is not handled any more.
    pub expires_at: Option<DateTime<Utc>>,
}

impl PublishedMessage {
    /// The message, if it is of one of this type's message types; one without a type is taken for the only type there is.
    ///
    /// # Errors
    /// The payload is not of the type's form.
    pub fn decode<T: Message>(&self) -> Option<Result<T, DecodeError>> {
        let message_type = match (self.message_type.as_deref(), T::TYPES) {
            (Some(message_type), types) if types.contains(&message_type) => message_type,
            (None, [only]) => only,
            _ => return None,
        };
        Some(T::decode(message_type, &self.payload))
    }

    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        let headers: Option<Json<BTreeMap<String, String>>> = row.try_get("headers")?;
        let content_type: Option<String> = row.try_get("content_type")?;
        Ok(Self {
            id: row.try_get::<Uuid, _>("id")?.into(),
            topic: row.try_get("topic")?,
            message_type: row.try_get("type")?,
            key: row.try_get("key")?,
            headers: headers.into_iter().flat_map(|headers| headers.0).collect(),
            content_type: content_type.unwrap_or_else(|| JSON.to_owned()),
            payload: row.try_get("payload")?,
            at: row.try_get::<Timestamptz, _>("at")?.into(),
            expires_at: row.try_get::<MaybeTimestamptz, _>("expires_at")?.into(),
        })
    }
}

/// Of a topic, by offset.
const PUBLISHED: &str = "SELECT o.id, o.topic, o.type, o.key, o.headers, o.content_type, o.payload, o.published_at AS at, o.expires_at \
     FROM postbox.segment g CROSS JOIN LATERAL unnest(g.xids, g.seqs) WITH ORDINALITY AS e (xid, seq, n) \
     JOIN postbox.outbox o ON o.slot = g.slot AND o.xid = e.xid AND o.seq = e.seq \
     WHERE g.topic = $1 ORDER BY g.base + e.n";

/// Of a topic, by when they are due.
const SCHEDULED: &str = "SELECT s.id, s.topic, s.type, s.key, s.headers, s.content_type, s.payload, s.deliver_at AS at, s.expires_at \
     FROM postbox.scheduled s WHERE s.topic = $1 ORDER BY s.deliver_at, s.n";

impl Kit {
    /// The messages of this type that the service published: those of its topic and message types that were committed, in the order of the topic. Among them
    /// are those that were scheduled and have become due; for the others see [`scheduled`](Self::scheduled). What the test itself published by
    /// [`publish`](Self::publish) is not among them, and neither is what was rolled back.
    ///
    /// It does not wait for handlers: that is [`settled`](Self::settled).
    ///
    /// # Panics
    /// One of them cannot be decoded, or the database fails.
    pub async fn published<T: Message>(&self) -> Vec<T> {
        decode_all(&self.published_in(T::TOPIC).await)
    }

    /// The messages of this type that the service scheduled for later, and that are not due yet, the next first.
    ///
    /// # Panics
    /// As [`published`](Self::published).
    pub async fn scheduled<T: Message>(&self) -> Vec<T> {
        decode_all(&self.scheduled_in(T::TOPIC).await)
    }

    /// As [`published`](Self::published), every message of a topic, with its key, its headers and what else is known of it.
    ///
    /// # Panics
    /// The database fails.
    pub async fn published_in(&self, topic: &str) -> Vec<PublishedMessage> {
        // In their order, which they get soon.
        self.sequenced().await;
        self.read(PUBLISHED, topic).await
    }

    /// As [`scheduled`](Self::scheduled), every message for a topic, with its key, its headers and what else is known of it.
    ///
    /// # Panics
    /// The database fails.
    pub async fn scheduled_in(&self, topic: &str) -> Vec<PublishedMessage> {
        self.read(SCHEDULED, topic).await
    }

    async fn read(&self, query: &'static str, topic: &str) -> Vec<PublishedMessage> {
        let rows = sqlx::query(query).bind(topic).fetch_all(self.pool()).await;
        let rows = rows.expect("the messages are read");
        let messages: Result<Vec<PublishedMessage>, _> = rows.iter().map(PublishedMessage::read).collect();
        let mut messages = messages.expect("the messages are read");
        let own = locked(&self.0.own);
        messages.retain(|message| !own.contains(&message.id));
        messages
    }
}

fn decode_all<T: Message>(messages: &[PublishedMessage]) -> Vec<T> {
    let decoded = messages.iter().filter_map(|message| {
        let decoded = message.decode()?;
        let refused = |error| {
            panic!(
                "message {} on topic {} cannot be decoded: {error}",
                message.id, message.topic
            )
        };
        Some(decoded.unwrap_or_else(refused))
    });
    decoded.collect()
}
