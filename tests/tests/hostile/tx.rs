//! Transactional handlers that take their time, lose their connection without a word, or end their transaction themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::{Bench, Step, bench, publish_steps, settled, step, steps};
use postbox_consumer::{Batch, Delivery, HandlerError, State, Tx, handler, handlers};
use sqlx::{AssertSqlSafe, Connection};

const TABLES: &str = "CREATE TABLE effect (key text, n bigint)";

async fn write(tx: &mut Tx, step: &Step) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO effect (key, n) VALUES ($1, $2)")
        .bind(&step.key)
        .bind(step.n)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

async fn reasons(bench: &Bench) -> Vec<(String, i32)> {
    sqlx::query_as("SELECT reason, attempts FROM postbox.dead_letter ORDER BY \"offset\"")
        .fetch_all(bench.db.pool())
        .await
        .unwrap()
}

type Runs = Arc<AtomicU64>;

#[handler(group = "slow")]
async fn slow(step: Step, mut tx: Tx, State(runs): State<Runs>) -> Result<(), HandlerError> {
    runs.fetch_add(1, Ordering::SeqCst);
    write(&mut tx, &step).await?;
    let limit: String = sqlx::query_scalar("SHOW idle_in_transaction_session_timeout")
        .fetch_one(&mut *tx)
        .await?;
    // Another system is asked.
    tokio::time::sleep(Duration::from_secs(7)).await;
    write(&mut tx, &step).await?;
    match limit == "61s" {
        true => Ok(()),
        false => Err(HandlerError::discard(format!("not tied to the timeout: {limit}"))),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_may_do_something_else_between_two_statements_for_as_long_as_its_timeout() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let runs = Runs::default();
    let consumer = bench
        .consumer(handlers![slow])
        .state(runs.clone())
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(3, 1)).await;
    settled(bench.db.pool(), "slow").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 6);
    assert_eq!((runs.load(Ordering::SeqCst), consumer.stats()[0].failed), (3, 0));
}

/// The connection is gone, and the handler does not mind.
async fn cut(tx: &mut Tx) {
    let _ = sqlx::query("SELECT pg_terminate_backend(pg_backend_pid())")
        .execute(&mut **tx)
        .await;
}

#[handler(group = "swallows", retry(backoff = "fixed(100ms)", max_attempts = 4))]
async fn swallows(step: Step, mut tx: Tx, State(runs): State<Runs>) -> Result<(), HandlerError> {
    if step.n == 1 {
        runs.fetch_add(1, Ordering::SeqCst);
        cut(&mut tx).await;
        return Ok(());
    }
    write(&mut tx, &step).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_swallows_the_loss_of_its_connection_has_failed_and_backs_off() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let runs = Runs::default();
    let _consumer = bench
        .consumer(handlers![swallows])
        .state(runs.clone())
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(2, 4)).await;
    settled(bench.db.pool(), "swallows").await;
    let reasons = reasons(&bench).await;
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    for (reason, attempts) in &reasons {
        assert!(
            reason
                .starts_with("failed 4 times: the connection was lost before the transaction was committed"),
            "{reason}"
        );
        assert_eq!(*attempts, 4);
    }
    // Both keys may be in one lane: what was cut with the lane runs again.
    let runs = runs.load(Ordering::SeqCst);
    assert!(
        (8..=16).contains(&runs),
        "{runs} runs of two messages with four attempts"
    );
    assert_eq!(
        bench.number("SELECT count(*) FROM effect").await,
        6,
        "their keys go on"
    );
}

#[handler(
    group = "swallows_batches",
    batch = 40,
    batch_wait = "200ms",
    retry(backoff = "fixed(100ms)", max_attempts = 2)
)]
async fn swallows_batches(
    steps: Batch<Step>,
    mut tx: Tx,
    State(runs): State<Runs>,
) -> Result<(), HandlerError> {
    runs.fetch_add(1, Ordering::SeqCst);
    for item in &steps {
        write(&mut tx, &item.message).await?;
    }
    if steps.iter().any(|item| item.message.n == 7) {
        cut(&mut tx).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_batch_whose_connection_was_lost_the_culprit_is_found() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    let runs = Runs::default();
    publish_steps(bench.db.pool(), &(0..40).map(|n| step(n, n)).collect::<Vec<_>>()).await;
    let _consumer = bench
        .consumer(handlers![swallows_batches])
        .state(runs.clone())
        .start()
        .await
        .unwrap();
    settled(bench.db.pool(), "swallows_batches").await;
    let reasons = reasons(&bench).await;
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 39);
    assert_eq!(bench.number("SELECT count(DISTINCT n) FROM effect").await, 39);
    let runs = runs.load(Ordering::SeqCst);
    assert!(runs < 120, "{runs} runs");
}

