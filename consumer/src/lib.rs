//! Consumer groups for Postbox.

mod block;
mod extract;
mod handler;
mod retry;
mod state;

pub use extract::{Delivery, Extract, Invocation, Json, Raw, State, Tx};
pub use handler::{
    BoxFuture, DEFAULT_TIMEOUT, DefineHandler, HandlerDefinition, HandlerError, IntoOutcome, Order, Outcome, Start,
};
pub use postbox_macros::{handler, handlers};
pub use retry::Retry;
