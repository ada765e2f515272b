//! Other people's systems: their settings, roles, networks, deploys, clocks and rows, a module a kind. What panics where the whole process notices is in
//! hostile_panics.rs.
#![allow(clippy::unwrap_used)] // Clippy allows it in test functions, and here what they call is as much a test.

mod breaker;
mod cancelled;
mod clock;
mod collations;
mod cron;
mod encodings;
mod half_open;
mod handlers;
mod history;
mod locks;
mod nodes;
mod notices;
mod plans;
mod pool;
mod pooler;
mod roles;
mod rows;
mod search_path;
mod settings;
mod texts;
mod tx;
mod types;

#[path = "../proxy/mod.rs"]
mod proxy;
#[path = "../role/mod.rs"]
mod role;
#[path = "../support/mod.rs"]
mod support;
