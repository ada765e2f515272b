//! Settling a message in a transaction of the handler's own, whatever client has it open.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use postbox::__private::{Answer, Bind, Query};
use postbox::blocking;

use super::{Extract, Invocation, Needs};
use crate::outcome::HandlerError;

/// The right to settle the message, or the batch, in a transaction of yours: for handlers whose data is behind another client than the consumer's, or
/// another pool. What the transaction writes, the messages it publishes and the acknowledgement commit together, or not at all, as with
/// [`Tx`](crate::Tx): so the effect is exactly once.
///
/// Begin a transaction on the database that the message comes from, do the work, [`settle`](Self::settle) as its last statement, and commit:
///
/// ```
/// use postbox::{Message, Publish};
/// use postbox_consumer::{HandlerError, Settlement, State, handler};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize, Message)]
/// #[message(topic = "orders", type = "order.placed", key = order_id)]
/// struct OrderPlaced { order_id: i64 }
///
/// # #[derive(Clone)] struct Pool(sqlx::PgPool);
/// # impl std::ops::Deref for Pool { type Target = sqlx::PgPool; fn deref(&self) -> &sqlx::PgPool { &self.0 } }
/// #[handler(group = "billing")]
/// async fn charge(order: OrderPlaced, settlement: Settlement, State(pool): State<Pool>) -> Result<(), HandlerError> {
///     let mut tx = pool.begin().await?;
///     // … with whatever client: INSERT INTO charges …
///     settlement.settle(&mut tx).await?;
///     tx.commit().await?;
///     Ok(())
/// }
/// ```
///
/// # Rules
/// - The transaction is of the database that the message comes from, and READ COMMITTED (PB008 otherwise); its role is granted what a consumer is
///   (`postbox grant ROLE --as consumer`). Not in a savepoint: one that is rolled back takes the settlement with it, and not what was written before.
/// - Once it is settled a takeover of the message waits for the transaction's end, so commit at once. The server ends it where it is idle for longer than the
///   handler's `timeout`.
/// - A handler that returns `Ok` must have settled and committed. One that did not settle goes to the dead letters, since what it may have committed would
///   happen again with another attempt; where there is nothing to write, say so by [`without_effect`](Self::without_effect). One that did not commit has failed.
/// - If another instance owns the message by now, settling fails (PB001): return the error, and nothing is counted against the message.
/// - Whatever becomes of the handler then (an error, a panic, its time-out, a lost connection): whether its transaction committed is read from the database
///   before the message runs again.
pub struct Settlement(Arc<Claim>);

/// What is shared between a run and its [`Settlement`].
pub(crate) struct Claim {
    query: Query,
    state: Mutex<State>,
}

#[derive(Debug, Clone)]
enum State {
    /// No handler has asked for it.
    Unasked,
    Open,
    /// It was handed out, and may be settled and committed.
    Taken,
    /// So it was, and the database has answered: nothing of it is still to come but the commit.
    Settled,
    /// The database has refused it: the code, and what was said.
    Refused(Option<String>, String),
    WithoutEffect,
    /// The run has ended.
    Closed,
}

/// What a run has done with its claim, once it has ended.
#[derive(Debug)]
pub(crate) enum Used {
    Not,
    /// It may have committed, or may yet.
    Perhaps,
    /// The same, and nothing but the commit can be on its way.
    Settled,
    Refused(Option<String>, String),
    WithoutEffect,
}

const ENDED: &str = "the run has ended (its time-out has passed, or the handler has returned), so its message cannot be settled any more";

impl Claim {
    pub(crate) fn new(query: Query) -> Arc<Self> {
        let state = Mutex::new(State::Unasked);
        Arc::new(Self { query, state })
    }

    fn swap(&self, state: State) -> State {
        std::mem::replace(
            &mut *self.state.lock().unwrap_or_else(PoisonError::into_inner),
            state,
        )
    }

    /// From one state only; says whether it was in that.
    fn replace(&self, from: &State, to: State) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let was = std::mem::discriminant(&*state) == std::mem::discriminant(from);
        if was {
            *state = to;
        }
        was
    }

    /// The statement, once, and not after the run's end: a thread that nobody waits for any more must not settle.
    fn take(&self) -> Result<Query, HandlerError> {
        match self.replace(&State::Open, State::Taken) {
            true => Ok(self.query.clone()),
            false => Err(HandlerError::retry(ENDED)),
        }
    }

    fn answered(&self, answer: Result<Answer, postbox::Error>) -> Result<(), HandlerError> {
        let error = match answer {
            Ok(_) => {
                self.replace(&State::Taken, State::Settled);
                return Ok(());
            }
            Err(error) => error,
        };
        match &error {
            postbox::Error::Database(told) if told.is_refusal() => {
                self.swap(State::Refused(told.code().map(str::to_owned), told.to_string()));
                Err(error.into())
            }
            // What it wrote is there already, and would be again.
            postbox::Error::NoTransaction => {
                self.swap(State::Refused(None, error.to_string()));
                Err(HandlerError::dead_letter(format!(
                    "the handler settles outside of a transaction, so what it wrote is not tied to its message: {error}"
                )))
            }
            _ => Err(error.into()),
        }
    }

    /// The run has ended.
    pub(crate) fn close(&self) -> Used {
        match self.swap(State::Closed) {
            State::Open | State::Closed => Used::Not,
            State::Taken => Used::Perhaps,
            State::Settled => Used::Settled,
            State::Refused(code, why) => Used::Refused(code, why),
            // A layer that answered in the handler's place has no effect either.
            State::Unasked | State::WithoutEffect => Used::WithoutEffect,
        }
    }
}

