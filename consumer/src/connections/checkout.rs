//! A connection of the application's pool that serves one transaction after another.
//!
//! Taking a connection from the pool and giving it back costs two round trips, and beginning a transaction one. So a commit begins the next
//! transaction in the same message, and while messages are ready to run the connection stays. See docs/internals/settling.md.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use postbox::__private::begin_on;
use postbox_core::link::in_time;
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgTransactionManager;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres};
use sqlx_core::transaction::TransactionManager;

use super::Seat;

/// After so long it goes back to the pool, so that others who wait there have their turn.
const SPAN: Duration = Duration::from_millis(50);

/// A connection that does not answer for so long is dead, though nobody said so. A commit may wait for a standby.
pub(crate) const ROUND_TRIP: Duration = Duration::from_secs(10);
const COMMIT_TIMEOUT: Duration = Duration::from_secs(30);
/// For what is left of it to be rolled back on its way to the pool.
const RETURN_TIMEOUT: Duration = Duration::from_secs(5);

/// An open transaction.
///
/// Dropped, it is rolled back before its connection is the pool's again; if the server does not answer, the connection is closed, and the pool
/// has room for another. (sqlx's own transaction would wait for the answer for ever, and the pool's room with it.) sqlx takes it for a
/// transaction, so that one that is begun on it is a savepoint.
pub(crate) struct Checkout {
    connection: PoolConnection<Postgres>,
    statements: Arc<Statements>,
    since: Instant,
    /// The server's `now()` is not earlier.
    begun: Instant,
    // The last: the connection is given back before the right to one is.
    seat: Seat,
}

/// What became of a commit.
pub(crate) enum Committed {
    /// With the transaction that follows, if that could begin.
    Yes(Option<Checkout>),
    /// Perhaps, if the connection was lost.
    No(sqlx::Error, Checkout),
}

/// How transactions of a subscription begin and end.
///
/// What is set is the transaction's own, so nothing of it stays with the connection. A transaction that its handler ended, and began another, has lost it.
pub(crate) struct Statements {
    begin: String,
    rollback: String,
    commit: String,
}

/// Set while the transaction is the one that Postbox began.
const MARK: &str = "SELECT coalesce(pg_catalog.current_setting('postbox.handling', true) OPERATOR(pg_catalog.=) 'on', false)";

/// The mark as the last argument of `postbox.settle` and `postbox.settle_batch`.
pub(crate) const MARKED: &str = "pg_catalog.current_setting('postbox.handling', true)";

impl Statements {
    /// Handlers have so long. The server ends a transaction that is idle for longer: a live owner never lets it come to that, and a frozen one's row locks do not
    /// hold up its successor for good.
    pub(crate) fn within(timeout: Duration) -> Self {
        let idle = timeout.saturating_add(Duration::from_secs(1)).as_millis();
        let idle = idle.min(i32::MAX as u128);
        let begun_by = |begin: &str| {
            format!(
                "{begin}; SET LOCAL idle_in_transaction_session_timeout = {idle}; SET LOCAL postbox.handling = 'on'"
            )
        };
        Self {
            // Whatever the database, the role and the application's pool default to; the next transaction is as this one.
            begin: begun_by("BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE, NOT DEFERRABLE"),
            // Unless a handler changed it: what it did so is not for the next one.
            rollback: begun_by(
                "ROLLBACK AND CHAIN; SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE, NOT DEFERRABLE",
            ),
            commit: begun_by("COMMIT AND CHAIN"),
        }
    }
}

impl Checkout {
    /// A transaction on a connection of the pool.
    pub(crate) async fn begin(
        pool: &PgPool,
        statements: Arc<Statements>,
        seat: Seat,
    ) -> Result<Self, sqlx::Error> {
        // sqlx's future has many kilobytes, and every run of a handler would carry them about, though few begin so.
        let connection = Box::pin(pool.acquire()).await?;
        let begin = begin_on(connection, &statements.begin);
        let connection = in_time(ROUND_TRIP, "beginning a transaction", begin).await?;
        let since = Instant::now();
        Ok(Self {
            connection,
            statements,
            since,
            begun: since,
            seat,
        })
    }

    /// The same, if it was begun at or after an instant, or anew. Nothing was done in it.
    pub(crate) async fn not_before(self, instant: Instant) -> Result<Self, sqlx::Error> {
        self.seat.passes_on();
        match self.begun < instant {
            true => self.rolled_back().await,
            false => Ok(self),
        }
    }

    /// Takes back what was done.
    pub(crate) async fn rolled_back(mut self) -> Result<Self, sqlx::Error> {
        self.begun = Instant::now();
        let rollback = AssertSqlSafe(self.statements.rollback.clone());
        let rollback = sqlx::raw_sql(rollback).execute(&mut *self.connection);
        in_time(ROUND_TRIP, "rolling a transaction back", rollback).await?;
        Ok(self)
    }

    /// Whether it is another transaction than the one that was begun here. `false` where that cannot be told, because a statement in it failed.
    pub(crate) async fn is_anothers(&mut self) -> bool {
        let marked = sqlx::query_scalar::<_, bool>(MARK).fetch_one(&mut *self.connection);
        matches!(marked.await, Ok(false))
    }

    /// Commits after these last statements. All is one message, so an owner cannot be frozen between them.
    pub(crate) async fn commit(mut self, last: &[String]) -> Committed {
        self.begun = Instant::now();
        let message = AssertSqlSafe(format!("{}; {}", last.join("; "), self.statements.commit));
        let mut answered = 0;
        let commit = async {
            let mut answers = sqlx::raw_sql(message).execute_many(&mut *self.connection);
            while let Some(answer) = answers.next().await {
                answer?;
                answered += 1;
            }
            Ok(())
        };
        match in_time(COMMIT_TIMEOUT, "committing", commit).await.err() {
            None => Committed::Yes(Some(self)),
            // What failed then is the beginning of the next.
            Some(_) if answered > last.len() => Committed::Yes(None),
            Some(error) => Committed::No(error, self),
        }
    }

    /// Whether it may serve another message.
    pub(crate) fn may_stay(&self) -> bool {
        self.since.elapsed() < SPAN
    }
}

impl Deref for Checkout {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Checkout {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        PgTransactionManager::start_rollback(&mut self.connection);
        // Without a runtime sqlx's own way is left.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let returned = self.connection.return_to_pool();
            runtime.spawn(tokio::time::timeout(RETURN_TIMEOUT, returned));
        }
    }
}
