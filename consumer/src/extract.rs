//! Arguments of handlers.

mod batch;
mod delivery;
mod json;
mod raw;
mod scheduled_at;
mod state;
mod tx;

use std::sync::Arc;

use postbox::Message;

pub use batch::{Batch, BesideBatch, Item};
pub use delivery::Delivery;
pub use json::Json;
pub use raw::Raw;
pub use scheduled_at::ScheduledAt;
pub use state::State;
pub use tx::Tx;
pub(crate) use tx::TxSlot;

use crate::block::Record;
use crate::handler::{HandlerDefinition, HandlerError};
use crate::state::States;

/// One run of a handler for a message or a batch: what its arguments are made from.
pub struct Invocation {
    pub(crate) topic: Arc<str>,
    pub(crate) group: Arc<str>,
    pub(crate) record: Record,
    /// The other messages of a batch.
    pub(crate) others: Vec<Record>,
    pub(crate) attempt: u32,
    pub(crate) states: Arc<States>,
    pub(crate) tx: Option<TxSlot>,
}

/// Makes an argument of a handler from a delivery.
///
/// Implemented for every [`Message`], and for [`Json`], [`Raw`], [`Delivery`], [`ScheduledAt`], [`State`] and [`Tx`]. Implement it for a type
/// of your own to check or convert something before each run.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an argument of a handler",
    label = "not a message and not an extractor",
    note = "take a type with `#[derive(Serialize, Deserialize, Message)]`, or `Json<T>`, `Raw`, `Delivery`, `State<S>` or `Tx`, by value"
)]
pub trait Extract: Sized {
    /// Tells the handler at its definition what this argument needs. Nothing by default.
    fn declare(_handler: &mut HandlerDefinition) {}

    /// The argument. An error is the handler's failure: the message is retried by its policy.
    fn extract(invocation: &mut Invocation) -> impl Future<Output = Result<Self, HandlerError>> + Send;
}

impl<M: Message + Send> Extract for M {
    fn declare(handler: &mut HandlerDefinition) {
        handler.topic.get_or_insert_with(|| M::TOPIC.to_owned());
        if handler.types.is_empty() {
            handler
                .types
                .extend(M::TYPES.iter().map(|name| (*name).to_owned()));
        }
    }

    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        let message = invocation.record.message();
        let message_type = match (message.message_type.as_deref(), M::TYPES) {
            (Some(message_type), _) => message_type,
            // An untyped message is taken for the only type there is.
            (None, [only]) => only,
            (None, _) => {
                return Err(HandlerError::retry(
                    "the message has no type and the handler's type has several",
                ));
            }
        };
        M::decode(message_type, &message.payload).map_err(HandlerError::from)
    }
}
