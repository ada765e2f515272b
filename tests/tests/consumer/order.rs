//! Order within a key, a topic, or not at all (I4).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::{History, Step, bench, publish_steps, settled, step, steps};
use postbox::Outgoing;
use postbox_consumer::{Delivery, HandlerError, State, handler, handlers};

async fn work(step: &Step, history: &History) {
    let began = Instant::now();
    // Some finish at once, some wait.
    if step.n % 3 != 0 {
        tokio::time::sleep(Duration::from_micros(200 * (step.n as u64 % 7))).await;
    }
    history.note(step, began);
}

#[handler(group = "by-key", concurrency = 16)]
async fn by_key(step: Step, State(history): State<History>) {
    work(&step, &history).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_a_key_run_one_after_another_and_keys_beside_each_other() {
    let bench = bench().await;
    let history = History::default();
    let _consumer = bench
        .consumer(handlers![by_key])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(20, 60)).await;
    history.has(1200).await;
    history.assert_in_order_and_alone(20, 60);
    assert!(history.most_at_once() > 1, "different keys ran beside each other");
}

#[handler(group = "by-topic", order = "topic", concurrency = 16)]
async fn by_topic(delivery: Delivery, step: Step, State(history): State<History>) {
    let began = Instant::now();
    if step.n % 5 == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    history.note(
        &Step {
            key: "topic".into(),
            n: delivery.offset.get(),
        },
        began,
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn in_topic_order_every_message_waits_for_the_one_before() {
    let bench = bench().await;
    let history = History::default();
    let _consumer = bench
        .consumer(handlers![by_topic])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(10, 50)).await;
    history.has(500).await;
    history.assert_in_order_and_alone(1, 500);
}

#[handler(group = "unordered", order = "none", concurrency = 8)]
async fn unordered(step: Step, State(history): State<History>) {
    let began = Instant::now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    history.note(&step, began);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_order_messages_of_a_key_run_beside_each_other() {
    let bench = bench().await;
    let history = History::default();
    let _consumer = bench
        .consumer(handlers![unordered])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(1, 40)).await;
    history.has(40).await;
    let most = history.most_at_once();
    assert!((2..=8).contains(&most), "{most} at once with a concurrency of 8");
}

#[handler(group = "keyless", topic = "loose", concurrency = 8)]
async fn keyless(delivery: Delivery, State(history): State<History>) {
    let began = Instant::now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    history.note(&step("", delivery.offset.get()), began);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_without_a_key_run_beside_each_other_up_to_the_concurrency() {
    let bench = bench().await;
    let history = History::default();
    let _consumer = bench
        .consumer(handlers![keyless])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    bench.publish((0..40).map(|n| Outgoing::json("loose", &n))).await;
    history.has(40).await;
    let most = history.most_at_once();
    assert!((2..=8).contains(&most), "{most} at once with a concurrency of 8");
}

#[derive(Clone, Default)]
struct Gate(Arc<AtomicBool>, Arc<AtomicUsize>);

#[handler(group = "blocked", retry(backoff = "fixed(50ms)"))]
async fn blocked(
    step: Step,
    State(history): State<History>,
    State(gate): State<Gate>,
) -> Result<(), HandlerError> {
    if step.key == "0" && step.n == 2 && !gate.0.load(Ordering::SeqCst) {
        gate.1.fetch_add(1, Ordering::SeqCst);
        return Err(HandlerError::retry("the gate is shut"));
    }
    work(&step, &history).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_message_holds_its_key_and_no_other() {
    let bench = bench().await;
    let (history, gate) = (History::default(), Gate::default());
    let consumer = bench
        .consumer(handlers![blocked])
        .state(history.clone())
        .state(gate.clone())
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(10, 30)).await;
    history.has(9 * 30 + 2).await;
    // Not before it was tried again: nothing passed it meanwhile.
    postbox_testkit::eventually(crate::support::PATIENCE, || async {
        if gate.1.load(Ordering::SeqCst) >= 3 {
            Ok(())
        } else {
            Err("no third attempt")
        }
    })
    .await;
    assert_eq!(history.of("0"), [0, 1]);
    assert_eq!(consumer.stats()[0].retrying, 1);
    gate.0.store(true, Ordering::SeqCst);
    history.has(300).await;
    history.assert_in_order_and_alone(10, 30);
    settled(bench.db.pool(), "blocked").await;
}

#[handler(group = "hot", concurrency = 4)]
async fn hot(step: Step, State(history): State<History>) {
    let began = Instant::now();
    if step.key == "hot" {
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    history.note(&step, began);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_key_takes_one_place_and_leaves_the_others_to_the_rest() {
    let bench = bench().await;
    let history = History::default();
    let _consumer = bench
        .consumer(handlers![hot])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    let mut all: Vec<Step> = (0..40).map(|n| step("hot", n)).collect();
    all.extend((0..200).map(|n| step(format!("cold-{n}"), 0)));
    publish_steps(bench.db.pool(), &all).await;
    history.has(240).await;
    let runs = history.runs();
    let last_cold = runs.iter().rposition(|run| run.key != "hot").unwrap();
    let hot_before = runs[..last_cold].iter().filter(|run| run.key == "hot").count();
    assert!(hot_before < 40, "cold keys did not wait for the hot one");
    assert_eq!(history.of("hot"), (0..40).collect::<Vec<_>>());
}
