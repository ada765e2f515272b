//! Consumers: order, failure, takeover of lanes, transactions, batches, broadcasts, a module each. What needs processes of its own is in
//! consumer_takeover.rs.
#![allow(clippy::unwrap_used)] // Clippy allows it in test functions, and here what they call is as much a test.

mod batch;
mod broadcast;
mod failure;
mod filter;
mod groups;
mod inbox;
mod lanes;
mod order;
mod pace;
mod postpone;
mod replay;
mod settlement;
mod tx;

#[path = "../role/mod.rs"]
mod role;
#[path = "../support/mod.rs"]
mod support;
