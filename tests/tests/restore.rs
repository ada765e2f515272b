//! Restore into another cluster: nothing is lost, nothing that was settled comes again, and the order is kept.

use std::collections::HashSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::Publish;
use postbox_consumer::{Consumer, Delivery, Extract, HandlerDefinition, Raw};
use postbox_dispatcher::{Dispatcher, restore};
use postbox_testkit::{TestDatabase, TestPostgres, eventually};
use sqlx::{AssertSqlSafe, PgPool};

mod ledger;
mod role;
mod support;
use support::{PATIENCE, Step, publish, settled, step};

/// What handlers of a group were given: key, number, offset.
type Seen = Arc<Mutex<Vec<(String, i64, i64)>>>;

fn note_in(seen: &Seen, group: &str) -> HandlerDefinition {
    let seen = seen.clone();
    HandlerDefinition::new("note")
        .group(group)
        .topic("steps")
        .call(move |mut invocation| {
            let seen = seen.clone();
            Box::pin(async move {
                let delivery = <Delivery as Extract>::extract(&mut invocation).await?;
                let raw = <Raw as Extract>::extract(&mut invocation).await?;
                let step: Step = serde_json::from_slice(&raw.payload)?;
                seen.lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .push((step.key, step.n, delivery.offset.get()));
                Ok(())
            })
        })
}

