//! Runs a transactional handler: its effect and its settlement commit together, fenced by the lanes' epochs.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use postbox::__private::{Bind, Query};
use postbox_core::link::{explain, in_time};
use postbox_core::restarts::say;
use sqlx::PgPool;
use tracing::warn;

use crate::connections::Share;
use crate::connections::{Checkout, Committed, MARKED, ROUND_TRIP, Statements};
use crate::extract::{Claim, ClaimedRun, Invocation, TxSource, Used};
use crate::handler::router::Handler;
use crate::ids::{ConsumerId, Epoch, Lane, SubscriptionId};
use crate::outcome::timed_out;
use crate::outcome::{HandlerError, Outcome};

/// How a run ended.
pub(crate) enum Verdict {
    Settled,
    Failed(HandlerError),
    /// The transaction could not begin, or was lost before its commit: the handler is not to blame.
    Unavailable(String),
    /// It may have committed: the connection was lost meanwhile, or it is the handler's own transaction. If it has not, it failed so.
    InDoubt(HandlerError),
    /// The lane has another owner; nothing was committed.
    Stale,
}

/// What a settlement is fenced by.
pub(crate) struct Fence {
    pub(crate) consumer: ConsumerId,
    pub(crate) subscription: SubscriptionId,
    /// With their epochs, in order, so that two fences cannot wait for each other.
    pub(crate) lanes: Vec<(Lane, Epoch)>,
    /// The messages to be settled, with their lanes.
    pub(crate) messages: Vec<(Lane, i64)>,
    /// The one message has a row in `postbox.redelivery`, which goes with the same commit.
    pub(crate) stored: bool,
}

impl Fence {
    /// The last statement of a transaction that is the handler's own, which ends if it is idle for longer than such a handler runs.
    fn query(&self, timeout: Duration) -> Query {
        let sql = match self.stored {
            true => SETTLE_STORED,
            false => SETTLE,
        };
        let idle = timeout.saturating_add(Duration::from_secs(1)).as_millis();
        let array = |numbers: String| format!("{{{numbers}}}");
        let parameters = [
            self.consumer.to_string(),
            self.subscription.to_string(),
            array(list(self.lanes.iter().map(|(lane, _)| lane))),
            array(list(self.lanes.iter().map(|(_, epoch)| epoch))),
            array(list(self.messages.iter().map(|(lane, _)| lane))),
            array(list(self.messages.iter().map(|(_, offset)| offset))),
            idle.min(i32::MAX as u128).to_string(),
        ];
        Query::new(
            sql,
            parameters
                .into_iter()
                .map(|text| Bind::Text(Some(text)))
                .collect(),
        )
    }

    /// Whether all of them are settled.
    async fn is_settled(&self, pool: &PgPool) -> Result<bool, sqlx::Error> {
        let (lanes, offsets): (Vec<Lane>, Vec<i64>) = self.messages.iter().copied().unzip();
        let look = sqlx::query_scalar(IS_SETTLED)
            .bind(self.subscription)
            .bind(lanes)
            .bind(offsets)
            .fetch_one(pool);
        in_time(ROUND_TRIP, "looking whether a message is settled", look).await
    }

    /// Of a run that has settled and ended: whether it committed, and whether that may yet come. Its transaction has the lanes' locks; where these are free it
    /// has ended, and a look after that is the last word. A client may take a moment to roll back what was dropped.
    async fn became_of(&self, pool: &PgPool) -> (Result<bool, sqlx::Error>, bool) {
        for wait in PATIENCE {
            tokio::time::sleep(wait).await;
            match self.is_settled(pool).await {
                Ok(false) => {}
                known => return (known, true),
            }
            match self.look(pool, HAVE_ENDED).await {
                Ok(true) => return (self.is_settled(pool).await, false),
                Ok(false) => {}
                Err(error) => return (Err(error), true),
            }
        }
        (Ok(false), true)
    }

