//! What is known of a message beside its payload.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use postbox::{Headers, MessageId, Offset};

use super::{Extract, Invocation};
use crate::handler::HandlerError;

/// What is known of a message beside its payload, and of this run.
#[derive(Debug, Clone)]
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
