//! Nodes: two instances that call themselves the same, and nodes that come and go.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::{Message, Publish};
use postbox_consumer::{Consumer, ConsumerHandle, Error, State, handler, handlers};
use postbox_dispatcher::{Dispatcher, doctor, retention, status};
use postbox_testkit::{TestDatabase, eventually};
use serde::{Deserialize, Serialize};

const SOON: Duration = Duration::from_secs(30);

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "prices", type = "changed")]
struct Changed {
    n: i64,
}

type Seen = Arc<Mutex<Vec<i64>>>;

#[handler(broadcast = "durable")]
async fn refresh(changed: Changed, State(seen): State<Seen>) {
    seen.lock().unwrap().push(changed.n);
}

fn consumer(db: &TestDatabase, node: &str, seen: &Seen) -> Consumer {
    Consumer::new(db.pool().clone())
        .node(node)
        .lease(Duration::from_secs(6))
        .state(seen.clone())
        .handlers(handlers![refresh])
}

async fn start(db: &TestDatabase, node: &str, seen: &Seen) -> ConsumerHandle {
    consumer(db, node, seen).start().await.unwrap()
}

async fn publish(db: &TestDatabase, n: i64) {
    let mut tx = db.pool().begin().await.unwrap();
    tx.publish(&Changed { n }).await.unwrap();
    tx.commit().await.unwrap();
}

async fn sees(seen: &Seen, n: i64) {
    eventually(SOON, async || match seen.lock().unwrap().contains(&n) {
        true => Ok(()),
        false => Err(format!("{n} is not seen")),
    })
    .await;
}

#[tokio::test]
async fn a_node_name_that_lives_already_is_refused_and_the_one_who_has_it_is_named() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let (first, second) = (Seen::default(), Seen::default());
    let one = start(&db, "web", &first).await;
    let error = consumer(&db, "web", &second).start().await.map(drop).unwrap_err();
    assert!(matches!(error, Error::NodeTaken { .. }), "{error}");
    let says = error.to_string();
    assert!(
        says.contains("node \"web\" lives already") && says.contains(&std::process::id().to_string()),
        "{says}"
    );
    // The first goes on, and others come.
    let other = start(&db, "web-2", &second).await;
    publish(&db, 1).await;
    sees(&first, 1).await;
    sees(&second, 1).await;
    // Whoever follows an instance that stopped has its name, and what it has not seen.
    one.shutdown().await.unwrap();
    publish(&db, 2).await;
    let next = start(&db, "web", &first).await;
    sees(&first, 2).await;
    for consumer in [next, other] {
        consumer.shutdown().await.unwrap();
    }
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn of_two_that_come_at_once_one_has_the_name() {
    let db = TestDatabase::new().await.unwrap();
    let seen = Seen::default();
    // Their numbers are given at random, and so is who of them looks first.
    for round in 0..8 {
        let name = format!("web-{round}");
        let (a, b) = tokio::join!(
            consumer(&db, &name, &seen).start(),
            consumer(&db, &name, &seen).start()
        );
        let started = [a.is_ok(), b.is_ok()].into_iter().filter(|ok| *ok).count();
        assert_eq!(started, 1, "{:?} {:?}", a.as_ref().err(), b.as_ref().err());
        for consumer in [a, b].into_iter().flatten() {
            consumer.shutdown().await.unwrap();
        }
    }
}

#[tokio::test]
async fn an_instance_that_loses_its_session_keeps_its_name() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let seen = Seen::default();
    let one = start(&db, "web", &seen).await;
    sqlx::query(
        "SELECT pg_terminate_backend(l.pid) FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 1347571763 \
         AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
    )
    .execute(db.pool())
    .await
    .unwrap();
    publish(&db, 1).await;
    sees(&seen, 1).await;
    one.shutdown().await.unwrap();
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn broadcasts_of_nodes_that_are_gone_expire_and_groups_do_not() {
    let db = TestDatabase::new().await.unwrap();
    let seen = Seen::default();
    for node in ["pod-1", "pod-2"] {
        start(&db, node, &seen).await.shutdown().await.unwrap();
    }
    sqlx::query("SELECT postbox.subscribe('mail', 'prices', 4::smallint, 'key', NULL, 'earliest', NULL)")
        .execute(db.pool())
        .await
        .unwrap();
    let names = async || -> Vec<String> {
        let all = status::subscriptions(db.pool()).await.unwrap();
        all.into_iter().map(|one| one.group_name).collect()
    };
    // As if a dispatcher had watched all the time.
    let without_a_consumer_for = async |days: i32| {
        sqlx::query(
            "UPDATE postbox.subscription SET last_live_at = postbox.clock() - make_interval(days => $1)",
        )
        .bind(days)
        .execute(db.pool())
        .await
        .unwrap();
        retention::turn(db.pool()).await.unwrap().expired
    };
    assert!(without_a_consumer_for(5).await.is_empty());
    let findings = doctor::examine(db.pool()).await.unwrap();
    let warned = findings
        .iter()
        .filter(|finding| finding.name == "expires")
        .count();
    assert_eq!(warned, 2, "before it happens: {findings:?}");
    let expired = without_a_consumer_for(8).await;
    assert_eq!(expired.len(), 2, "{expired:?}");
    assert_eq!(names().await, ["mail"]);
    // And not where that is said.
    start(&db, "pod-3", &seen).await.shutdown().await.unwrap();
    retention::set_node_expiry(db.pool(), None).await.unwrap();
    assert!(without_a_consumer_for(400).await.is_empty());
    publish(&db, 1).await;
}
