//! What `derive(Message)` expands to, and what the other crates of Postbox share. Hidden and without a promise: only those of the same version use it.

#[cfg(feature = "sqlx")]
pub use crate::adapters::sqlx::SqlxTransaction;
pub use crate::publish::{Answer, Bind, OpenTransaction, Query};
pub use crate::reserved::{CRON, REDRIVEN, REPLAYED, SCHEDULED_AT, dead_letters};
#[cfg(feature = "sqlx")]
pub use crate::transaction::{Transaction, begin_on};
use std::borrow::Cow;
use std::fmt::Display;

pub use serde;
use serde::Serialize;
use serde::de::DeserializeOwned;
pub use serde_json;

use crate::{DecodeError, EncodeError};

/// A value whose whole self is the JSON payload.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not JSON, which a derived message is stored as",
    label = "add #[derive(Serialize, Deserialize)]",
    note = "for another encoding, implement `Message` by hand"
)]
pub trait Payload: Sized {
    /// As `Message::encode`.
    fn encode(&self) -> Result<Vec<u8>, EncodeError>;

    /// As `Message::decode`, the type being known.
    fn decode(payload: &[u8]) -> Result<Self, DecodeError>;
}

#[diagnostic::do_not_recommend]
impl<T: Serialize + DeserializeOwned> Payload for T {
    fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        serde_json::to_vec(self).map_err(EncodeError::new)
    }

    fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        decode(payload)
    }
}

/// The serializer that a variant's content is written with.
pub type Serializer<'a> = serde_json::Serializer<&'a mut Vec<u8>>;

/// The payload that `write` makes.
pub fn encode(
    write: impl FnOnce(&mut Serializer<'_>) -> Result<(), serde_json::Error>,
) -> Result<Vec<u8>, EncodeError> {
    let mut payload = Vec::new();
    write(&mut Serializer::new(&mut payload)).map_err(EncodeError::new)?;
    Ok(payload)
}

/// Reads the content of a variant.
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, DecodeError> {
    serde_json::from_slice(payload).map_err(DecodeError::new)
}

/// A value that can be written as an ordering key.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an ordering key, because it does not implement `Display`",
    label = "not a key",
    note = "name another field or a text: `key = order_id.0`, `key = order_id.as_str()`"
)]
pub trait KeyText {
    /// The key's text.
    fn key_text(&self) -> String;
}

#[diagnostic::do_not_recommend]
impl<T: Display + ?Sized> KeyText for T {
    fn key_text(&self) -> String {
        self.to_string()
    }
}

/// Tells an `Option` from any other key by method resolution: `(&Key(&value)).kind()` finds [`OptionalKey`]
/// without a further reference and [`RequiredKey`] only with one. (Two blanket implementations of one trait
/// would overlap.)
pub struct Key<'a, T: ?Sized>(pub &'a T);

/// The key of an `Option`.
pub trait OptionalKey {
    /// The kind that turns it into text.
    fn kind(&self) -> Optional {
        Optional
    }
}

impl<T> OptionalKey for Key<'_, Option<T>> {}
impl<T> OptionalKey for Key<'_, &Option<T>> {}

/// The key of anything else.
pub trait RequiredKey {
    /// The kind that turns it into text.
    fn kind(&self) -> Required {
        Required
    }
}

impl<T: ?Sized> RequiredKey for &Key<'_, T> {}

/// `None` is no key.
pub struct Optional;

impl Optional {
    /// The text, if there is a value.
    pub fn text<T: KeyText>(self, key: &Option<T>) -> Option<Cow<'static, str>> {
        key.as_ref().map(|key| Cow::Owned(key.key_text()))
    }
}

/// There is always a key.
pub struct Required;

impl Required {
    /// The text.
    pub fn text<T: KeyText + ?Sized>(self, key: &T) -> Option<Cow<'static, str>> {
        Some(Cow::Owned(key.key_text()))
    }
}
