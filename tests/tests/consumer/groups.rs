//! Groups, dispatch by type, start positions, shutdown, and what is refused at start.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::{History, PATIENCE, Step, bench, publish_steps, settled, step, steps};
use postbox::{Message, Offset, Outgoing};
use postbox_consumer::{
    Consumer, Delivery, Error, Extract, HandlerDefinition, HandlerError, Json, Position, Raw, State, Tx,
    UnknownType, handler, handlers,
};
use postbox_testkit::eventually;

#[handler(group = "quick")]
async fn quick(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

#[derive(Clone, Default)]
struct Slow(History);

#[handler(group = "slow", concurrency = 1)]
async fn slow(step: Step, State(slow): State<Slow>) {
    tokio::time::sleep(Duration::from_millis(20)).await;
    slow.0.note(&step, Instant::now());
}

#[handler(group = "failing", retry(backoff = "fixed(100ms)"))]
async fn failing(_step: Step) -> Result<(), HandlerError> {
    Err(HandlerError::retry("down"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_and_a_failing_group_delay_no_other() {
    let bench = bench().await;
    let (history, slow_one) = (History::default(), Slow::default());
    let consumer = bench
        .consumer(handlers![quick, slow, failing])
        .state(history.clone())
        .state(slow_one.clone());
    let consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(50, 4)).await;
    history.has(200).await;
    assert!(slow_one.0.len() < 200, "the slow group is still at it");
    slow_one.0.has(200).await;
    history.assert_in_order_and_alone(50, 4);
    slow_one.0.assert_in_order_and_alone(50, 4);
    let failed = consumer
        .stats()
        .into_iter()
        .find(|stats| stats.group == "failing")
        .unwrap();
    assert_eq!(failed.handled, 0);
    assert!(failed.failed >= 20 && failed.breaker_open, "{failed:?}");
}

#[derive(Message, Debug)]
#[message(topic = "parcels", key = parcel)]
enum Parcel {
    #[message(type = "parcel.sent")]
    Sent { parcel: String },
    #[message(type = "parcel.lost")]
    Lost { parcel: String },
}

#[derive(Clone, Default)]
struct Tally(Arc<AtomicU64>, Arc<AtomicU64>, Arc<AtomicU64>);

#[handler(group = "parcels")]
async fn parcels(parcel: Parcel, State(tally): State<Tally>) {
    match parcel {
        Parcel::Sent { .. } => tally.0.fetch_add(1, Ordering::SeqCst),
        Parcel::Lost { .. } => tally.1.fetch_add(1, Ordering::SeqCst),
    };
}

#[handler(group = "parcels", topic = "parcels", type = "parcel.weighed")]
async fn weighed(Json(grams): Json<u64>, State(tally): State<Tally>) {
    tally.2.fetch_add(grams, Ordering::SeqCst);
}

fn parcel_messages() -> Vec<Outgoing> {
    vec![
        Outgoing::from(&Parcel::Sent { parcel: "a".into() }),
        Outgoing::json("parcels", &250)
            .message_type("parcel.weighed")
            .key("a"),
        Outgoing::json("parcels", &())
            .message_type("parcel.eaten")
            .key("a"),
        Outgoing::from(&Parcel::Lost { parcel: "a".into() }),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_type_chooses_the_handler_and_an_unknown_type_is_settled_and_counted_where_that_is_said() {
    let bench = bench().await;
    let tally = Tally::default();
    let consumer = bench
        .consumer(handlers![parcels, weighed])
        .state(tally.clone())
        .unknown_types(UnknownType::Settle)
        .start()
        .await
        .unwrap();
    bench.publish(parcel_messages()).await;
    settled(bench.db.pool(), "parcels").await;
    let counts = [&tally.0, &tally.1, &tally.2].map(|count| count.load(Ordering::SeqCst));
    assert_eq!(counts, [1, 1, 250]);
    let stats = &consumer.stats()[0];
    assert_eq!((stats.handled, stats.unknown, stats.failed), (3, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_type_holds_its_key_if_it_is_to_fail() {
    let bench = bench().await;
    let tally = Tally::default();
    let consumer = bench
        .consumer(handlers![parcels, weighed])
        .state(tally.clone())
        .unknown_types(UnknownType::Fail);
    let consumer = consumer.start().await.unwrap();
    bench.publish(parcel_messages()).await;
    eventually(PATIENCE, || async {
        let stats = &consumer.stats()[0];
        if stats.failed > 0 {
            Ok(())
        } else {
            Err(format!("{stats:?}"))
        }
    })
    .await;
    assert_eq!(tally.1.load(Ordering::SeqCst), 0, "the successor waits");
    assert_eq!(tally.2.load(Ordering::SeqCst), 250);
}

#[handler(group = "raw", topic = "blobs")]
async fn raw(raw: Raw, delivery: Delivery, State(seen): State<Seen>) {
    seen.0.lock().unwrap().push((raw, delivery));
}

#[derive(Clone, Default)]
struct Seen(Arc<std::sync::Mutex<Vec<(Raw, Delivery)>>>);

#[tokio::test(flavor = "multi_thread")]
async fn a_delivery_has_everything_that_was_published() {
    let bench = bench().await;
    let seen = Seen::default();
    let _consumer = bench
        .consumer(handlers![raw])
        .state(seen.clone())
        .start()
        .await
        .unwrap();
    let message = Outgoing::bytes("blobs", "application/x-protobuf", vec![0, 159, 146, 150])
        .message_type("blob")
        .key("k/ä")
        .header("tenant", "acme")
        .header("trace", "00-1");
    let id = message.id();
    bench.publish([message]).await;
    bench
        .sql("INSERT INTO postbox.outbox (topic, headers, payload) VALUES ('blobs', '{\"n\": 7}', '{}')")
        .await;
    eventually(PATIENCE, || async {
        if seen.0.lock().unwrap().len() == 2 {
            Ok(())
        } else {
            Err("waiting")
        }
    })
    .await;
    let seen = seen.0.lock().unwrap();
    let (raw, delivery) = &seen[0];
    assert_eq!(
        (raw.payload.as_slice(), raw.content_type.as_str()),
        ([0, 159, 146, 150].as_slice(), "application/x-protobuf")
    );
    assert_eq!((delivery.id, delivery.offset.get(), delivery.attempt), (id, 0, 1));
    assert_eq!(delivery.message_type.as_deref(), Some("blob"));
    assert_eq!(delivery.key.as_deref(), Some("k/ä"));
    assert_eq!(
        (delivery.headers.get("tenant"), delivery.headers.get("trace")),
        (Some("acme"), Some("00-1"))
    );
    assert_eq!(
        (delivery.topic.as_ref(), delivery.group.as_ref()),
        ("blobs", "raw")
    );
    let (raw, delivery) = &seen[1];
    assert_eq!(
        (
            raw.content_type.as_str(),
            delivery.message_type.as_deref(),
            delivery.key.as_deref()
        ),
        ("application/json", None, None)
    );
    assert_eq!(delivery.headers.get("n"), Some("7"));
}

/// A handler of the topic `steps` that notes what it gets, with a group and a start of the test's choice.
fn noting(group: &str, start: Position, history: &History) -> HandlerDefinition {
    let history = history.clone();
    HandlerDefinition::new("noting")
        .group(group)
        .start(start)
        .argument::<Step>()
        .call(move |mut invocation| {
            let history = history.clone();
            Box::pin(async move {
                let step = <Step as Extract>::extract(&mut invocation).await?;
                history.note(&step, Instant::now());
                Ok(())
            })
        })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_group_begins_where_it_says() {
    let bench = bench().await;
    publish_steps(bench.db.pool(), &[step("k", 0), step("k", 1)]).await;
    eventually(PATIENCE, || async {
        let head = bench.number("SELECT postbox.next_offset('steps')").await;
        if head == 2 { Ok(()) } else { Err(head) }
    })
    .await;
    let between: chrono::DateTime<chrono::Utc> = sqlx::query_scalar("SELECT clock_timestamp()")
        .fetch_one(bench.db.pool())
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &[step("k", 2), step("k", 3)]).await;
    eventually(PATIENCE, || async {
        let head = bench.number("SELECT postbox.next_offset('steps')").await;
        if head == 4 { Ok(()) } else { Err(head) }
    })
    .await;
    let starts = [
        ("earliest", Position::Earliest, vec![0, 1, 2, 3, 4]),
        ("latest", Position::Latest, vec![4]),
        ("offset", Position::Offset(Offset::new(1)), vec![1, 2, 3, 4]),
        ("beyond", Position::Offset(Offset::new(99)), vec![4]),
        ("time", Position::At(between), vec![2, 3, 4]),
        (
            "ago",
            Position::Ago(Duration::from_secs(3600)),
            vec![0, 1, 2, 3, 4],
        ),
    ];
    let histories: Vec<History> = starts.iter().map(|_| History::default()).collect();
    let handlers = starts
        .iter()
        .zip(&histories)
        .map(|((group, start, _), history)| noting(group, *start, history));
    let _consumer = bench.start(handlers.collect()).await;
    publish_steps(bench.db.pool(), &[step("k", 4)]).await;
    for ((group, _, expected), history) in starts.iter().zip(&histories) {
        history.has(expected.len()).await;
        settled(bench.db.pool(), group).await;
        assert_eq!(history.of("k"), *expected, "{group}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_repeats_nothing_and_loses_nothing() {
    let bench = bench().await;
    let history = History::default();
    let all = steps(30, 40);
    publish_steps(bench.db.pool(), &all[..600]).await;
    let slow = |history: &History| {
        let history = history.clone();
        HandlerDefinition::new("slow")
            .group("stopped")
            .concurrency(8)
            .argument::<Step>()
            .call(move |mut invocation| {
                let history = history.clone();
                Box::pin(async move {
                    let step = <Step as Extract>::extract(&mut invocation).await?;
                    let began = Instant::now();
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    history.note(&step, began);
                    Ok(())
                })
            })
    };
    let first = bench.start(vec![slow(&history)]).await;
    history.has(100).await;
    first.shutdown().await.unwrap();
    let after_stop = history.len();
    assert!(after_stop < 1200);
    publish_steps(bench.db.pool(), &all[600..]).await;
    let owned = bench
        .number("SELECT count(*) FROM postbox.lane WHERE consumer_id IS NOT NULL")
        .await;
    assert_eq!(owned, 0, "a stopped instance owns nothing");
    assert_eq!(history.len(), after_stop, "a stopped instance runs nothing");
    let _second = bench.start(vec![slow(&history)]).await;
    history.has(1200).await;
    settled(bench.db.pool(), "stopped").await;
    history.assert_in_order_and_alone(30, 40);
}

#[derive(Clone, Default)]
struct Attempts(Arc<AtomicU64>);

#[handler(group = "panics", retry(backoff = "fixed(10ms)"))]
async fn panics(step: Step, State(attempts): State<Attempts>, State(history): State<History>) {
    if step.n == 1 && attempts.0.fetch_add(1, Ordering::SeqCst) < 2 {
        panic!("a bug");
    }
    history.note(&step, Instant::now());
}

#[handler(group = "hangs", timeout = "100ms", retry(backoff = "fixed(10ms)"))]
async fn hangs(delivery: Delivery, _step: Step) {
    if delivery.attempt < 3 {
        std::future::pending::<()>().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_and_a_timeout_are_failures_and_are_retried_in_order() {
    let bench = bench().await;
    let (history, attempts) = (History::default(), Attempts::default());
    let consumer = bench
        .consumer(handlers![panics, hangs])
        .state(history.clone())
        .state(attempts.clone());
    let consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &[step("k", 0), step("k", 1), step("k", 2)]).await;
    history.has(3).await;
    assert_eq!(history.of("k"), [0, 1, 2]);
    settled(bench.db.pool(), "panics").await;
    settled(bench.db.pool(), "hangs").await;
    let stats = consumer.stats();
    assert_eq!(
        stats
            .iter()
            .map(|stats| (stats.group.as_str(), stats.handled, stats.failed))
            .collect::<Vec<_>>(),
        [("panics", 3, 2), ("hangs", 3, 6)]
    );
}

#[handler(group = "choosy")]
async fn choosy(step: Step, delivery: Delivery) -> Result<(), HandlerError> {
    match (step.n, delivery.attempt) {
        (0, _) => Err(HandlerError::discard("not ours")),
        (1, 1) => Err(HandlerError::retry_in(Duration::from_millis(30), "soon")),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_decides_to_discard_or_when_to_retry() {
    let bench = bench().await;
    let consumer = bench.start(handlers![choosy]).await;
    let begun = Instant::now();
    publish_steps(bench.db.pool(), &[step("k", 0), step("k", 1)]).await;
    settled(bench.db.pool(), "choosy").await;
    let stats = &consumer.stats()[0];
    assert_eq!((stats.handled, stats.failed, stats.discarded), (1, 2, 1));
    assert!(begun.elapsed() >= Duration::from_millis(30));
}

#[handler(group = "g", topic = "t")]
async fn takes_all(_raw: Raw) {}
#[handler(group = "g", topic = "t")]
async fn takes_all_too(_raw: Raw) {}
#[handler(group = "g", topic = "t", order = "topic", type = "a")]
async fn in_topic_order(_raw: Raw) {}
#[handler(group = "g", topic = "t", order = "none", type = "b")]
async fn in_no_order(_raw: Raw) {}
#[handler(group = "g", topic = "t")]
async fn wants_state(_raw: Raw, State(_): State<History>) {}
#[handler(group = "g")]
async fn no_topic(_raw: Raw) {}
#[handler(broadcast, topic = "t")]
async fn broadcast_tx(_tx: Tx) {}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_handlers_is_said_at_start() {
    let bench = bench().await;
    let cases: [(Vec<HandlerDefinition>, &str); 7] = [
        (handlers![], "no handlers"),
        (handlers![takes_all, takes_all_too], "both take every type"),
        (handlers![in_topic_order, in_no_order], "disagree on order"),
        (handlers![wants_state], "Consumer::state"),
        (handlers![no_topic], "topic = "),
        (handlers![broadcast_tx], "takes a Tx"),
        (vec![HandlerDefinition::new("bare").topic("t")], "no group"),
    ];
    for (handlers, says) in cases {
        let error = bench
            .consumer(handlers)
            .start()
            .await
            .expect_err(says)
            .to_string();
        assert!(error.contains(says), "{error:?} says {says:?}");
    }
    let first = bench.start(handlers![in_topic_order]).await;
    first.shutdown().await.unwrap();
    let error = bench
        .consumer(handlers![in_no_order])
        .start()
        .await
        .expect_err("the order is fixed");
    assert!(matches!(error, Error::OrderChanged { .. }), "{error}");
    let bare = postbox_testkit::TestDatabase::empty().await.unwrap();
    let error = Consumer::new(bare.pool().clone())
        .handlers(handlers![takes_all])
        .start()
        .await
        .expect_err("no schema");
    assert!(error.to_string().contains("postbox migrate"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn thirty_groups_read_once_and_need_three_connections_in_all() {
    let bench = bench().await;
    let histories: Vec<History> = (0..30).map(|_| History::default()).collect();
    let handlers = histories
        .iter()
        .enumerate()
        .map(|(n, history)| noting(&format!("group-{n}"), Position::Earliest, history));
    let options: sqlx::postgres::PgConnectOptions = bench.db.url().parse().unwrap();
    let pool = sqlx::postgres::PgPoolOptions::new()
        .max_connections(1)
        .connect_lazy_with(options.application_name("thirty"));
    let consumer = Consumer::new(pool.clone())
        .handlers(handlers)
        .start()
        .await
        .unwrap();
    pool.close().await;
    publish_steps(bench.db.pool(), &steps(20, 20)).await;
    for history in &histories {
        history.has(400).await;
        history.assert_in_order_and_alone(20, 20);
    }
    let connections = bench
        .number("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'thirty'")
        .await;
    assert!(connections <= 3, "{connections} connections");
    consumer.shutdown().await.unwrap();
}
