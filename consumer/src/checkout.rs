//! A connection of the application's pool that serves one transaction after another.
//!
//! Taking a connection from the pool and giving it back costs two round trips, and beginning a transaction one. So a commit begins the next
//! transaction in the same message, and while messages are ready to run the connection stays. See ARCHITECTURE.md, "Transactions".

use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, PgTransaction};

/// After so long it goes back to the pool, so that others who wait there have their turn.
const SPAN: Duration = Duration::from_millis(50);

/// An open transaction.
///
/// Dropped, it is rolled back before its connection is the pool's again. sqlx takes it for a transaction, so that one that is begun on it is
/// a savepoint.
pub(crate) struct Checkout {
    transaction: PgTransaction<'static>,
    since: Instant,
    /// The server's `now()` is not earlier.
    begun: Instant,
}

/// What became of a commit.
pub(crate) enum Committed {
    /// With the transaction that follows, if that could begin.
    Yes(Option<Checkout>),
    /// Perhaps, if the connection was lost.
    No(sqlx::Error, Checkout),
}

/// The timeout is below the shortest lease, so that a frozen owner's row locks do not hold up its successor. It is the transaction's own, so
/// nothing of it stays with the connection.
macro_rules! begun_by {
    ($begin:literal) => {
        concat!($begin, "; SET LOCAL idle_in_transaction_session_timeout = '5s'")
    };
}

const BEGIN: &str = begun_by!("BEGIN ISOLATION LEVEL READ COMMITTED");
const ROLLBACK: &str = begun_by!("ROLLBACK AND CHAIN");
const COMMIT: &str = begun_by!("COMMIT AND CHAIN");

impl Checkout {
    /// A transaction on a connection of the pool.
    pub(crate) async fn begin(pool: &PgPool) -> Result<Self, sqlx::Error> {
        // sqlx's future has many kilobytes, and every run of a handler would carry them about, though few begin so.
        let transaction = Box::pin(pool.begin_with(BEGIN)).await?;
        let since = Instant::now();
        Ok(Self {
            transaction,
            since,
            begun: since,
        })
    }

    /// The same, if it was begun at or after an instant, or anew. Nothing was done in it.
    pub(crate) async fn not_before(self, instant: Instant) -> Result<Self, sqlx::Error> {
        match self.begun < instant {
            true => self.rolled_back().await,
            false => Ok(self),
        }
    }

    /// Takes back what was done.
    pub(crate) async fn rolled_back(mut self) -> Result<Self, sqlx::Error> {
        self.begun = Instant::now();
        sqlx::raw_sql(ROLLBACK).execute(&mut *self.transaction).await?;
        Ok(self)
    }

    /// Commits after these last statements. All is one message, so an owner cannot be frozen between them.
    pub(crate) async fn commit(mut self, last: &[String]) -> Committed {
        self.begun = Instant::now();
        let message = AssertSqlSafe(format!("{}; {COMMIT}", last.join("; ")));
        let mut answers = sqlx::raw_sql(message).execute_many(&mut *self.transaction);
        let mut answered = 0;
        let error = loop {
            match answers.next().await {
                Some(Ok(_)) => answered += 1,
                Some(Err(error)) => break Some(error),
                None => break None,
            }
        };
        drop(answers);
        match error {
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
        &self.transaction
    }
}

impl DerefMut for Checkout {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.transaction
    }
}
