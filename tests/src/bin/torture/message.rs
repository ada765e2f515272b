//! What is published, and which groups take it.

use postbox::Message;
use serde::{Deserialize, Serialize};

/// A numbered message of a key. Numbers of a key are given under its row's lock, so their order is the order of the commits.
#[derive(Clone, Debug, Serialize, Deserialize, Message)]
#[message(topic = "steps", type = "step", key = key)]
pub(crate) struct Step {
    pub(crate) key: String,
    pub(crate) n: i64,
}

/// A numbered message of a topic that is handled strictly in its order.
#[derive(Clone, Debug, Serialize, Deserialize, Message)]
#[message(topic = "ledger", type = "entry")]
pub(crate) struct Entry {
    pub(crate) n: i64,
}

/// The types of every fourth step and every eighth entry, which consumers of version 1 have no handlers for.
pub(crate) const NEWER_STEP: &str = "step.newer";
pub(crate) const NEWER_ENTRY: &str = "entry.newer";

pub(crate) const STEPS: &str = "steps";
pub(crate) const LEDGER: &str = "ledger";
/// What the entries of the strict topic are counted under.
pub(crate) const LEDGER_KEY: &str = "(ledger)";

/// Whose handlers have effects elsewhere: at least once.
pub(crate) const PLAIN: &str = "plain";
/// Whose handlers take a `Tx`, or a `Settlement` for the newer type: exactly once.
pub(crate) const EFFECTS: &str = "effects";
/// The group on the strict topic.
pub(crate) const STRICT: &str = "strict";
/// The broadcast, from the memory of each instance; not a group.
pub(crate) const NODES: &str = "nodes";

/// The topic of a group.
pub(crate) fn topic_of(group: &str) -> &'static str {
    if group == STRICT { LEDGER } else { STEPS }
}
