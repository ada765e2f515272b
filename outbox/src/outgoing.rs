//! A message on its way out, and the limits it must keep.

use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::error::{Error, Result};
use crate::headers::Headers;
use crate::id::MessageId;
use crate::message::{EncodeError, JSON, Message};
use crate::rules::{self, MAX_KEY, is_name};

/// Largest payload in bytes unless [`set_payload_limit`] says otherwise.
pub const DEFAULT_PAYLOAD_LIMIT: usize = 1024 * 1024;
/// For how long a deduplication key is remembered unless [`Outgoing::dedup_window`] says otherwise.
pub const DEFAULT_DEDUP_WINDOW: Duration = Duration::from_secs(24 * 3600);

const MAX_DEDUP_WINDOW: Duration = Duration::from_secs(10 * 366 * 24 * 3600);
/// Of delays and lifetimes: what PostgreSQL can add to the time of today.
const MAX_SPAN: Duration = Duration::from_secs(10_000 * 366 * 24 * 3600);

static PAYLOAD_LIMIT: AtomicUsize = AtomicUsize::new(DEFAULT_PAYLOAD_LIMIT);

/// Sets the largest payload that this process publishes, in bytes (1 MiB by default).
///
/// Messages are read in batches of a few MiB, so for large documents publish a reference instead.
pub fn set_payload_limit(bytes: usize) {
    PAYLOAD_LIMIT.store(bytes, Ordering::Relaxed);
}

/// A message with what can be said about its publishing.
///
/// [`message`] makes one from a [`Message`], [`Outgoing::json`] and [`Outgoing::bytes`] from anything else:
///
/// ```
/// use postbox::Outgoing;
///
/// let reminder = Outgoing::json("reminders", &serde_json::json!({"cart": 42}))
///     .message_type("cart.abandoned")
///     .key("42")
///     .header("tenant", "acme")
///     .dedup_key("cart-42");
/// let image = Outgoing::bytes("thumbnails", "image/png", vec![0x89, 0x50]);
/// ```
#[derive(Debug)]
#[must_use = "it does nothing until it is published"]
pub struct Outgoing {
    pub(crate) id: MessageId,
    pub(crate) topic: Cow<'static, str>,
    pub(crate) message_type: Option<Cow<'static, str>>,
    pub(crate) key: Option<String>,
    pub(crate) headers: Headers,
    pub(crate) content_type: Cow<'static, str>,
    pub(crate) payload: Result<Vec<u8>, EncodeError>,
    dedup_key: Option<String>,
    dedup_window: Option<Duration>,
    pub(crate) ordered: bool,
    pub(crate) due: Option<When>,
    pub(crate) expiry: Option<When>,
}

/// An instant, or a span whose beginning the database's clock gives.
#[derive(Debug, Clone, Copy)]
pub(crate) enum When {
    At(DateTime<Utc>),
    In(Duration),
}

impl When {
    pub(crate) fn at(self) -> Option<DateTime<Utc>> {
        match self {
            When::At(instant) => Some(instant),
            When::In(_) => None,
        }
    }

