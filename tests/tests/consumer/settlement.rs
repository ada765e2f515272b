//! Handlers that settle in a transaction of their own: as with `Tx`, the effect, the messages and the settlement commit together, whatever becomes of the
//! handler, its connection or its instance.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::support::{PATIENCE, Step, bench, publish_steps, settled, step, steps};
use diesel_async::AsyncConnection;
use postbox::{Outgoing, Publish};
use postbox_consumer::{Batch, Consumer, Delivery, HandlerError, Settlement, State, handler, handlers};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::{PgConnection, PgPool};
use tokio::sync::Notify;

const TABLES: &str = "CREATE TABLE effect (id bigserial, key text, n bigint)";

/// Effects that a key has not exactly once and in order.
const WRONG: &str = "SELECT count(*) FROM (SELECT key, n, count(*) OVER (PARTITION BY key, n) AS times, \
    row_number() OVER (PARTITION BY key ORDER BY id) - 1 AS place FROM effect) e WHERE times <> 1 OR place <> n";

/// The handler's own, of which the consumer knows nothing.
#[derive(Clone)]
struct Own(PgPool);

async fn write(connection: &mut PgConnection, step: &Step) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO effect (key, n) VALUES ($1, $2)")
        .bind(&step.key)
        .bind(step.n)
        .execute(connection)
        .await?;
    Ok(())
}

/// Fails once in each way.
#[handler(group = "echo", retry(backoff = "fixed(10ms)"))]
async fn echo(
    step: Step,
    delivery: Delivery,
    settlement: Settlement,
    State(Own(pool)): State<Own>,
) -> Result<(), HandlerError> {
    let mut tx = pool.begin().await?;
    write(&mut tx, &step).await?;
    tx.publish(Outgoing::json("echoes", &step.n).key(&step.key))
        .await?;
    let first = delivery.attempt == 1;
    match step.n % 8 {
        1 if first => return Err(HandlerError::retry("before it settles")),
        2 if first => panic!("before it settles"),
        // An error that is swallowed has still failed the transaction.
        3 if first => {
            let _ = sqlx::query("SELECT 1 / 0").execute(&mut *tx).await;
        }
        _ => {}
    }
    let settled = settlement.settle(&mut tx).await;
    match step.n % 8 {
        3 if first => {
            assert!(settled.is_err(), "the transaction has failed");
            return Ok(());
        }
        4 if first => return Err(HandlerError::retry("after it settled")),
        5 if first => panic!("after it settled"),
        // It forgets to commit.
        6 if first => return Ok(()),
        _ => settled?,
    }
    tx.commit().await?;
    match step.n % 8 {
        // What has committed is not run again for that.
        7 => Err(HandlerError::retry("after it committed")),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_messages_and_settlement_commit_together_or_not_at_all() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let own = bench.db.connect_pool(8);
    let consumer = bench.consumer(handlers![echo]).state(Own(own));
    let consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(5, 16)).await;
    settled(bench.db.pool(), "echo").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 80);
    assert_eq!(bench.number(WRONG).await, 0);
    let echoes = "SELECT count(*) FROM postbox.outbox WHERE topic = 'echoes'";
    assert_eq!(bench.number(echoes).await, 80);
    let failed = consumer.stats()[0].failed;
    assert_eq!(failed, 5 * 2 * 6, "each of six ways, once for each message");
    assert_eq!(bench.number("SELECT count(*) FROM postbox.dead_letter").await, 0);
}

#[derive(Clone, Default)]
struct Meeting {
    arrived: Arc<Notify>,
    go_on: Arc<Notify>,
    first: Arc<AtomicBool>,
    runs: Arc<AtomicU64>,
}

impl Meeting {
    /// Only who is first waits.
    async fn take_place(&self) {
        if !self.first.swap(true, Ordering::SeqCst) {
            self.arrived.notify_one();
            self.go_on.notified().await;
        }
    }
}

