//! The transaction in which a message is settled.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use postbox::Publish;
use sqlx::PgConnection;

use super::{Extract, Invocation};
use crate::checkout::Checkout;
use crate::handler::{HandlerDefinition, HandlerError};

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
pub struct Tx {
    // Some until it is dropped.
    transaction: Option<Checkout>,
    slot: TxSlot,
}

/// Where the transaction is when no [`Tx`] has it: before the handler takes it, and after the handler let it go.
pub(crate) type TxSlot = Arc<Mutex<Option<Checkout>>>;

const TAKEN: &str = "the transaction is there until the Tx is dropped";

impl Deref for Tx {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.transaction.as_ref().expect(TAKEN)
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.transaction.as_mut().expect(TAKEN)
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = self.transaction.take();
    }
}

impl fmt::Debug for Tx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tx")
    }
}

impl Publish for Tx {
    fn transaction(&mut self) -> &mut PgConnection {
        self
    }
}

impl Extract for Tx {
    fn declare(handler: &mut HandlerDefinition) {
        handler.transactional = true;
    }

    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        let slot = invocation
            .tx
            .clone()
            .ok_or_else(|| HandlerError::retry("this handler has no transaction"))?;
        let transaction = slot
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .ok_or_else(|| HandlerError::retry("a handler can take one Tx only"))?;
        Ok(Self {
            transaction: Some(transaction),
            slot,
        })
    }
}
