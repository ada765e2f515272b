//! What is known of a message beside its payload.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use postbox::{Headers, MessageId, Offset};

use super::{Extract, Invocation};
use crate::outcome::HandlerError;

/// What is known of a message beside its payload, and of this run.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Delivery {
    /// Message id.
    pub id: MessageId,
    /// Topic.
    pub topic: Arc<str>,
    /// Its place in the topic.
    pub offset: Offset,
    /// Message type, if it has one.
    pub message_type: Option<Arc<str>>,
    /// Ordering key, if it has one.
    pub key: Option<String>,
    /// Headers.
    pub headers: Headers,
    /// The group it is handled for.
    pub group: Arc<str>,
    /// Which attempt this is, from 1.
    pub attempt: u32,
    /// When it was inserted into the outbox.
    pub published_at: DateTime<Utc>,
}

impl Delivery {
    /// One for a test that calls a handler itself: the first attempt at the first message of a topic, of the group `test`, published now. What it
    /// says can be changed.
    pub fn for_test(topic: &str) -> Self {
        Self {
            id: MessageId::new(),
            topic: topic.into(),
            offset: Offset::ZERO,
            message_type: None,
            key: None,
            headers: Headers::default(),
            group: "test".into(),
            attempt: 1,
            published_at: Utc::now(),
        }
    }
}

impl Extract for Delivery {
    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        let message = invocation.record.message();
        Ok(Self {
            id: message.id,
            topic: invocation.topic.clone(),
            offset: message.offset,
            message_type: message.message_type.clone(),
            key: message.key.as_deref().map(str::to_owned),
            headers: message.headers.as_deref().cloned().unwrap_or_default(),
            group: invocation.group.clone(),
            attempt: invocation.attempt,
            published_at: message.published_at,
        })
    }
}
