//! For which due time a recurring message is.

use chrono::{DateTime, Utc};
use postbox::cron::SCHEDULED_AT;

use super::{Extract, Invocation};
use crate::outcome::HandlerError;

/// The due time of a firing. A handler that is retried, or runs late, still sees the time that it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ScheduledAt(pub DateTime<Utc>);

impl Extract for ScheduledAt {
    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        let headers = invocation.record.message().headers.as_deref();
        headers
            .and_then(|headers| headers.get(SCHEDULED_AT))
            .and_then(|at| at.parse().ok())
            .map(Self)
            .ok_or_else(|| {
                HandlerError::undecodable(format!(
                    "the message has no header {SCHEDULED_AT} with an instant: it is not the firing of a cron schedule"
                ))
            })
    }
}
