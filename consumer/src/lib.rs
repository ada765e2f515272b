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

mod block;
mod breaker;
mod checkout;
mod clock;
mod consumer;
mod cron;
mod dead_letter;
mod error;
mod executor;
mod extract;
mod failures;
mod handler;
mod inbox;
mod journal;
mod lane;
#[doc(hidden)]
pub mod link;
#[cfg(feature = "micro")]
#[doc(hidden)]
pub mod micro;
#[doc(hidden)]
pub mod news;
mod pace;
mod process;
mod progress;
mod record;
mod redelivery;
mod replay;
mod retry;
mod router;
mod session;
mod settlement;
mod state;
mod subscription;
mod throttle;
mod topic_log;
mod window;

pub use consumer::{Consumer, ConsumerHandle, SubscriptionStats, UnknownType};
pub use dead_letter::DeadLetter;
pub use error::Error;
pub use extract::{
    Batch, BesideBatch, Delivery, Extract, Invocation, Item, Json, Raw, ScheduledAt, State, Tx,
};
pub use failures::{BatchResult, Failures};
pub use handler::{
    BoxFuture, DEFAULT_TIMEOUT, DefineHandler, Expired, HandlerDefinition, HandlerError, IntoOutcome, Order,
    Outcome, Start,
};
pub use inbox::Inbox;
pub use postbox::cron::Missed;
pub use postbox_macros::{cron, handler, handlers};
pub use retry::{DEFAULT_MAX_ATTEMPTS, Exhausted, Retry};
pub use window::{DailyWindow, WindowError};
