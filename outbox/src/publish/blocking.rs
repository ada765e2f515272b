//! Publishing without `async`: as [`Publish`](crate::Publish), for the synchronous `postgres` and for diesel.
//!
//! ```no_run
//! # #[cfg(feature = "postgres")]
//! # fn example(client: &mut postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! use postbox::{Outgoing, blocking::Publish};
//!
//! let mut tx = client.transaction()?;
//! tx.execute("UPDATE carts SET abandoned = true WHERE id = 42", &[])?;
//! tx.publish(Outgoing::json("carts", &serde_json::json!({"cart": 42})).key("42"))?;
//! tx.commit()?;
//! # Ok(()) }
//! ```

use chrono::{DateTime, Utc};

use super::query::{Answer, Query, cancel, reschedule, steps};
use super::validate_all;
#[cfg(feature = "cron")]
use crate::cron::Cron;
use crate::error::Result;
use crate::id::MessageId;
use crate::outgoing::Outgoing;

/// Publishes messages in a transaction: they are delivered if, and only if, it commits. It is [`postbox::Publish`](crate::Publish) without
/// `async`, with the same rules, guarantees and errors.
pub trait Publish: OpenTransaction {
    /// As [`Publish::publish`](crate::Publish::publish).
    ///
    /// # Errors
    ///
    /// A message that is refused, which leaves the transaction usable; else [`Error::Database`](crate::Error::Database).
    fn publish(&mut self, message: impl Into<Outgoing>) -> Result<MessageId> {
        let message = message.into().validate()?;
        let id = message.id;
        self.run(message.into_query())?.id_or(id)
    }

    /// As [`Publish::publish_all`](crate::Publish::publish_all).
    ///
    /// # Errors
    ///
    /// [`Error::InBatch`](crate::Error::InBatch), which leaves the transaction usable; else [`Error::Database`](crate::Error::Database).
    fn publish_all<I>(&mut self, messages: I) -> Result<Vec<MessageId>>
    where
        I: IntoIterator,
        I::Item: Into<Outgoing>,
    {
        let messages = validate_all(messages)?;
        let mut ids = Vec::with_capacity(messages.len());
        for step in steps(messages) {
            let answer = self.run(step.query)?;
            step.ids.collect(answer, &mut ids)?;
        }
        Ok(ids)
    }

    /// As [`Publish::cancel`](crate::Publish::cancel).
    ///
    /// # Errors
    ///
    /// [`Error::Database`](crate::Error::Database).
    fn cancel(&mut self, id: MessageId) -> Result<bool> {
        self.run(cancel(id))?.yes_or_no()
    }

    /// As [`Publish::reschedule`](crate::Publish::reschedule).
    ///
    /// # Errors
    ///
    /// [`Error::Database`](crate::Error::Database).
    fn reschedule(&mut self, id: MessageId, instant: DateTime<Utc>) -> Result<bool> {
        self.run(reschedule(id, instant))?.yes_or_no()
    }

    /// As [`Publish::register`](crate::Publish::register).
    ///
    /// # Errors
    ///
    /// What [`Cron`] refuses, which leaves the transaction usable; else [`Error::Database`](crate::Error::Database).
    #[cfg(feature = "cron")]
    fn register(&mut self, cron: Cron) -> Result<Option<DateTime<Utc>>> {
        let valid = cron.validate()?;
        let fired = self.run(valid.fired())?;
        let register = valid.register(&fired)?;
        let mut answer = self.run(register.clone())?;
        if answer.is_empty() {
            // Who registers the same just now was first; the next snapshot has it.
            answer = self.run(register)?;
        }
        answer.instant()
    }
}

impl<T: OpenTransaction + ?Sized> Publish for T {}

/// What [`Publish`] is for: implemented by what has a transaction open, and by nobody else.
pub trait OpenTransaction {
    /// Runs a statement in it, and gives the only column of its rows, which is text.
    #[doc(hidden)]
    fn run(&mut self, query: Query) -> Result<Answer>;
}