    /// The database has refused to settle.
    async fn refused(&self, pool: &PgPool, code: Option<&str>, why: &str, outcome: Outcome) -> Verdict {
        if code == Some(STALE) {
            // It says so of a lane that it does not know, too.
            return match self.look(pool, IS_OURS).await {
                Ok(true) => Verdict::Failed(HandlerError::dead_letter(
                    "the handler settles in a transaction of another database than its message's: begin it on the consumer's database",
                )),
                _ => Verdict::Stale,
            };
        }
        // Nor can a transaction commit of which a statement failed.
        match outcome {
            Err(failure) => Verdict::Failed(failure),
            Ok(()) => Verdict::Failed(HandlerError::retry(format!(
                "the handler returned Ok although its message could not be settled: {why}"
            ))),
        }
    }

    /// Something about all of the lanes.
    async fn look(&self, pool: &PgPool, what: &'static str) -> Result<bool, sqlx::Error> {
        let (lanes, epochs): (Vec<Lane>, Vec<Epoch>) = self.lanes.iter().copied().unzip();
        let look = sqlx::query_scalar(what)
            .bind(self.subscription)
            .bind(lanes)
            .bind(epochs)
            .bind(self.consumer)
            .fetch_one(pool);
        in_time(ROUND_TRIP, "looking what became of a handler's transaction", look).await
    }

    /// The last statements of the transaction.
    fn statements(&self) -> Vec<String> {
        let Fence {
            consumer,
            subscription,
            lanes,
            messages,
            stored,
        } = self;
        if let ([(lane, epoch)], [(_, offset)]) = (lanes.as_slice(), messages.as_slice()) {
            // The bigint in quotes, or it would be an integer that is cast when it is called.
            let mut statements = vec![format!(
                "CALL postbox.settle({consumer}, {subscription}, {lane}, {epoch}, '{offset}', {MARKED})"
            )];
            if *stored {
                statements.push(format!(
                    "DELETE FROM postbox.redelivery WHERE subscription_id OPERATOR(pg_catalog.=) {subscription} \
                        AND \"offset\" OPERATOR(pg_catalog.=) {offset}"
                ));
            }
            return statements;
        }
        vec![format!(
            "SELECT postbox.settle_batch({consumer}, {subscription}, '{{{}}}', '{{{}}}', '{{{}}}', '{{{}}}', {MARKED})",
            list(lanes.iter().map(|(lane, _)| lane)),
            list(lanes.iter().map(|(_, epoch)| epoch)),
            list(messages.iter().map(|(lane, _)| lane)),
            list(messages.iter().map(|(_, offset)| offset)),
        )]
    }
}

/// Numbers go as texts, which every client binds; the statement's text is always the same, for those who keep prepared ones.
const SETTLE: &str = "SELECT postbox.settle_batch($1::pg_catalog.text::integer, $2::pg_catalog.text::integer, $3::pg_catalog.text::smallint[], $4::pg_catalog.text::integer[], \
         $5::pg_catalog.text::smallint[], $6::pg_catalog.text::bigint[])::pg_catalog.text \
         OPERATOR(pg_catalog.||) postbox.idle_for_at_most($7::pg_catalog.text::integer) AS answer";

/// Messages that failed before have rows, which go with the same commit.
const SETTLE_STORED: &str = "WITH settled AS (DELETE FROM postbox.redelivery r \
         WHERE r.subscription_id OPERATOR(pg_catalog.=) $2::pg_catalog.text::integer AND r.\"offset\" OPERATOR(pg_catalog.=) ANY ($6::pg_catalog.text::bigint[])) \
     SELECT postbox.settle_batch($1::pg_catalog.text::integer, $2::pg_catalog.text::integer, $3::pg_catalog.text::smallint[], $4::pg_catalog.text::integer[], \
         $5::pg_catalog.text::smallint[], $6::pg_catalog.text::bigint[])::pg_catalog.text \
         OPERATOR(pg_catalog.||) postbox.idle_for_at_most($7::pg_catalog.text::integer) AS answer";

