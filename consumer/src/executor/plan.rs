//! What a subscription is, for as long as the process runs.

use std::sync::Arc;
use std::time::Duration;

use postbox::log::Filters;
use sqlx::PgPool;
use tokio::sync::Semaphore;

use crate::clock::DatabaseClock;
use crate::connections::{Share, Statements};
use crate::handler::router::{Handler, Router};
use crate::handler::{self, Hooks, MessageOrder, UnknownType};
use crate::protocol::progress::Counters;
use crate::state::States;

/// What a subscription is, for as long as the process runs.
pub(crate) struct Plan {
    pub(crate) group: Arc<str>,
    pub(crate) topic: Arc<str>,
    pub(crate) order: MessageOrder,
    pub(crate) lanes: u16,
    pub(crate) concurrency: usize,
    /// Most messages of one run.
    pub(crate) batch: usize,
    /// Most messages taken in and not settled.
    pub(crate) window: usize,
    pub(crate) router: Router,
    /// With which the topic is read, for all that read it in this process.
    pub(crate) filters: Arc<Filters>,
    /// What becomes of messages of a type that no live instance takes.
    pub(crate) unknown_types: UnknownType,
    /// Runs for them where that is an error.
    pub(crate) unknown: Arc<Handler>,
    /// Whether the breaker opens.
    pub(crate) breaker: handler::Breaker,
    /// So many messages may fail at once, over all instances, before no more are taken in.
    pub(crate) max_failing: usize,
    /// For the messages of which a process may have died: one at a time in this process.
    pub(crate) quarantine: Arc<Semaphore>,
    /// By which messages expire.
    pub(crate) clock: Arc<DatabaseClock>,
    pub(crate) states: Arc<States>,
    /// Of the process's own connections, for a statement at a time.
    pub(crate) pool: PgPool,
    /// Where those run who are told of dead letters.
    pub(crate) hooks: Arc<Hooks>,
    /// Where transactional handlers get theirs, if there are any.
    pub(crate) transactions: Option<Transactions>,
    pub(crate) counters: Counters,
}

impl Plan {
    /// For how long a message has waited for a connection, if for long.
    pub(crate) fn connection_wait(&self) -> Option<Duration> {
        self.transactions.as_ref()?.share.longest_wait()
    }
}

/// Where transactional handlers get their transactions.
pub(crate) struct Transactions {
    pub(crate) share: Arc<Share>,
    pub(crate) statements: Arc<Statements>,
}