    pub(crate) fn span(self) -> Option<Duration> {
        match self {
            When::At(_) => None,
            When::In(span) => Some(span),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Dedup {
    pub(crate) key: String,
    pub(crate) window: Duration,
}

/// The message as [`Outgoing`], to say more about its publishing.
pub fn message<M: Message>(message: &M) -> Outgoing {
    Outgoing::from(message)
}

impl<M: Message> From<&M> for Outgoing {
    fn from(message: &M) -> Self {
        let mut outgoing = Outgoing::new(
            Cow::Borrowed(M::TOPIC),
            Cow::Borrowed(M::CONTENT_TYPE),
            message.encode(),
        );
        outgoing.message_type = Some(Cow::Borrowed(message.message_type()));
        outgoing.key = message.key().map(Cow::into_owned);
        outgoing
    }
}

impl Outgoing {
    fn new(
        topic: Cow<'static, str>,
        content_type: Cow<'static, str>,
        payload: Result<Vec<u8>, EncodeError>,
    ) -> Self {
        Self {
            id: MessageId::new(),
            topic,
            message_type: None,
            key: None,
            headers: Headers::new(),
            content_type,
            payload,
            dedup_key: None,
            dedup_window: None,
            ordered: false,
            due: None,
            expiry: None,
        }
    }

    /// A message whose payload is the JSON of `value`.
    pub fn json(topic: impl Into<Cow<'static, str>>, value: &(impl serde::Serialize + ?Sized)) -> Self {
        let payload = serde_json::to_vec(value).map_err(EncodeError::new);
        Self::new(topic.into(), Cow::Borrowed(JSON), payload)
    }

    /// A message whose payload is these bytes, of the given media type.
    pub fn bytes(
        topic: impl Into<Cow<'static, str>>,
        content_type: impl Into<Cow<'static, str>>,
        payload: impl Into<Vec<u8>>,
    ) -> Self {
        Self::new(topic.into(), content_type.into(), Ok(payload.into()))
    }

    /// The id it has when it is published.
    pub fn id(&self) -> MessageId {
        self.id
    }

    /// Publishes to another topic than the message's own.
    pub fn topic(mut self, topic: impl Into<Cow<'static, str>>) -> Self {
        self.topic = topic.into();
        self
    }

    /// The message type, which chooses the handler within a group.
    pub fn message_type(mut self, message_type: impl Into<Cow<'static, str>>) -> Self {
        self.message_type = Some(message_type.into());
        self
    }

    /// The ordering key, up to 1,024 bytes: messages of one key are handled one after another.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds a header. A name is 1 to 128 characters of `A–Z a–z 0–9 . _ -`; names beginning with `postbox-` are
    /// reserved; all headers together have at most 16,384 bytes as JSON.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name, value);
        self
    }

    /// Adds many headers.
    pub fn headers(mut self, headers: impl IntoIterator<Item = (String, String)>) -> Self {
        for (name, value) in headers {
            self.headers.insert(name, value);
        }
        self
    }

    /// Makes publishing idempotent: while the key is remembered (24 h, see [`dedup_window`](Self::dedup_window)), publishing
    /// to the same topic with it again does nothing and returns the first message's id.
    ///
    /// Two transactions that publish with one key at the same time wait for each other. Costs one more row; the key
    /// is forgotten if the transaction rolls back.
    pub fn dedup_key(mut self, key: impl Into<String>) -> Self {
        self.dedup_key = Some(key.into());
        self
    }

    /// For how long the deduplication key is remembered: more than zero, at most 10 years. It needs a [`dedup_key`](Self::dedup_key).
    pub fn dedup_window(mut self, window: Duration) -> Self {
        self.dedup_window = Some(window);
        self
    }

    /// Takes a lock on the topic and key before the message is written, held until the transaction ends: of two transactions
    /// that publish to one key, the one whose message comes first also commits first.
    ///
    /// Needed only where concurrent transactions on one key do not already wait for each other on a row (an `UPDATE` of the
    /// entity, say). It makes transactions on one key run one after another from here on, and costs two advisory locks. A transaction that does it
    /// with more than 64 keys waits for some others too, since it locks keys by the bucket, of which there are 128. Publishing to several keys in different orders can deadlock, which PostgreSQL resolves by failing one transaction;
    /// [`publish_all`](crate::Publish::publish_all) takes the locks of a batch in one order.
    pub fn ordered(mut self) -> Self {
        self.ordered = true;
        self
    }

    /// Delivers it at this instant, or now if that is past; never earlier by the database's clock. No instant is too far away.
    ///
    /// Until then it can be cancelled and rescheduled by its id ([`Publish::cancel`](crate::Publish::cancel),
    /// [`Publish::reschedule`](crate::Publish::reschedule)). It takes its place in its key's order when it becomes due: messages that were
    /// published before that are before it. Costs one more row while it waits.
    pub fn deliver_at(mut self, instant: DateTime<Utc>) -> Self {
        self.due = Some(When::At(instant));
        self
    }

    /// As [`deliver_at`](Self::deliver_at), after a span from now by the database's clock. At most 10,000 years.
    pub fn delay(mut self, span: Duration) -> Self {
        self.due = Some(When::In(span));
        self
    }

    /// From this instant on it is no longer handled: an expired message is settled and counted instead of run. By default a message does not
    /// expire.
    pub fn expires_at(mut self, instant: DateTime<Utc>) -> Self {
        self.expiry = Some(When::At(instant));
        self
    }

    /// As [`expires_at`](Self::expires_at), after a span from when it is published, or from when it is due if that is later. More than zero, and
    /// at most 10,000 years.
    pub fn expires_in(mut self, span: Duration) -> Self {
        self.expiry = Some(When::In(span));
        self
    }

    /// Checks every limit, so that the database refuses nothing later and the transaction stays usable.
    pub(crate) fn validate(self) -> Result<Valid> {
        if !is_name(&self.topic) {
            return Err(Error::InvalidTopic(self.topic.into_owned()));
        }
        if let Some(message_type) = self.message_type.as_deref() {
            rules::check_type(message_type)?;
        }
        if let Some(key) = &self.key {
            rules::check_key(key)?;
            refuse_nul("key", key)?;
        }
        let headers = self.check_headers()?;
        rules::check_content_type(&self.content_type)?;
        let dedup = match (self.dedup_key, self.dedup_window) {
            (Some(key), window) => Some(Dedup {
                key,
                window: window.unwrap_or(DEFAULT_DEDUP_WINDOW),
            }),
            (None, Some(_)) => return Err(Error::DedupWindowWithoutKey),
            (None, None) => None,
        };
        if let Some(dedup) = &dedup {
            if !(1..=MAX_KEY).contains(&dedup.key.len()) {
                return Err(Error::InvalidDedupKey(dedup.key.len()));
            }
            refuse_nul("deduplication key", &dedup.key)?;
            if dedup.window.is_zero() || dedup.window > MAX_DEDUP_WINDOW {
                return Err(Error::InvalidDedupWindow(dedup.window));
            }
        }
        if let Some(delay) = self.due.and_then(When::span).filter(|delay| *delay > MAX_SPAN) {
            return Err(Error::InvalidDelay(delay));
        }
        let lifetime = self.expiry.and_then(When::span);
        if let Some(lifetime) = lifetime.filter(|span| span.is_zero() || *span > MAX_SPAN) {
            return Err(Error::InvalidLifetime(lifetime));
        }
        let payload = self.payload?;
        let limit = PAYLOAD_LIMIT.load(Ordering::Relaxed);
        if payload.len() > limit {
            return Err(Error::PayloadTooLarge {
                size: payload.len(),
                limit,
            });
        }
        Ok(Valid {
            id: self.id,
            topic: self.topic,
            message_type: self.message_type,
            key: self.key,
            headers,
            content_type: (self.content_type != JSON).then_some(self.content_type),
            payload,
            dedup,
            ordered: self.ordered,
            due: self.due,
            expiry: self.expiry,
        })
    }

    fn check_headers(&self) -> Result<Option<serde_json::Value>> {
        if self.headers.is_empty() {
            return Ok(None);
        }
        for (name, value) in self.headers.iter() {
            rules::check_header_name(name)?;
            refuse_nul("headers", value)?;
        }
        let json = serde_json::to_value(&self.headers).map_err(EncodeError::new)?;
        // PostgreSQL's text of a jsonb object has a space after each comma and colon.
        rules::check_headers_size(json.to_string().len() + 2 * self.headers.len() - 1)?;
        Ok(Some(json))
    }
}

/// An [`Outgoing`] that keeps every limit.
#[derive(Debug)]
pub struct Valid {
    pub(crate) id: MessageId,
    pub(crate) topic: Cow<'static, str>,
    pub(crate) message_type: Option<Cow<'static, str>>,
    pub(crate) key: Option<String>,
    pub(crate) headers: Option<serde_json::Value>,
    pub(crate) content_type: Option<Cow<'static, str>>,
    pub(crate) payload: Vec<u8>,
    pub(crate) dedup: Option<Dedup>,
    pub(crate) ordered: bool,
    pub(crate) due: Option<When>,
    pub(crate) expiry: Option<When>,
}

fn refuse_nul(field: &'static str, text: &str) -> Result<()> {
    if text.contains('\0') {
        Err(Error::NulCharacter { field })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::MAX_HEADERS;

    fn refused(outgoing: Outgoing) -> String {
        outgoing.validate().expect_err("it is refused").to_string()
    }

    fn ok() -> Outgoing {
        Outgoing::json("t", &1)
    }

    #[test]
    fn limits_are_inclusive() {
        let largest = Outgoing::bytes("t".repeat(255), "x".repeat(255), vec![0; DEFAULT_PAYLOAD_LIMIT])
            .message_type("y".repeat(255))
            .key("k".repeat(1024))
            .header("h".repeat(128), "v")
            .dedup_key("d".repeat(1024));
        assert!(largest.validate().is_ok());
    }

    #[test]
    fn what_breaks_a_limit_is_refused_by_name() {
        for (outgoing, says) in [
            (ok().topic(""), "topic \"\""),
            (ok().topic("t".repeat(256)), "topic"),
            (ok().topic("a b"), "topic \"a b\""),
            (ok().topic("ä"), "topic"),
            (ok().message_type(""), "type \"\""),
            (ok().message_type("a,b"), "type \"a,b\""),
            (ok().key("k".repeat(1025)), "1025 bytes"),
            (ok().key("a\0b"), "the key contains"),
            (ok().header("a b", ""), "header name \"a b\""),
            (ok().header("", ""), "header name \"\""),
            (ok().header("postbox-x", ""), "reserved"),
            (ok().header("a", "\0"), "the headers contains"),
            (ok().header("a", "v".repeat(MAX_HEADERS)), "16,384"),
            (Outgoing::bytes("t", "", vec![]), "content type"),
            (Outgoing::bytes("t", "a\nb", vec![]), "content type"),
            (
                Outgoing::bytes("t", "a/b", vec![0; DEFAULT_PAYLOAD_LIMIT + 1]),
                "1048577 bytes",
            ),
            (ok().dedup_key(""), "deduplication key has 0 bytes"),
            (ok().dedup_key("a\0"), "deduplication key contains"),
            (ok().dedup_key("a").dedup_window(Duration::ZERO), "window"),
            (ok().delay(Duration::MAX), "10,000 years"),
            (ok().expires_in(Duration::ZERO), "more than zero"),
            (ok().expires_in(Duration::MAX), "10,000 years"),
        ] {
            let error = refused(outgoing);
            assert!(error.contains(says), "{error:?} says {says:?}");
        }
    }
}
