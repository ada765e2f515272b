//! What a handler of batches says of single messages.

use std::collections::BTreeMap;
use std::fmt;

use crate::extract::Delivery;
use crate::outcome::{Decision, HandlerError, IntoOutcome, Outcome};

/// What a handler of a [`Batch`](crate::Batch) returns that knows which messages failed: `Ok` with those, or an error that is of them all.
pub type BatchResult = Result<Failures, HandlerError>;

/// The messages of a [`Batch`](crate::Batch) that failed; all others are handled.
///
/// For a handler whose downstream answers for each message, such as a bulk request to a search engine. A message that failed is retried, discarded
/// or given up as its error says, like one that ran by itself. Its key waits for it: messages of the key that come after it in the batch run again
/// after it, as if they had not run, whatever was said of them.
///
/// Not beside a [`Tx`](crate::Tx), which commits whole: such a batch is rolled back and has failed as one.
///
/// ```
/// use postbox::Message;
/// use postbox_consumer::{Batch, BatchResult, Failures, HandlerError, State, handler};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize, Message)]
/// #[message(topic = "orders", type = "order.placed", key = order_id)]
/// struct OrderPlaced { order_id: i64 }
/// # #[derive(Clone)]
/// # struct Search;
/// # impl Search { async fn bulk(&self, orders: &Batch<OrderPlaced>) -> std::io::Result<Vec<Result<(), String>>> { Ok(vec![]) } }
///
/// #[handler(group = "search", batch = 500)]
/// async fn index(orders: Batch<OrderPlaced>, State(search): State<Search>) -> BatchResult {
///     let mut failures = Failures::none();
///     for (order, answer) in orders.iter().zip(search.bulk(&orders).await?) {
///         if let Err(why) = answer {
///             failures.add(&order.delivery, HandlerError::dead_letter(why));
///         }
///     }
///     Ok(failures)
/// }
/// ```
#[derive(Debug, Default)]
#[must_use = "a handler returns its failures"]
pub struct Failures {
    by_offset: BTreeMap<i64, HandlerError>,
}

impl Failures {
    /// All messages are handled.
    pub fn none() -> Self {
        Self::default()
    }

    /// This message of the batch failed. Said twice of one, the last counts.
    pub fn add(&mut self, delivery: &Delivery, why: impl Into<HandlerError>) {
        self.by_offset.insert(delivery.offset.get(), why.into());
    }

    /// How many failed.
    pub fn len(&self) -> usize {
        self.by_offset.len()
    }

    /// Whether none failed.
    pub fn is_empty(&self) -> bool {
        self.by_offset.is_empty()
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.by_offset.first_key_value() {
            None => f.write_str("no message failed"),
            Some((offset, why)) => {
                write!(
                    f,
                    "{} messages of the batch failed, the one at offset {offset}: {why}",
                    self.len()
                )
            }
        }
    }
}

impl<E: Into<HandlerError>> IntoOutcome for Result<Failures, E> {
    const OF_EACH: bool = true;

    fn into_outcome(self) -> Outcome {
        let failures = self.map_err(Into::into)?;
        if failures.is_empty() {
            return Ok(());
        }
        let reason = failures.to_string();
        Err(HandlerError::new(Decision::OfEach(failures.by_offset), reason))
    }
}
