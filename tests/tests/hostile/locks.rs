//! Whoever holds a lock that Postbox needs is named, with the statement that ends it, and nothing waits for it without a bound.

use std::time::Duration;

use crate::support::{PATIENCE, Step, publish, step};
use postbox::Outgoing;
use postbox_consumer::{Consumer, handler, handlers};
use postbox_core::link;
use postbox_core::locks::{self, LockHolder};
use postbox_dispatcher::{Dispatcher, doctor, status};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::{AssertSqlSafe, ConnectOptions, PgConnection, PgPool};

#[handler(group = "plain")]
async fn plain(_step: Step) {}

/// An application that does what it should not.
async fn holder(db: &TestDatabase, statement: String) -> PgConnection {
    let options = (*db.pool().connect_options())
        .clone()
        .application_name("a cron job");
    let mut connection = options.connect().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(statement))
        .execute(&mut connection)
        .await
        .unwrap();
    connection
}

async fn named(pool: &PgPool, lock: &str) -> LockHolder {
    eventually(PATIENCE, || async {
        let holders = locks::holders(pool, Duration::ZERO).await.unwrap();
        let found = holders
            .iter()
            .find(|holder| holder.lock == lock && holder.who.contains("a cron job"));
        found
            .cloned()
            .ok_or_else(|| format!("{lock} is not in {holders:?}"))
    })
    .await
}

async fn sequenced(pool: &PgPool) -> i64 {
    sqlx::query_scalar("SELECT postbox.next_offset('steps')")
        .fetch_one(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn who_holds_the_sequencers_lock_is_named_and_ended_by_the_statement_that_is_told() {
    let db = TestDatabase::new().await.unwrap();
    let own = link::pool((*db.pool().connect_options()).clone(), 2, "");
    let dispatcher = Dispatcher::new(db.pool().clone()).start().await.unwrap();
    let consumer = Consumer::new(db.pool().clone())
        .handlers(handlers![plain])
        .start()
        .await
        .unwrap();
    let _connection = holder(&db, "SELECT pg_advisory_lock(1347571761, 1)".to_owned()).await;
    publish(db.pool(), &[step("a", 0)]).await;

    let held = named(&own, "advisory lock (1347571761, 1)").await;
    assert!(
        held.consequence.contains("no message is put in order"),
        "{held:?}"
    );
    assert!(held.who.contains("postgres a cron job"), "{held:?}");
    eventually(PATIENCE, || async {
        let findings = doctor::examine(&own).await.unwrap();
        let found = findings.iter().find(|finding| finding.name == "held-lock");
        match found {
            Some(found) if found.what.contains("a cron job") && found.hint == held.hint => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let status = status::read(&own).await.unwrap();
    assert!(
        status.locks.iter().any(|lock| lock.pid == held.pid),
        "{:?}",
        status.locks
    );
    assert_eq!(status.unsequenced.messages, 1);
    assert!(status.unsequenced.oldest_at.is_some());
    assert_eq!(sequenced(&own).await, 0);

    sqlx::raw_sql(AssertSqlSafe(held.hint))
        .execute(&own)
        .await
        .unwrap();
    eventually(PATIENCE, || async {
        match (
            sequenced(&own).await,
            status::read(&own).await.unwrap().unsequenced.messages,
        ) {
            (1, 0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn every_lock_that_is_waited_for_is_named() {
    let db = TestDatabase::new().await.unwrap();
    let own = link::pool((*db.pool().connect_options()).clone(), 2, "");
    for (number, consequence) in [
        (1, "no message is put in order"),
        (2, "late"),
        (3, "no consumer can start"),
        (4, "nobody can migrate"),
        (5, "late"),
        (6, "no scheduled message"),
        (7, "not removed"),
    ] {
        let connection = holder(&db, format!("SELECT pg_advisory_lock(1347571761, {number})")).await;
        let held = named(&own, &format!("advisory lock (1347571761, {number})")).await;
        assert!(held.consequence.contains(consequence), "{held:?}");
        drop(connection);
    }
    for mode in ["", "_shared"] {
        let _connection = holder(
            &db,
            format!("SELECT pg_advisory_lock{mode}(1347571762, {})", 3 * 1024 + 5),
        )
        .await;
        let held = named(&own, &format!("advisory lock (1347571762, {})", 3 * 1024 + 5)).await;
        assert!(held.consequence.contains("lane 5 of subscription 3"), "{held:?}");
    }
    let connection = holder(&db, "BEGIN; LOCK TABLE postbox.tick IN EXCLUSIVE MODE".to_owned()).await;
    let held = named(&own, "postbox.tick").await;
    assert!(
        held.consequence.contains("nothing is written to postbox.tick"),
        "{held:?}"
    );
    // Each of its partitions is a lock, and no more than some are told at once.
    drop(connection);
    let _connection = holder(
        &db,
        "BEGIN; SELECT pg_advisory_xact_lock(1347571761, 6); PREPARE TRANSACTION 'left behind'".to_owned(),
    )
    .await;
    eventually(PATIENCE, || async {
        let holders = locks::holders(&own, Duration::ZERO).await.unwrap();
        let found = holders
            .iter()
            .any(|holder| holder.state == "prepared" && holder.hint == "ROLLBACK PREPARED 'left behind'");
        found.then_some(()).ok_or_else(|| format!("{holders:?}"))
    })
    .await;
    sqlx::raw_sql("ROLLBACK PREPARED 'left behind'")
        .execute(&own)
        .await
        .unwrap();
}

/// A dispatcher that sleeps, a consumer that is well: nobody is accused.
#[tokio::test]
async fn those_who_work_are_not_named() {
    let db = TestDatabase::new().await.unwrap();
    let own = link::pool((*db.pool().connect_options()).clone(), 2, "");
    let dispatcher = Dispatcher::new(db.pool().clone()).start().await.unwrap();
    let consumer = Consumer::new(db.pool().clone())
        .handlers(handlers![plain])
        .start()
        .await
        .unwrap();
    publish(db.pool(), &[step("a", 0)]).await;
    publish(
        db.pool(),
        [Outgoing::from(&step("b", 0)).delay(Duration::from_secs(100))],
    )
    .await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(locks::holders(&own, Duration::from_secs(5)).await.unwrap(), []);
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
}