/// Nobody has settled in these lanes and not yet committed. The locks are given back at once.
const HAVE_ENDED: &str = "SELECT coalesce(bool_and(pg_try_advisory_xact_lock(1347571762, $1 * 1024 + m.lane)), true) AND $4 IS NOT NULL \
     FROM unnest($2::smallint[], $3::integer[]) AS m (lane, epoch)";

/// The lanes are this consumer's, and its session lives.
const IS_OURS: &str = "SELECT bool_and(EXISTS (SELECT FROM postbox.lane l \
         WHERE l.subscription_id = $1 AND l.lane = m.lane AND l.epoch = m.epoch AND l.consumer_id = $4)) \
         AND NOT pg_try_advisory_xact_lock_shared(1347571763, $4) \
     FROM unnest($2::smallint[], $3::integer[]) AS m (lane, epoch)";

const PATIENCE: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(5),
    Duration::from_millis(25),
    Duration::from_millis(100),
];

const IS_SETTLED: &str = "SELECT bool_and(EXISTS (SELECT FROM postbox.settlement s \
         WHERE s.subscription_id = $1 AND s.lane = m.lane AND s.\"offset\" = m.\"offset\")) \
     FROM unnest($2::smallint[], $3::bigint[]) AS m (lane, \"offset\")";

fn list(numbers: impl Iterator<Item = impl ToString>) -> String {
    numbers
        .map(|number| number.to_string())
        .collect::<Vec<_>>()
        .join(",")
}

/// Raised by `postbox.settle`.
const STALE: &str = "PB001";
/// Raised by `postbox.settle`: it is not the transaction that the handler was given.
const ANOTHERS: &str = "PB006";
/// There is no transaction to commit.
const NO_TRANSACTION: &str = "25P01";
/// An earlier statement failed, and the handler has not minded.
const ABORTED: &str = "25P02";

/// Where messages of this subscription get their transactions.
pub(crate) struct Source {
    pub(crate) share: Arc<Share>,
    /// How its transactions begin and end.
    pub(crate) statements: Arc<Statements>,
    /// One that the message before left.
    pub(crate) checkout: Option<Checkout>,
    /// Since when the message could run: its transaction does not begin earlier.
    pub(crate) ready_since: Option<Instant>,
}

/// Also gives back the transaction that follows on the same connection, if it is in order.
pub(crate) async fn run(
    source: Source,
    fence: Fence,
    handler: Arc<Handler>,
    mut invocation: Invocation,
) -> (Verdict, Option<Checkout>) {
    let begun = match source.checkout {
        Some(checkout) => {
            checkout
                .not_before(source.ready_since.unwrap_or_else(Instant::now))
                .await
        }
        None => source.share.begin(source.statements).await,
    };
    let checkout = match begun {
        Ok(checkout) => checkout,
        Err(error) => return (Verdict::Unavailable(explain(&error)), None),
    };
    let slot = Arc::new(Mutex::new(Some(checkout)));
    invocation.tx = Some(TxSource::Handlers(slot.clone()));
    let timeout = handler.timeout;
    let run = AssertUnwindSafe(handler.call(invocation)).catch_unwind();
    let outcome = match tokio::time::timeout(timeout, run).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(panic)) => Err(crate::outcome::panicked(panic)),
        Err(_) => Err(timed_out(timeout)),
    };
    let Some(mut checkout) = slot.lock().unwrap_or_else(PoisonError::into_inner).take() else {
        let failure =
            HandlerError::retry("the handler still has its Tx: it must let it go before it returns");
        return (Verdict::Failed(failure), None);
    };
    match outcome {
        Ok(()) => commit(checkout, &fence).await,
        Err(failure) if checkout.is_anothers().await => (Verdict::Failed(ended(&failure)), None),
        Err(failure) => (Verdict::Failed(failure), checkout.rolled_back().await.ok()),
    }
}