#[handler(group = "fenced")]
async fn fenced(
    step: Step,
    settlement: Settlement,
    State(Own(pool)): State<Own>,
    State(meeting): State<Meeting>,
) -> Result<(), HandlerError> {
    meeting.runs.fetch_add(1, Ordering::SeqCst);
    let mut tx = pool.begin().await?;
    write(&mut tx, &step).await?;
    meeting.take_place().await;
    settlement.settle(&mut tx).await?;
    tx.commit().await?;
    Ok(())
}

/// Takes all lanes away, as an instance would that does nothing.
async fn take_over(pool: &PgPool) {
    let take = "SELECT postbox.claim(2000000, l.subscription_id, ARRAY[l.lane], ARRAY[l.epoch], ARRAY[false]) FROM postbox.lane l; \
         UPDATE postbox.lane SET crashes = 0";
    sqlx::raw_sql(take).execute(pool).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_owner_cannot_settle_and_nothing_is_counted_against_the_message() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let meeting = Meeting::default();
    let consumer = bench
        .consumer(handlers![fenced])
        .state(meeting.clone())
        .state(Own(bench.db.connect_pool(4)));
    let consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &[step("k", 0), step("k", 1)]).await;
    meeting.arrived.notified().await;
    take_over(bench.db.pool()).await;
    meeting.go_on.notify_one();
    settled(bench.db.pool(), "fenced").await;
    assert_eq!(meeting.runs.load(Ordering::SeqCst), 3, "the first was refused");
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 2);
    assert_eq!(bench.number(WRONG).await, 0);
    assert_eq!(consumer.stats()[0].failed, 0);
}

#[handler(group = "lingering")]
async fn lingering(
    step: Step,
    settlement: Settlement,
    State(Own(pool)): State<Own>,
    State(meeting): State<Meeting>,
) -> Result<(), HandlerError> {
    let mut tx = pool.begin().await?;
    write(&mut tx, &step).await?;
    settlement.settle(&mut tx).await?;
    meeting.take_place().await;
    tx.commit().await?;
    Ok(())
}

/// Who took a lane over would otherwise run what may still commit.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_settled_and_not_committed_holds_off_a_takeover() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    for commits in [true, false] {
        bench.sql("TRUNCATE effect").await;
        let meeting = Meeting::default();
        let consumer = bench
            .consumer(handlers![lingering])
            .state(meeting.clone())
            .state(Own(bench.db.connect_pool(4)));
        let consumer = consumer.start().await.unwrap();
        publish_steps(bench.db.pool(), &[step("k", 0)]).await;
        meeting.arrived.notified().await;
        take_over(bench.db.pool()).await;
        let left = "SELECT count(*) FROM postbox.lane WHERE consumer_id <> 2000000";
        assert_eq!(
            bench.number(left).await,
            1,
            "all lanes but that of what may still commit"
        );
        if commits {
            meeting.go_on.notify_one();
        } else {
            // Its connection is lost instead.
            let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE state = 'idle in transaction' \
                AND datname = current_database()";
            bench.number(cut).await;
            meeting.go_on.notify_one();
        }
        settled(bench.db.pool(), "lingering").await;
        assert_eq!(
            bench.number("SELECT count(*) FROM effect").await,
            1,
            "commits: {commits}"
        );
        consumer.shutdown().await.unwrap();
    }
}

