//! Arguments of handlers.

mod batch;
mod dead_letter;
mod delivery;
mod json;
mod needs;
mod raw;
mod scheduled_at;
mod settlement;
mod state;
mod tx;

use std::fmt;
use std::sync::Arc;

use postbox::{Message, MessageId};

pub use batch::{Batch, BatchItem, BesideBatch};
pub use dead_letter::DeadLetter;
pub(crate) use dead_letter::topic_of as dead_letter_topic;
pub use delivery::Delivery;
pub use json::Json;
pub use needs::Needs;
pub use raw::Raw;
pub use scheduled_at::ScheduledAt;
pub use settlement::Settlement;
pub(crate) use settlement::{Claim, Run as ClaimedRun, Used};
pub use state::State;
pub(crate) use tx::{OwnSlot, TxSource};
pub use tx::{TestTx, Tx};

use crate::log::block::Record;
use crate::outcome::HandlerError;
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
    pub(crate) tx: Option<TxSource>,
    /// For a handler that settles in a transaction of its own.
    pub(crate) settlement: Option<Arc<Claim>>,
    /// Of a hook for dead letters.
    pub(crate) letter: Option<Box<DeadLetter>>,
}

/// Of a batch, what is said of a message is of its first.
impl Invocation {
    /// Group that it is handled for.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// Topic.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Message id.
    pub fn id(&self) -> MessageId {
        self.record.message().id
    }

    /// Message type, if it has one.
    pub fn message_type(&self) -> Option<&str> {
        self.record.message().message_type.as_deref()
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.record.message().headers.as_deref()?.get(name)
    }

    /// Which attempt this is, from 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// How many messages it is of: of a handler that takes no batches, one.
    pub fn messages(&self) -> usize {
        1 + self.others.len()
    }
}

impl fmt::Debug for Invocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invocation")
            .field("group", &self.group)
            .field("topic", &self.topic)
            .field("id", &self.id())
            .field("attempt", &self.attempt)
            .field("messages", &self.messages())
            .finish_non_exhaustive()
    }
}

/// Makes an argument of a handler from a delivery.
///
/// Implemented for every [`Message`], and for [`Json`], [`Raw`], [`Delivery`], [`DeadLetter`], [`ScheduledAt`], [`State`], [`Tx`] and [`Settlement`]. Implement it for a type
/// of your own to check or convert something before each run: make it from these, see [`Needs`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an argument of a handler",
    label = "not a message and not an extractor",
    note = "take a type with `#[derive(Serialize, Deserialize, Message)]`, or `Json<T>`, `Raw`, `Delivery`, `State<S>`, `Tx` or `Settlement`, by value"
)]
pub trait Extract: Sized {
    /// What it needs. A handler whose messages are of several topics does not compile, and one that asks for a state that is not there does not start.
    const NEEDS: Needs = Needs::NOTHING;

    /// The argument.
    ///
    /// # Errors
    ///
    /// They are the handler's failure: the message is retried by its policy, unless the error says otherwise, such as
    /// [`HandlerError::undecodable`].
    fn extract(invocation: &mut Invocation) -> impl Future<Output = Result<Self, HandlerError>> + Send;
}

impl<M: Message + Send> Extract for M {
    const NEEDS: Needs = Needs::message(M::TOPIC, M::TYPES);

    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        let message = invocation.record.message();
        let message_type = match (message.message_type.as_deref(), M::TYPES) {
            (Some(message_type), _) => message_type,
            // An untyped message is taken for the only type there is.
            (None, [only]) => only,
            (None, _) => {
                return Err(HandlerError::undecodable(
                    "the message has no type and the handler's type has several",
                ));
            }
        };
        M::decode(message_type, &message.payload).map_err(HandlerError::undecodable)
    }
}