fn taken(seen: &Seen) -> Vec<(String, i64, i64)> {
    std::mem::take(&mut seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

async fn sql(pool: &PgPool, sql: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(sql.into()))
        .execute(pool)
        .await
        .expect("a statement of the test");
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("a number")
}

/// Transactions pass, in the whole cluster.
async fn age(pool: &PgPool, transactions: u32) {
    sql(
        pool,
        format!("DO $$ BEGIN FOR n IN 1..{transactions} LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"),
    )
    .await;
}

/// The client programs of a server; prints why where they are missing.
struct Programs {
    dump: PathBuf,
    restore: PathBuf,
}

impl Programs {
    fn of(server: &TestPostgres) -> Option<Self> {
        let programs = server.program("pg_dump").zip(server.program("pg_restore"));
        if programs.is_none() {
            eprintln!("skipped: pg_dump and pg_restore are not beside the server's programs");
        }
        programs.map(|(dump, restore)| Self { dump, restore })
    }

    /// Into an empty database.
    async fn copy(&self, from: &TestDatabase, to: &TestDatabase) {
        let mut dump = Command::new(&self.dump)
            .args(["--format=custom", "--schema=postbox", "--dbname", from.url()])
            .stdout(Stdio::piped())
            .spawn()
            .expect("pg_dump runs");
        let restore = Command::new(&self.restore)
            .args(["--exit-on-error", "--no-owner", "--dbname", to.url()])
            .stdin(dump.stdout.take().expect("a pipe"))
            .output()
            .expect("pg_restore runs");
        assert!(dump.wait().expect("pg_dump ends").success());
        assert!(restore.status.success(), "{restore:?}");
    }
}

/// An old cluster, with many transactions behind it, and a young one.
async fn two_clusters() -> Option<(Programs, TestDatabase, TestDatabase)> {
    let old = TestPostgres::private().await.expect("a server");
    let programs = Programs::of(&old)?;
    let young = TestPostgres::private().await.expect("another server");
    let from = old.database().await.expect("a database");
    age(from.pool(), 20_000).await;
    Some((
        programs,
        from,
        young.empty_database().await.expect("an empty database"),
    ))
}

fn numbers(keys: i64, numbers: std::ops::Range<i64>) -> Vec<Step> {
    numbers
        .flat_map(|n| (0..keys).map(move |key| step(key, n)))
        .collect()
}

/// `keys` × 30 messages are settled by the group `early`, as many more are in order but not settled, and as many are not in order when the
/// dump is made.
async fn live_a_while(db: &TestDatabase, keys: i64) -> Vec<(String, i64, i64)> {
    let seen = Seen::default();
    let dispatcher = Dispatcher::new(db.pool().clone())
        .start()
        .await
        .expect("it starts");
    let consumer = Consumer::new(db.pool().clone())
        .handlers([note_in(&seen, "early")])
        .start()
        .await
        .expect("it starts");
    publish(db.pool(), numbers(keys, 0..30).iter()).await;
    settled(db.pool(), "early").await;
    consumer.shutdown().await.expect("it stops");
    publish(db.pool(), numbers(keys, 30..60).iter()).await;
    eventually(PATIENCE, async || {
        match number(db.pool(), "SELECT postbox.next_offset('steps')").await {
            next if next == keys * 60 => Ok(()),
            next => Err(format!("{next} in order")),
        }
    })
    .await;
    dispatcher.shutdown().await;
    publish(db.pool(), numbers(keys, 60..90).iter()).await;
    taken(&seen)
}

/// Every message is seen once by its own offset, and a key's numbers are in order.
fn assert_each_once_and_in_order(seen: &[(String, i64, i64)], keys: i64, numbers: std::ops::Range<i64>) {
    let offsets: HashSet<i64> = seen.iter().map(|(.., offset)| *offset).collect();
    assert_eq!(offsets.len(), seen.len(), "an offset came twice");
    for key in 0..keys {
        let of_key: Vec<i64> = seen
            .iter()
            .filter(|(k, ..)| *k == key.to_string())
            .map(|(_, n, _)| *n)
            .collect();
        assert_eq!(of_key, numbers.clone().collect::<Vec<_>>(), "key {key}");
    }
}

#[tokio::test]
async fn what_was_dumped_goes_on_in_a_younger_cluster() {
    let Some((programs, old, young)) = two_clusters().await else {
        return;
    };
    let keys = 7;
    let before = live_a_while(&old, keys).await;
    assert_each_once_and_in_order(&before, keys, 0..30);
    programs.copy(&old, &young).await;

    // Before any dispatcher runs: two that commit, and one that stays open for a while.
    let pool = young.pool();
    let mut open = pool.begin().await.expect("a transaction");
    open.publish(&step("open", 0)).await.expect("published");
    publish(pool, numbers(keys, 90..100).iter()).await;
    let step_now = sqlx::query("SELECT * FROM postbox.sequence()")
        .fetch_all(pool)
        .await;
    let error = step_now.expect_err("a step must not be taken");
    let error = error.as_database_error().expect("the database's");
    assert_eq!(error.code().as_deref(), Some("PB002"), "{error}");
    assert_eq!(
        number(pool, "SELECT postbox.next_offset('steps')").await,
        keys * 60
    );

    let dispatcher = Dispatcher::new(pool.clone()).start().await.expect("it starts");
    publish(pool, numbers(keys, 100..110).iter()).await;
    open.commit().await.expect("committed");
    let (early, late) = (Seen::default(), Seen::default());
    let consumer = Consumer::new(pool.clone())
        .handlers([note_in(&early, "early"), note_in(&late, "late")])
        .start()
        .await
        .expect("it starts");
    publish(pool, numbers(keys, 110..120).iter()).await;
    for group in ["early", "late"] {
        settled(pool, group).await;
    }
    consumer.shutdown().await.expect("it stops");
    dispatcher.shutdown().await;

    let mut early = taken(&early);
    assert!(early.iter().any(|(key, ..)| key == "open"));
    early.retain(|(key, ..)| key != "open");
    assert_each_once_and_in_order(&early, keys, 30..120);
    // Offsets of the dump are kept: together with what was handled in the old cluster, none is there twice.
    assert_each_once_and_in_order(&[before, early].concat(), keys, 0..120);
    let mut late = taken(&late);
    late.retain(|(key, ..)| key != "open");
    assert_each_once_and_in_order(&late, keys, 0..120);
    assert_eq!(
        ledger::complete(&young, "steps").await.len() as i64,
        keys * 120 + 1
    );
    assert_eq!(restore::is_needed(pool).await.expect("an answer"), None);
}

#[tokio::test]
async fn a_younger_cluster_that_has_caught_up_is_told_from_the_old_one() {
    let Some((programs, old, young)) = two_clusters().await else {
        return;
    };
    live_a_while(&old, 3).await;
    programs.copy(&old, &young).await;
    let pool = young.pool();
    age(pool, 60_000).await;
    publish(pool, numbers(3, 90..100).iter()).await;
    let reason = restore::is_needed(pool)
        .await
        .expect("an answer")
        .expect("needed");
    assert!(reason.contains("cluster"), "{reason}");
    assert!(
        sqlx::query("SELECT * FROM postbox.sequence()")
            .fetch_all(pool)
            .await
            .is_err()
    );

    let done = restore::rebase(pool, false)
        .await
        .expect("rebased")
        .expect("it was needed");
    assert_eq!(
        (done.sequenced, done.unsequenced, done.freed_lanes),
        (180, 120, 0)
    );
    assert_eq!(restore::rebase(pool, false).await.expect("nothing to do"), None);
    ledger::step(pool).await;
    assert_eq!(ledger::complete(&young, "steps").await.len(), 300);
}

#[tokio::test]
async fn a_cluster_that_may_not_be_told_apart_is_by_its_transactions() {
    let Some((programs, old, young)) = two_clusters().await else {
        return;
    };
    // Never a step: nothing but the rows themselves says where they are from.
    publish(old.pool(), numbers(2, 0..5).iter()).await;
    programs.copy(&old, &young).await;
    let pool = young.pool();
    sql(pool, "UPDATE postbox.cluster SET system_identifier = NULL").await;
    let reason = restore::is_needed(pool)
        .await
        .expect("an answer")
        .expect("needed");
    assert!(reason.contains("message of transaction"), "{reason}");
    assert!(restore::rebase(pool, false).await.expect("rebased").is_some());
    ledger::step(pool).await;
    assert_eq!(ledger::complete(&young, "steps").await.len(), 10);
    // A role without rights can see for itself, too.
    let role = role::Role::new(&young).await;
    sql(
        pool,
        format!(
            "GRANT USAGE ON SCHEMA postbox TO {0}; GRANT SELECT ON ALL TABLES IN SCHEMA postbox TO {0}",
            role.name
        ),
    )
    .await;
    let theirs: Option<i64> = sqlx::query_scalar("SELECT postbox.system_identifier()")
        .fetch_one(&role.pool)
        .await
        .expect("an answer");
    assert!(theirs.is_some());
    sql(pool, "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC").await;
    let theirs: Option<i64> = sqlx::query_scalar("SELECT postbox.system_identifier()")
        .fetch_one(&role.pool)
        .await
        .expect("an answer");
    assert_eq!(theirs, None);
    assert_eq!(restore::is_needed(&role.pool).await.expect("an answer"), None);
    role.drop(&young).await;
}

#[tokio::test]
async fn instances_of_the_old_cluster_are_forgotten_and_their_lanes_go_on_where_they_stood() {
    let Some((programs, old, young)) = two_clusters().await else {
        return;
    };
    let seen = Seen::default();
    let dispatcher = Dispatcher::new(old.pool().clone())
        .start()
        .await
        .expect("it starts");
    let consumer = Consumer::new(old.pool().clone())
        .handlers([note_in(&seen, "early")])
        .start()
        .await
        .expect("it starts");
    publish(old.pool(), numbers(5, 0..20).iter()).await;
    settled(old.pool(), "early").await;
    // While it is running: its registration, its lanes and its checkpoints are in the dump.
    programs.copy(&old, &young).await;
    consumer.shutdown().await.expect("it stops");
    dispatcher.shutdown().await;

    let pool = young.pool();
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.consumer").await, 1);
    let done = restore::rebase(pool, false)
        .await
        .expect("rebased")
        .expect("it was needed");
    assert_eq!(done.freed_lanes, 32);
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.consumer").await, 0);
    assert_eq!(
        number(
            pool,
            "SELECT count(*) FROM postbox.lane WHERE consumer_id IS NOT NULL OR crashes > 0"
        )
        .await,
        0
    );
    taken(&seen);
    publish(pool, numbers(5, 20..25).iter()).await;
    let dispatcher = Dispatcher::new(pool.clone()).start().await.expect("it starts");
    let consumer = Consumer::new(pool.clone())
        .handlers([note_in(&seen, "early")])
        .start()
        .await
        .expect("it starts");
    settled(pool, "early").await;
    consumer.shutdown().await.expect("it stops");
    dispatcher.shutdown().await;
    assert_each_once_and_in_order(&taken(&seen), 5, 20..25);
}

#[tokio::test]
async fn a_restore_that_has_not_ended_is_waited_for() {
    let Some((programs, old, young)) = two_clusters().await else {
        return;
    };
    live_a_while(&old, 2).await;
    programs.copy(&old, &young).await;
    // Segments are loaded after messages, and indexes after all data.
    let pool = young.pool();
    sql(
        pool,
        "DROP INDEX postbox.segment_topic_base; CREATE TABLE kept AS SELECT * FROM postbox.segment; TRUNCATE postbox.segment",
    )
    .await;
    let error = restore::rebase(pool, false).await.expect_err("too early");
    assert!(error.to_string().contains("not complete"), "{error}");
    assert!(Dispatcher::new(pool.clone()).start().await.is_err());
    sql(
        pool,
        "INSERT INTO postbox.segment SELECT * FROM kept;
         CREATE INDEX segment_topic_base ON postbox.segment (topic, base)",
    )
    .await;
    let done = restore::rebase(pool, false)
        .await
        .expect("rebased")
        .expect("it was needed");
    assert_eq!((done.sequenced, done.unsequenced), (120, 60));
}

/// Any database of one cluster: a rebase may be asked for at any time, under load.
#[tokio::test]
async fn a_rebase_under_load_loses_and_repeats_nothing() {
    let db = TestDatabase::new().await.expect("a database");
    let dispatcher = Dispatcher::new(db.pool().clone())
        .start()
        .await
        .expect("it starts");
    let seen = Seen::default();
    let consumer = Consumer::new(db.connect_pool(8))
        .handlers([note_in(&seen, "early")])
        .start()
        .await
        .expect("it starts");
    let mut publishers = tokio::task::JoinSet::new();
    for key in 0..4 {
        let pool = db.pool().clone();
        publishers.spawn(async move {
            for n in 0..150 {
                let mut tx = pool.begin().await.expect("a transaction");
                tx.publish(&step(key, n)).await.expect("published");
                if n % 10 == 0 {
                    // Rebases come while it is open.
                    tokio::time::sleep(Duration::from_millis(40)).await;
                }
                tx.commit().await.expect("committed");
            }
        });
    }
    let mut rebases = 0;
    let rebasing = db.connect_pool(1);
    while publishers.try_join_next().is_some() || !publishers.is_empty() {
        restore::rebase(&rebasing, true).await.expect("rebased");
        rebases += 1;
    }
    settled(db.pool(), "early").await;
    consumer.shutdown().await.expect("it stops");
    dispatcher.shutdown().await;
    assert!(rebases > 3, "{rebases}");
    assert_each_once_and_in_order(&taken(&seen), 4, 0..150);
    assert_eq!(ledger::complete(&db, "steps").await.len(), 600);
}