#[handler(group = "forgetful", retry(max_attempts = 3, backoff = "fixed(10ms)"))]
async fn forgetful(
    step: Step,
    settlement: Settlement,
    State(Own(pool)): State<Own>,
    State(runs): State<Arc<AtomicU64>>,
) -> Result<(), HandlerError> {
    runs.fetch_add(1, Ordering::SeqCst);
    let mut tx = pool.begin().await?;
    write(&mut tx, &step).await?;
    match step.key.as_str() {
        "settles not" => tx.commit().await?,
        "commits not" => settlement.settle(&mut tx).await?,
        "isolated" => {
            let mut tx = pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
            settlement.settle(&mut tx).await?;
            tx.commit().await?;
        }
        _ => {
            tx.rollback().await?;
            settlement.without_effect();
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_does_not_settle_or_does_not_commit_is_told_so() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let runs = Arc::new(AtomicU64::new(0));
    let consumer = bench
        .consumer(handlers![forgetful])
        .state(runs.clone())
        .state(Own(bench.db.connect_pool(4)));
    let _consumer = consumer.start().await.unwrap();
    for (key, times, says) in [
        ("settles not", 1, Some("has not settled its message")),
        ("commits not", 3, Some("was not committed")),
        ("isolated", 3, Some("READ COMMITTED")),
        ("has nothing to write", 1, None),
    ] {
        runs.store(0, Ordering::SeqCst);
        bench.sql("DELETE FROM postbox.dead_letter").await;
        publish_steps(bench.db.pool(), &[step(key, 0)]).await;
        settled(bench.db.pool(), "forgetful").await;
        assert_eq!(runs.load(Ordering::SeqCst), times, "{key}");
        let reasons: Vec<String> = sqlx::query_scalar("SELECT reason FROM postbox.dead_letter")
            .fetch_all(bench.db.pool())
            .await
            .unwrap();
        match says {
            Some(says) => assert!(
                reasons.len() == 1 && reasons[0].contains(says),
                "{key}: {reasons:?}"
            ),
            None => assert_eq!(reasons, [""; 0], "{key}"),
        }
    }
    assert_eq!(
        bench.number("SELECT count(*) FROM effect").await,
        1,
        "what was committed without a settlement is there once, since it was not tried again"
    );
}

#[handler(group = "astray", retry(max_attempts = 3, backoff = "fixed(10ms)"))]
async fn astray(
    step: Step,
    settlement: Settlement,
    State(Own(elsewhere)): State<Own>,
    State(url): State<Arc<str>>,
    State(runs): State<Arc<AtomicU64>>,
) -> Result<(), HandlerError> {
    runs.fetch_add(1, Ordering::SeqCst);
    if step.key == "another database" {
        let mut tx = elsewhere.begin().await?;
        settlement.settle(&mut tx).await?;
        tx.commit().await?;
    } else {
        let mut connection = diesel_async::AsyncPgConnection::establish(&url).await?;
        settlement.settle(&mut connection).await?;
    }
    Ok(())
}

/// Trying again helps neither, and repeats what was written.
#[tokio::test(flavor = "multi_thread")]
async fn who_settles_elsewhere_or_outside_of_a_transaction_is_told_so_at_once() {
    let bench = bench().await;
    let elsewhere = TestDatabase::new().await.unwrap();
    let runs = Arc::new(AtomicU64::new(0));
    let consumer = bench
        .consumer(handlers![astray])
        .state(runs.clone())
        .state(Arc::<str>::from(bench.db.url()))
        .state(Own(elsewhere.connect_pool(2)));
    let _consumer = consumer.start().await.unwrap();
    for (key, says) in [
        ("another database", "in a transaction of another database"),
        ("no transaction", "outside of a transaction"),
    ] {
        runs.store(0, Ordering::SeqCst);
        bench.sql("DELETE FROM postbox.dead_letter").await;
        publish_steps(bench.db.pool(), &[step(key, 0)]).await;
        settled(bench.db.pool(), "astray").await;
        assert_eq!(runs.load(Ordering::SeqCst), 1, "{key}");
        let reason: String = sqlx::query_scalar("SELECT reason FROM postbox.dead_letter")
            .fetch_one(bench.db.pool())
            .await
            .unwrap();
        assert!(reason.contains(says), "{key}: {reason}");
    }
}

#[handler(group = "lasting", retry(max_attempts = 5, backoff = "fixed(10ms)"))]
async fn lasting(
    step: Step,
    delivery: Delivery,
    settlement: Settlement,
    State(Own(pool)): State<Own>,
) -> Result<(), HandlerError> {
    let mut tx = pool.begin().await?;
    write(&mut tx, &step).await?;
    settlement.settle(&mut tx).await?;
    // As a client that takes its time to roll back.
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(700)).await;
        drop(tx);
    });
    match delivery.attempt {
        1 => Err(HandlerError::retry("the first time")),
        _ => Err(HandlerError::dead_letter("the second time")),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_handler_says_of_a_message_counts_though_its_transaction_ends_later() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let consumer = bench
        .consumer(handlers![lasting])
        .state(Own(bench.db.connect_pool(4)));
    let _consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &[step("k", 0)]).await;
    settled(bench.db.pool(), "lasting").await;
    let (attempts, reason): (i32, String) =
        sqlx::query_as("SELECT attempts, reason FROM postbox.dead_letter")
            .fetch_one(bench.db.pool())
            .await
            .unwrap();
    assert!(
        attempts == 2 && reason.contains("the second time"),
        "{attempts}: {reason}"
    );
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 0);
}

