//! A transaction on a connection of the application's pool, which the pool gets back without one, whenever this is dropped.
//!
//! sqlx's own is not yet known to be one when its `begin` is dropped: the pool would lend the connection with the transaction open, and what others
//! write there would be lost (<https://github.com/launchbadge/sqlx/issues/4393>).

use std::ops::{Deref, DerefMut};

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgTransactionManager;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;

/// Begins a transaction with such a statement; dropped or failed meanwhile, the connection is closed. sqlx takes it for a transaction, so that one that is
/// begun on it is a savepoint.
pub async fn begin_on(
    connection: PoolConnection<Postgres>,
    statement: &str,
) -> Result<PoolConnection<Postgres>, sqlx::Error> {
    struct Begins(Option<PoolConnection<Postgres>>);

    impl Drop for Begins {
        fn drop(&mut self) {
            if let Some(connection) = &mut self.0 {
                connection.close_on_drop();
            }
        }
    }

    let statement = AssertSqlSafe(statement).into_sql_str();
    let mut begins = Begins(Some(connection));
    if let Some(connection) = &mut begins.0 {
        PgTransactionManager::begin(connection, Some(statement)).await?;
    }
    begins.0.take().ok_or(sqlx::Error::BeginFailed)
}

/// An open transaction. Dropped, it is rolled back before its connection is the pool's again.
#[derive(Debug)]
pub struct Transaction(PoolConnection<Postgres>);

impl Transaction {
    /// Begins one with such a statement.
    pub async fn begin(pool: &PgPool, statement: &str) -> Result<Self, sqlx::Error> {
        Ok(Self(begin_on(pool.acquire().await?, statement).await?))
    }

    /// Commits it. After an error that is the connection's it may have been.
    pub async fn commit(mut self) -> Result<(), sqlx::Error> {
        PgTransactionManager::commit(&mut self.0).await
    }
}

impl Deref for Transaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.0
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.0
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        // Nothing, if it was committed.
        PgTransactionManager::start_rollback(&mut self.0);
    }
}
