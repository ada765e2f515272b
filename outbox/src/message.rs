//! What a message is: its topic, type, key and payload.

use std::borrow::Cow;

/// The content type of a payload that says nothing else.
pub const JSON: &str = "application/json";

/// A value that can be published and handled.
///
/// Derive it on a struct for one message type, on an enum for several types of one topic (one a variant):
///
/// ```
/// use postbox::Message;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize, Message)]
/// #[message(topic = "orders", type = "order.placed", key = order_id)]
/// struct OrderPlaced { order_id: u64, total_cents: i64 }
///
/// #[derive(Message)]
/// #[message(topic = "shipments", key = parcel)]
/// enum Shipment {
///     #[message(type = "shipment.sent")]
///     Sent { parcel: String, carrier: String },
///     #[message(type = "shipment.delivered")]
///     Delivered { parcel: String },
/// }
///
/// assert_eq!(OrderPlaced::TOPIC, "orders");
/// assert_eq!(Shipment::TYPES, ["shipment.sent", "shipment.delivered"]);
/// let sent = Shipment::Delivered { parcel: "p1".into() };
/// assert_eq!(sent.message_type(), "shipment.delivered");
/// assert_eq!(sent.key().as_deref(), Some("p1"));
/// assert_eq!(sent.encode().unwrap(), br#"{"parcel":"p1"}"#);
/// ```
///
/// The derived payload is JSON. For Protobuf, Avro or any other encoding implement the trait by hand.
pub trait Message: Sized {
    /// The topic it is published to: 1–255 characters of `A–Z a–z 0–9 . _ - : /`.
    const TOPIC: &'static str;

    /// Every type a value of this Rust type can have, in the alphabet of a topic. A handler that takes this
    /// Rust type is called for exactly these.
    const TYPES: &'static [&'static str];

    /// The media type of what [`encode`](Message::encode) returns.
    const CONTENT_TYPE: &'static str = JSON;

    /// The type of this value; one of [`TYPES`](Message::TYPES).
    fn message_type(&self) -> &'static str;

    /// The ordering key: messages of one key are handled one after another, in the order in which their
    /// transactions committed. `None` (the default) lets the message run beside any other.
    fn key(&self) -> Option<Cow<'_, str>> {
        None
    }

    /// The payload as it is stored.
    ///
    /// # Errors
    ///
    /// What keeps the value from being written in its format.
    fn encode(&self) -> Result<Vec<u8>, EncodeError>;

    /// The value back from a stored payload of the given type.
    ///
    /// # Errors
    ///
    /// The payload is not of the type's form, or the type is none of its types.
    fn decode(message_type: &str, payload: &[u8]) -> Result<Self, DecodeError>;
}

/// A value could not be turned into a payload.
#[derive(Debug, thiserror::Error)]
#[error("the message cannot be encoded: {0}")]
pub struct EncodeError(#[source] Box<dyn std::error::Error + Send + Sync>);

impl EncodeError {
    /// Wraps the encoder's own error.
    pub fn new(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(source.into())
    }
}

/// A payload could not be turned into a value.
#[derive(Debug, thiserror::Error)]
#[error("the payload cannot be decoded: {0}")]
pub struct DecodeError(#[source] Box<dyn std::error::Error + Send + Sync>);

impl DecodeError {
    /// Wraps the decoder's own error.
    pub fn new(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(source.into())
    }

    /// The type is none that this Rust type knows.
    pub fn unknown_type(message_type: &str, known: &[&str]) -> Self {
        Self(format!("type {message_type:?} is none of {known:?}").into())
    }
}
