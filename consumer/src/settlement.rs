//! Runs a transactional handler: its effect and its settlement commit together, fenced by the lane's epoch.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, PoisonError};

use futures_util::FutureExt;
use sqlx::{AssertSqlSafe, PgPool};

use crate::executor::timed_out;
use crate::extract::{Invocation, TxConnection};
use crate::handler::HandlerError;
use crate::router::{Handler, tx_slot};

/// How a run ended.
pub(crate) enum Verdict {
    Settled,
    Failed(HandlerError),
    /// The transaction could not begin, or was lost before its commit: the handler is not to blame.
    Unavailable(String),
    /// The connection was lost during the commit.
    InDoubt(String),
    /// The lane has another owner; nothing was committed.
    Stale,
}

/// What a settlement is fenced by.
pub(crate) struct Fence {
    pub(crate) consumer: i32,
    pub(crate) subscription: i32,
    pub(crate) lane: u16,
    pub(crate) epoch: i32,
    pub(crate) offset: i64,
    /// It has a row in `postbox.redelivery`, which goes with the same commit.
    pub(crate) stored: bool,
}

/// The timeout is below the shortest lease, so that a frozen owner's row locks do not hold up its successor.
const BEGIN: &str =
    "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL idle_in_transaction_session_timeout = '5s'";

/// The fence and the commit go in one message, so an owner cannot be frozen between them.
fn settle_and_commit(fence: &Fence) -> String {
    let Fence {
        consumer,
        subscription,
        lane,
        epoch,
        offset,
        stored,
    } = fence;
    let forget = match stored {
        true => format!(
            "DELETE FROM postbox.redelivery WHERE subscription_id = {subscription} AND \"offset\" = {offset}; "
        ),
        false => String::new(),
    };
    format!(
        "SELECT postbox.settle({consumer}, {subscription}, {lane}::smallint, {epoch}, ARRAY[{offset}]::bigint[]); {forget}COMMIT"
    )
}

/// Raised by `postbox.settle`.
const STALE: &str = "PB001";

pub(crate) async fn run(
    pool: PgPool,
    fence: Fence,
    handler: Arc<Handler>,
    mut invocation: Invocation,
) -> Verdict {
    let mut connection = match pool.acquire().await {
        Ok(connection) => TxConnection::new(connection),
        Err(error) => return Verdict::Unavailable(error.to_string()),
    };
    if let Err(error) = sqlx::raw_sql(BEGIN).execute(&mut *connection).await {
        return Verdict::Unavailable(error.to_string());
    }
    let slot = tx_slot(connection);
    invocation.tx = Some(slot.clone());
    let timeout = handler.timeout;
    let run = AssertUnwindSafe(handler.call(invocation)).catch_unwind();
    let outcome = match tokio::time::timeout(timeout, run).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(panic)) => Err(crate::executor::panicked(panic)),
        Err(_) => Err(timed_out(timeout)),
    };
    let Some(mut connection) = slot.lock().unwrap_or_else(PoisonError::into_inner).take() else {
        return Verdict::Failed(HandlerError::retry(
            "the handler still has its Tx: it must let it go before it returns",
        ));
    };
    if let Err(failure) = outcome {
        if sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await.is_ok() {
            connection.finished();
        }
        return Verdict::Failed(failure);
    }
    let statement = AssertSqlSafe(settle_and_commit(&fence));
    match sqlx::raw_sql(statement).execute(&mut *connection).await {
        Ok(_) => {
            connection.finished();
            Verdict::Settled
        }
        Err(sqlx::Error::Database(error)) => {
            // The server answered, so nothing was committed; unless it says that it is going down.
            let verdict = match error.code().as_deref() {
                Some(STALE) => Verdict::Stale,
                Some(code) if code.starts_with("57P") => Verdict::InDoubt(error.to_string()),
                // Deferred constraints and serialization failures are the handler's.
                _ => Verdict::Failed(HandlerError::retry(format!("cannot commit: {error}"))),
            };
            if sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await.is_ok() {
                connection.finished();
            }
            verdict
        }
        Err(error) => Verdict::InDoubt(error.to_string()),
    }
}
