//! The transaction in which a message is settled.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use postbox::__private::{SqlxTransaction, Transaction};
use sqlx::{PgConnection, PgPool};

use super::{Extract, Invocation, Needs};
use crate::connections::Checkout;
use crate::outcome::HandlerError;

/// The transaction in which the message is settled: what the handler writes with it, the messages it publishes with it and
/// the acknowledgement commit together, or not at all. So the effect is exactly once.
///
/// It is a `PgConnection` with an open transaction, so one that is begun on it is a savepoint. It commits when the handler returns `Ok`, if the
/// instance still owns the message's lane, and rolls back otherwise. Do not end it yourself, and let it go before the handler returns.
///
/// The connection is of the consumer's pool. While one message after another is ready to run it goes from handler to handler, for 50 ms
/// at most; then it is the pool's again, so that whoever waits there has its turn. The server's `now()` is never before the moment at which
/// the message could run.
///
/// ```
/// use postbox::{Message, Outgoing, Publish};
/// use postbox_consumer::{HandlerError, Tx, handler};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize, Message)]
/// #[message(topic = "orders", type = "order.placed", key = order_id)]
/// struct OrderPlaced { order_id: i64 }
///
/// #[handler(group = "inventory")]
/// async fn reserve_stock(order: OrderPlaced, mut tx: Tx) -> Result<(), HandlerError> {
///     sqlx::query("INSERT INTO reservation (order_id) VALUES ($1)").bind(order.order_id).execute(&mut *tx).await?;
///     tx.publish(Outgoing::json("stock", &order.order_id)).await?;
///     Ok(())
/// }
/// ```
pub struct Tx(Held);

// Some until it is dropped.
enum Held {
    Handlers(Option<Checkout>, TxSlot),
    /// For tests and hooks: it settles nothing.
    Own(Option<Transaction>, OwnSlot),
}

/// As [`TxSlot`], for a transaction that settles nothing.
pub(crate) type OwnSlot = Arc<Mutex<Option<Transaction>>>;

/// Where a run takes its transaction from.
pub(crate) enum TxSource {
    Handlers(TxSlot),
    Own(OwnSlot),
}

/// Where the transaction is when no [`Tx`] has it: before the handler takes it, and after the handler let it go.
pub(crate) type TxSlot = Arc<Mutex<Option<Checkout>>>;

const TAKEN: &str = "the transaction is there until the Tx is dropped";

/// The transaction of a [`Tx`] that was made for a test: it commits when the test says so, and rolls back otherwise.
pub struct TestTx(OwnSlot);

impl Tx {
    /// A transaction that settles nothing, for a test that calls a handler itself:
    ///
    /// ```
    /// # use postbox_consumer::{HandlerError, Tx};
    /// # async fn reserve(mut tx: Tx) -> Result<(), HandlerError> { Ok(()) }
    /// # async fn test(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
    /// let (tx, transaction) = Tx::for_test(&pool).await?;
    /// reserve(tx).await.map_err(|error| error.to_string())?;
    /// transaction.commit().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// The pool gives no connection, or the transaction cannot begin.
    pub async fn for_test(pool: &PgPool) -> Result<(Self, TestTx), sqlx::Error> {
        let slot = OwnSlot::default();
        let tx = Self(Held::Own(
            Some(Transaction::begin(pool, "BEGIN").await?),
            slot.clone(),
        ));
        Ok((tx, TestTx(slot)))
    }
}

impl TestTx {
    /// Commits what the handler did. It must have let its [`Tx`] go.
    ///
    /// # Errors
    ///
    /// The handler still holds its [`Tx`]; else the database's. Then nothing was committed, unless the connection was lost meanwhile.
    pub async fn commit(self) -> Result<(), sqlx::Error> {
        let transaction = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match transaction {
            Some(transaction) => transaction.commit().await,
            None => Err(sqlx::Error::Protocol("the handler still holds its Tx".to_owned())),
        }
    }
}

impl fmt::Debug for TestTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TestTx")
    }
}

impl Deref for Tx {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        match &self.0 {
            Held::Handlers(transaction, _) => transaction.as_ref().expect(TAKEN),
            Held::Own(transaction, _) => transaction.as_ref().expect(TAKEN),
        }
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut PgConnection {
        match &mut self.0 {
            Held::Handlers(transaction, _) => transaction.as_mut().expect(TAKEN),
            Held::Own(transaction, _) => transaction.as_mut().expect(TAKEN),
        }
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        match &mut self.0 {
            Held::Handlers(transaction, slot) => {
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = transaction.take();
            }
            Held::Own(transaction, slot) => {
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = transaction.take();
            }
        }
    }
}

impl fmt::Debug for Tx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tx")
    }
}

impl SqlxTransaction for Tx {
    fn connection(&mut self) -> &mut PgConnection {
        self
    }
}

impl Extract for Tx {
    const NEEDS: Needs = Needs::TRANSACTION;

    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        let once = || HandlerError::retry("a handler can take one Tx only");
        match &invocation.tx {
            None => Err(HandlerError::retry("this handler has no transaction")),
            Some(TxSource::Handlers(slot)) => {
                let transaction = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
                let transaction = transaction.ok_or_else(once)?;
                Ok(Self(Held::Handlers(Some(transaction), slot.clone())))
            }
            Some(TxSource::Own(slot)) => {
                let transaction = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
                let transaction = transaction.ok_or_else(once)?;
                Ok(Self(Held::Own(Some(transaction), slot.clone())))
            }
        }
    }
}
