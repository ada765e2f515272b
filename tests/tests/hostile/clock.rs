//! Clocks that are set: of the server, on and back, for good and for a moment. Nobody is taken for dead or alive by them, nothing stands still after them,
//! and they are named.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::{History, PATIENCE, Step, bench, publish_steps, settled, step};
use postbox_consumer::{Consumer, HandlerError, State, handler, handlers};
use postbox_dispatcher::{Dispatcher, doctor, retention, status};
use postbox_testkit::{TestDatabase, TestPostgres, eventually};
use sqlx::{Connection, PgConnection, PgPool};

const LEASE: Duration = Duration::from_secs(6);

/// A server whose clock a test can set, by the library libfaketime; its monotonic time stays true.
struct Server {
    server: TestPostgres,
    offset: PathBuf,
}

impl Server {
    /// `None` where the library is not installed.
    async fn new() -> Option<Self> {
        let Some(library) = library() else {
            eprintln!("libfaketime is not installed: this test does nothing");
            return None;
        };
        let folder = std::env::temp_dir().join(format!("postbox-clock-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let offset = folder.join(format!("offset-{}", uuid::Uuid::now_v7().simple()));
        std::fs::write(&offset, "+0").unwrap();
        let server = TestPostgres::builder()
            .environment("LD_PRELOAD", library.display().to_string())
            .environment("FAKETIME_TIMESTAMP_FILE", offset.display().to_string())
            .environment("FAKETIME_NO_CACHE", "1")
            .environment("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .environment("DONT_FAKE_MONOTONIC", "1")
            .start()
            .await
            .unwrap();
        Some(Self { server, offset })
    }

    async fn database(&self) -> TestDatabase {
        self.server.database().await.unwrap()
    }

    fn set(&self, seconds: i64) {
        // In one step, so that nobody reads half of it.
        let new = self.offset.with_extension("new");
        std::fs::write(&new, format!("{seconds:+}")).unwrap();
        std::fs::rename(new, &self.offset).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.offset);
    }
}

fn library() -> Option<PathBuf> {
    [
        "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
        "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
        "/usr/lib64/faketime/libfaketime.so.1",
        "/usr/lib/faketime/libfaketime.so.1",
        "/usr/local/lib/faketime/libfaketime.so.1",
    ]
    .into_iter()
    .map(Path::new)
    .find(|path| path.exists())
    .map(Path::to_owned)
}

async fn ahead(pool: &PgPool) -> i64 {
    let server: chrono::DateTime<chrono::Utc> = sqlx::query_scalar("SELECT clock_timestamp()")
        .fetch_one(pool)
        .await
        .unwrap();
    (server - chrono::Utc::now()).num_seconds()
}

async fn findings(pool: &PgPool, name: &str) -> Vec<String> {
    let findings = doctor::examine(pool).await.unwrap();
    findings
        .into_iter()
        .filter(|finding| finding.name == name)
        .map(|finding| finding.what)
        .collect()
}

async fn names(pool: &PgPool, name: &str, words: &str) {
    eventually(PATIENCE, || async {
        let found = findings(pool, name).await;
        match found.iter().any(|what| what.contains(words)) {
            true => Ok(()),
            false => Err(format!("{found:?}")),
        }
    })
    .await;
}

#[handler(group = "long", concurrency = 12, timeout = "60s")]
async fn long(step: Step, State(history): State<History>) {
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(9)).await;
    history.note(&step, began);
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_do_not_take_each_other_for_dead_when_the_servers_clock_is_set() {
    let Some(server) = Server::new().await else { return };
    let db = server.database().await;
    let dispatcher = Dispatcher::new(db.connect_pool(4)).start().await.unwrap();
    let history = History::default();
    let mut consumers = Vec::new();
    for name in ["first", "second"] {
        let consumer = Consumer::new(db.connect_pool(4))
            .name(name)
            .lease(LEASE)
            .handlers(handlers![long])
            .state(history.clone());
        consumers.push(consumer.start().await.unwrap());
    }
    eventually(PATIENCE, || async {
        let owners: i64 = sqlx::query_scalar("SELECT count(DISTINCT consumer_id) FROM postbox.lane")
            .fetch_one(db.pool())
            .await
            .unwrap();
        match owners {
            2 => Ok(()),
            owners => Err(format!("{owners} owners")),
        }
    })
    .await;
    for (round, set) in [(0, 3_600), (1, -3_600), (2, 0)] {
        let steps: Vec<Step> = (0..12).map(|n| step(format!("{round}-{n}"), n)).collect();
        publish_steps(db.pool(), &steps).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        server.set(set);
        assert!((ahead(db.pool()).await - set).abs() < 60, "the clock was not set");
        history.has(12 * (round + 1)).await;
        settled(db.pool(), "long").await;
        assert_eq!(history.len(), 12 * (round + 1), "some ran twice after {set} s");
    }
    names(db.pool(), "clock", "was set forward by").await;
    names(db.pool(), "clock", "instance first is").await;
    for consumer in consumers {
        consumer.shutdown().await.unwrap();
    }
    dispatcher.shutdown().await;
}

#[handler(group = "work")]
async fn work(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

/// An instance that holds its lock and all the lanes of the group `work`, and says nothing.
async fn frozen(db: &TestDatabase) -> PgConnection {
    let mut session = db.connect().await.unwrap();
    let id: i32 = sqlx::query_scalar(
        "SELECT postbox.register('frozen', 0, ARRAY[s.id], '6 s', '{}') FROM postbox.subscription s",
    )
    .fetch_one(&mut session)
    .await
    .unwrap();
    sqlx::query("SELECT postbox.heartbeat($1, '[]', NULL)")
        .bind(id)
        .execute(&mut session)
        .await
        .unwrap();
    sqlx::query("UPDATE postbox.lane SET consumer_id = $1, epoch = epoch + 1")
        .bind(id)
        .execute(&mut session)
        .await
        .unwrap();
    session
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_instance_is_named_and_its_lanes_are_taken_although_the_servers_clock_was_set_back() {
    let Some(server) = Server::new().await else { return };
    let db = server.database().await;
    let dispatcher = Dispatcher::new(db.connect_pool(4)).start().await.unwrap();
    let history = History::default();
    let consumer = async |name: &str| {
        Consumer::new(db.connect_pool(4))
            .name(name)
            .lease(LEASE)
            .handlers(handlers![work])
            .state(history.clone())
            .start()
            .await
            .unwrap()
    };
    consumer("first").await.shutdown().await.unwrap();
    let session = frozen(&db).await;
    server.set(-3_600);
    let steps: Vec<Step> = (0..31).map(|n| step(n, 0)).collect();
    publish_steps(db.pool(), &steps).await;
    names(db.pool(), "silent", "instance frozen").await;
    let second = consumer("second").await;
    history.has(31).await;
    settled(db.pool(), "work").await;
    second.shutdown().await.unwrap();
    session.close().await.unwrap();
    dispatcher.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_instance_is_not_called_silent_after_the_clock_was_set_on() {
    let Some(server) = Server::new().await else { return };
    let db = server.database().await;
    let history = History::default();
    let consumer = Consumer::new(db.connect_pool(4))
        .name("alive")
        .lease(LEASE)
        .handlers(handlers![work])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    eventually(PATIENCE, || async {
        match status::read(db.pool()).await.unwrap().consumers[0]
            .report
            .is_array()
        {
            true => Ok(()),
            false => Err("it has not been heard of"),
        }
    })
    .await;
    for set in [3_600, -3_600, 0] {
        server.set(set);
        assert_eq!(
            findings(db.pool(), "silent").await,
            Vec::<String>::new(),
            "at {set} s"
        );
        assert!(status::read(db.pool()).await.unwrap().consumers[0].live);
    }
    consumer.shutdown().await.unwrap();
}

/// Sets `postbox.clock()`, by which everything is due, kept and expires, to so many seconds from now.
async fn set_clock(pool: &PgPool, seconds: i64) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "CREATE OR REPLACE FUNCTION postbox.clock() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE \
         RETURN clock_timestamp() + make_interval(secs => {seconds})"
    )))
    .execute(pool)
    .await
    .unwrap();
}

const DAY: i64 = 86_400;

async fn watched(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar("SELECT expired FROM postbox.watch_subscriptions()")
        .fetch_all(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_clock_that_was_a_year_ahead_drops_no_subscription_and_expiry_works_again_when_it_is_back() {
    let db = TestDatabase::new().await.unwrap();
    let pool = db.pool();
    retention::set_expiry(pool, Some(Duration::from_secs(DAY as u64)))
        .await
        .unwrap();
    sqlx::query("SELECT postbox.subscribe('g', 'steps', 4::smallint, 'key', NULL, 'earliest', NULL)")
        .execute(pool)
        .await
        .unwrap();
    for seconds in [0, 365 * DAY, 365 * DAY + 60, 0, 60] {
        set_clock(pool, seconds).await;
        assert_eq!(watched(pool).await, Vec::<String>::new(), "at {seconds} s");
    }
    // Nobody serves it, and somebody watches, for a day and an hour.
    let mut dropped = Vec::new();
    for quarter in 1..=4 * 27 {
        set_clock(pool, 60 + quarter * 900).await;
        dropped.extend(watched(pool).await);
    }
    assert_eq!(dropped, ["g on steps"]);
}

#[handler(group = "fragile", retry(backoff = "fixed(1s)"))]
async fn fragile(
    step: Step,
    State(history): State<History>,
    State(failures): State<Arc<AtomicUsize>>,
) -> Result<(), HandlerError> {
    if failures.fetch_add(1, Ordering::Relaxed) == 0 {
        return Err(HandlerError::retry("the first time"));
    }
    history.note(&step, Instant::now());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_that_was_noted_while_the_clock_was_ahead_does_not_wait_until_then() {
    let bench = bench().await;
    let (history, failures) = (History::default(), Arc::new(AtomicUsize::new(0)));
    let consumer = || {
        bench
            .consumer(handlers![fragile])
            .state(history.clone())
            .state(failures.clone())
    };
    set_clock(bench.db.pool(), 3_600).await;
    let first = consumer().start().await.unwrap();
    bench.publish_one(&step("k", 0)).await;
    eventually(PATIENCE, || async {
        match bench.number("SELECT count(*) FROM postbox.redelivery").await {
            1 => Ok(()),
            n => Err(format!("{n} rows")),
        }
    })
    .await;
    // Before its retry, if it can be; else there is nothing to see.
    first.shutdown().await.unwrap();
    set_clock(bench.db.pool(), 0).await;
    let second = consumer().start().await.unwrap();
    history.has(1).await;
    settled(bench.db.pool(), "fragile").await;
    second.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_was_set_is_named_by_doctor_also_when_it_is_back() {
    let bench = bench().await;
    for seconds in [0, 3_600, 0] {
        set_clock(bench.db.pool(), seconds).await;
        tokio::time::sleep(Duration::from_millis(2_500)).await;
    }
    names(bench.db.pool(), "clock", "set").await;

    // By a consumer, too, where nobody dispatches.
    let db = TestDatabase::new().await.unwrap();
    let consumer = Consumer::new(db.pool().clone())
        .state(History::default())
        .handlers(handlers![long])
        .start()
        .await
        .unwrap();
    for seconds in [0, 3_600, 0] {
        set_clock(db.pool(), seconds).await;
        tokio::time::sleep(Duration::from_millis(2_500)).await;
    }
    names(db.pool(), "clock", "set").await;
    consumer.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_newest_report_counts_although_the_clock_was_set_back() {
    let db = TestDatabase::new().await.unwrap();
    sqlx::raw_sql(
        "INSERT INTO postbox.consumer (id, name, pid, subscriptions, lease) VALUES (1, 'a', 1, '{}', '10 s'); \
         INSERT INTO postbox.heartbeat (consumer_id, beat, at, report) \
         VALUES (1, 1, clock_timestamp() + interval '1 hour', '[1]'), (1, 2, clock_timestamp(), '[2]')",
    )
    .execute(db.pool())
    .await
    .unwrap();
    let report: serde_json::Value = sqlx::query_scalar("SELECT report FROM postbox.last_report(1)")
        .fetch_one(db.pool())
        .await
        .unwrap();
    assert_eq!(report, serde_json::json!([2]));
}