impl Settlement {
    /// Settles the message in this transaction: its last statement before the commit.
    ///
    /// # Errors
    ///
    /// Another instance owns the message, the transaction has another isolation than READ COMMITTED, or the run has ended; else the database's. Return it.
    pub async fn settle(self, tx: &mut impl postbox::Publish) -> Result<(), HandlerError> {
        let query = self.0.take()?;
        let answer = tx.run(query).await;
        self.0.answered(answer)
    }

    /// The same without `async`, in a transaction of the synchronous `postgres`, or of diesel (`postbox::diesel::InTransaction`).
    ///
    /// # Errors
    ///
    /// As [`settle`](Self::settle).
    pub fn settle_blocking(self, tx: &mut impl blocking::Publish) -> Result<(), HandlerError> {
        let query = self.0.take()?;
        let answer = tx.run(query);
        self.0.answered(answer)
    }

    /// The same for any other client: the SQL of the transaction's last statement, and its parameters `$1`, `$2`, …, each of which is a `text`. It gives one row.
    /// Execute it once, and in the transaction: nothing notices if it runs by itself, or again after a commit whose answer was lost.
    ///
    /// # Errors
    ///
    /// The run has ended.
    pub fn statement(self) -> Result<(&'static str, Vec<String>), HandlerError> {
        let query = self.0.take()?;
        let texts = query.parameters.into_iter().map(|bind| match bind {
            Bind::Text(text) => text.unwrap_or_default(),
            Bind::Bytes(_) | Bind::Texts(_) | Bind::Blobs(_) => String::new(),
        });
        Ok((query.sql, texts.collect()))
    }

    /// There is nothing to be written for this message: it is settled when the handler returns `Ok`, as by a handler without a transaction.
    pub fn without_effect(self) {
        self.0.replace(&State::Open, State::WithoutEffect);
    }

    /// One that settles nothing, for a test that calls a handler itself: its statement does nothing in whatever transaction.
    pub fn for_test() -> Self {
        let claim = Claim::new(Query::new("SELECT ''::text AS answer", Vec::new()));
        claim.swap(State::Open);
        Self(claim)
    }
}

impl fmt::Debug for Settlement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Settlement")
    }
}

impl Extract for Settlement {
    const NEEDS: Needs = Needs::SETTLEMENT;

    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        match invocation.settlement.take() {
            Some(claim) => match claim.replace(&State::Unasked, State::Open) {
                true => Ok(Self(claim)),
                false => Err(HandlerError::retry(ENDED)),
            },
            None => Err(HandlerError::retry(
                "there is nothing to settle here: a group's handler can take one Settlement, and a hook for dead letters none",
            )),
        }
    }
}

/// Closes the claim wherever its run ends, cancelled or not.
pub(crate) struct Run(pub(crate) Arc<Claim>);

impl Drop for Run {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked_for() -> Arc<Claim> {
        let claim = Claim::new(Query::new("SELECT", Vec::new()));
        claim.swap(State::Open);
        claim
    }

    #[test]
    fn a_claim_is_used_once_and_not_after_the_run() {
        let claim = asked_for();
        assert!(claim.take().is_ok());
        assert!(claim.take().is_err(), "a second time");
        assert!(matches!(claim.close(), Used::Perhaps));

        let claim = asked_for();
        assert!(matches!(claim.close(), Used::Not));
        assert!(claim.take().is_err(), "after the run");

        let claim = asked_for();
        drop(Run(claim.clone()));
        assert!(claim.take().is_err(), "after a run that was cancelled");

        let claim = asked_for();
        Settlement(claim.clone()).without_effect();
        assert!(
            claim.take().is_err(),
            "it was said that there is nothing to be written"
        );
        assert!(matches!(claim.close(), Used::WithoutEffect));

        let claim = Claim::new(Query::new("SELECT", Vec::new()));
        assert!(
            matches!(claim.close(), Used::WithoutEffect),
            "who never asked for it"
        );
        assert!(
            !claim.replace(&State::Unasked, State::Open),
            "a handler that begins after its run"
        );
        assert!(claim.take().is_err());
    }
}