#[tokio::test]
async fn a_transaction_that_may_be_idle_for_less_is_left_so() {
    let bench = bench().await;
    for (set, is) in [("0", "5s"), ("1s", "1s"), ("1min", "5s"), ("500ms", "500ms")] {
        let mut tx = bench.db.pool().begin().await.unwrap();
        let sql = "SELECT set_config('idle_in_transaction_session_timeout', $1, true)";
        sqlx::query(sql).bind(set).execute(&mut *tx).await.unwrap();
        sqlx::query("SELECT postbox.idle_for_at_most(5000)")
            .execute(&mut *tx)
            .await
            .unwrap();
        let sql = "SELECT current_setting('idle_in_transaction_session_timeout')";
        let now: String = sqlx::query_scalar(sql).fetch_one(&mut *tx).await.unwrap();
        assert_eq!(now, is, "{set}");
    }
}

#[derive(Clone)]
struct Late(Arc<Notify>, Arc<tokio::sync::Mutex<Vec<String>>>);

#[handler(group = "late", timeout = "300ms", retry(backoff = "fixed(10ms)"))]
async fn late(
    step: Step,
    delivery: Delivery,
    settlement: Settlement,
    State(Own(pool)): State<Own>,
    State(Late(go_on, said)): State<Late>,
) -> Result<(), HandlerError> {
    let first = delivery.attempt == 1;
    // As a thread that a blocking client runs on, which no time-out ends.
    let work = tokio::spawn(async move {
        let mut tx = pool.begin().await?;
        write(&mut tx, &step).await?;
        if first {
            go_on.notified().await;
        }
        if let Err(error) = settlement.settle(&mut tx).await {
            said.lock().await.push(error.to_string());
            return Err(error);
        }
        tx.commit().await?;
        Ok(())
    });
    work.await?
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_on_after_its_time_out_cannot_settle_beside_the_next_attempt() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let late_state = Late(Arc::default(), Arc::default());
    let consumer = bench
        .consumer(handlers![late])
        .state(late_state.clone())
        .state(Own(bench.db.connect_pool(4)));
    let _consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &[step("k", 0)]).await;
    settled(bench.db.pool(), "late").await;
    late_state.0.notify_one();
    eventually(PATIENCE, || async {
        match late_state.1.lock().await.first() {
            Some(said) if said.contains("the run has ended") => Ok(()),
            said => Err(format!("{said:?}")),
        }
    })
    .await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 1);
}

const SLOW_COMMIT: &str = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(2); RETURN NULL; END $$; \
    CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON effect DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()";

#[handler(group = "slow", timeout = "500ms", retry(backoff = "fixed(10ms)"))]
async fn slow(step: Step, settlement: Settlement, State(Own(pool)): State<Own>) -> Result<(), HandlerError> {
    let mut tx = pool.begin().await?;
    write(&mut tx, &step).await?;
    settlement.settle(&mut tx).await?;
    // As a thread of a blocking client, which the time-out does not end either.
    tokio::spawn(async move { tx.commit().await }).await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_under_way_when_the_run_ends_is_waited_for() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    bench.sql(SLOW_COMMIT).await;
    let consumer = bench
        .consumer(handlers![slow])
        .state(Own(bench.db.connect_pool(4)));
    let consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &[step("k", 0)]).await;
    settled(bench.db.pool(), "slow").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 1);
    assert_eq!(consumer.stats()[0].failed, 0, "it has committed");
}

