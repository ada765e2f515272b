//! A message that a group has given up, and who is told of it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use postbox::__private::dead_letters::{
    ATTEMPTS, GROUP, HALTED, HEADER_PREFIX, ID, OFFSET, PUBLISHED_AT, REASON, TOPIC, TOPIC_PREFIX,
};
use postbox::{Headers, MessageId, Offset};

use super::{Delivery, Extract, Invocation, Needs};
use crate::log::block::Record;
use crate::outcome::HandlerError;
use crate::state::States;

/// A message that a group has given up, as an argument.
///
/// - In a function set by `#[handler(on_dead_letter = …)]`, which is told of the dead letters of one handler: once each is in the database, at most
///   once, so not if the process dies just then. It may take what a handler of the message takes beside it. Its error is logged. Its [`Tx`](crate::Tx) is a
///   transaction that commits when it returns `Ok`.
/// - In a handler of the dead letters of a group, `#[handler(group = "…", dead_letters_of = "…")]`, which gets them as messages, in its own group, with
///   everything that other messages have: they wait for it, are retried, and with a `Tx` handled exactly once. What the group gave up before there was such a
///   handler is not among them.
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

    /// One for a test that calls a function itself which is told of dead letters, or handles them: the message of a delivery, given up for this reason
    /// after its attempts, without a payload. What it says can be changed.
    pub fn for_test(delivery: Delivery, reason: &str) -> Self {
        Self {
            group: delivery.group,
            topic: delivery.topic,
            id: delivery.id,
            offset: delivery.offset,
            message_type: delivery.message_type,
            key: delivery.key,
            headers: delivery.headers,
            content_type: None,
            payload: Vec::new(),
            published_at: delivery.published_at,
            attempts: delivery.attempt,
            reason: reason.to_owned(),
            halted: false,
            states: Arc::default(),
        }
    }

    /// As it is with this state, for the same.
    pub fn with_state<S: Clone + Send + Sync + 'static>(mut self, state: S) -> Self {
        let mut states = (*self.states).clone();
        states.insert(state);
        self.states = Arc::new(states);
        self
    }

    /// A clone of the value given to [`Consumer::state`](crate::Consumer::state), if there is one of this type.
    pub fn state<S: Clone + Send + Sync + 'static>(&self) -> Option<S> {
        self.states.get()
    }
}

/// The topic of the dead letters of a group. postbox.publish_dead_letters writes them.
pub(crate) fn topic_of(group: &str) -> String {
    format!("{TOPIC_PREFIX}{group}")
}

impl Extract for DeadLetter {
    const NEEDS: Needs = Needs::DEAD_LETTER;

    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        if let Some(letter) = &invocation.letter {
            return Ok((**letter).clone());
        }
        let message = invocation.record.message();
        let headers = message.headers.as_deref().cloned().unwrap_or_default();
        let said = |name: &str| {
            headers.get(name).ok_or_else(|| {
                HandlerError::undecodable(format!(
                    "the message has no header {name}: it is no dead letter of a group"
                ))
            })
        };
        Ok(Self {
            group: said(GROUP)?.into(),
            topic: said(TOPIC)?.into(),
            id: read(ID, said(ID)?)?,
            offset: Offset::new(read(OFFSET, said(OFFSET)?)?),
            message_type: message.message_type.clone(),
            key: message.key.as_deref().map(str::to_owned),
            headers: headers
                .iter()
                .filter(|(name, _)| !name.starts_with(HEADER_PREFIX))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            content_type: message.content_type.as_deref().map(str::to_owned),
            payload: message.payload.to_vec(),
            published_at: read(PUBLISHED_AT, said(PUBLISHED_AT)?)?,
            attempts: read(ATTEMPTS, said(ATTEMPTS)?)?,
            reason: said(REASON)?.to_owned(),
            halted: read(HALTED, said(HALTED)?)?,
            states: invocation.states.clone(),
        })
    }
}

fn read<T: FromStr>(name: &str, value: &str) -> Result<T, HandlerError> {
    let wrong = || HandlerError::undecodable(format!("header {name} of the message is {value:?}"));
    value.parse().map_err(|_| wrong())
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
