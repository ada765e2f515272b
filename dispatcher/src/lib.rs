//! The Postbox dispatcher: puts committed messages in order and wakes their consumers.
//!
//! Run it beside the services (`postbox run`), or inside one:
//!
//! ```no_run
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let dispatcher = postbox_dispatcher::Dispatcher::new(pool).start().await?;
//! // …
//! dispatcher.shutdown().await;
//! # Ok(()) }
//! ```
//!
//! Any number may run at once; none is the leader, and losing one loses nothing. Publishing needs none: while no dispatcher runs, messages wait in the
//! outbox.

pub mod dead_letters;
mod dispatcher;
mod expiry;
pub mod messages;
pub mod restore;
mod sequencer;
pub mod status;

pub use dispatcher::{Dispatcher, DispatcherHandle};
