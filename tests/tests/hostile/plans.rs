//! What is done for every message or step reads what it needs by an index, however the planner would see it: a table that is read whole costs nothing in a
//! test and everything once there are a million rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{PATIENCE, bench, publish};
use postbox::Outgoing;
use postbox_consumer::{Extract, HandlerDefinition, HandlerError, Json, Retry, Tx};
use postbox_testkit::eventually;

const ROUNDS: i64 = 60;
const TOPICS: [&str; 3] = ["plans/a", "plans/b", "plans/c"];

/// Of the tables that grow with messages; turning the ring and starting look at each once or twice.
const READ_WHOLE: &str = "SELECT relname::text, seq_scan FROM pg_stat_user_tables WHERE schemaname = 'postbox' \
    AND relname ~ '^(outbox|segment|settlement|checkpoint|tick|dedup|redelivery|parked_key|scheduled)(_\\d)?$' ORDER BY relname";

fn handler(topic: &'static str, with_tx: bool, runs: &Arc<AtomicUsize>) -> HandlerDefinition {
    let runs = runs.clone();
    let definition = HandlerDefinition::new(topic)
        .group("plans")
        .topic(topic)
        .retry(Retry::fixed(Duration::from_millis(20)))
        .argument::<Json<i64>>();
    let definition = if with_tx {
        definition.argument::<Tx>()
    } else {
        definition
    };
    definition.call(move |mut invocation| {
        let runs = runs.clone();
        Box::pin(async move {
            let Json(n) = <Json<i64> as Extract>::extract(&mut invocation).await?;
            // Some fail once, so that their keys wait.
            if n % 20 == 7 && runs.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
                return Err(HandlerError::retry("once more"));
            }
            runs.fetch_add(2, Ordering::Relaxed);
            Ok(())
        })
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn no_table_is_read_whole_for_a_message_or_a_step() {
    let bench = bench().await;
    let runs = Arc::new(AtomicUsize::new(0));
    let handlers = TOPICS.map(|topic| handler(topic, topic == TOPICS[0], &runs));
    let consumer = bench.start(handlers.into()).await;
    let read_whole = async || {
        // What sessions have counted is seen within a second of their being idle.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let tables: Vec<(String, i64)> = sqlx::query_as(READ_WHOLE)
            .fetch_all(bench.db.pool())
            .await
            .unwrap();
        tables
    };
    let before = read_whole().await;
    for n in 0..ROUNDS {
        // Several topics in a step, with and without keys, and each step by itself.
        publish(
            bench.db.pool(),
            TOPICS.map(|topic| match n % 3 {
                0 => Outgoing::json(topic, &n),
                _ => Outgoing::json(topic, &n).key((n % 7).to_string()),
            }),
        )
        .await;
        publish(
            bench.db.pool(),
            [
                Outgoing::json(TOPICS[1], &n).dedup_key(n.to_string()),
                Outgoing::json(TOPICS[2], &n).delay(Duration::from_millis(300)),
            ],
        )
        .await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eventually(PATIENCE, || async {
        let handled: u64 = consumer.stats().iter().map(|stats| stats.handled).sum();
        match handled {
            handled if handled == 5 * ROUNDS as u64 => Ok(()),
            handled => Err(format!("{handled} of {}", 5 * ROUNDS)),
        }
    })
    .await;
    for ((table, before), (_, after)) in before.into_iter().zip(read_whole().await) {
        assert!(
            after - before < ROUNDS / 4,
            "{table} was read whole {} times for {ROUNDS} rounds of messages",
            after - before
        );
    }
    consumer.shutdown().await.unwrap();
}
