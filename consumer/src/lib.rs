//! Consumer groups for Postbox: handlers of messages that were published with the `postbox` crate.
//!
//! - A **group** gets every message of the topics that its handlers take, once for the group; its instances share the work.
//! - Messages of one **key** are handled one after another, in their order; different keys run beside each other.
//! - A handler that asks for [`Tx`] has its effect **exactly once**: its writes and the acknowledgement commit together. Any other
//!   handler runs **at least once**: after a crash some messages come again.
//! - A **broadcast** gets every message on every instance.
//!
//! ```no_run
//! use postbox::{Message, Publish};
//! use postbox_consumer::{Consumer, HandlerError, Tx, handler, handlers};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize, Message)]
//! #[message(topic = "orders", type = "order.placed", key = order_id)]
//! struct OrderPlaced { order_id: i64 }
//!
//! #[handler(group = "inventory")]
//! async fn reserve_stock(order: OrderPlaced, mut tx: Tx) -> Result<(), HandlerError> {
//!     sqlx::query("INSERT INTO reservation (order_id) VALUES ($1)").bind(order.order_id).execute(&mut *tx).await?;
//!     Ok(())
//! }
//!
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let consumer = Consumer::new(pool).handlers(handlers![reserve_stock]).start().await?;
//! // …
//! consumer.shutdown().await?;
//! # Ok(()) }
//! ```

mod clock;
mod connections;
mod consumer;
mod cron;
mod error;
mod executor;
mod extract;
mod handler;
mod ids;
mod inbox;
mod lane;
mod layer;
mod log;
#[cfg(feature = "micro")]
#[doc(hidden)]
pub mod micro;
mod outcome;
mod protocol;
mod session;
mod settings;
mod shutdown;
mod state;
mod subscription;

pub use consumer::{Consumer, ConsumerHandle, SubscriptionStats};
pub use error::Error;
pub use extract::{
    Batch, BatchItem, BesideBatch, DeadLetter, Delivery, Extract, Invocation, Json, Needs, Raw, ScheduledAt,
    Settlement, State, TestTx, Tx,
};
pub use handler::failures::{BatchResult, Failures};
pub use handler::retry::{DEFAULT_MAX_ATTEMPTS, Exhausted, Retry};
pub use handler::{
    Breaker, DEFAULT_TIMEOUT, DeadLetterHook, DefineHandler, Expired, HandlerDefinition, MessageOrder,
    Undecodable, UnknownType,
};
pub use inbox::Inbox;
pub use layer::HandlerService;
pub use outcome::{BoxFuture, HandlerError, HandlerFailure, IntoOutcome, Outcome};
pub use postbox::Position;
pub use postbox::cron::Missed;
pub use postbox_core::{DailyWindow, WindowError};
pub use postbox_macros::{cron, handler, handlers};
pub use shutdown::shutdown_signal;

/// What the attributes expand to; not for use by hand.
#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;

/// What the testkit knows of a consumer; not for use by hand.
#[doc(hidden)]
#[path = "testkit.rs"]
pub mod __testkit;
