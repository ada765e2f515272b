//! The payload as it is.

use super::{Extract, Invocation};
use crate::handler::HandlerError;

/// The payload's bytes with their media type. The handler says `topic = "…"` itself.
#[derive(Debug, Clone)]
pub struct Raw {
    /// The bytes.
    pub payload: Vec<u8>,
    /// Their media type.
    pub content_type: String,
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
