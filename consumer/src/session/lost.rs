//! Why a session is lost, and how long it waits for an answer.

use std::time::Duration;

use postbox_core::link;
use postbox_core::restarts::panic_text;

use super::{LEAST_PATIENCE, SLOWEST, STATEMENT_TIMEOUT};
use crate::protocol::progress::Lease;

/// Why a session is over.
pub(super) struct Lost {
    pub(super) why: String,
    pub(super) panicked: bool,
}

impl Lost {
    pub(super) fn by_panic(panic: &(dyn std::any::Any + Send)) -> Self {
        Self {
            why: panic_text(panic),
            panicked: true,
        }
    }
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.why)
    }
}

impl From<String> for Lost {
    fn from(why: String) -> Self {
        Self { why, panicked: false }
    }
}

impl From<sqlx::Error> for Lost {
    fn from(error: sqlx::Error) -> Self {
        Self::from(link::explain(&error))
    }
}

/// While there is no lease yet.
pub(super) async fn within<T>(
    what: &str,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    link::in_time(STATEMENT_TIMEOUT, what, statement).await
}

/// Not beyond the end of the own lease, so that handlers are cancelled before others take over.
pub(super) async fn in_time<T>(
    lease: &Lease,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Lost> {
    in_time_for(0, lease, statement).await
}

/// As [`in_time`], for a statement that carries so many bytes.
pub(super) async fn in_time_for<T>(
    bytes: usize,
    lease: &Lease,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Lost> {
    let patience = STATEMENT_TIMEOUT + Duration::from_secs((bytes / SLOWEST) as u64);
    let limit = lease.left().clamp(LEAST_PATIENCE, patience);
    Ok(link::in_time(limit, "the session", statement).await?)
}
