//! The payload as it is.

use super::{Extract, Invocation};
use crate::outcome::HandlerError;

/// The payload's bytes with their media type. The handler says `topic = "…"` itself.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Raw {
    /// The bytes.
    pub payload: Vec<u8>,
    /// Their media type.
    pub content_type: String,
}

impl Raw {
    /// A payload with its media type, for a test that calls a handler itself.
    pub fn new(payload: impl Into<Vec<u8>>, content_type: impl Into<String>) -> Self {
        Self {
            payload: payload.into(),
            content_type: content_type.into(),
        }
    }
}

impl Extract for Raw {
    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        let message = invocation.record.message();
        Ok(Self {
            payload: message.payload.to_vec(),
            content_type: message
                .content_type
                .as_deref()
                .unwrap_or(postbox::JSON)
                .to_owned(),
        })
    }
}
