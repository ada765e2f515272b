//! sqlx 0.9, which the other crates of Postbox use too: with its own types, since these cost least.

use sqlx::postgres::types::PgInterval;
use sqlx::{PgConnection, Postgres, Transaction};
use std::time::Duration;
use uuid::Uuid;

use crate::error::{DatabaseError, Error, Result};
use crate::id::MessageId;
use crate::outgoing::{DEFAULT_DEDUP_WINDOW, Valid, When};
use crate::publish::{
    Answer, Bind, OpenTransaction, Query, batch_len, lock_keys, one_type, storable, up_to_the_last,
};

/// What has a transaction of sqlx open.
pub trait SqlxTransaction: Send {
    /// The connection that it is open on.
    fn connection(&mut self) -> &mut PgConnection;
}

impl<T: SqlxTransaction> OpenTransaction for T {
    async fn run(&mut self, query: Query) -> Result<Answer> {
        run(self.connection(), query).await
    }

    async fn publish_one(&mut self, message: Valid) -> Result<MessageId> {
        publish_one(self.connection(), message).await
    }

    async fn publish_batch(&mut self, messages: Vec<Valid>) -> Result<Vec<MessageId>> {
        publish_batch(self.connection(), messages).await
    }
}

impl SqlxTransaction for crate::transaction::Transaction {
    fn connection(&mut self) -> &mut PgConnection {
        self
    }
}

impl SqlxTransaction for Transaction<'_, Postgres> {
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

impl SqlxTransaction for InTransaction<'_> {
    fn connection(&mut self) -> &mut PgConnection {
        self.0
    }
}

impl From<sqlx::Error> for DatabaseError {
    fn from(error: sqlx::Error) -> Self {
        let told = error.as_database_error();
        let code = told.and_then(|told| told.code()).map(|code| code.into_owned());
        let text = told.map_or_else(|| error.to_string(), |told| told.message().to_owned());
        Self::new(code, text, error)
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Error::Database(error.into())
    }
}

/// Any statement, on a connection.
async fn run(connection: &mut PgConnection, query: Query) -> Result<Answer> {
    let mut bound = sqlx::query_scalar(query.sql);
    for parameter in query.parameters {
        bound = match parameter {
            Bind::Text(text) => bound.bind(text),
            Bind::Bytes(bytes) => bound.bind(bytes),
            Bind::Texts(texts) => bound.bind(texts),
            Bind::Blobs(blobs) => bound.bind(blobs),
        };
    }
    Ok(Answer(bound.fetch_all(connection).await?))
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

async fn publish_one(connection: &mut PgConnection, message: Valid) -> Result<MessageId> {
    if !message.is_plain() {
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

async fn publish_batch(connection: &mut PgConnection, messages: Vec<Valid>) -> Result<Vec<MessageId>> {
    if let Some(locks) = lock_keys(&messages) {
        run(connection, locks).await?;
    }
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

/// In whole microseconds, as PostgreSQL has them, and not shorter than asked for.
pub(crate) fn interval(span: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(span.as_nanos().div_ceil(1_000)).unwrap_or(i64::MAX),
    }
}
