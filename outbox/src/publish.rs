//! Publishing in a transaction.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::postgres::types::PgInterval;
use sqlx::{PgConnection, Postgres, Transaction};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::id::MessageId;
use crate::outgoing::{DEFAULT_DEDUP_WINDOW, Outgoing, Valid, When};

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
/// # Cancellation safety
///
/// Dropping the future leaves the transaction as sqlx leaves it when any query is dropped: the statement
/// may or may not have run, so roll back.
pub trait Publish: OpenTransaction {
    /// Publishes one message; returns its id. One round trip.
    ///
    /// # Errors
    ///
    /// A message that is refused, which leaves the transaction usable; else [`Error::Database`].
    fn publish(&mut self, message: impl Into<Outgoing>) -> impl Future<Output = Result<MessageId>> + Send {
        let valid = message.into().validate();
        async move { publish_one(self.connection(), valid?).await }
    }

    /// Publishes a batch in its order; returns the ids in the same order. One round trip for up to 10,000 messages and
    /// 32 MiB, then one for each further so many.
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
        async move { publish_batch(self.connection(), valid?).await }
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
        async move {
            Ok(sqlx::query_scalar(CANCEL)
                .bind(id.as_uuid())
                .fetch_one(self.connection())
                .await?)
        }
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
        async move {
            Ok(sqlx::query_scalar(RESCHEDULE)
                .bind(id.as_uuid())
                .bind(storable(instant))
                .fetch_one(self.connection())
                .await?)
        }
    }
}

/// What [`Publish`] is for: implemented by what has a transaction open, and by nobody else.
pub trait OpenTransaction: Send {
    /// The connection that the transaction is open on.
    fn connection(&mut self) -> &mut PgConnection;
}

impl<T: OpenTransaction> Publish for T {}

impl OpenTransaction for Transaction<'_, Postgres> {
    fn connection(&mut self) -> &mut PgConnection {
        self
    }
}

/// A connection on which a transaction is open, begun by whatever means: what publishes where there is a `&mut PgConnection` and no
/// [`Transaction`].
///
/// ```no_run
/// use postbox::{InTransaction, Outgoing, Publish};
///
/// # async fn example(connection: &mut sqlx::PgConnection) -> Result<(), Box<dyn std::error::Error>> {
/// let mut tx = InTransaction::of(connection).await?;
/// tx.publish(Outgoing::json("carts", &42)).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct InTransaction<'a>(&'a mut PgConnection);

/// The server refuses it outside of a transaction, whoever began that and however. It leaves nothing behind.
const IS_OPEN: &str = "SAVEPOINT postbox_is_open; RELEASE SAVEPOINT postbox_is_open";
const NO_ACTIVE_TRANSACTION: &str = "25P01";

