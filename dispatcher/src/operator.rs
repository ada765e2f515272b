//! What operators look at and decide: used by the `postbox` command and by whatever else shows or mends a database of Postbox.

pub mod dead_letters;
pub mod doctor;
mod finding;
pub mod messages;
mod oddities;
pub mod rejects;
pub mod status;
pub mod subscriptions;
mod types;
