//! Many messages at once.

use std::collections::BTreeMap;
use std::ops::Deref;

use super::{Delivery, Extract, Invocation, Needs, Settlement, State, Tx};
use crate::outcome::{Decision, HandlerError};

/// The messages of one run of a handler: as many as are ready, up to the handler's `batch`, and at least one. `T` is what a handler of one message would
/// take: a message, [`Json`](super::Json) or [`Raw`](super::Raw).
///
/// They are by offset, so messages of one key are in their order; and a key is never in two batches at once. All are of this one handler.
///
/// **Settled together.** When the handler returns `Ok`, all of them are handled. Beside a [`Tx`](super::Tx) they are acknowledged in it, so the
/// effect of the whole batch is exactly once: it commits if the instance still owns the lanes of all its messages, and rolls back otherwise.
///
/// **Failed together.** When it fails, panics or takes longer than its timeout, the batch runs again in tenths, and what fails of these in tenths
/// again, until the message that is to blame runs by itself. Only that counts as its attempt, is retried by the handler's policy (by
/// itself from then on) and holds its key; so decisions such as [`HandlerError::discard`] mean something of a single message only, but for
/// [`HandlerError::postpone`], which is of them all. A handler whose effect is not in a `Tx` therefore sees the messages of a failed batch again.
/// One that knows which of them failed returns a [`BatchResult`](crate::BatchResult) and need not be asked.
///
/// **Undecodable.** A message that `T` cannot be made from is a dead letter at once (or retried, as the handler's `undecodable` says), and the batch runs without it.
///
/// ```
/// use postbox::Message;
/// use postbox_consumer::{Batch, HandlerError, Tx, handler};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize, Message)]
/// #[message(topic = "orders", type = "order.placed", key = order_id)]
/// struct OrderPlaced { order_id: i64 }
///
/// #[handler(group = "reporting", batch = 500)]
/// async fn count_orders(orders: Batch<OrderPlaced>, mut tx: Tx) -> Result<(), HandlerError> {
///     let ids: Vec<i64> = orders.iter().map(|order| order.message.order_id).collect();
///     sqlx::query("INSERT INTO placed (order_id) SELECT unnest($1::bigint[])").bind(ids).execute(&mut *tx).await?;
///     Ok(())
/// }
/// ```
#[derive(Debug, Clone)]
pub struct Batch<T> {
    items: Vec<BatchItem<T>>,
}

/// A message of a [`Batch`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct BatchItem<T> {
    /// The message.
    pub message: T,
    /// What is known of it beside its payload.
    pub delivery: Delivery,
}

impl<T> BatchItem<T> {
    /// A message with its delivery, for a test of a handler.
    pub fn new(message: T, delivery: Delivery) -> Self {
        Self { message, delivery }
    }
}

/// For a test of a handler.
impl<T> FromIterator<BatchItem<T>> for Batch<T> {
    fn from_iter<I: IntoIterator<Item = BatchItem<T>>>(items: I) -> Self {
        Self {
            items: items.into_iter().collect(),
        }
    }
}

impl<T> Batch<T> {
    /// The messages without their deliveries.
    pub fn into_messages(self) -> impl Iterator<Item = T> {
        self.items.into_iter().map(|item| item.message)
    }
}

impl<T> Deref for Batch<T> {
    type Target = [BatchItem<T>];

    fn deref(&self) -> &[BatchItem<T>] {
        &self.items
    }
}

impl<T> IntoIterator for Batch<T> {
    type Item = BatchItem<T>;
    type IntoIter = std::vec::IntoIter<BatchItem<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.into_iter()
    }
}

impl<'a, T> IntoIterator for &'a Batch<T> {
    type Item = &'a BatchItem<T>;
    type IntoIter = std::slice::Iter<'a, BatchItem<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.iter()
    }
}

impl<T: Extract + Send> Extract for Batch<T> {
    const NEEDS: Needs = T::NEEDS.of_each();

    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        let others = std::mem::take(&mut invocation.others);
        let mut items = Vec::with_capacity(1 + others.len());
        // The batch runs without them.
        let mut unfit = BTreeMap::new();
        for record in std::iter::once(invocation.record.clone()).chain(others) {
            let mut one = Invocation {
                topic: invocation.topic.clone(),
                group: invocation.group.clone(),
                record,
                others: Vec::new(),
                attempt: invocation.attempt,
                states: invocation.states.clone(),
                tx: None,
                settlement: None,
                letter: None,
            };
            let message = match T::extract(&mut one).await {
                Ok(message) => message,
                Err(error) if matches!(error.decision, Decision::Undecodable) => {
                    unfit.insert(one.record.message().offset.get(), error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let delivery = Delivery::extract(&mut one).await?;
            items.push(BatchItem { message, delivery });
        }
        match unfit.first_key_value() {
            None => Ok(Self { items }),
            Some((offset, why)) => {
                let reason = format!(
                    "{} messages of the batch, the one at offset {offset}: {why}",
                    unfit.len()
                );
                Err(HandlerError::new(Decision::Unfit(unfit), reason))
            }
        }
    }
}

/// What a handler may take beside a [`Batch`]: what is not of a single message. Implemented for [`Tx`], [`Settlement`] and [`State`]; implement it for an
/// extractor of your own that is the same for every message.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is of one message, and this handler takes batches",
    label = "not allowed beside `Batch<…>`",
    note = "each item of a `Batch<…>` has its `message` and its `delivery`; beside it a handler takes `Tx` or `Settlement`, and `State<S>`"
)]
pub trait BesideBatch {}

impl BesideBatch for Tx {}

impl BesideBatch for Settlement {}

impl<T> BesideBatch for Batch<T> {}

impl<S> BesideBatch for State<S> {}
