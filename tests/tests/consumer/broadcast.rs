//! Broadcasts: every node sees every message once, in order (I10).

use std::time::{Duration, Instant};

use crate::support::{Bench, History, PATIENCE, Step, bench, publish_steps, step, steps};
use postbox::Publish;
use postbox_consumer::{Consumer, Extract, HandlerDefinition, HandlerError, State, handler, handlers};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestDatabase, TestPostgres, eventually};

#[handler(broadcast, retry(backoff = "fixed(10ms)"))]
async fn refresh(step: Step, State(history): State<History>) -> Result<(), HandlerError> {
    let began = Instant::now();
    if step.n % 5 == 4 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    history.note(&step, began);
    Ok(())
}

#[handler(broadcast = "durable")]
async fn keep(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

async fn node(
    bench: &Bench,
    name: &str,
    handlers: Vec<HandlerDefinition>,
    history: &History,
) -> postbox_consumer::ConsumerHandle {
    Consumer::new(bench.db.connect_pool(2))
        .node(name)
        .handlers(handlers)
        .state(history.clone())
        .start()
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_node_sees_every_message_once_and_in_order() {
    let bench = bench().await;
    // Before any node is up: a cache starts at the latest.
    publish_steps(bench.db.pool(), &[step("before", 0)]).await;
    eventually(PATIENCE, || async {
        if bench.number("SELECT postbox.next_offset('steps')").await == 1 {
            Ok(())
        } else {
            Err("not sequenced")
        }
    })
    .await;
    let histories = [History::default(), History::default(), History::default()];
    let mut nodes = Vec::new();
    for (n, history) in histories.iter().enumerate() {
        nodes.push(node(&bench, &format!("node-{n}"), handlers![refresh], history).await);
    }
    publish_steps(bench.db.pool(), &steps(15, 40)).await;
    for history in &histories {
        history.has(600).await;
        history.assert_in_order_and_alone(15, 40);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stays_up_sees_every_message_once_although_the_server_is_killed() {
    let server = TestPostgres::private().await.unwrap();
    let db = server.database().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let bench = Bench { db, dispatcher };
    let history = History::default();
    let _node = node(&bench, "node", handlers![refresh], &history).await;
    let mut published = 0;
    for _ in 0..4 {
        for _ in 0..60 {
            let round: Vec<Step> = (0..10).map(|key| step(key, published)).collect();
            // One transaction a message, so that many steps are in flight when the server dies.
            for one in &round {
                publish_steps(bench.db.pool(), std::slice::from_ref(one)).await;
            }
            published += 1;
        }
        server.kill().await.unwrap();
        server.start().await.unwrap();
        eventually(PATIENCE, || async {
            sqlx::query("SELECT 1").execute(bench.db.pool()).await
        })
        .await;
    }
    history.has(10 * published as usize).await;
    history.assert_in_order_and_alone(10, published);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_connections_are_cut_sees_every_message_once() {
    let bench = bench().await;
    let history = History::default();
    let _node = node(&bench, "node", handlers![refresh], &history).await;
    for n in 0..40 {
        let round: Vec<Step> = (0..10).map(|key| step(key, n)).collect();
        publish_steps(bench.db.pool(), &round).await;
        if n % 8 == 3 {
            bench.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
                AND pid <> pg_backend_pid() AND query NOT LIKE 'COMMIT%'").await;
            eventually(PATIENCE, || async {
                sqlx::query("SELECT 1").execute(bench.db.pool()).await
            })
            .await;
        }
    }
    history.has(400).await;
    history.assert_in_order_and_alone(10, 40);
}

/// The backends of sessions.
const SESSIONS: &str = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = 1347571763 AND granted \
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";

#[tokio::test(flavor = "multi_thread")]
async fn a_node_finds_out_that_a_crash_gave_messages_other_offsets() {
    // Without a dispatcher: the sequencer's steps are taken by hand.
    let db = TestDatabase::new().await.unwrap();
    let sequence = async || {
        sqlx::query("SELECT * FROM postbox.sequence()")
            .execute(db.pool())
            .await
            .unwrap()
    };
    let history = History::default();
    let _node = Consumer::new(db.connect_pool(2))
        .node("node")
        .handlers(handlers![refresh])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    let mut late = db.pool().begin().await.unwrap();
    late.publish(&step("late", 0)).await.unwrap();
    publish_steps(db.pool(), &[step("early", 0)]).await;
    sequence().await;
    history.has(1).await;

    // The server crashes before it has flushed that step; what it has when it is back gets its offsets anew, now with the late one, which
    // was inserted first. Nobody has a session meanwhile.
    let mut down = db.pool().begin().await.unwrap();
    sqlx::query("LOCK TABLE postbox.consumer IN SHARE MODE")
        .execute(&mut *down)
        .await
        .unwrap();
    eventually(PATIENCE, || async {
        let sessions: Vec<i32> = sqlx::query_scalar(SESSIONS).fetch_all(db.pool()).await.unwrap();
        for session in &sessions {
            sqlx::query("SELECT pg_terminate_backend($1)")
                .bind(session)
                .execute(db.pool())
                .await
                .unwrap();
        }
        if sessions.is_empty() {
            Ok(())
        } else {
            Err("it has a session")
        }
    })
    .await;
    sqlx::raw_sql("DELETE FROM postbox.segment; DELETE FROM postbox.tick")
        .execute(db.pool())
        .await
        .unwrap();
    late.commit().await.unwrap();
    sequence().await;
    down.rollback().await.unwrap();

    history.has(2).await;
    publish_steps(db.pool(), &[step("last", 0)]).await;
    sequence().await;
    history.has(3).await;
    let seen: Vec<String> = history.runs().into_iter().map(|run| run.key).collect();
    assert_eq!(seen, ["early", "late", "last"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_durable_node_goes_on_where_it_stopped() {
    let bench = bench().await;
    let (history, other) = (History::default(), History::default());
    let first = node(&bench, "a", handlers![keep], &history).await;
    publish_steps(bench.db.pool(), &steps(5, 10)).await;
    history.has(50).await;
    first.shutdown().await.unwrap();
    let more: Vec<Step> = (10..20)
        .flat_map(|n| (0..5).map(move |key| step(key, n)))
        .collect();
    publish_steps(bench.db.pool(), &more).await;
    // Another node has a cursor of its own, which begins at the latest.
    eventually(PATIENCE, || async {
        if bench.number("SELECT postbox.next_offset('steps')").await == 100 {
            Ok(())
        } else {
            Err("not sequenced")
        }
    })
    .await;
    let _other = node(&bench, "b", handlers![keep], &other).await;
    let _again = node(&bench, "a", handlers![keep], &history).await;
    history.has(100).await;
    history.assert_in_order_and_alone(5, 20);
    assert_eq!(other.len(), 0);
}

#[handler(broadcast, retry(backoff = "fixed(20ms)"))]
async fn broken(_step: Step) -> Result<(), HandlerError> {
    Err(HandlerError::retry("the cache is down"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_fails_or_lags_is_visible() {
    let bench = bench().await;
    let consumer = Consumer::new(bench.pool())
        .name("sick")
        .lease(Duration::from_secs(6))
        .handlers(handlers![broken]);
    let _consumer = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &[step("k", 0), step("k", 1)]).await;
    eventually(PATIENCE, || async {
        let status = postbox_dispatcher::status::read(bench.db.pool())
            .await
            .map_err(|error| error.to_string())?;
        let sick = status
            .consumers
            .iter()
            .find(|consumer| consumer.name == "sick")
            .ok_or("not there")?;
        let report = &sick.report[0];
        let visible =
            report["failed"].as_u64() > Some(0) && report["retrying"] == 1 && report["memory"] == true;
        if visible && sick.live {
            Ok(())
        } else {
            Err(format!("{report}"))
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_can_replay_a_span_to_warm_its_cache() {
    let bench = bench().await;
    publish_steps(bench.db.pool(), &steps(2, 5)).await;
    eventually(PATIENCE, || async {
        if bench.number("SELECT postbox.next_offset('steps')").await == 10 {
            Ok(())
        } else {
            Err("not sequenced")
        }
    })
    .await;
    let history = History::default();
    let noted = history.clone();
    let warm = HandlerDefinition::new("warm")
        .broadcast()
        .start(postbox_consumer::Position::Ago(Duration::from_secs(600)))
        .argument::<Step>()
        .call(move |mut invocation| {
            let noted = noted.clone();
            Box::pin(async move {
                noted.note(
                    &<Step as Extract>::extract(&mut invocation).await?,
                    Instant::now(),
                );
                Ok(())
            })
        });
    let _node = bench.start(vec![warm]).await;
    history.has(10).await;
    history.assert_in_order_and_alone(2, 5);
}
