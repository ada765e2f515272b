//! Under construction.

mod message;

pub use message::{DecodeError, EncodeError, JSON, Message};

#[cfg(feature = "derive")]
pub use postbox_macros::Message;

/// What the derive macro expands to; not for use by hand.
#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;
