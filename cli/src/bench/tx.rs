//! Handlers that share their transaction with the acknowledgement, against bare transactions with the handler's own write; and batches of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use postbox_consumer::{Batch, Consumer, Extract, HandlerDefinition, HandlerError, Raw, Tx};
use sqlx::Connection;

use super::environment::Environment;
use super::fanout;
use super::report::Report;
use super::rounds::Rounds;
use super::sink::LANES;

const EFFECT: &str = "INSERT INTO postbox_bench.effect VALUES ($1, 'handled')";
const PATIENCE: Duration = Duration::from_secs(60);

const EFFECTS: &str = "INSERT INTO postbox_bench.effect SELECT n, 'handled' FROM unnest($1::bigint[]) AS n";
/// Messages of a batch.
const BATCH: usize = 500;
/// Batches of one measurement.
const BATCHES: u64 = 200;

pub(crate) async fn measure(environment: &mut Environment) -> anyhow::Result<Vec<Report>> {
    let topics = [environment.topic("tx"), environment.topic("tx")];
    let (rounds, clients) = (environment.settings.rounds(), environment.settings.clients());
    environment.progress.begin("tx", 3 * rounds);
    let handled: [Arc<AtomicU64>; 2] = Default::default();
    let consumer = Consumer::new(environment.consumer_pool(1))
        .tx_pool(environment.consumer_pool((clients + AT_ONCE) as u32))
        .name("postbox-bench")
        .handlers([
            one_by_one(environment, &topics[0], clients, handled[0].clone()),
            batched(environment, &topics[1], handled[1].clone()),
        ])
        .start()
        .await?;
    for topic in &topics {
        environment.lanes_owned(topic, LANES).await?;
    }
    // As many as bare transactions fit in the time.
    let first = bare(environment, clients, environment.settings.span(1), u64::MAX).await?;
    let messages = ((first * environment.settings.span(1).as_secs_f64()) as u64).max(1);
    let in_batches = BATCHES * BATCH as u64;
    let mut rates = Rounds::<3>::new();
    let mut published = [0, 0];
    for _ in 0..rounds {
        fanout::publish(environment, &topics[0], messages).await?;
        published[0] += messages;
        let of_messages = until_handled(&handled[0], published[0] - messages, published[0]).await?;
        environment.progress.step("handlers");
        let of_bare = bare(environment, clients, Duration::MAX, messages).await?;
        environment.progress.step("bare transactions");
        fanout::publish(environment, &topics[1], in_batches).await?;
        published[1] += in_batches;
        let of_batches = until_handled(&handled[1], published[1] - in_batches, published[1]).await?;
        environment.progress.step("batches");
        rates.add([of_messages, of_bare, of_batches]);
    }
    consumer.shutdown().await?;
    for (topic, published) in topics.iter().zip(published) {
        let settled: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM postbox.settlement t JOIN postbox.subscription s ON s.id = t.subscription_id WHERE s.topic = $1",
        )
        .bind(topic)
        .fetch_one(&environment.pool)
        .await?;
        ensure!(
            settled == published as i64,
            "{settled} of {published} messages were settled in their transactions"
        );
    }
    Ok(vec![
        Report::verified("tx")
            .with("messages", published[0])
            .with("batch", BATCH)
            .figure("messages_per_s", rates.median(0))
            .figure("bare_transactions_per_s", rates.median(1))
            .figure("ratio_to_bare_transactions", rates.ratio(0, 1))
            .figure("batched_messages_per_s", rates.median(2)),
    ])
}

/// A transaction for each message.
fn one_by_one(
    environment: &Environment,
    topic: &str,
    clients: usize,
    handled: Arc<AtomicU64>,
) -> HandlerDefinition {
    HandlerDefinition::new("bench")
        .group(environment.group(0))
        .topic(topic)
        .concurrency(clients)
        .connections(clients)
        .argument::<Tx>()
        .call(move |mut invocation| {
            let handled = handled.clone();
            Box::pin(async move {
                let mut tx = Tx::extract(&mut invocation).await?;
                let n = handled.fetch_add(1, Ordering::Relaxed);
                sqlx::query(EFFECT)
                    .bind(n as i64)
                    .execute(&mut *tx)
                    .await
                    .map_err(HandlerError::retry)?;
                Ok(())
            })
        })
}

/// A transaction for each batch.
/// Batches that run at once.
const AT_ONCE: usize = 4;

fn batched(environment: &Environment, topic: &str, handled: Arc<AtomicU64>) -> HandlerDefinition {
    HandlerDefinition::new("bench")
        .group(environment.group(1))
        .topic(topic)
        .batch(BATCH)
        .concurrency(AT_ONCE)
        .connections(AT_ONCE)
        .argument::<Batch<Raw>>()
        .argument::<Tx>()
        .call(move |mut invocation| {
            let handled = handled.clone();
            Box::pin(async move {
                let messages = Batch::<Raw>::extract(&mut invocation).await?;
                let mut tx = Tx::extract(&mut invocation).await?;
                let offsets: Vec<i64> = messages.iter().map(|item| item.delivery.offset.get()).collect();
                sqlx::query(EFFECTS)
                    .bind(offsets)
                    .execute(&mut *tx)
                    .await
                    .map_err(HandlerError::retry)?;
                handled.fetch_add(messages.len() as u64, Ordering::Relaxed);
                Ok(())
            })
        })
}

/// The rate from the first to the last run. Those that are last to begin are not committed yet: that is as many as there are clients.
async fn until_handled(handled: &AtomicU64, before: u64, expected: u64) -> anyhow::Result<f64> {
    let published = Instant::now();
    let mut begun = None;
    while handled.load(Ordering::Relaxed) < expected {
        if begun.is_none() && handled.load(Ordering::Relaxed) > before {
            begun = Some(Instant::now());
        }
        ensure!(
            published.elapsed() < PATIENCE,
            "{} of {expected} messages came",
            handled.load(Ordering::Relaxed)
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let took = begun.unwrap_or(published).elapsed();
    Ok((expected - before) as f64 / took.as_secs_f64())
}

/// So many transactions, or for so long.
async fn bare(
    environment: &Environment,
    clients: usize,
    span: Duration,
    transactions: u64,
) -> anyhow::Result<f64> {
    let mut connections = Vec::new();
    for _ in 0..clients {
        connections.push(environment.pool.acquire().await?);
    }
    let begun = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = connections
        .into_iter()
        .map(|mut connection| {
            let next = next.clone();
            tokio::spawn(async move {
                let mut count = 0_u64;
                while begun.elapsed() < span {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= transactions {
                        break;
                    }
                    let mut tx = connection.begin().await?;
                    sqlx::query(EFFECT).bind(-1 - n as i64).execute(&mut *tx).await?;
                    tx.commit().await?;
                    count += 1;
                }
                anyhow::Ok(count)
            })
        })
        .collect();
    let mut count = 0;
    for task in tasks {
        count += task.await.context("a client ended")??;
    }
    Ok(count as f64 / begun.elapsed().as_secs_f64())
}
