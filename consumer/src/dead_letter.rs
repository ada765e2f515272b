//! A message that a group has given up, as its hook gets it.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use postbox::{Headers, MessageId, Offset};

use crate::block::Record;
use crate::state::States;

/// A message that a group has given up: what a hook set by `#[handler(on_dead_letter = …)]` gets.
///
/// The hook runs once the dead letter is in the database, at most once: not if the process dies just then. Its error is logged.
#[derive(Clone)]
#[non_exhaustive]
pub struct DeadLetter {
    /// Group that gave it up.
    pub group: Arc<str>,
    /// Topic.
    pub topic: Arc<str>,
    /// Message id.
    pub id: MessageId,
    /// Its place in the topic.
    pub offset: Offset,
    /// Message type, if it has one.
    pub message_type: Option<Arc<str>>,
    /// Ordering key, if it has one.
    pub key: Option<String>,
    /// Headers.
    pub headers: Headers,
    /// Media type of the payload; `None`: `application/json`.
    pub content_type: Option<String>,
    /// The payload.
    pub payload: Vec<u8>,
    /// When it was inserted into the outbox.
    pub published_at: DateTime<Utc>,
    /// Attempts made.
    pub attempts: u32,
    /// Why it was given up, with the last error.
    pub reason: String,
    /// Whether its key waits for an operator.
    pub halted: bool,
    states: Arc<States>,
}

impl DeadLetter {
    pub(crate) fn new(
        group: Arc<str>,
        topic: Arc<str>,
        states: Arc<States>,
        record: &Record,
        attempts: u32,
        reason: String,
        halted: bool,
    ) -> Self {
        let message = record.message();
        Self {
            group,
            topic,
            id: message.id,
            offset: message.offset,
            message_type: message.message_type.clone(),
            key: message.key.as_deref().map(str::to_owned),
            headers: message.headers.as_deref().cloned().unwrap_or_default(),
            content_type: message.content_type.as_deref().map(str::to_owned),
            payload: message.payload.to_vec(),
            published_at: message.published_at,
            attempts,
            reason,
            halted,
            states,
        }
    }

    /// A clone of the value given to [`Consumer::state`](crate::Consumer::state), if there is one of this type.
    pub fn state<S: Clone + Send + Sync + 'static>(&self) -> Option<S> {
        self.states.get()
    }
}

impl fmt::Debug for DeadLetter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetter")
            .field("group", &self.group)
            .field("topic", &self.topic)
            .field("id", &self.id)
            .field("offset", &self.offset)
            .field("attempts", &self.attempts)
            .field("reason", &self.reason)
            .field("halted", &self.halted)
            .finish_non_exhaustive()
    }
}