impl<'a> InTransaction<'a> {
    /// Asks the server whether a transaction is open, in one round trip. It must stay open for as long as this is used.
    ///
    /// # Errors
    ///
    /// [`Error::NoTransaction`].
    pub async fn of(connection: &'a mut PgConnection) -> Result<Self> {
        match sqlx::raw_sql(IS_OPEN).execute(&mut *connection).await {
            Ok(_) => Ok(Self(connection)),
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(NO_ACTIVE_TRANSACTION) => {
                Err(Error::NoTransaction)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl OpenTransaction for InTransaction<'_> {
    fn connection(&mut self) -> &mut PgConnection {
        self.0
    }
}

/// The plain path: what any SQL client can write by hand. Here as in all that follows nothing is looked up in the publisher's search_path. (`unnest`
/// of several arrays is PostgreSQL's own syntax, which has no other name.)
const INSERT: &str = "INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload) \
     VALUES ($1, $2, $3, $4, $5, $6, $7)";

/// Rows take their seq in the order of the arrays, so a batch keeps its order. Several `unnest` in the select list go through the arrays as
/// they are; in FROM, each would be put in a store of tuples first, which is a sixth of what a row costs. A shorter array goes on as nulls.
const INSERT_BATCH: &str = "INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload) \
     SELECT pg_catalog.unnest($1::pg_catalog.uuid[]), pg_catalog.unnest($2::pg_catalog.text[]), pg_catalog.unnest($3::pg_catalog.text[]), \
         pg_catalog.unnest($4::pg_catalog.text[]), pg_catalog.unnest($5::pg_catalog.jsonb[]), pg_catalog.unnest($6::pg_catalog.text[]), \
         pg_catalog.unnest($7::pg_catalog.bytea[])";

/// The same where all have one topic and type, as most batches do: these are sent and taken apart once, not for each row.
const INSERT_BATCH_OF_ONE_TYPE: &str = "INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload) \
     SELECT pg_catalog.unnest($1::pg_catalog.uuid[]), $2, $3, pg_catalog.unnest($4::pg_catalog.text[]), \
         pg_catalog.unnest($5::pg_catalog.jsonb[]), pg_catalog.unnest($6::pg_catalog.text[]), pg_catalog.unnest($7::pg_catalog.bytea[])";

const CANCEL: &str = "SELECT postbox.cancel($1)";
const RESCHEDULE: &str = "SELECT postbox.reschedule($1, $2)";

/// Deduplication, scheduling and expiry live in SQL, so that every client has the same.
const PUBLISH_EACH: &str = "SELECT postbox.publish_bytes(id => m.id, topic => m.topic, type => m.type, key => m.key, \
         headers => m.headers, content_type => coalesce(m.content_type, 'application/json'), payload => m.payload, \
         dedup_key => m.dedup_key, dedup_window => m.dedup_window, deliver_at => m.deliver_at, delay => m.delay, \
         expires_at => m.expires_at, expires_in => m.expires_in) \
     FROM unnest($1::pg_catalog.uuid[], $2::pg_catalog.text[], $3::pg_catalog.text[], $4::pg_catalog.text[], \
         $5::pg_catalog.jsonb[], $6::pg_catalog.text[], $7::pg_catalog.bytea[], $8::pg_catalog.text[], $9::interval[], \
         $10::pg_catalog.timestamptz[], $11::interval[], $12::pg_catalog.timestamptz[], $13::interval[]) WITH ORDINALITY \
         AS m (id, topic, type, key, headers, content_type, payload, dedup_key, dedup_window, deliver_at, delay, expires_at, \
         expires_in, n) \
     ORDER BY m.n";

/// In the order of the locks, so that two batches cannot deadlock on them. (Not of the keys: different ones may share a lock.)
const LOCK_KEYS: &str = "SELECT postbox.order_lock(k.topic, k.key, k.keys OPERATOR(pg_catalog.>) 64) \
     FROM (SELECT u.topic, u.key, pg_catalog.count(*) OVER () AS keys FROM unnest($1::pg_catalog.text[], $2::pg_catalog.text[]) AS u (topic, key) \
         ORDER BY postbox.order_hash(u.topic, u.key) OPERATOR(pg_catalog.&) 127, postbox.order_hash(u.topic, u.key)) k";

const BATCH_ROWS: usize = 10_000;
const BATCH_BYTES: usize = 32 * 1024 * 1024;

async fn publish_one(connection: &mut PgConnection, message: Valid) -> Result<MessageId> {
    if message.ordered || message.is_special() {
        let ids = publish_batch(connection, vec![message]).await?;
        return Ok(ids[0]);
    }
    let id = message.id;
    sqlx::query(INSERT)
        .bind(id.as_uuid())
        .bind(message.topic.as_ref())
        .bind(message.message_type.as_deref())
        .bind(message.key.as_deref())
        .bind(message.headers)
        .bind(message.content_type.as_deref())
        .bind(message.payload)
        .execute(connection)
        .await?;
    Ok(id)
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

async fn publish_batch(connection: &mut PgConnection, messages: Vec<Valid>) -> Result<Vec<MessageId>> {
    lock_keys(connection, &messages).await?;
    let mut ids = Vec::with_capacity(messages.len());
    let mut rest = messages.as_slice();
    while !rest.is_empty() {
        let (batch, others) = rest.split_at(batch_len(rest));
        match batch.iter().any(Valid::is_special) {
            true => publish_each(connection, batch, &mut ids).await?,
            false => insert(connection, batch, &mut ids).await?,
        }
        rest = others;
    }
    Ok(ids)
}

/// How many of these are one statement; one message may be larger than the limit.
fn batch_len(messages: &[Valid]) -> usize {
    let mut bytes = 0;
    let fits = |message: &&Valid| {
        bytes += message.payload.len();
        bytes <= BATCH_BYTES
    };
    messages.iter().take(BATCH_ROWS).take_while(fits).count().max(1)
}

async fn lock_keys(connection: &mut PgConnection, messages: &[Valid]) -> Result<()> {
    let keys: BTreeSet<(&str, Option<&str>)> = messages
        .iter()
        .filter(|m| m.ordered)
        .map(|m| (m.topic.as_ref(), m.key.as_deref()))
        .collect();
    if keys.is_empty() {
        return Ok(());
    }
    let (topics, keys): (Vec<&str>, Vec<Option<&str>>) = keys.into_iter().unzip();
    sqlx::query(LOCK_KEYS)
        .bind(topics)
        .bind(keys)
        .execute(connection)
        .await?;
    Ok(())
}

/// A column of a batch, as `unnest` takes it.
fn column<'a, T>(batch: &'a [Valid], of: impl Fn(&'a Valid) -> T) -> Vec<T> {
    batch.iter().map(of).collect()
}

async fn insert(connection: &mut PgConnection, batch: &[Valid], ids: &mut Vec<MessageId>) -> Result<()> {
    let row_ids = column(batch, |m| m.id.as_uuid());
    let insert = match one_type(batch) {
        Some((topic, message_type)) => sqlx::query(INSERT_BATCH_OF_ONE_TYPE)
            .bind(row_ids)
            .bind(topic)
            .bind(message_type),
        None => sqlx::query(INSERT_BATCH)
            .bind(row_ids)
            .bind(column(batch, |m| m.topic.as_ref()))
            .bind(up_to_the_last(&column(batch, |m| m.message_type.as_deref()))),
    };
    insert
        .bind(up_to_the_last(&column(batch, |m| m.key.as_deref())))
        .bind(up_to_the_last(&column(batch, |m| m.headers.as_ref())))
        .bind(up_to_the_last(&column(batch, |m| m.content_type.as_deref())))
        .bind(column(batch, |m| m.payload.as_slice()))
        .execute(connection)
        .await?;
    ids.extend(batch.iter().map(|message| message.id));
    Ok(())
}

async fn publish_each(
    connection: &mut PgConnection,
    batch: &[Valid],
    ids: &mut Vec<MessageId>,
) -> Result<()> {
    let window = |m: &Valid| {
        m.dedup
            .as_ref()
            .map_or(DEFAULT_DEDUP_WINDOW, |dedup| dedup.window)
    };
    let published: Vec<Uuid> = sqlx::query_scalar(PUBLISH_EACH)
        .bind(column(batch, |m| m.id.as_uuid()))
        .bind(column(batch, |m| m.topic.as_ref()))
        .bind(column(batch, |m| m.message_type.as_deref()))
        .bind(column(batch, |m| m.key.as_deref()))
        .bind(column(batch, |m| m.headers.as_ref()))
        .bind(column(batch, |m| m.content_type.as_deref()))
        .bind(column(batch, |m| m.payload.as_slice()))
        .bind(column(batch, |m| {
            m.dedup.as_ref().map(|dedup| dedup.key.as_str())
        }))
        .bind(column(batch, |m| interval(window(m))))
        .bind(column(batch, |m| m.due.and_then(When::at).map(storable)))
        .bind(column(batch, |m| m.due.and_then(When::span).map(interval)))
        .bind(column(batch, |m| m.expiry.and_then(When::at).map(storable)))
        .bind(column(batch, |m| m.expiry.and_then(When::span).map(interval)))
        .fetch_all(connection)
        .await?;
    ids.extend(published.into_iter().map(MessageId::from));
    Ok(())
}

/// The topic and type of all of them, if they have the same.
fn one_type(batch: &[Valid]) -> Option<(&str, Option<&str>)> {
    let first = batch.first()?;
    batch
        .iter()
        .all(|m| m.topic == first.topic && m.message_type == first.message_type)
        .then_some((&first.topic, first.message_type.as_deref()))
}

/// Without the nulls at the end, which for an optional column are often all.
fn up_to_the_last<T>(column: &[Option<T>]) -> &[Option<T>] {
    let len = column
        .iter()
        .rposition(Option::is_some)
        .map_or(0, |last| last + 1);
    &column[..len]
}

impl Valid {
    /// Whether it needs more than an append.
    pub(crate) fn is_special(&self) -> bool {
        self.dedup.is_some() || self.due.is_some() || self.expiry.is_some()
    }
}

/// In whole microseconds, as PostgreSQL has them, and not shorter than asked for.
pub(crate) fn interval(span: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(span.as_nanos().div_ceil(1_000)).unwrap_or(i64::MAX),
    }
}

/// In whole microseconds and not earlier than asked for. What was before 1970 is past all the same, and PostgreSQL's calendar begins later
/// than chrono's.
pub(crate) fn storable(instant: DateTime<Utc>) -> DateTime<Utc> {
    let rest = instant.timestamp_subsec_nanos() % 1_000;
    let up = TimeDelta::nanoseconds(if rest == 0 { 0 } else { i64::from(1_000 - rest) });
    instant
        .checked_add_signed(up)
        .unwrap_or(instant)
        .max(DateTime::UNIX_EPOCH)
}
