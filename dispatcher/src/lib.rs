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

mod bell;
mod cron;
mod dispatcher;
mod expiry;
mod flood;
mod idle;
mod notifications;
mod operator;
mod pace;
mod parts;
mod promotion;
pub mod restore;
pub mod retention;
mod sequencer;
mod steady;
mod supervised;
mod timers;

pub use operator::{dead_letters, doctor, messages, rejects, status, subscriptions};

pub use dispatcher::{Dispatcher, DispatcherHandle, DispatcherStats};
