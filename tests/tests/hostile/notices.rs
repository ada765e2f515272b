//! Notifications that are none of Postbox's: any role that may connect can send them, and what they say is at most a hint to look.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use crate::support::{Bench, History, PATIENCE, Step, bench, publish_steps, settled, step};
use postbox::Outgoing;
use postbox_consumer::{Consumer, ConsumerHandle, HandlerDefinition, State, handler, handlers};
use postbox_core::seal::{Heard, Seal};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestPostgres, eventually};
use sqlx::postgres::PgListener;
use sqlx::{Connection, PgConnection, PgPool};

#[handler(group = "heard")]
async fn hear(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

#[handler(broadcast)]
async fn refresh(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

async fn start(bench: &Bench, handlers: Vec<HandlerDefinition>, history: &History) -> ConsumerHandle {
    bench
        .consumer(handlers)
        .state(history.clone())
        .start()
        .await
        .unwrap()
}

async fn notify(pool: &PgPool, channel: &str, text: &str) {
    sqlx::query("SELECT pg_notify($1, $2)")
        .bind(channel)
        .bind(text)
        .execute(pool)
        .await
        .unwrap();
}

/// For as long as a session needs to hear of something, and to look twice.
async fn a_while() {
    tokio::time::sleep(Duration::from_millis(1_500)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_segment_makes_no_group_and_no_broadcast_pass_messages_that_come_later() {
    let bench = bench().await;
    let (group, node) = (History::default(), History::default());
    let _group = start(&bench, handlers![hear], &group).await;
    let _node = start(&bench, handlers![refresh], &node).await;
    publish_steps(bench.db.pool(), &[step("k", 0)]).await;
    group.has(1).await;
    node.has(1).await;
    for forged in [
        "steps 6 0:10:9001,9002,9003,9004,9005:901,902,903,904,905:-,-,-,-,-",
        "steps 6 -",
        "steps 1000000 -",
        "steps 0 -",
        "steps -5 -",
        "steps 9223372036854775807 -",
        "steps 2 3:10:2:1:-",
    ] {
        notify(bench.db.pool(), "postbox_segment", forged).await;
    }
    a_while().await;
    let more: Vec<Step> = (1..40).map(|n| step("k", n)).collect();
    for one in &more {
        publish_steps(bench.db.pool(), std::slice::from_ref(one)).await;
    }
    group.has(40).await;
    node.has(40).await;
    group.assert_in_order_and_alone(1, 40);
    node.assert_in_order_and_alone(1, 40);
    settled(bench.db.pool(), "heard").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_another_topic_are_not_run_whatever_a_notification_says() {
    let bench = bench().await;
    let history = History::default();
    let _consumer = start(&bench, handlers![hear], &history).await;
    publish_steps(bench.db.pool(), &[step("k", 0)]).await;
    history.has(1).await;
    // Two that lie apart, so that they are read by address.
    for topic in ["salaries", "other", "other", "other", "other", "salaries"] {
        bench
            .publish([Outgoing::json(topic, &step("secret", 7)).message_type("step")])
            .await;
    }
    eventually(PATIENCE, || async {
        match bench
            .number("SELECT postbox.next_offset('other') + postbox.next_offset('salaries')")
            .await
        {
            6 => Ok(()),
            n => Err(format!("{n} sequenced")),
        }
    })
    .await;
    let rows: Vec<(String, i64)> =
        sqlx::query_as("SELECT xid::text, seq FROM postbox.outbox WHERE topic = 'salaries' ORDER BY seq")
            .fetch_all(bench.db.pool())
            .await
            .unwrap();
    let slot: i16 = sqlx::query_scalar("SELECT slot FROM postbox.outbox LIMIT 1")
        .fetch_one(bench.db.pool())
        .await
        .unwrap();
    let forged = format!(
        "steps 3 {slot}:20:{},{}:{},{}:-,-",
        rows[0].0, rows[1].0, rows[0].1, rows[1].1
    );
    notify(bench.db.pool(), "postbox_segment", &forged).await;
    a_while().await;
    publish_steps(bench.db.pool(), &[step("k", 1), step("k", 2), step("k", 3)]).await;
    history.has(4).await;
    settled(bench.db.pool(), "heard").await;
    history.assert_in_order_and_alone(1, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_by_address_gives_no_row_of_another_topic() {
    let bench = bench().await;
    for topic in ["salaries", "other", "other", "other", "other", "salaries"] {
        bench.publish([Outgoing::json(topic, &step("secret", 7))]).await;
    }
    eventually(PATIENCE, || async {
        match bench.number("SELECT postbox.next_offset('salaries')").await {
            2 => Ok(()),
            n => Err(format!("{n} sequenced")),
        }
    })
    .await;
    // A segment that says of another topic's rows that they are of this one, as somebody who may write segments could make it.
    bench
        .sql("INSERT INTO postbox.segment (slot, topic, base, count, bytes, xids, seqs) \
              SELECT min(slot), 'steps', 0, count(*), 10, array_agg(xid ORDER BY seq), array_agg(seq ORDER BY seq) FROM postbox.outbox WHERE topic = 'salaries'")
        .await;
    let mut connection = bench.db.pool().acquire().await.unwrap();
    let from = postbox::Offset::new(0);
    let segments = postbox::log::segments(&mut connection, "steps", from, 8)
        .await
        .unwrap();
    let found = postbox::log::messages(
        &mut connection,
        "steps",
        &segments,
        from,
        postbox::Offset::new(2),
        &postbox::log::Filters::NONE,
        |_, _| true,
    )
    .await
    .unwrap();
    assert!(found.is_empty(), "{found:?}");
}

/// A step whose number the dispatcher could not know has its seal, too: the first of a database, and one after others took steps. Without it nobody
/// believes the dispatcher, and everybody complains of it.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_sequencer_tells_is_known_to_be_its_own() {
    let mut bench = bench().await;
    let mut listener = PgListener::connect_with(bench.db.pool()).await.unwrap();
    listener.listen("postbox_segment").await.unwrap();
    // As a consumer that waits, since nobody else is told anything.
    sqlx::query("SELECT pg_advisory_lock_shared(1347571761, 3)")
        .execute(&mut listener)
        .await
        .unwrap();
    let mut seal = Seal::of(&mut listener).await.unwrap();
    // Steps that found nothing, before the first that finds something.
    a_while().await;
    for (n, before) in ["nothing", "nothing", "a step by hand", "another dispatcher"]
        .into_iter()
        .enumerate()
    {
        match before {
            "a step by hand" => {
                sqlx::query("SELECT nextval('postbox.tick_id')")
                    .execute(bench.db.pool())
                    .await
                    .unwrap();
            }
            "another dispatcher" => {
                let next = Dispatcher::new(bench.pool()).start().await.unwrap();
                std::mem::replace(&mut bench.dispatcher, next).shutdown().await;
            }
            _ => {}
        }
        publish_steps(bench.db.pool(), &[step("k", n as i64)]).await;
        let heard = tokio::time::timeout(PATIENCE, listener.recv())
            .await
            .unwrap()
            .unwrap();
        let opened = seal.open(heard.payload());
        assert!(
            matches!(opened, Heard::Announcement(_)),
            "after {before}: {opened:?}, {}",
            heard.payload()
        );
    }
}

/// What is heard is recorded and sent again, in this run and, with the numbers of a lost history, in the next.
#[tokio::test(flavor = "multi_thread")]
async fn recorded_notifications_that_are_sent_again_change_nothing() {
    let bench = bench().await;
    let history = History::default();
    let _consumer = start(&bench, handlers![hear], &history).await;
    let mut recorder = PgListener::connect_with(bench.db.pool()).await.unwrap();
    recorder.listen("postbox_segment").await.unwrap();
    let mut recorded = Vec::new();
    for n in 0..20 {
        publish_steps(bench.db.pool(), &[step("k", n)]).await;
        history.has(n as usize + 1).await;
        let heard = tokio::time::timeout(PATIENCE, recorder.recv())
            .await
            .unwrap()
            .unwrap();
        recorded.push(heard.payload().to_owned());
    }
    drop(recorder);
    for text in &recorded {
        notify(bench.db.pool(), "postbox_segment", text).await;
    }
    for n in 20..40 {
        publish_steps(bench.db.pool(), &[step("k", n)]).await;
        notify(bench.db.pool(), "postbox_segment", &recorded[n as usize - 20]).await;
    }
    history.has(40).await;
    settled(bench.db.pool(), "heard").await;
    history.assert_in_order_and_alone(1, 40);
}

/// Sends notifications of all channels as fast as they go, until it is told to stop; a role without any right.
async fn flood(url: String, stop: Arc<AtomicBool>, sent: Arc<AtomicI64>) {
    let mut connection = PgConnection::connect(&url).await.unwrap();
    while !stop.load(Ordering::Relaxed) {
        sqlx::query(
            "SELECT count(pg_notify(c.name, 'steps ' || g.n || ' 0:10:' || g.n || ':' || g.n || ':-')) FROM generate_series(1, 500) AS g (n), \
                 unnest('{postbox_segment,postbox_outbox,postbox_scheduled,postbox_cron}'::text[]) AS c (name)",
        )
        .execute(&mut connection)
        .await
        .unwrap();
        sqlx::query("SELECT pg_notify('postbox_segment', '')")
            .execute(&mut connection)
            .await
            .unwrap();
        sent.fetch_add(2_000, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_forged_notifications_stops_nobody_and_is_named() {
    let server = TestPostgres::private().await.unwrap();
    let db = server.database().await.unwrap();
    sqlx::raw_sql("CREATE ROLE stranger LOGIN PASSWORD 'x'")
        .execute(db.pool())
        .await
        .unwrap();
    let mut url = db.url().to_owned();
    if let Some(at) = url.find('@') {
        url = format!("postgres://stranger:x{}", &url[at..]);
    }
    let dispatcher = Dispatcher::new(db.connect_pool(4)).start().await.unwrap();
    let history = History::default();
    let consumer = Consumer::new(db.connect_pool(4))
        .name("flooded")
        .handlers(handlers![hear])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    let flooding = tokio::spawn(flood(url, stop.clone(), sent.clone()));
    for n in 0..100 {
        publish_steps(db.pool(), &steps_of(n)).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    history.has(500).await;
    settled(db.pool(), "heard").await;
    history.assert_in_order_and_alone(5, 100);
    let names = async || -> Vec<String> {
        let findings = postbox_dispatcher::doctor::examine(db.pool()).await.unwrap();
        findings
            .iter()
            .map(|finding| format!("{}: {}", finding.name, finding.what))
            .collect()
    };
    eventually(PATIENCE, || async {
        let found = names().await;
        let named = |channel: &str| {
            found
                .iter()
                .any(|found| found.starts_with("notifications") && found.contains(channel))
        };
        match ["postbox_segment", "postbox_outbox"]
            .iter()
            .all(|channel| named(channel))
        {
            true => Ok(()),
            false => Err(format!("{found:?}")),
        }
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    flooding.await.unwrap();
    assert!(sent.load(Ordering::Relaxed) > 0);
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
}

fn steps_of(n: i64) -> Vec<Step> {
    (0..5).map(|key| step(key, n)).collect()
}
