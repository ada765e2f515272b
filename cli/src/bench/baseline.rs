//! What PostgreSQL itself charges for the same work: plain rows, a read by cursor, a notification; and the textbook outbox.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::postgres::PgListener;
use sqlx::{Connection, PgConnection, Row};
use tokio::task::JoinHandle;

use super::environment::Environment;
use super::message::{PAYLOAD, key};
use super::rounds::median;

pub(crate) const PLAIN_INSERT: &str = "INSERT INTO postbox_bench.plain (id, topic, type, key, headers, content_type, payload) \
     VALUES ($1, $2, $3, $4, $5, $6, $7)";
pub(crate) const QUEUE_INSERT: &str = "INSERT INTO postbox_bench.queue (id, topic, type, key, headers, content_type, payload) \
     VALUES ($1, $2, $3, $4, $5, $6, $7)";
pub(crate) const LOG_INSERT: &str = "INSERT INTO postbox_bench.log (id, topic, type, key, headers, content_type, payload) \
     SELECT unnest($1::uuid[]), $2, $3, unnest($4::text[]), unnest($5::jsonb[]), unnest($6::text[]), unnest($7::bytea[])";
pub(crate) const QUEUE_INSERT_BATCH: &str = "INSERT INTO postbox_bench.queue (id, topic, type, key, headers, content_type, payload) \
     SELECT unnest($1::uuid[]), $2, $3, unnest($4::text[]), unnest($5::jsonb[]), unnest($6::text[]), unnest($7::bytea[])";

/// Unsafe as a queue, since rows of a transaction that commits late are passed by; as a baseline that is good enough.
const READ_BY_CURSOR: &str = "SELECT n, id, topic, type, key, headers, content_type, payload, published_at FROM postbox_bench.log \
     WHERE n > $1 ORDER BY n LIMIT 1000";

const TAKE: &str = "SELECT n, id, topic, type, key, headers, content_type, payload, published_at FROM postbox_bench.queue \
     ORDER BY n LIMIT 1000 FOR UPDATE SKIP LOCKED";
const DELETE: &str = "DELETE FROM postbox_bench.queue WHERE n = ANY ($1)";

/// A plan of when the table was empty would sort it for every read.
const BY_INDEX: &str = "SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_sort = off";

/// Between two looks that find nothing.
const POLL: Duration = Duration::from_millis(2);

/// As Postbox sends a batch: the topic once, columns without a value as empty arrays.
pub(crate) async fn insert_batch(
    connection: &mut PgConnection,
    statement: &'static str,
    rows: u64,
) -> anyhow::Result<()> {
    let count = rows as usize;
    let ids: Vec<uuid::Uuid> = (0..rows).map(|_| postbox::MessageId::new().as_uuid()).collect();
    let keys: Vec<String> = (0..rows).map(key).collect();
    sqlx::query(statement)
        .bind(ids)
        .bind("bench")
        .bind(None::<&str>)
        .bind(keys)
        .bind([None::<serde_json::Value>; 0])
        .bind([None::<&str>; 0])
        .bind(vec![PAYLOAD; count])
        .execute(connection)
        .await?;
    Ok(())
}

/// A reader that counts what it reads; it ends when dropped.
pub(crate) struct Reader {
    read: Arc<AtomicU64>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Reader {
    /// Reads the log from its end on.
    pub(crate) async fn of_log(environment: &Environment) -> anyhow::Result<Self> {
        let mut connection = Self::connect(environment).await?;
        let cursor: i64 = sqlx::query_scalar("SELECT coalesce(max(n), 0) FROM postbox_bench.log")
            .fetch_one(&mut connection)
            .await?;
        let read = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(read_by_cursor(connection, cursor, read.clone()));
        Ok(Self { read, task })
    }

    /// Takes rows from the queue and deletes them.
    pub(crate) async fn of_queue(environment: &Environment) -> anyhow::Result<Self> {
        let connection = Self::connect(environment).await?;
        let read = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(take_and_delete(connection, read.clone()));
        Ok(Self { read, task })
    }

    async fn connect(environment: &Environment) -> anyhow::Result<PgConnection> {
        let mut connection = environment.connect().await?;
        sqlx::raw_sql(BY_INDEX).execute(&mut connection).await?;
        Ok(connection)
    }

    pub(crate) fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Until it has read so many; or, `passing_by`, until it reads no more.
    pub(crate) async fn has_read(&self, rows: u64, passing_by: bool) -> anyhow::Result<Instant> {
        let mut last = (self.read(), Instant::now());
        loop {
            let read = self.read();
            if read >= rows {
                return Ok(Instant::now());
            }
            if read > last.0 {
                last = (read, Instant::now());
            }
            if passing_by && last.1.elapsed() > Duration::from_millis(200) {
                return Ok(last.1);
            }
            anyhow::ensure!(!self.task.is_finished(), "the baseline's reader ended");
            anyhow::ensure!(
                last.1.elapsed() < Duration::from_secs(30),
                "the baseline's reader has {read} of {rows} rows"
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read_by_cursor(
    mut connection: PgConnection,
    mut cursor: i64,
    read: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    loop {
        let rows = sqlx::query(READ_BY_CURSOR)
            .bind(cursor)
            .fetch_all(&mut connection)
            .await?;
        match rows.last() {
            Some(row) => cursor = row.try_get(0)?,
            None => tokio::time::sleep(POLL).await,
        }
        read.fetch_add(rows.len() as u64, Ordering::Relaxed);
    }
}

async fn take_and_delete(mut connection: PgConnection, read: Arc<AtomicU64>) -> anyhow::Result<()> {
    loop {
        let mut tx = connection.begin().await?;
        let rows = sqlx::query(TAKE).fetch_all(&mut *tx).await?;
        let numbers: Vec<i64> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        if !numbers.is_empty() {
            sqlx::query(DELETE).bind(&numbers).execute(&mut *tx).await?;
        }
        tx.commit().await?;
        if numbers.is_empty() {
            tokio::time::sleep(POLL).await;
        }
        read.fetch_add(numbers.len() as u64, Ordering::Relaxed);
    }
}

/// From sending a NOTIFY until another connection hears it: the median in milliseconds.
pub(crate) async fn notify_round_trip(environment: &Environment, times: usize) -> anyhow::Result<f64> {
    let mut listener = PgListener::connect_with(&environment.consumer_pool(1)).await?;
    listener.listen("postbox_bench").await?;
    let mut connection = environment.connect().await?;
    let mut took = Vec::new();
    for _ in 0..times {
        tokio::time::sleep(Duration::from_millis(7)).await;
        let sent = Instant::now();
        let notify = sqlx::query("SELECT pg_notify('postbox_bench', '')").execute(&mut connection);
        let (heard, notified) = tokio::join!(async { listener.recv().await.map(|_| sent.elapsed()) }, notify);
        notified?;
        took.push(heard?.as_secs_f64() * 1000.0);
    }
    Ok(median(took))
}
