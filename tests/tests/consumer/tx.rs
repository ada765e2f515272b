//! Transactional handlers: the effect, the messages and the settlement commit together (I1, I6).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::support::{Bench, PATIENCE, Step, bench, publish_steps, settled, step, steps};
use postbox::{Outgoing, Publish};
use postbox_consumer::{Consumer, Delivery, HandlerError, State, Tx, handler, handlers};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestPostgres, eventually};
use sqlx::{Connection, PgPool};
use tokio::sync::Notify;

const TABLES: &str = "CREATE TABLE effect (id bigserial, key text, n bigint)";

/// Effects that a key has not exactly once and in order.
const WRONG: &str = "SELECT count(*) FROM (SELECT key, n, count(*) OVER (PARTITION BY key, n) AS times, \
    row_number() OVER (PARTITION BY key ORDER BY id) - 1 AS place FROM effect) e WHERE times <> 1 OR place <> n";

async fn write(tx: &mut Tx, step: &Step) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO effect (key, n) VALUES ($1, $2)")
        .bind(&step.key)
        .bind(step.n)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[handler(group = "echo", retry(backoff = "fixed(10ms)"))]
async fn echo(step: Step, delivery: Delivery, mut tx: Tx) -> Result<(), HandlerError> {
    write(&mut tx, &step).await?;
    tx.publish(Outgoing::json("echoes", &step.n).key(&step.key))
        .await?;
    match (step.n % 4, delivery.attempt) {
        (1, 1) => Err(HandlerError::retry("after the write")),
        (2, 1) => panic!("after the write"),
        // An error that the handler swallows has still failed the transaction.
        (3, 1) => {
            let _ = sqlx::query("SELECT 1 / 0").execute(&mut *tx).await;
            Ok(())
        }
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_messages_and_settlement_commit_together_or_not_at_all() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let consumer = bench.start(handlers![echo]).await;
    publish_steps(bench.db.pool(), &steps(10, 20)).await;
    settled(bench.db.pool(), "echo").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 200);
    assert_eq!(bench.number(WRONG).await, 0);
    assert_eq!(
        bench
            .number("SELECT count(*) FROM postbox.outbox WHERE topic = 'echoes'")
            .await,
        200
    );
    assert_eq!(consumer.stats()[0].failed, 150);
}

#[derive(Clone, Default)]
struct Meeting {
    arrived: Arc<Notify>,
    go_on: Arc<Notify>,
    first: Arc<AtomicBool>,
    runs: Arc<AtomicU64>,
}

#[handler(group = "fenced")]
async fn fenced(step: Step, mut tx: Tx, State(meeting): State<Meeting>) -> Result<(), HandlerError> {
    meeting.runs.fetch_add(1, Ordering::SeqCst);
    write(&mut tx, &step).await?;
    if !meeting.first.swap(true, Ordering::SeqCst) {
        meeting.arrived.notify_one();
        meeting.go_on.notified().await;
    }
    Ok(())
}