/// The key is what it does with its transaction.
#[handler(group = "ends", retry(backoff = "fixed(50ms)", max_attempts = 3))]
async fn ends(step: Step, delivery: Delivery, mut tx: Tx) -> Result<(), HandlerError> {
    write(&mut tx, &step).await?;
    let (what, fails) = match step.key.strip_prefix("fails: ") {
        Some(what) => (what, true),
        None => (step.key.as_str(), false),
    };
    if what == "savepoint by sqlx" {
        let mut inner = tx.begin().await?;
        sqlx::query("INSERT INTO effect VALUES ('inner', 0)")
            .execute(&mut *inner)
            .await?;
        inner.commit().await?;
        return Ok(());
    }
    sqlx::raw_sql(AssertSqlSafe(what.to_owned()))
        .execute(&mut *tx)
        .await?;
    match fails {
        true => Err(HandlerError::retry(format!(
            "afterwards, attempt {}",
            delivery.attempt
        ))),
        false => Ok(()),
    }
}

/// In one transaction, as a batch.
#[handler(
    group = "ends_batches",
    batch = 10,
    retry(backoff = "fixed(50ms)", max_attempts = 3)
)]
async fn ends_batches(steps: Batch<Step>, mut tx: Tx) -> Result<(), HandlerError> {
    for item in &steps {
        write(&mut tx, &item.message).await?;
        sqlx::raw_sql(AssertSqlSafe(item.message.key.clone()))
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_ends_its_transaction_is_refused_and_not_run_again() {
    let ending = [
        "COMMIT; BEGIN",
        "COMMIT AND CHAIN",
        "COMMIT",
        "ROLLBACK; BEGIN",
        "ROLLBACK AND CHAIN",
        "ROLLBACK",
        "END; START TRANSACTION",
        "COMMIT; BEGIN; SAVEPOINT s",
    ];
    let allowed = [
        "SELECT 1",
        "SAVEPOINT s; INSERT INTO effect VALUES ('gone', 0); ROLLBACK TO s",
        "SAVEPOINT s; RELEASE s",
        "SET LOCAL idle_in_transaction_session_timeout = 0",
        "SET LOCAL statement_timeout = '1min'",
        "CREATE TABLE IF NOT EXISTS made (n int)",
        "savepoint by sqlx",
    ];
    let bench = bench().await;
    bench.sql(TABLES).await;
    let consumer = bench.start(handlers![ends, ends_batches]).await;
    let steps: Vec<Step> = ending.iter().chain(&allowed).map(|what| step(what, 0)).collect();
    for step in &steps {
        // One batch each.
        publish_steps(bench.db.pool(), std::slice::from_ref(step)).await;
        settled(bench.db.pool(), "ends").await;
        if step.key != "savepoint by sqlx" {
            settled(bench.db.pool(), "ends_batches").await;
        }
    }
    for what in ending {
        let letters: Vec<(String, i32)> =
            sqlx::query_as("SELECT reason, attempts FROM postbox.dead_letter WHERE key = $1")
                .bind(what)
                .fetch_all(bench.db.pool())
                .await
                .unwrap();
        assert_eq!(letters.len(), 2, "{what}: {letters:?}");
        for (reason, attempts) in letters {
            assert!(
                reason.contains("ended its transaction itself"),
                "{what}: {reason}"
            );
            assert_eq!(attempts, 1, "{what}: its effect would happen again");
        }
        let effects: i64 = sqlx::query_scalar("SELECT count(*) FROM effect WHERE key = $1")
            .bind(what)
            .fetch_one(bench.db.pool())
            .await
            .unwrap();
        assert_eq!(
            effects,
            if what.starts_with("ROLLBACK") { 0 } else { 2 },
            "{what}"
        );
    }
    let refused = bench
        .number("SELECT count(*) FROM postbox.dead_letter d JOIN postbox.subscription s ON s.id = d.subscription_id WHERE s.group_name = 'ends'")
        .await;
    assert_eq!(
        refused,
        ending.len() as i64,
        "and nothing else: {:?}",
        reasons(&bench).await
    );
    let _ = consumer;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_ends_its_transaction_and_then_fails_is_noticed_too() {
    let bench = bench().await;
    bench.sql(TABLES).await;
    bench
        .sql("CREATE PROCEDURE commits() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$")
        .await;
    let _consumer = bench.start(handlers![ends]).await;
    let all = [
        "fails: COMMIT; BEGIN",
        "fails: COMMIT",
        "fails: SELECT 1",
        "CALL commits()",
        "SELECT 1 / 0",
    ];
    publish_steps(bench.db.pool(), &all.map(|what| step(what, 0))).await;
    settled(bench.db.pool(), "ends").await;
    let letters: Vec<(String, String, i32)> =
        sqlx::query_as("SELECT key, reason, attempts FROM postbox.dead_letter ORDER BY \"offset\"")
            .fetch_all(bench.db.pool())
            .await
            .unwrap();
    assert_eq!(letters.len(), 5);
    for (what, reason, attempts) in letters {
        match what.starts_with("fails: COMMIT") {
            true => {
                assert!(
                    reason.contains("ended its transaction itself")
                        && reason.contains("afterwards, attempt 1"),
                    "{reason}"
                );
                assert_eq!(attempts, 1);
            }
            false => assert_eq!(
                (attempts, reason.starts_with("failed 3 times: ")),
                (3, true),
                "{what}: {reason}"
            ),
        }
    }
    assert_eq!(
        bench.number("SELECT count(*) FROM effect").await,
        2,
        "once each, where it committed"
    );
}
