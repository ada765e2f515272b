//! A JSON payload as any type.

use serde::de::DeserializeOwned;

use super::{Extract, Invocation};
use crate::outcome::HandlerError;

/// The payload, decoded from JSON. The handler says `topic = "…"` itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned + Send> Extract for Json<T> {
    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        serde_json::from_slice(&invocation.record.message().payload)
            .map(Self)
            .map_err(HandlerError::undecodable)
    }
}
