//! Publishing in a transaction, whatever client has it open.

pub mod blocking;
mod query;
#[cfg(feature = "cron")]
mod register;

use std::future::Future;

use chrono::{DateTime, Utc};

pub use self::query::{Answer, Bind, Query};
#[cfg(feature = "sqlx")]
pub(crate) use self::query::{batch_len, lock_keys, one_type, storable, up_to_the_last};
use self::query::{cancel, reschedule, steps};
#[cfg(feature = "cron")]
use crate::cron::Cron;
use crate::error::{Error, Result};
use crate::id::MessageId;
use crate::outgoing::{Outgoing, Valid};

/// Publishes messages in a transaction: they are delivered if, and only if, it commits.
///
/// It exists for transactions only, so publishing outside of one does not compile:
///
/// ```no_run
/// # use postbox::{Message, Outgoing, Publish};
/// # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let mut tx = pool.begin().await?;
/// sqlx::query("UPDATE carts SET abandoned = true WHERE id = 42").execute(&mut *tx).await?;
/// let id = tx.publish(Outgoing::json("carts", &serde_json::json!({"cart": 42})).key("42")).await?;
/// tx.commit().await?;
/// # Ok(()) }
/// ```
///
/// Publishing is one append. It never waits for a dispatcher, a consumer or another publisher, except where
/// [`ordered`](Outgoing::ordered) or [`dedup_key`](Outgoing::dedup_key) ask for it.
///
/// # Errors
///
/// Bad input is refused before the database sees it ([`Error`] names the field and the limit), and the transaction
/// stays usable. After [`Error::Database`] it is for the caller to roll back, as after any failed statement.
///
/// # Clients
///
/// Each has its feature: `sqlx` (0.9, on by default), `sqlx-0_8`, `tokio-postgres`, `deadpool-postgres`, `diesel-async`, `sea-orm`; and, without
/// `async`, `postgres` and `diesel` ([`blocking::Publish`](crate::blocking::Publish)). They write the same rows with the same guarantees. For
/// any other client there is [`Outgoing::statement`].
///
/// # Cancellation safety
///
/// Dropping the future leaves the transaction as the client leaves it when any query is dropped: the statement
/// may or may not have run, so roll back.
pub trait Publish: OpenTransaction {
    /// Publishes one message; returns its id. One round trip.
    ///
    /// # Errors
    ///
    /// A message that is refused, which leaves the transaction usable; else [`Error::Database`].
    fn publish(&mut self, message: impl Into<Outgoing>) -> impl Future<Output = Result<MessageId>> + Send {
        let valid = message.into().validate();
        async move { self.publish_one(valid?).await }
    }

    /// Publishes a batch in its order; returns the ids in the same order. One round trip for up to 10,000 messages and
    /// 32 MiB, then one for each further so many, and one before them if some are [`ordered`](Outgoing::ordered).
    ///
    /// All are checked first: if one is refused ([`Error::InBatch`] says which), none is published.
    ///
    /// # Errors
    ///
    /// [`Error::InBatch`], which leaves the transaction usable; else [`Error::Database`].
    fn publish_all<I>(&mut self, messages: I) -> impl Future<Output = Result<Vec<MessageId>>> + Send
    where
        I: IntoIterator,
        I::Item: Into<Outgoing>,
    {
        let valid = validate_all(messages);
        async move { self.publish_batch(valid?).await }
    }

    /// Cancels a message that was published with [`deliver_at`](Outgoing::deliver_at) or [`delay`](Outgoing::delay) and is not yet due; takes
    /// effect when the transaction commits.
    ///
    /// `true`: it was still pending, and if the transaction commits it will not be delivered. `false`: it was delivered, or cancelled, or
    /// never scheduled. If it is being delivered or changed by another transaction just now, this waits for that and then knows.
    ///
    /// # Errors
    ///
    /// [`Error::Database`].
    fn cancel(&mut self, id: MessageId) -> impl Future<Output = Result<bool>> + Send {
        async move { self.run(cancel(id)).await?.yes_or_no() }
    }

    /// Moves a scheduled message that is not yet due to another instant; one in the past means now. It answers as [`cancel`](Self::cancel) does.
    ///
    /// The message keeps its id and its expiry; among those that are due at the same instant it is the last.
    ///
    /// # Errors
    ///
    /// [`Error::Database`].
    fn reschedule(
        &mut self,
        id: MessageId,
        instant: DateTime<Utc>,
    ) -> impl Future<Output = Result<bool>> + Send {
        async move { self.run(reschedule(id, instant)).await?.yes_or_no() }
    }

    /// Registers a recurring message, or changes the one of that name; takes effect when the transaction commits. Returns its next due time.
    ///
    /// Registering what is there already changes nothing: it keeps its next due time and stays paused if it is. A changed expression or time zone
    /// counts from now. It begins with the first due time after now.
    ///
    /// # Errors
    ///
    /// What [`Cron`] refuses, which leaves the transaction usable; else [`Error::Database`].
    #[cfg(feature = "cron")]
    fn register(&mut self, cron: Cron) -> impl Future<Output = Result<Option<DateTime<Utc>>>> + Send {
        async move {
            let valid = cron.validate()?;
            let fired = self.run(valid.fired()).await?;
            let register = valid.register(&fired)?;
            let mut answer = self.run(register.clone()).await?;
            if answer.is_empty() {
                // Who registers the same just now was first; the next snapshot has it.
                answer = self.run(register).await?;
            }
            answer.instant()
        }
    }
}

impl<T: OpenTransaction + ?Sized> Publish for T {}

/// What [`Publish`] is for: implemented by what has a transaction open, and by nobody else.
pub trait OpenTransaction: Send {
    /// Runs a statement in it, and gives the only column of its rows, which is text.
    fn run(&mut self, query: Query) -> impl Future<Output = Result<Answer>> + Send;

    /// Publishes one.
    fn publish_one(&mut self, message: Valid) -> impl Future<Output = Result<MessageId>> + Send {
        async move {
            let id = message.id;
            self.run(message.into_query()).await?.id_or(id)
        }
    }

    /// Publishes many.
    fn publish_batch(&mut self, messages: Vec<Valid>) -> impl Future<Output = Result<Vec<MessageId>>> + Send {
        async move {
            let mut ids = Vec::with_capacity(messages.len());
            for step in steps(messages) {
                let answer = self.run(step.query).await?;
                step.ids.collect(answer, &mut ids)?;
            }
            Ok(ids)
        }
    }
}

fn validate_all<I>(messages: I) -> Result<Vec<Valid>>
where
    I: IntoIterator,
    I::Item: Into<Outgoing>,
{
    let messages = messages.into_iter();
    // Not collected: to collect results knows of no size, and a growing vector moves all that it has.
    let mut valid = Vec::with_capacity(messages.size_hint().0);
    for (index, message) in messages.enumerate() {
        let message: Outgoing = message.into();
        valid.push(message.validate().map_err(|source| Error::InBatch {
            index,
            source: Box::new(source),
        })?);
    }
    Ok(valid)
}
