//! Postbox: a transactional outbox on PostgreSQL.
//!
//! An application writes messages into the outbox **in the same transaction as its business data**; they are delivered if, and only
//! if, the transaction commits. This crate is the publishing side: it is all that a service needs which only publishes, and
//! it starts no task and keeps no connection. Handlers are in `postbox-consumer`, the dispatcher is in `postbox-dispatcher`.
//!
//! ```no_run
//! use postbox::{Message, Publish};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize, Message)]
//! #[message(topic = "orders", type = "order.placed", key = order_id)]
//! struct OrderPlaced { order_id: i64, total_cents: i64 }
//!
//! # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! postbox::migrate(&pool).await?;
//!
//! let mut tx = pool.begin().await?;
//! sqlx::query("INSERT INTO orders (id) VALUES (42)").execute(&mut *tx).await?;
//! tx.publish(&OrderPlaced { order_id: 42, total_cents: 1999 }).await?;
//! tx.commit().await?;
//! # Ok(()) }
//! ```

mod adapters;
#[cfg(feature = "cron")]
pub mod cron;
mod error;
mod headers;
mod id;
#[cfg(feature = "sqlx")]
mod instant;
#[cfg(feature = "sqlx")]
mod json;
#[cfg(feature = "sqlx")]
pub mod log;
mod message;
mod outgoing;
mod position;
mod publish;
mod reserved;
mod rules;
#[cfg(feature = "sqlx")]
mod schema;
mod statement;
#[cfg(feature = "sqlx")]
mod transaction;

#[cfg(feature = "diesel")]
pub use adapters::diesel;
#[cfg(feature = "sqlx")]
pub use adapters::sqlx::InTransaction;
pub use error::{DatabaseError, Error, Result};
pub use headers::Headers;
pub use id::{MessageId, Offset};
#[cfg(feature = "sqlx")]
#[doc(hidden)]
pub use instant::{MaybeTimestamptz, Timestamptz};
#[cfg(feature = "sqlx")]
#[doc(hidden)]
pub use json::{Json as StoredJson, MaybeJson};
pub use message::{DecodeError, EncodeError, JSON, Message};
pub use outgoing::{DEFAULT_DEDUP_WINDOW, DEFAULT_PAYLOAD_LIMIT, Outgoing, message, set_payload_limit};
pub use position::Position;
#[cfg(feature = "derive")]
pub use postbox_macros::Message;
pub use publish::{Publish, blocking};
pub use rules::{MAX_HEADER_NAME, MAX_HEADERS, MAX_KEY, MAX_NAME, is_name};
#[cfg(feature = "sqlx")]
pub use schema::{Migrated, SCHEMA_VERSION, check_schema, migrate, schema_fingerprint};
pub use statement::{Parameter, Statement};

/// What the derive macro expands to; not for use by hand.
#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;