async fn commit(checkout: Checkout, fence: &Fence) -> (Verdict, Option<Checkout>) {
    let (error, checkout) = match checkout.commit(&fence.statements()).await {
        Committed::Yes(next) => return (Verdict::Settled, next),
        Committed::No(sqlx::Error::Database(error), checkout) => (error, checkout),
        Committed::No(error, _) => return (Verdict::InDoubt(lost(&error)), None),
    };
    // The server answered, so nothing was committed; unless it says that it is going down.
    let verdict = match error.code().as_deref() {
        Some(STALE) => Verdict::Stale,
        Some(code) if code.starts_with("57P") => Verdict::InDoubt(lost(&error)),
        // What it began instead is nobody's, and rolled back with the connection's return.
        Some(NO_TRANSACTION | ANOTHERS) => return (Verdict::Failed(ended(&"")), None),
        Some(ABORTED) => Verdict::Failed(HandlerError::retry(
            "the handler returned Ok although a statement of its Tx failed, so nothing can be committed: it must return the error, or make a savepoint (tx.begin()) before what may fail",
        )),
        // Deferred constraints and serialization failures are the handler's.
        _ => Verdict::Failed(HandlerError::retry(format!("cannot commit: {error}"))),
    };
    (verdict, checkout.rolled_back().await.ok())
}

fn lost(error: &impl std::fmt::Display) -> HandlerError {
    HandlerError::retry(format!(
        "the connection was lost before the transaction was committed: {error}"
    ))
}

/// Runs a handler that settles in a transaction of its own.
pub(crate) async fn run_own(
    pool: PgPool,
    fence: Fence,
    handler: Arc<Handler>,
    mut invocation: Invocation,
) -> Verdict {
    let timeout = handler.timeout;
    let claim = Claim::new(fence.query(timeout));
    invocation.settlement = Some(claim.clone());
    // Aborted with its lane, too.
    let claim = ClaimedRun(claim);
    let run = AssertUnwindSafe(handler.call(invocation)).catch_unwind();
    let outcome = match tokio::time::timeout(timeout, run).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(panic)) => Err(crate::outcome::panicked(panic)),
        Err(_) => Err(timed_out(timeout)),
    };
    // From here on what is left of the handler cannot settle any more.
    let used = claim.0.close();
    let (settled, may_come) = match used {
        Used::Not if outcome.is_ok() => return Verdict::Failed(HandlerError::dead_letter(FORGOTTEN)),
        Used::Not | Used::WithoutEffect => return Verdict::from(outcome),
        Used::Refused(code, why) => return fence.refused(&pool, code.as_deref(), &why, outcome).await,
        Used::Perhaps => (fence.is_settled(&pool).await, true),
        Used::Settled => fence.became_of(&pool).await,
    };
    let failure = match (settled, outcome) {
        (Ok(true), outcome) => {
            if let Err(failure) = outcome {
                say(|| {
                    warn!(
                        handler = handler.name, error = %failure,
                        "the handler failed after its transaction had committed: the message is settled"
                    );
                });
            }
            return Verdict::Settled;
        }
        (_, Err(failure)) => failure,
        (Ok(false), Ok(())) => HandlerError::retry(UNCOMMITTED),
        (Err(error), Ok(())) => HandlerError::retry(format!(
            "cannot see whether its transaction was committed: {}",
            explain(&error)
        )),
    };
    match may_come {
        true => Verdict::InDoubt(failure),
        false => Verdict::Failed(failure),
    }
}

/// Not again, as [`ended`].
const FORGOTTEN: &str = "the handler returned Ok and has not settled its message: call settlement.settle(&mut tx) as the last statement of the transaction, or settlement.without_effect() where there is nothing to write; what it committed may happen again with another attempt, so there is none";
const UNCOMMITTED: &str = "the handler returned Ok and the transaction in which its message was settled was not committed: commit it before returning";

/// Not again, because an effect that the handler committed itself would happen again.
fn ended(what: &impl std::fmt::Display) -> HandlerError {
    let what = what.to_string();
    let but = if what.is_empty() {
        String::new()
    } else {
        format!(" (and then it failed: {what})")
    };
    HandlerError::dead_letter(format!(
        "the handler has ended its transaction itself (COMMIT or ROLLBACK), so its effect is not tied to the message and would happen again with another attempt: it must leave the end to Postbox; savepoints are allowed{but}"
    ))
}
