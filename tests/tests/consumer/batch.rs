//! Batches: order within keys, failures, transactions for all or none, and the fence of every lane (I1, I4, I6).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{History, PATIENCE, Step, bench, publish, publish_steps, settled, step, steps};
use postbox::Outgoing;
use postbox_consumer::{
    Batch, BatchItem, BatchResult, BesideBatch, Consumer, Delivery, Error, Extract, Failures,
    HandlerDefinition, HandlerError, IntoOutcome, Invocation, Json, MessageOrder, State, Tx, handler,
    handlers,
};
use postbox_testkit::eventually;
use tokio::sync::Notify;

const TABLES: &str = "CREATE TABLE effect (id bigserial, key text, n bigint)";

/// Effects that a key has not exactly once and in order.
const WRONG: &str = "SELECT count(*) FROM (SELECT key, n, count(*) OVER (PARTITION BY key, n) AS times, \
    row_number() OVER (PARTITION BY key ORDER BY id) - 1 AS place FROM effect) e WHERE times <> 1 OR place <> n";

/// How large the batches were, in the order in which they ended.
#[derive(Clone, Default)]
struct Sizes(Arc<Mutex<Vec<usize>>>);

impl Sizes {
    fn note<T>(&self, batch: &Batch<T>) {
        self.0.lock().unwrap().push(batch.len());
    }

    fn all(&self) -> Vec<usize> {
        self.0.lock().unwrap().clone()
    }
}