#[handler(group = "batches", batch = 20, retry(backoff = "fixed(10ms)"))]
async fn batches(
    batch: Batch<Step>,
    settlement: Settlement,
    State(Own(pool)): State<Own>,
    State(runs): State<Arc<AtomicU64>>,
) -> Result<(), HandlerError> {
    let mut tx = pool.begin().await?;
    for item in &batch {
        write(&mut tx, &item.message).await?;
    }
    settlement.settle(&mut tx).await?;
    match runs.fetch_add(1, Ordering::SeqCst) % 3 {
        0 => Err(HandlerError::retry("a batch is whole")),
        _ => {
            tx.commit().await?;
            Ok(())
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_settled_whole_or_not_at_all() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let consumer = bench
        .consumer(handlers![batches])
        .state(Arc::new(AtomicU64::new(0)))
        .state(Own(bench.db.connect_pool(4)));
    let _consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(7, 20)).await;
    settled(bench.db.pool(), "batches").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 140);
    assert_eq!(bench.number(WRONG).await, 0);
}

#[handler(group = "effects", concurrency = 8, retry(backoff = "fixed(20ms)"))]
async fn effects(
    step: Step,
    settlement: Settlement,
    State(Own(pool)): State<Own>,
) -> Result<(), HandlerError> {
    let mut tx = pool.begin().await?;
    write(&mut tx, &step).await?;
    settlement.settle(&mut tx).await?;
    tx.commit().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_cut_at_any_moment_lose_and_double_no_effect() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let consumer = Consumer::new(bench.db.connect_pool(8))
        .handlers(handlers![effects])
        .state(Own(bench.db.connect_pool(8)));
    let _consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(40, 50)).await;
    let cutter = bench.db.connect_pool(1);
    // Any backend of this database: sessions, readers, the dispatcher, the consumer's looks and the handlers' own transactions.
    for _ in 0..150 {
        let _ = sqlx::query(
            "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity \
            WHERE datname = current_database() AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1) victim",
        )
        .execute(&cutter)
        .await;
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
    settled(bench.db.pool(), "effects").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 2000);
    assert_eq!(bench.number(WRONG).await, 0);
}

#[handler(group = "hooked", on_dead_letter = takes_one)]
async fn hooked(_step: Step) -> Result<(), HandlerError> {
    Ok(())
}

async fn takes_one(_settlement: Settlement) -> Result<(), HandlerError> {
    Ok(())
}

#[handler(broadcast)]
async fn everywhere(_step: Step, settlement: Settlement) -> Result<(), HandlerError> {
    settlement.without_effect();
    Ok(())
}

#[tokio::test]
async fn where_there_is_nothing_to_settle_a_settlement_is_refused_at_start() {
    let bench = bench().await;
    for (handlers, says) in [
        (handlers![hooked], "nothing that a hook could settle"),
        (
            handlers![everywhere],
            "is a broadcast and takes a Tx or a Settlement",
        ),
    ] {
        let error = bench.consumer(handlers).start().await.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[handler(group = "by-url")]
async fn by_url(_step: Step, settlement: Settlement) -> Result<(), HandlerError> {
    settlement.without_effect();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_a_pool_of_sqlx_connects_by_a_url() {
    let bench = bench().await;
    let consumer = Consumer::connect(bench.db.url())
        .unwrap()
        .handlers(handlers![by_url]);
    let _consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(3, 3)).await;
    settled(bench.db.pool(), "by-url").await;
    for (url, says) in [
        ("mysql://u:secret@h/app", "MySQL"),
        ("postgres://u@one,two/app", "several servers"),
        ("localhost/app", "does not begin with postgres://"),
    ] {
        let error = Consumer::connect(url).err().map(|error| error.to_string());
        let error = error.unwrap_or_default();
        assert!(
            error.contains(says) && !error.contains("secret"),
            "{url}: {error}"
        );
    }
}
