//! What sessions and executors tell each other, beside commands and events (`executor/command.rs`): progress, journals, and what was found in the database.

pub(crate) mod journal;
pub(crate) mod progress;
pub(crate) mod redelivery;
pub(crate) mod standing;
