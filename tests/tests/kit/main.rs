//! The testkit for users: what `Kit` promises, and what it says where a promise cannot be kept.
#![allow(unreachable_pub, clippy::unwrap_used)]

mod advance;
mod failing;
mod harness;
mod messages;
mod migrations;
mod published;
mod settled;
mod several;
mod timeouts;
