//! The Postbox dispatcher: puts committed messages in order and wakes their consumers; publishes what was scheduled when it is due.
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

mod cron;
pub mod dead_letters;
mod dispatcher;
mod expiry;
pub mod messages;
mod promotion;
pub mod restore;
mod sequencer;
pub mod status;
mod timers;

pub use dispatcher::{Dispatcher, DispatcherHandle};
