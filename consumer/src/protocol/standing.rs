//! How things stand with an executor that can do nothing but wait: what a test asks before it says that all is settled.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};

/// How things stand with a subscription in this process, or with a broadcast from memory.
#[derive(Debug, Clone)]
pub struct Standing {
    /// Group; for a broadcast its name.
    pub group: Arc<str>,
    /// Topic.
    pub topic: Arc<str>,
    /// Its number in the database; a broadcast from memory has none.
    pub subscription: Option<i32>,
    /// The database's clock, as far as this process knows it.
    pub clock: DateTime<Utc>,
    /// Lanes that it owns and is not about to give back.
    pub lanes: usize,
    /// Lanes that there are.
    pub all_lanes: usize,
    /// A message of a type that nobody handles waits; otherwise the policy decides.
    pub unknown_waits: bool,
    /// All before it was taken in; of the lane that is furthest behind.
    pub next: i64,
    /// Nothing more is taken in, whatever comes: it is paused, everything fails, or so much waits that there is no room.
    pub held_up: bool,
    /// Neither paused nor outside of its window.
    pub open: bool,
    /// Something runs, is about to, or is about to be recorded.
    pub busy: bool,
    /// Handlers that run, and reads beside them.
    pub running: usize,
    /// Messages that may run as soon as there is room, or the rate allows.
    pub ready: usize,
    /// Messages that wait for their next attempt.
    pub retrying: usize,
    /// When the first of them is due.
    pub retry_in: Option<Duration>,
    /// The breaker is open: when the next probe is due.
    pub probe_in: Option<Duration>,
    /// Functions that are being told of dead letters.
    pub telling: usize,
}