/// Takes all lanes away as another instance would, which does nothing and is taken for dead, but not for dead of a message: these would then
/// run one by one.
async fn take_over(pool: &PgPool) {
    sqlx::raw_sql(
        "SELECT postbox.claim(2000000, l.subscription_id, ARRAY[l.lane], ARRAY[l.epoch], ARRAY[false]) FROM postbox.lane l; \
         UPDATE postbox.lane SET crashes = 0",
    )
    .execute(pool)
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_owner_cannot_commit_and_cannot_move_a_cursor() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let meeting = Meeting::default();
    let _consumer = bench
        .consumer(handlers![fenced])
        .state(meeting.clone())
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &[step("k", 0), step("k", 1)]).await;
    meeting.arrived.notified().await;
    let consumer_id = bench.number("SELECT max(id)::bigint FROM postbox.consumer").await as i32;
    let (lane, epoch): (i16, i32) = sqlx::query_as(
        "SELECT lane, epoch FROM postbox.lane WHERE consumer_id IS NOT NULL ORDER BY lane LIMIT 1",
    )
    .fetch_one(bench.db.pool())
    .await
    .unwrap();
    take_over(bench.db.pool()).await;
    let accepted: i64 = sqlx::query_scalar(
        "SELECT postbox.checkpoint($1, ARRAY[1], ARRAY[$2], ARRAY[$3], ARRAY[99::bigint], '{}', '{}')",
    )
    .bind(consumer_id)
    .bind(lane)
    .bind(epoch)
    .fetch_one(bench.db.pool())
    .await
    .unwrap();
    assert_eq!(accepted, 0, "a stale checkpoint is refused");
    meeting.go_on.notify_one();
    // The other owner is nobody, so the consumer claims its lanes again and runs the message anew.
    settled(bench.db.pool(), "fenced").await;
    let runs = meeting.runs.load(Ordering::SeqCst);
    assert_eq!(runs, 3, "the first commit was refused");
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 2);
    assert_eq!(bench.number(WRONG).await, 0);
    let at_99 = bench
        .number("SELECT count(*) FROM postbox.lane_state(1, 0::smallint) WHERE position = 99")
        .await;
    assert_eq!(at_99, 0);
}

#[handler(group = "robbed", concurrency = 8, lanes = 8)]
async fn robbed(step: Step, mut tx: Tx) -> Result<(), HandlerError> {
    write(&mut tx, &step).await?;
    tokio::time::sleep(Duration::from_millis(1)).await;
    Ok(())
}

