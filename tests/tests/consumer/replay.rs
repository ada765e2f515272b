//! Replay: moving a subscription, and running a range again without moving it.

use std::time::{Duration, Instant};

use crate::support::{Bench, History, PATIENCE, Step, bench, publish_steps, settled, step, steps};
use postbox::Offset;
use postbox_consumer::{Delivery, HandlerError, State, Tx, handler, handlers};
use postbox_dispatcher::subscriptions::{self, Position};
use postbox_testkit::eventually;

#[handler(group = "reader")]
async fn read(step: Step, State(history): State<History>) {
    let began = Instant::now();
    if step.n % 3 == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    history.note(&step, began);
}

#[handler(group = "reader")]
async fn read_slowly(step: Step, State(history): State<History>) {
    let began = Instant::now();
    tokio::time::sleep(Duration::from_millis(100)).await;
    history.note(&step, began);
}

#[handler(group = "writer")]
async fn write(step: Step, mut tx: Tx) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO written (key, n) VALUES ($1, $2)")
        .bind(&step.key)
        .bind(step.n)
        .execute(&mut *tx)
        .await?;
    Ok(())
}

#[handler(group = "replayed")]
async fn note_replays(step: Step, delivery: Delivery, State(history): State<History>) {
    let replayed = delivery.headers.get("postbox-replayed").is_some();
    let key = if replayed {
        format!("replayed {}", step.key)
    } else {
        step.key.clone()
    };
    history.note(&Step { key, n: step.n }, Instant::now());
}

async fn find(bench: &Bench, group: &str) -> i32 {
    subscriptions::find(bench.db.pool(), group, "steps")
        .await
        .unwrap()
}

