//! A database that goes back to an earlier state under those who run: a failover to a standby that lags, a recovery to a point in time, a crash that
//! takes back commits which did not wait for the disk. Offsets, numbers and transaction ids are given again then; ids of messages are not.

use std::collections::HashMap;
use std::time::Instant;

use crate::support::{History, PATIENCE, Step, publish_steps, settled, step};
use postbox::Publish;
use postbox_consumer::{Consumer, ConsumerHandle, HandlerDefinition, State, handler, handlers};
use postbox_dispatcher::{Dispatcher, DispatcherHandle};
use postbox_testkit::{TestDatabase, TestPostgres, eventually};

#[handler(broadcast)]
async fn refresh(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

#[handler(group = "work")]
async fn work(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

struct House {
    server: TestPostgres,
    db: TestDatabase,
    _dispatcher: DispatcherHandle,
}

impl House {
    async fn new(settings: &[(&str, &str)]) -> Self {
        let mut server = TestPostgres::builder();
        for (name, value) in settings {
            server = server.setting(*name, *value);
        }
        let server = server.start().await.unwrap();
        let db = server.database().await.unwrap();
        let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
        Self {
            server,
            db,
            _dispatcher: dispatcher,
        }
    }

    async fn consumer(
        &self,
        name: &str,
        handlers: Vec<HandlerDefinition>,
        history: &History,
    ) -> ConsumerHandle {
        Consumer::new(self.db.connect_pool(2))
            .name(name)
            .handlers(handlers)
            .state(history.clone())
            .start()
            .await
            .unwrap()
    }

    async fn publish(&self, key: &str, numbers: std::ops::Range<i64>) {
        let all: Vec<Step> = numbers.map(|n| step(key, n)).collect();
        publish_steps(self.db.pool(), &all).await;
    }

    async fn answers(&self) {
        eventually(PATIENCE, || async {
            sqlx::query("SELECT 1").execute(self.db.pool()).await
        })
        .await;
    }

    async fn sequenced(&self) -> i64 {
        sqlx::query_scalar("SELECT postbox.next_offset('steps')")
            .fetch_one(self.db.pool())
            .await
            .unwrap()
    }

    async fn is_sequenced(&self, count: i64) {
        eventually(PATIENCE, || async {
            match self.sequenced().await {
                sequenced if sequenced == count => Ok(()),
                sequenced => Err(format!("{sequenced} of {count} sequenced")),
            }
        })
        .await;
    }
}

/// How often each number of a key was seen.
fn counts(history: &History, key: &str) -> HashMap<i64, usize> {
    let mut counts = HashMap::new();
    for n in history.of(key) {
        *counts.entry(n).or_default() += 1;
    }
    counts
}

async fn sees_each_once(history: &History, key: &str, count: i64) {
    eventually(PATIENCE, || async {
        let seen = counts(history, key).len() as i64;
        match seen == count {
            true => Ok(()),
            false => Err(format!("{seen} of {count} messages of {key} seen")),
        }
    })
    .await;
    let twice = counts(history, key).values().filter(|count| **count > 1).count();
    assert_eq!(twice, 0, "messages of {key} seen twice");
    assert_eq!(history.of(key), (0..count).collect::<Vec<_>>(), "order of {key}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_sees_every_new_message_once_after_a_failover_that_lost_commits() {
    let house = House::new(&[]).await;
    let history = History::default();
    let _node = house.consumer("node", handlers![refresh], &history).await;
    house.publish("kept", 0..200).await;
    sees_each_once(&history, "kept", 200).await;
    let standby = house.server.backup().await.unwrap();
    house.publish("lost", 0..3_000).await;
    sees_each_once(&history, "lost", 3_000).await;
    house.server.recover(standby).await.unwrap();
    house.answers().await;
    for n in 0..32 {
        house.publish("new", n * 100..(n + 1) * 100).await;
    }
    sees_each_once(&history, "new", 3_200).await;
    assert_eq!(history.of("kept").len(), 200);
}

/// Messages that reached the standby, and were sequenced otherwise there than where the node saw them.
#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_does_not_see_again_what_a_failover_displaced() {
    let house = House::new(&[]).await;
    let history = History::default();
    let _node = house.consumer("node", handlers![refresh], &history).await;
    let mut late = house.db.pool().begin().await.unwrap();
    late.publish(&step("late", 0)).await.unwrap();
    // Committed and not yet sequenced when the standby stops receiving: the dispatcher is held for that moment.
    let mut sequencer = house.db.pool().begin().await.unwrap();
    sqlx::query("SELECT pg_advisory_xact_lock(1347571761, 1)")
        .execute(&mut *sequencer)
        .await
        .unwrap();
    house.publish("kept", 0..50).await;
    late.commit().await.unwrap();
    let standby = house.server.backup().await.unwrap();
    house.publish("lost", 0..50).await;
    sequencer.rollback().await.unwrap();
    sees_each_once(&history, "kept", 50).await;
    sees_each_once(&history, "lost", 50).await;
    house.server.recover(standby).await.unwrap();
    house.answers().await;
    house.publish("new", 0..200).await;
    sees_each_once(&history, "new", 200).await;
    sees_each_once(&history, "kept", 50).await;
    sees_each_once(&history, "late", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_that_had_seen_nothing_yet_sees_what_comes_after_a_recovery() {
    let house = House::new(&[]).await;
    house.publish("kept", 0..20).await;
    house.is_sequenced(20).await;
    let backup = house.server.backup().await.unwrap();
    house.publish("lost", 0..500).await;
    house.is_sequenced(520).await;
    let history = History::default();
    let _node = house.consumer("node", handlers![refresh], &history).await;
    house.server.recover(backup).await.unwrap();
    house.answers().await;
    house.publish("new", 0..100).await;
    sees_each_once(&history, "new", 100).await;
}

/// Publishers and the sequencer commit asynchronously, and nothing was written when the server is killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_sees_every_new_message_once_after_a_crash_that_took_back_commits() {
    let house = House::new(&[
        ("wal_writer_delay", "10s"),
        ("wal_writer_flush_after", "1GB"),
        ("wal_buffers", "64MB"),
    ])
    .await;
    let history = History::default();
    let _node = house.consumer("node", handlers![refresh], &history).await;
    let (mut total, mut lost) = (0, 0);
    for round in 0..6_i64 {
        let before: i64 = house.sequenced().await;
        let mut publisher = house.db.connect().await.unwrap();
        sqlx::raw_sql("SET synchronous_commit = off")
            .execute(&mut publisher)
            .await
            .unwrap();
        sqlx::query("INSERT INTO postbox.outbox (topic, type, key, payload) SELECT 'steps', 'step', 'gone-' || $1, \
                convert_to(json_build_object('key', 'gone-' || $1, 'n', n)::text, 'UTF8') FROM generate_series(0, 99) n")
            .bind(round.to_string())
            .execute(&mut publisher)
            .await
            .unwrap();
        history.has(total as usize + 100).await;
        house.server.kill().await.unwrap();
        house.server.start().await.unwrap();
        house.answers().await;
        let key = format!("new-{round}");
        house.publish(&key, 0..150).await;
        sees_each_once(&history, &key, 150).await;
        sees_each_once(&history, &format!("gone-{round}"), 100).await;
        total += 250;
        lost += i64::from(house.sequenced().await < before + 250);
    }
    assert!(lost > 0, "no crash took anything back, so nothing was tried");
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_go_on_after_a_recovery_and_no_session_is_taken_for_another() {
    let house = House::new(&[]).await;
    // Before any session, so that whatever counts sessions begins again.
    let backup = house.server.backup().await.unwrap();
    let (first, second) = (History::default(), History::default());
    let _first = house.consumer("first", handlers![work], &first).await;
    let _second = house.consumer("second", handlers![work], &second).await;
    let owners = async |count: i64| {
        eventually(PATIENCE, || async {
            let owners: i64 = sqlx::query_scalar(
                "SELECT count(DISTINCT l.consumer_id) FROM postbox.lane l JOIN postbox.consumer c ON c.id = l.consumer_id \
                 WHERE postbox.is_live(c.id) AND (SELECT count(*) FROM postbox.lane f WHERE f.consumer_id IS NULL) = 0",
            )
            .fetch_one(house.db.pool())
            .await
            .map_err(|error| error.to_string())?;
            match owners == count {
                true => Ok(()),
                false => Err(format!("{owners} of {count} own lanes")),
            }
        })
        .await;
    };
    owners(2).await;
    house.publish("lost", 0..100).await;
    eventually(PATIENCE, || async {
        match first.len() + second.len() {
            100 => Ok(()),
            n => Err(format!("{n} of 100")),
        }
    })
    .await;
    house.server.recover(backup).await.unwrap();
    house.answers().await;
    let _third = house.consumer("third", handlers![work], &second).await;
    owners(3).await;
    let all: Vec<Step> = (0..300).map(|n| step(n % 50, n / 50)).collect();
    publish_steps(house.db.pool(), &all).await;
    settled(house.db.pool(), "work").await;
    let runs = |history: &History| history.runs().into_iter().filter(|run| run.key != "lost").count();
    assert_eq!(runs(&first) + runs(&second), 300);
}

#[tokio::test]
async fn a_session_gets_a_number_that_nobody_has_or_had() {
    let db = TestDatabase::new().await.unwrap();
    let mut session = db.connect().await.unwrap();
    let mut ids: Vec<i32> = Vec::new();
    for _ in 0..20 {
        let id: i32 = sqlx::query_scalar("SELECT postbox.register('a', 1, '{}', '10 s', $1)")
            .bind(&ids)
            .fetch_one(&mut session)
            .await
            .unwrap();
        assert!(id > 0 && !ids.contains(&id));
        ids.push(id);
    }
    // Were they numbered one after another, they would be given again.
    let near = ids
        .windows(2)
        .filter(|pair| pair[0].abs_diff(pair[1]) < 1_000)
        .count();
    assert!(near < 3, "{ids:?}");
    let live: Vec<bool> = sqlx::query_scalar("SELECT postbox.is_live(id) FROM postbox.consumer")
        .fetch_all(db.pool())
        .await
        .unwrap();
    assert!(live.len() == 20 && live.iter().all(|live| *live));
}