/// Its lanes become stale one after the other, some while the session already claims others again.
#[tokio::test(flavor = "multi_thread")]
async fn lanes_that_are_taken_again_and_again_keep_their_order() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let _consumer = bench.start(handlers![robbed]).await;
    const ROUNDS: i64 = 30;
    let steps = steps(16, ROUNDS);
    for round in steps.chunks(16) {
        publish_steps(bench.db.pool(), round).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        take_over(bench.db.pool()).await;
    }
    settled(bench.db.pool(), "robbed").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 16 * ROUNDS);
    assert_eq!(bench.number(WRONG).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_without_its_session_is_refused() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let meeting = Meeting::default();
    let _consumer = bench
        .consumer(handlers![fenced])
        .state(meeting.clone())
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &[step("k", 0)]).await;
    meeting.arrived.notified().await;
    let (consumer, subscription, lane, epoch): (i32, i32, i16, i32) = sqlx::query_as(
        "SELECT consumer_id, subscription_id, lane, epoch FROM postbox.lane WHERE consumer_id IS NOT NULL LIMIT 1",
    )
    .fetch_one(bench.db.pool())
    .await
    .unwrap();
    let settle = || async {
        sqlx::query("CALL postbox.settle($1, $2, $3, $4, 5000)")
            .bind(consumer)
            .bind(subscription)
            .bind(lane)
            .bind(epoch)
            .execute(bench.db.pool())
            .await
    };
    settle().await.expect("while the session lives");
    sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1347571763 AND objid = $1::int::oid \
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
        .bind(consumer)
        .execute(bench.db.pool())
        .await
        .unwrap();
    eventually(PATIENCE, || async {
        match settle().await {
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("PB001") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    meeting.go_on.notify_one();
    settled(bench.db.pool(), "fenced").await;
    assert_eq!(bench.number(WRONG).await, 0);
}

#[handler(group = "nested")]
async fn nested(step: Step, mut tx: Tx) -> Result<(), HandlerError> {
    for keep in [true, false] {
        let mut savepoint = tx.begin().await?;
        sqlx::query("INSERT INTO effect (key, n) VALUES ($1, $2)")
            .bind(format!("{} {keep}", step.key))
            .bind(step.n)
            .execute(&mut *savepoint)
            .await?;
        match keep {
            true => savepoint.commit().await?,
            // Dropped, it is rolled back before the next statement.
            false => drop(savepoint),
        }
    }
    write(&mut tx, &step).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_handler_begins_on_its_transaction_is_a_savepoint() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let _consumer = bench.start(handlers![nested]).await;
    publish_steps(bench.db.pool(), &steps(3, 10)).await;
    settled(bench.db.pool(), "nested").await;
    assert_eq!(bench.number(WRONG).await, 0);
    let of = async |keys| bench.number(keys).await;
    assert_eq!(
        of("SELECT count(*) FROM effect WHERE key LIKE '% true'").await,
        30
    );
    assert_eq!(
        of("SELECT count(*) FROM effect WHERE key LIKE '% false'").await,
        0
    );
    assert_eq!(of("SELECT count(*) FROM effect").await, 60);
}

#[handler(group = "effects", concurrency = 8, retry(backoff = "fixed(20ms)"))]
async fn effects(step: Step, mut tx: Tx, State(runs): State<Arc<AtomicU64>>) -> Result<(), HandlerError> {
    runs.fetch_add(1, Ordering::SeqCst);
    write(&mut tx, &step).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_cut_at_any_moment_lose_and_double_no_effect() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let runs = Arc::new(AtomicU64::new(0));
    let consumer = Consumer::new(bench.db.connect_pool(8))
        .handlers(handlers![effects])
        .state(runs.clone());
    let _consumer = consumer.start().await.unwrap();
    let all = steps(40, 50);
    let cutter = bench.db.connect_pool(1);
    let cutting = async {
        loop {
            // Not one that is by itself, which would be cut whatever it does.
            // Any backend of this database but this one: sessions, readers, handlers in the middle of a commit, the dispatcher.
            let _ = sqlx::query("SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity \
                WHERE datname = current_database() AND pid <> pg_backend_pid() \
                    AND (SELECT count(*) FROM pg_stat_activity a WHERE a.datname = current_database()) > 4 ORDER BY random() LIMIT 1) victim")
                .execute(&cutter)
                .await;
            tokio::time::sleep(Duration::from_millis(15)).await;
        }
    };
    let publishing = async {
        for chunk in all.chunks(100) {
            // Cut while it publishes: again, as a whole.
            while publish_once(bench.db.pool(), chunk).await.is_err() {}
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = cutting => {}
        () = publishing => {}
    }
    settled(bench.db.pool(), "effects").await;
    let published = bench
        .number("SELECT count(DISTINCT payload) FROM postbox.outbox")
        .await;
    assert_eq!(published, 2000);
    let doubled = bench.number("SELECT count(*) - 2000 FROM postbox.outbox").await;
    let effects = bench.number("SELECT count(*) FROM effect").await;
    // A commit whose answer was cut was published again: those are two messages, each with its one effect.
    assert_eq!(effects, 2000 + doubled);
    if doubled == 0 {
        assert_eq!(bench.number(WRONG).await, 0);
    }
}

async fn publish_once(pool: &PgPool, steps: &[Step]) -> Result<(), Box<dyn std::error::Error>> {
    let mut tx = pool.begin().await?;
    tx.publish_all(steps).await?;
    tx.commit().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_and_restarted_under_load_loses_and_doubles_no_effect() {
    let server = TestPostgres::private().await.unwrap();
    let db = server.database().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let bench = Bench { db, dispatcher };
    bench.sql(TABLES).await;
    let runs = Arc::new(AtomicU64::new(0));
    let consumer = Consumer::new(bench.db.connect_pool(8))
        .handlers(handlers![effects])
        .state(runs.clone());
    let _consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(50, 100)).await;
    for round in 1..=2 {
        eventually(PATIENCE, || async {
            let runs = runs.load(Ordering::SeqCst);
            if runs > round * 700 {
                Ok(())
            } else {
                Err(format!("{runs} runs"))
            }
        })
        .await;
        server.kill().await.unwrap();
        server.start().await.unwrap();
    }
    settled(bench.db.pool(), "effects").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 5000);
    assert_eq!(bench.number(WRONG).await, 0);
}