async fn seek(bench: &Bench, group: &str, to: Position) -> i64 {
    let id = find(bench, group).await;
    subscriptions::seek(bench.db.pool(), id, to).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_consumer_follows_a_seek_within_a_second() {
    let bench = bench().await;
    let history = History::default();
    let consumer = bench
        .consumer(handlers![read])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    publish_steps(&bench.pool(), &steps(10, 10)).await;
    history.has(100).await;
    settled(bench.db.pool(), "reader").await;
    let begun = Instant::now();
    assert_eq!(
        seek(&bench, "reader", Position::Offset(Offset::new(40))).await,
        40
    );
    history.has(101).await;
    let followed = begun.elapsed();
    history.has(160).await;
    settled(bench.db.pool(), "reader").await;
    assert!(
        followed < Duration::from_secs(2),
        "it followed after {followed:?}"
    );
    assert_eq!(history.len(), 160);
    for key in 0..10 {
        let again: Vec<i64> = (0..10).chain(4..10).collect();
        assert_eq!(history.of(&key.to_string()), again);
    }
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_while_handlers_run_never_runs_a_key_twice_at_once() {
    let bench = bench().await;
    let history = History::default();
    let mut consumers = Vec::new();
    for _ in 0..2 {
        let consumer = bench.consumer(handlers![read_slowly]).state(history.clone());
        consumers.push(consumer.start().await.unwrap());
    }
    publish_steps(&bench.pool(), &steps(20, 4)).await;
    history.has(10).await;
    for _ in 0..3 {
        seek(&bench, "reader", Position::Earliest).await;
        let before = history.len();
        history.has(before + 10).await;
    }
    settled(bench.db.pool(), "reader").await;
    for (key, runs) in history.by_key() {
        for pair in runs.windows(2) {
            assert!(
                pair[0].ended <= pair[1].began,
                "runs of key {key} overlap: {pair:?}"
            );
        }
        let last: Vec<i64> = runs[runs.len() - 4..].iter().map(|run| run.n).collect();
        assert_eq!(last, [0, 1, 2, 3], "key {key}");
    }
    for consumer in consumers {
        consumer.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_seek_transactional_handlers_run_again_from_there() {
    let bench = bench().await;
    bench.sql("CREATE TABLE written (key text, n bigint)").await;
    let consumer = bench.start(handlers![write]).await;
    publish_steps(&bench.pool(), &steps(5, 20)).await;
    settled(bench.db.pool(), "writer").await;
    assert_eq!(bench.number("SELECT count(*) FROM written").await, 100);
    seek(&bench, "writer", Position::Offset(Offset::new(30))).await;
    settled(bench.db.pool(), "writer").await;
    assert_eq!(bench.number("SELECT count(*) FROM written").await, 170);
    // Once each: what was settled before the seek is not taken for what comes after it, nor the other way round.
    assert_eq!(
        bench
            .number("SELECT count(*) FROM (SELECT key, n FROM written GROUP BY 1, 2 HAVING count(*) = 2) t")
            .await,
        70
    );
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_goes_by_offset_time_and_name_and_is_kept_within_what_is_retained() {
    let bench = bench().await;
    let consumer = bench
        .consumer(handlers![read])
        .state(History::default())
        .start()
        .await
        .unwrap();
    publish_steps(&bench.pool(), &steps(1, 10)).await;
    settled(bench.db.pool(), "reader").await;
    consumer.shutdown().await.unwrap();
    bench.db.advance(Duration::from_secs(3600)).await.unwrap();
    publish_steps(&bench.pool(), &steps(1, 5)).await;
    eventually(PATIENCE, async || {
        let next = bench.number("SELECT postbox.next_offset('steps')").await;
        if next == 15 { Ok(()) } else { Err(next) }
    })
    .await;
    for (to, expected) in [
        (Position::Earliest, 0),
        (Position::Latest, 15),
        (Position::Offset(Offset::new(7)), 7),
        (Position::Offset(Offset::new(99)), 15),
        (Position::Offset(Offset::new(-3)), 0),
        (Position::Ago(Duration::from_secs(1800)), 10),
        (Position::Ago(Duration::from_secs(7200)), 0),
        (Position::At(chrono::Utc::now() + Duration::from_secs(1800)), 10),
    ] {
        assert_eq!(seek(&bench, "reader", to).await, expected, "{to:?}");
        assert_eq!(
            bench
                .number("SELECT count(*) FROM postbox.lane WHERE position <> 15")
                .await
                == 0,
            expected == 15
        );
        assert_eq!(
            bench.number("SELECT max(position) FROM postbox.lane").await,
            expected,
            "{to:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_is_replayed_in_order_to_one_group_and_its_cursor_stays() {
    let bench = bench().await;
    let history = History::default();
    let other = History::default();
    let consumer = bench
        .consumer(handlers![note_replays])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    let second = bench
        .consumer(handlers![read])
        .state(other.clone())
        .start()
        .await
        .unwrap();
    publish_steps(&bench.pool(), &steps(5, 100)).await;
    history.has(500).await;
    settled(bench.db.pool(), "replayed").await;
    settled(bench.db.pool(), "reader").await;
    let id = find(&bench, "replayed").await;
    let mut next = 100;
    let mut total = 0;
    while next < 400 {
        let (reached, replayed) = subscriptions::replay(bench.db.pool(), id, next, 400, 128)
            .await
            .unwrap();
        (next, total) = (reached, total + replayed);
        // Messages that come meanwhile are delivered as ever.
        publish_steps(&bench.pool(), &[step("new", total)]).await;
    }
    assert_eq!((next, total), (400, 300));
    history.has(803).await;
    for key in 0..5 {
        assert_eq!(
            history.of(&format!("replayed {key}")),
            (20..80).collect::<Vec<i64>>()
        );
    }
    settled(bench.db.pool(), "replayed").await;
    eventually(PATIENCE, async || {
        let left = bench.number("SELECT count(*) FROM postbox.redelivery").await;
        if left == 0 { Ok(()) } else { Err(left) }
    })
    .await;
    settled(bench.db.pool(), "reader").await;
    assert_eq!((history.len(), other.len()), (803, 503));
    // What is not settled comes anyway.
    let head = bench.number("SELECT postbox.next_offset('steps')").await;
    assert_eq!(
        subscriptions::replay(bench.db.pool(), id, head, head + 10, 10)
            .await
            .unwrap(),
        (head, 0)
    );
    consumer.shutdown().await.unwrap();
    second.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_back_takes_failed_messages_from_the_log_again_and_a_seek_on_keeps_them() {
    let bench = bench().await;
    let consumer = bench.start(handlers![refuse]).await;
    publish_steps(&bench.pool(), &steps(4, 3)).await;
    eventually(PATIENCE, async || {
        let failed = bench.number("SELECT count(*) FROM postbox.redelivery").await;
        let parked = "SELECT sum(postbox.parked(id))::bigint FROM postbox.subscription";
        let parked = bench.number(parked).await;
        if (failed, parked) == (4, 8) {
            Ok(())
        } else {
            Err(format!("{failed} failed, {parked} parked"))
        }
    })
    .await;
    consumer.shutdown().await.unwrap();
    // These are skipped, though they are of the same keys.
    publish_steps(&bench.pool(), &steps(4, 1)).await;
    eventually(PATIENCE, async || {
        let next = bench.number("SELECT postbox.next_offset('steps')").await;
        if next == 16 { Ok(()) } else { Err(next) }
    })
    .await;
    seek(&bench, "refuser", Position::Latest).await;
    assert_eq!(bench.number("SELECT count(*) FROM postbox.redelivery").await, 12);
    assert_eq!(bench.number("SELECT count(*) FROM postbox.parked_key").await, 0);
    seek(&bench, "refuser", Position::Offset(Offset::new(1))).await;
    assert_eq!(bench.number("SELECT count(*) FROM postbox.redelivery").await, 1);
    assert_eq!(
        bench
            .number("SELECT sum(messages)::bigint FROM postbox.subscription s, postbox.backlog(s.id)")
            .await,
        15
    );
}

#[handler(group = "refuser", retry(backoff = "fixed(1h)"))]
async fn refuse(_step: Step) -> Result<(), HandlerError> {
    Err(HandlerError::retry("never"))
}
