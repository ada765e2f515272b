//! Clients that run transactions as fast as they are let.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use postbox::Publish;
use sqlx::{Connection, PgConnection, PgPool};

use super::baseline;
use super::message::{PAYLOAD, key, keyed, message};

/// What a client does again and again.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    /// A business transaction…
    Business(Beside),
    /// A transaction with a hundred messages or rows and nothing else.
    Batch(Batch),
}

/// … and what is in it beside the business.
#[derive(Debug, Clone)]
pub(crate) enum Beside {
    Nothing,
    PlainInsert,
    Message { topic: String },
    QueueInsert,
}

#[derive(Debug, Clone)]
pub(crate) enum Batch {
    Messages {
        topic: String,
    },
    /// Over so many topics, each with all of so many keys.
    Spread {
        topics: Arc<[String]>,
        keys: u64,
    },
    Log,
    Queue,
}

pub(crate) const BATCH: u64 = 100;

pub(crate) struct Done {
    /// Transactions; messages or rows, where they are batches.
    pub(crate) count: u64,
    pub(crate) begun: Instant,
    pub(crate) took: Duration,
}

impl Done {
    pub(crate) fn per_second(&self) -> f64 {
        self.count as f64 / self.took.as_secs_f64()
    }
}

/// Runs it by so many clients, each with a connection of its own, for so long.
pub(crate) async fn run(pool: &PgPool, clients: usize, span: Duration, work: &Work) -> anyhow::Result<Done> {
    let mut connections = Vec::new();
    for _ in 0..clients {
        connections.push(pool.acquire().await?);
    }
    let begun = Instant::now();
    let clients: Vec<_> = connections
        .into_iter()
        .map(|mut connection| {
            let work = work.clone();
            tokio::spawn(async move {
                let mut count = 0;
                while begun.elapsed() < span {
                    count += work.once(&mut connection, count).await?;
                }
                anyhow::Ok(count)
            })
        })
        .collect();
    let mut count = 0;
    for client in clients {
        count += client.await.context("a client ended")??;
    }
    Ok(Done {
        count,
        begun,
        took: begun.elapsed(),
    })
}

/// Runs it so many times.
pub(crate) async fn times(pool: &PgPool, clients: usize, times: u64, work: &Work) -> anyhow::Result<()> {
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for _ in 0..clients {
        let mut connection = pool.acquire().await?;
        let (next, work) = (next.clone(), work.clone());
        tasks.push(tokio::spawn(async move {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= times {
                    return anyhow::Ok(());
                }
                work.once(&mut connection, n).await?;
            }
        }));
    }
    for task in tasks {
        task.await.context("a client ended")??;
    }
    Ok(())
}

impl Work {
    async fn once(&self, connection: &mut PgConnection, n: u64) -> anyhow::Result<u64> {
        match self {
            Work::Business(beside) => beside.transaction(connection, n).await.map(|()| 1),
            Work::Batch(batch) => batch.transaction(connection, n).await.map(|()| BATCH),
        }
    }
}

impl Beside {
    async fn transaction(&self, connection: &mut PgConnection, n: u64) -> anyhow::Result<()> {
        let mut tx = connection.begin().await?;
        sqlx::query("INSERT INTO postbox_bench.business VALUES ($1, 'changed')")
            .bind(n as i64)
            .execute(&mut *tx)
            .await?;
        match self {
            Beside::Nothing => {}
            Beside::PlainInsert => insert(&mut tx, baseline::PLAIN_INSERT, n).await?,
            Beside::QueueInsert => insert(&mut tx, baseline::QUEUE_INSERT, n).await?,
            Beside::Message { topic } => {
                tx.publish(message(topic, n)).await?;
            }
        }
        tx.commit().await?;
        Ok(())
    }
}

/// The row that a message would be.
async fn insert(connection: &mut PgConnection, statement: &'static str, n: u64) -> anyhow::Result<()> {
    sqlx::query(statement)
        .bind(postbox::MessageId::new().as_uuid())
        .bind("bench")
        .bind(None::<&str>)
        .bind(key(n))
        .bind(None::<serde_json::Value>)
        .bind(None::<&str>)
        .bind(PAYLOAD)
        .execute(connection)
        .await?;
    Ok(())
}

impl Batch {
    async fn transaction(&self, connection: &mut PgConnection, n: u64) -> anyhow::Result<()> {
        let mut tx = connection.begin().await?;
        match self {
            Batch::Messages { topic } => {
                tx.publish_all((0..BATCH).map(|n| message(topic, n))).await?;
            }
            Batch::Spread { topics, keys } => {
                let count = topics.len() as u64;
                let batch = (n * BATCH..(n + 1) * BATCH).map(|n| {
                    let key = n / count % keys;
                    keyed(&topics[(n % count) as usize], key.to_string())
                });
                tx.publish_all(batch).await?;
            }
            Batch::Log => baseline::insert_batch(&mut tx, baseline::LOG_INSERT, BATCH).await?,
            Batch::Queue => baseline::insert_batch(&mut tx, baseline::QUEUE_INSERT_BATCH, BATCH).await?,
        }
        tx.commit().await?;
        Ok(())
    }
}
