//! Measures the main path on this machine: what publishing adds to a transaction, and how fast messages go end to end.
//!
//! Ratios come from interleaved rounds of one run, because machines are noisy; the figure is the median of the rounds' ratios. Every message is
//! counted on the other side, and a missing one is an error.
//!
//! `cargo run --release --example measure`

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use postbox::{Outgoing, Publish};
use postbox_consumer::{Consumer, Raw, State, handler, handlers};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::TestPostgres;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

const CLIENTS: usize = 8;
const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_secs(2);
const BATCH: u64 = 100;

#[derive(Clone, Default)]
struct Handled(Arc<AtomicU64>);

#[handler(group = "no-op", topic = "measure")]
async fn no_op(_message: Raw, State(handled): State<Handled>) {
    handled.0.fetch_add(1, Ordering::Relaxed);
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let server = TestPostgres::find_or_start().await?;
    let database = server.database().await?;
    let pool = PgPoolOptions::new()
        .max_connections(CLIENTS as u32 + 2)
        .connect(database.url())
        .await?;
    sqlx::raw_sql(
        "CREATE TABLE business (id bigint, note text); \
         CREATE TABLE plain (id uuid, topic text, type text, key text, headers jsonb, content_type text, payload bytea, \
             published_at timestamptz DEFAULT clock_timestamp())",
    )
    .execute(&pool)
    .await?;
    let dispatcher = Dispatcher::new(pool.clone()).start().await?;
    println!(
        "PostgreSQL {}, {CLIENTS} clients, {ROUNDS} rounds of {ROUND:?}",
        server.version()
    );

    publish(&pool).await?;
    throughput(&pool, database.url()).await?;
    dispatcher.shutdown().await;
    Ok(())
}

/// A business transaction with a message, against the same with a plain unindexed insert instead.
async fn publish(pool: &PgPool) -> anyhow::Result<()> {
    let mut ratios = Vec::new();
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let plain = rate(pool, false).await?;
        let message = rate(pool, true).await?;
        ratios.push(message / plain);
        rates.push(message);
    }
    println!(
        "publish: {:.0} transactions/s with one message, {:.2} of the rate with a plain insert",
        median(&mut rates),
        median(&mut ratios)
    );
    Ok(())
}

async fn rate(pool: &PgPool, with_message: bool) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let clients = (0..CLIENTS).map(|client| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let mut transactions = 0_u64;
            while begun.elapsed() < ROUND {
                let mut tx = pool.begin().await?;
                sqlx::query("INSERT INTO business VALUES ($1, 'changed')")
                    .bind(client as i64)
                    .execute(&mut *tx)
                    .await?;
                if with_message {
                    tx.publish(message(transactions)).await?;
                } else {
                    // The same row, in a table without index, trigger or partitions.
                    sqlx::query(
                        "INSERT INTO plain (id, topic, type, key, headers, content_type, payload) VALUES ($1, $2, $3, $4, $5, $6, $7)",
                    )
                    .bind(postbox::MessageId::new().as_uuid())
                    .bind("measure")
                    .bind(None::<&str>)
                    .bind((transactions % 1000).to_string())
                    .bind(None::<serde_json::Value>)
                    .bind(None::<&str>)
                    .bind(PAYLOAD)
                    .execute(&mut *tx)
                    .await?;
                }
                tx.commit().await?;
                transactions += 1;
            }
            anyhow::Ok(transactions)
        })
    });
    let mut all = 0;
    for client in clients.collect::<Vec<_>>() {
        all += client.await??;
    }
    Ok(all as f64 / begun.elapsed().as_secs_f64())
}

/// Batches of 100, one group, everything at once: from the first publish to the last message handled.
async fn throughput(pool: &PgPool, url: &str) -> anyhow::Result<()> {
    let handled = Handled::default();
    let consumer = Consumer::new(PgPoolOptions::new().max_connections(1).connect_lazy(url)?)
        .state(handled.clone())
        .handlers(handlers![no_op]);
    let consumer = consumer.start().await?;
    let mut expected: i64 = sqlx::query_scalar("SELECT count(*) FROM postbox.outbox")
        .fetch_one(pool)
        .await?;
    wait(&handled, expected as u64).await?;
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let clients = (0..4_u64).map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move {
                let mut messages = 0;
                while begun.elapsed() < ROUND {
                    let mut tx = pool.begin().await?;
                    tx.publish_all((0..BATCH).map(message)).await?;
                    tx.commit().await?;
                    messages += BATCH;
                }
                anyhow::Ok(messages)
            })
        });
        let mut published = 0;
        for client in clients.collect::<Vec<_>>() {
            published += client.await??;
        }
        expected += published as i64;
        wait(&handled, expected as u64).await?;
        rates.push(published as f64 / begun.elapsed().as_secs_f64());
    }
    consumer.shutdown().await?;
    println!(
        "end to end: {:.0} messages/s, published in batches of {BATCH} and handled by one group",
        median(&mut rates)
    );
    Ok(())
}

async fn wait(handled: &Handled, expected: u64) -> anyhow::Result<()> {
    let begun = Instant::now();
    while handled.0.load(Ordering::Relaxed) < expected {
        ensure!(
            begun.elapsed() < Duration::from_secs(120),
            "{} of {expected} messages came",
            handled.0.load(Ordering::Relaxed)
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    ensure!(
        handled.0.load(Ordering::Relaxed) == expected,
        "more messages came than were published"
    );
    Ok(())
}

const PAYLOAD: &[u8] =
    br#"{"order_id":"0190163d-8694-739b-aea5-966c26f8ad91","total_cents":1999,"currency":"EUR"}"#;

fn message(n: u64) -> Outgoing {
    Outgoing::bytes("measure", postbox::JSON, PAYLOAD).key((n % 1000).to_string())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values
        .get(values.len() / 2)
        .copied()
        .context("no rounds")
        .unwrap_or(f64::NAN)
}