async fn write_all(tx: &mut Tx, batch: &Batch<Step>) -> Result<(), sqlx::Error> {
    let keys: Vec<String> = batch.iter().map(|item| item.message.key.clone()).collect();
    let numbers: Vec<i64> = batch.iter().map(|item| item.message.n).collect();
    sqlx::query("INSERT INTO effect (key, n) SELECT * FROM unnest($1::text[], $2::bigint[])")
        .bind(keys)
        .bind(numbers)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[handler(group = "plain", batch = 50, concurrency = 3)]
async fn plain(batch: Batch<Step>, State(history): State<History>, State(sizes): State<Sizes>) {
    let began = Instant::now();
    sizes.note(&batch);
    assert!(
        batch
            .windows(2)
            .all(|pair| pair[0].delivery.offset < pair[1].delivery.offset)
    );
    tokio::time::sleep(Duration::from_millis(2)).await;
    for item in &batch {
        assert_eq!(item.delivery.key.as_deref(), Some(item.message.key.as_str()));
        assert_eq!(item.delivery.attempt, 1);
    }
    // A key that is in one batch twice has its runs there; they are one after another.
    let mut keys = std::collections::HashSet::new();
    for step in batch.into_messages() {
        let began = if keys.insert(step.key.clone()) {
            began
        } else {
            Instant::now()
        };
        history.note(&step, began);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_in_one_batch_at_a_time_and_in_order() {
    let bench = bench().await;
    let (history, sizes) = (History::default(), Sizes::default());
    publish_steps(bench.db.pool(), &steps(20, 100)).await;
    let consumer = bench
        .consumer(handlers![plain])
        .state(history.clone())
        .state(sizes.clone())
        .start()
        .await
        .unwrap();
    settled(bench.db.pool(), "plain").await;
    history.assert_in_order_and_alone(20, 100);
    let sizes = sizes.all();
    assert_eq!(sizes.iter().sum::<usize>(), 2000);
    assert_eq!(
        sizes.iter().max(),
        Some(&50),
        "full where there is enough, and never fuller"
    );
    assert!(sizes.len() < 200, "{sizes:?}");
    assert_eq!(consumer.stats()[0].handled, 2000);
}

#[handler(group = "strict", order = "topic", batch = 40)]
async fn strict(batch: Batch<Step>, State(history): State<History>) {
    let began = Instant::now();
    tokio::task::yield_now().await;
    for item in batch {
        history.note(&item.message, began);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_order_topic_batches_follow_the_topic() {
    let bench = bench().await;
    let history = History::default();
    let all: Vec<Step> = (0..500).map(|n| step(n % 7, n)).collect();
    publish_steps(bench.db.pool(), &all).await;
    let consumer = bench.consumer(handlers![strict]).state(history.clone());
    let _consumer = consumer.start().await.unwrap();
    settled(bench.db.pool(), "strict").await;
    let numbers: Vec<i64> = history.runs().iter().map(|run| run.n).collect();
    assert_eq!(numbers, (0..500).collect::<Vec<_>>());
}

#[handler(group = "picky", batch = 100, retry(backoff = "fixed(2s)"))]
async fn picky(batch: Batch<Step>, mut tx: Tx, State(sizes): State<Sizes>) -> Result<(), HandlerError> {
    sizes.note(&batch);
    write_all(&mut tx, &batch).await?;
    let bad = batch
        .iter()
        .find(|item| item.message.key == "7" && item.message.n == 1);
    match bad {
        Some(bad) if bad.delivery.attempt < 3 => Err(HandlerError::retry("cannot have this one")),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_fails_is_found_and_holds_its_key_only() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let sizes = Sizes::default();
    publish_steps(bench.db.pool(), &steps(40, 10)).await;
    let consumer = bench.consumer(handlers![picky]).state(sizes.clone());
    let consumer = consumer.start().await.unwrap();
    // While it waits for its second attempt everything else gets done.
    eventually(PATIENCE, || async {
        let others = bench.number("SELECT count(*) FROM effect WHERE key <> '7'").await;
        if others == 390 { Ok(()) } else { Err(others) }
    })
    .await;
    // Its first may still be on its way, in a part of the batch.
    assert!(bench.number("SELECT count(*) FROM effect WHERE key = '7'").await <= 1);
    // By the next report.
    eventually(PATIENCE, || async {
        let attempts = "SELECT coalesce(max(attempt), 0)::bigint FROM postbox.redelivery";
        let attempts = bench.number(attempts).await;
        if attempts == 1 { Ok(()) } else { Err(attempts) }
    })
    .await;
    settled(bench.db.pool(), "picky").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 400);
    assert_eq!(bench.number(WRONG).await, 0);
    assert_eq!(consumer.stats()[0].handled, 400);
    let sizes = sizes.all();
    assert!(
        sizes.len() < 60,
        "one bad message does not take all batches apart: {sizes:?}"
    );
}

#[handler(
    group = "doomed",
    batch = 30,
    retry(max_attempts = 2, backoff = "fixed(10ms)")
)]
async fn doomed(batch: Batch<Step>) -> Result<(), HandlerError> {
    for item in &batch {
        match item.message.key.as_str() {
            "3" => return Err(HandlerError::retry("never")),
            "4" => return Err(HandlerError::discard("not wanted")),
            "5" => panic!("cannot"),
            _ => {}
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn decisions_are_of_the_message_that_is_to_blame() {
    let bench = bench().await;
    publish_steps(bench.db.pool(), &steps(10, 6)).await;
    let consumer = bench.start(handlers![doomed]).await;
    settled(bench.db.pool(), "doomed").await;
    let dead = bench
        .number("SELECT count(*) FROM postbox.dead_letter WHERE key IN ('3', '5') AND attempts = 2")
        .await;
    assert_eq!(dead, 12);
    assert_eq!(bench.number("SELECT count(*) FROM postbox.dead_letter").await, 12);
    let stats = &consumer.stats()[0];
    assert_eq!((stats.discarded, stats.handled), (6, 42));
}

#[handler(group = "exact", batch = 100, retry(backoff = "fixed(500ms)"))]
async fn exact(
    batch: Batch<Step>,
    State(history): State<History>,
    State(sizes): State<Sizes>,
) -> BatchResult {
    let began = Instant::now();
    sizes.note(&batch);
    let mut failures = Failures::none();
    for BatchItem {
        message, delivery, ..
    } in &batch
    {
        match (message.key.as_str(), message.n) {
            ("0", 1) => failures.add(delivery, HandlerError::discard("not wanted")),
            ("1", 1) => failures.add(delivery, HandlerError::dead_letter("cannot be")),
            ("2", 1) if delivery.attempt == 1 => failures.add(delivery, HandlerError::retry("not yet")),
            // Of two that fail the first counts.
            ("2", 2) if history.of("2").iter().all(|n| *n != 1) => {
                failures.add(delivery, std::io::Error::other("nor I"))
            }
            ("2", 2) => assert_eq!(delivery.attempt, 1),
            (key, 0) if key > "5" && delivery.attempt == 1 => {
                failures.add(delivery, HandlerError::retry("not yet"))
            }
            _ => {}
        }
        history.note(message, began);
    }
    Ok(failures)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_says_which_of_its_messages_failed() {
    let bench = bench().await;
    let (history, sizes) = (History::default(), Sizes::default());
    let mut all = steps(6, 4);
    // More than open the breaker when they fail one by one.
    all.extend((60..90).map(|key| step(key, 0)));
    publish_steps(bench.db.pool(), &all).await;
    sqlx::query("SELECT * FROM postbox.sequence()")
        .execute(bench.db.pool())
        .await
        .unwrap();
    let consumer = bench
        .consumer(handlers![exact])
        .state(history.clone())
        .state(sizes.clone());
    let consumer = consumer.start().await.unwrap();
    eventually(PATIENCE, async || match consumer.stats()[0].failed {
        33 => Ok(()),
        failed => Err(failed),
    })
    .await;
    assert!(
        !consumer.stats()[0].breaker_open,
        "it was one run, and not all of it failed"
    );
    settled(bench.db.pool(), "exact").await;
    assert_eq!(sizes.all()[0], 54, "all at once");
    // What was discarded holds up nothing; what comes after another failure runs again after it.
    assert_eq!(history.of("0"), [0, 1, 2, 3]);
    assert_eq!(history.of("1"), [0, 1, 2, 3, 2, 3]);
    assert_eq!(history.of("2"), [0, 1, 2, 3, 1, 2, 3]);
    for key in 3..6 {
        assert_eq!(history.of(&key.to_string()), [0, 1, 2, 3]);
    }
    for key in 60..90 {
        assert_eq!(history.of(&key.to_string()), [0, 0]);
    }
    let stats = &consumer.stats()[0];
    assert_eq!(
        (stats.handled, stats.discarded, stats.dead, stats.failed),
        (52, 1, 1, 33)
    );
    assert_eq!(
        bench
            .number("SELECT count(*) FROM postbox.dead_letter WHERE key = '1' AND attempts = 1")
            .await,
        1
    );
}

#[handler(group = "some", order = "none", batch = 4, retry(backoff = "fixed(1s)"))]
async fn some_of_each(batch: Batch<Step>) -> BatchResult {
    let mut failures = Failures::none();
    for item in batch
        .iter()
        .filter(|item| item.message.n == 0 && item.delivery.attempt == 1)
    {
        failures.add(&item.delivery, HandlerError::retry("not yet"));
    }
    Ok(failures)
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_of_which_some_succeed_do_not_open_the_breaker() {
    let bench = bench().await;
    // One of the four of a batch fails.
    let all: Vec<Step> = (0..200).map(|n| step(n, n % 4)).collect();
    publish_steps(bench.db.pool(), &all).await;
    let consumer = bench.start(handlers![some_of_each]).await;
    eventually(PATIENCE, async || match consumer.stats()[0].failed {
        50 => Ok(()),
        failed => Err(failed),
    })
    .await;
    assert!(!consumer.stats()[0].breaker_open);
    settled(bench.db.pool(), "some").await;
    let stats = &consumer.stats()[0];
    assert_eq!((stats.handled, stats.failed), (200, 50));
}

#[derive(Clone, Default)]
struct Earlier(Arc<Mutex<Option<Delivery>>>);

#[handler(group = "confused", order = "none", batch = 10, retry(backoff = "fixed(5ms)"))]
async fn confused(
    batch: Batch<Step>,
    State(earlier): State<Earlier>,
    State(sizes): State<Sizes>,
) -> BatchResult {
    sizes.note(&batch);
    let mut failures = Failures::none();
    let known = earlier
        .0
        .lock()
        .unwrap()
        .get_or_insert_with(|| batch[0].delivery.clone())
        .clone();
    if known.offset != batch[0].delivery.offset && sizes.all().len() == 2 {
        failures.add(&known, HandlerError::retry("long ago"));
    }
    Ok(failures)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_names_another_ones_message_has_failed() {
    let bench = bench().await;
    let sizes = Sizes::default();
    publish_steps(bench.db.pool(), &steps(20, 1)).await;
    let consumer = bench
        .consumer(handlers![confused])
        .state(Earlier::default())
        .state(sizes.clone());
    let consumer = consumer.start().await.unwrap();
    settled(bench.db.pool(), "confused").await;
    let stats = &consumer.stats()[0];
    assert_eq!((stats.handled, stats.failed), (20, 1));
    assert!(sizes.all().iter().sum::<usize>() > 20, "it ran again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_in_a_transaction_fails_whole_whatever_it_says() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let failed = Arc::new(AtomicBool::new(false));
    let has_failed = failed.clone();
    let partial = HandlerDefinition::new("partial")
        .group("partial")
        .batch(50)
        .argument::<Batch<Step>>()
        .argument::<Tx>()
        .call(move |mut invocation| {
            let failed = has_failed.clone();
            Box::pin(async move {
                let batch = Batch::<Step>::extract(&mut invocation).await?;
                let mut tx = Tx::extract(&mut invocation).await?;
                write_all(&mut tx, &batch).await?;
                let mut failures = Failures::none();
                if !failed.swap(true, Ordering::SeqCst) {
                    failures.add(&batch[0].delivery, HandlerError::discard("not wanted"));
                }
                Ok::<_, HandlerError>(failures).into_outcome()
            })
        });
    publish_steps(bench.db.pool(), &steps(10, 5)).await;
    let consumer = bench.start(vec![partial]).await;
    settled(bench.db.pool(), "partial").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 50);
    assert_eq!(bench.number(WRONG).await, 0);
    let stats = &consumer.stats()[0];
    assert_eq!((stats.handled, stats.discarded), (50, 0));
}

#[derive(Clone, Default)]
struct Meeting {
    arrived: Arc<Notify>,
    go_on: Arc<Notify>,
    first: Arc<AtomicBool>,
}

#[handler(group = "fenced", batch = 100)]
async fn fenced(batch: Batch<Step>, mut tx: Tx, State(meeting): State<Meeting>) -> Result<(), HandlerError> {
    write_all(&mut tx, &batch).await?;
    if !meeting.first.swap(true, Ordering::SeqCst) {
        meeting.arrived.notify_one();
        meeting.go_on.notified().await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_epoch_of_one_lane_refuses_the_whole_batch() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let meeting = Meeting::default();
    publish_steps(bench.db.pool(), &steps(64, 1)).await;
    let consumer = bench.consumer(handlers![fenced]).state(meeting.clone());
    let _consumer = consumer.start().await.unwrap();
    meeting.arrived.notified().await;
    // Messages of several lanes are in it; one of them goes to somebody else, who does nothing and is taken for dead.
    sqlx::query(
        "SELECT postbox.claim(2000000, l.subscription_id, ARRAY[l.lane], ARRAY[l.epoch], ARRAY[false]) \
         FROM (SELECT l.* FROM postbox.lane l JOIN postbox.outbox o ON postbox.key_hash(o.key) % 32 = l.lane ORDER BY o.seq LIMIT 1) l",
    )
    .execute(bench.db.pool())
    .await
    .unwrap();
    meeting.go_on.notify_one();
    settled(bench.db.pool(), "fenced").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 64);
    assert_eq!(bench.number(WRONG).await, 0);
    // What the refused batch wrote has left a gap in the numbers.
    assert!(bench.number("SELECT max(id) FROM effect").await > 64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_settlement_needs_every_lane_and_the_session() {
    let bench = bench().await;
    let subscription: i32 = sqlx::query_scalar(
        "SELECT id FROM postbox.subscribe('played', 'steps', 4::smallint, 'key', NULL, 'earliest', NULL)",
    )
    .fetch_one(bench.db.pool())
    .await
    .unwrap();
    let mut session = bench.db.connect().await.unwrap();
    sqlx::raw_sql("INSERT INTO postbox.consumer (id, name, pid, subscriptions, lease) VALUES (900, 'played', 0, '{}', '1 hour'); \
        SELECT pg_advisory_lock(1347571763, 900); UPDATE postbox.lane SET consumer_id = 900, epoch = lane + 1")
        .execute(&mut session)
        .await
        .unwrap();
    let settle = |lanes: [i16; 2], epochs: [i32; 2], offsets: [i64; 3]| {
        let pool = bench.pool();
        async move {
            let settled = sqlx::query("SELECT postbox.settle_batch(900, $1, $2, $3, ARRAY[$4, $5, $4], $6)")
                .bind(subscription)
                .bind(lanes)
                .bind(epochs)
                .bind(lanes[0])
                .bind(lanes[1])
                .bind(offsets)
                .execute(&pool)
                .await;
            match settled {
                Ok(_) => true,
                Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("PB001") => false,
                Err(error) => panic!("{error}"),
            }
        }
    };
    assert!(settle([0, 2], [1, 3], [10, 11, 12]).await);
    assert!(
        !settle([0, 2], [1, 2], [20, 21, 22]).await,
        "the second lane's epoch is an older one"
    );
    assert!(
        !settle([0, 2], [0, 3], [20, 21, 22]).await,
        "the first lane's epoch is an older one"
    );
    let rows: Vec<(i16, i64)> = sqlx::query_as("SELECT lane, \"offset\" FROM postbox.settlement ORDER BY 2")
        .fetch_all(bench.db.pool())
        .await
        .unwrap();
    assert_eq!(rows, [(0, 10), (2, 11), (0, 12)]);
    drop(session);
    eventually(PATIENCE, || async {
        match settle([0, 2], [1, 3], [30, 31, 32]).await {
            false => Ok(()),
            true => Err("the session is alive"),
        }
    })
    .await;
}

#[handler(group = "cut", batch = 25, concurrency = 3, retry(backoff = "fixed(20ms)"))]
async fn cut(batch: Batch<Step>, mut tx: Tx) -> Result<(), HandlerError> {
    Ok(write_all(&mut tx, &batch).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_cut_at_any_moment_lose_and_double_no_batch() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    publish_steps(bench.db.pool(), &steps(100, 60)).await;
    let consumer = Consumer::new(bench.db.connect_pool(4)).handlers(handlers![cut]);
    let _consumer = consumer.start().await.unwrap();
    let cutter = bench.db.connect_pool(1);
    let done = async {
        eventually(PATIENCE, || async {
            match sqlx::query_scalar::<_, i64>("SELECT count(*) FROM effect")
                .fetch_one(bench.db.pool())
                .await
            {
                Ok(6000) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await
    };
    let cutting = async {
        for _ in 0..60 {
            let _ = sqlx::query("SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity \
                WHERE datname = current_database() AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1) victim")
                .execute(&cutter)
                .await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::join!(cutting, done);
    settled(bench.db.pool(), "cut").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 6000);
    assert_eq!(bench.number(WRONG).await, 0);
}

#[handler(group = "both", batch = 10, topic = "mixed", type = "a")]
async fn many(batch: Batch<Json<i64>>, State(seen): State<Seen>) {
    let numbers = batch.into_messages().map(|Json(n)| n).collect();
    seen.0.lock().unwrap().push(('a', numbers));
}

#[handler(group = "both", topic = "mixed", type = "b")]
async fn one(Json(n): Json<i64>, State(seen): State<Seen>) {
    seen.0.lock().unwrap().push(('b', vec![n]));
}

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<SeenBatch>>>);

/// Which handler it was, and the numbers of its messages.
type SeenBatch = (char, Vec<i64>);

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_has_messages_of_its_handler_only_and_keys_keep_their_order_across_handlers() {
    let bench = bench().await;
    let seen = Seen::default();
    let messages = (0..300).map(|n| {
        let message = Outgoing::json("mixed", &n).message_type(if n % 3 == 0 { "b" } else { "a" });
        // A third of the keys has messages of both.
        message.key(format!("{}", n % 9))
    });
    publish(bench.db.pool(), messages.collect::<Vec<_>>()).await;
    let consumer = bench.consumer(handlers![many, one]).state(seen.clone());
    let _consumer = consumer.start().await.unwrap();
    settled(bench.db.pool(), "both").await;
    let seen = seen.0.lock().unwrap().clone();
    for (handler, numbers) in &seen {
        assert!(numbers.len() <= if *handler == 'a' { 10 } else { 1 });
        assert!(numbers.iter().all(|n| (n % 3 == 0) == (*handler == 'b')));
    }
    for key in 0..9 {
        let of_key: Vec<i64> = seen
            .iter()
            .flat_map(|(_, numbers)| numbers)
            .copied()
            .filter(|n| n % 9 == key)
            .collect();
        assert!(of_key.is_sorted() && of_key.len() >= 33, "{of_key:?}");
    }
    assert!(seen.iter().any(|(_, numbers)| numbers.len() > 1));
}

#[handler(group = "patient", batch = 4, batch_wait = "400ms")]
async fn patient(batch: Batch<Step>, State(sizes): State<Sizes>) {
    sizes.note(&batch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_waits_for_more_until_it_is_full_or_its_time_is_over() {
    let bench = bench().await;
    let sizes = Sizes::default();
    let consumer = bench.consumer(handlers![patient]).state(sizes.clone());
    let _consumer = consumer.start().await.unwrap();
    eventually(PATIENCE, || async {
        let free = bench
            .number("SELECT count(*) FROM postbox.lane WHERE consumer_id IS NULL")
            .await;
        if free == 0 { Ok(()) } else { Err(free) }
    })
    .await;
    let begun = Instant::now();
    publish_steps(bench.db.pool(), &steps(1, 5)).await;
    settled(bench.db.pool(), "patient").await;
    let sizes = sizes.all();
    assert_eq!(sizes.iter().sum::<usize>(), 5);
    assert_eq!(sizes[0], 4, "full: {sizes:?}");
    assert_eq!(sizes[1], 1, "alone: {sizes:?}");
    assert!(
        begun.elapsed() >= Duration::from_millis(350),
        "the fifth waits for more"
    );
}

#[handler(broadcast, batch = 16)]
async fn everywhere(batch: Batch<Step>, State(history): State<History>) -> Result<(), HandlerError> {
    static FAILED: AtomicU64 = AtomicU64::new(0);
    if batch.iter().any(|item| item.message.n == 5) && FAILED.fetch_add(1, Ordering::SeqCst) < 3 {
        return Err(HandlerError::retry("not yet"));
    }
    for item in &batch {
        history.note(&item.message, Instant::now());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_may_take_batches_too() {
    let bench = bench().await;
    let history = History::default();
    let consumer = bench.consumer(handlers![everywhere]).state(history.clone());
    let _consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(8, 20)).await;
    history.has(160).await;
    for (key, runs) in history.by_key() {
        let numbers: Vec<i64> = runs.iter().map(|run| run.n).collect();
        assert_eq!(numbers, (0..20).collect::<Vec<_>>(), "key {key}");
    }
}

#[handler(group = "paced", batch = 100)]
async fn paced(batch: Batch<Step>, State(sizes): State<Sizes>) {
    sizes.note(&batch);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_counts_messages_and_not_batches() {
    let bench = bench().await;
    let sizes = Sizes::default();
    bench
        .sql(
            "SELECT postbox.subscribe('paced', 'steps', 32::smallint, 'key', NULL, 'earliest', NULL); \
            UPDATE postbox.subscription SET rate_limit = 200",
        )
        .await;
    publish_steps(bench.db.pool(), &steps(300, 1)).await;
    let consumer = bench.consumer(handlers![paced]).state(sizes.clone());
    let begun = Instant::now();
    let _consumer = consumer.start().await.unwrap();
    settled(bench.db.pool(), "paced").await;
    assert_eq!(sizes.all().iter().sum::<usize>(), 300);
    assert!(
        begun.elapsed() >= Duration::from_millis(1300),
        "{:?}",
        begun.elapsed()
    );
}

struct Tenant;

impl BesideBatch for Tenant {}

impl Extract for Tenant {
    async fn extract(_: &mut Invocation) -> Result<Self, HandlerError> {
        Ok(Self)
    }
}

#[handler(group = "own", batch = 10)]
async fn own(_batch: Batch<Step>, _tenant: Tenant) {}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_go_together_does_not_start() {
    let bench = bench().await;
    let nothing = |_: Invocation| -> postbox_consumer::BoxFuture<postbox_consumer::Outcome> {
        Box::pin(async { Ok(()) })
    };
    let definition = || {
        HandlerDefinition::new("wrong")
            .group("wrong")
            .order(MessageOrder::None)
            .call(nothing)
    };
    let without_size = definition().argument::<Batch<Step>>();
    let without_batch = definition().argument::<Step>().batch(5);
    let too_large = definition().argument::<Batch<Step>>().batch(10_001);
    for (wrong, sentence) in [
        (without_size, "go together"),
        (without_batch, "go together"),
        (too_large, "1 to 10,000"),
    ] {
        let error: Error = bench.consumer(vec![wrong]).start().await.unwrap_err();
        assert!(error.to_string().contains(sentence), "{error}");
    }
    bench.start(handlers![own]).await;
}
