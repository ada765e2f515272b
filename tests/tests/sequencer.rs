//! The order of a topic: every committed message has one offset, offsets are dense, and what was committed before is before.
//!
//! All with concurrent connections; what a test relies on is a lock it holds or a condition it waits for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use postbox::log::{Filters, Segment, messages, segments};
use postbox::{Offset, Outgoing, Publish};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestDatabase, TestPostgres, eventually};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Postgres, Row, Transaction};
use tokio::task::JoinSet;
use uuid::Uuid;

mod dice;
mod ledger;
use dice::Dice;
use ledger::{complete, entries, step};

const SOON: Duration = Duration::from_secs(30);
const TOPICS: [&str; 3] = ["orders", "payments", "letters"];

async fn run(connection: &mut PgConnection, sql: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(sql.into()))
        .execute(connection)
        .await
        .expect("a statement of the test");
}

async fn publish(tx: &mut Transaction<'_, Postgres>, topic: &'static str, text: &str) -> Uuid {
    let outgoing = Outgoing::json(topic, text).key(text.to_owned());
    tx.publish(outgoing).await.expect("published").as_uuid()
}

/// Publishes in a transaction of its own.
async fn publish_alone(connection: &mut PgConnection, topic: &'static str, text: &str) -> Uuid {
    let mut tx = connection.begin().await.expect("a transaction");
    let id = publish(&mut tx, topic, text).await;
    tx.commit().await.expect("committed");
    id
}

async fn texts(db: &TestDatabase, topic: &str) -> Vec<String> {
    complete(db, topic)
        .await
        .iter()
        .map(ledger::Entry::text)
        .collect()
}

/// Waits until a backend waits for a lock of the given class and number.
async fn somebody_waits_for_the_sequencers_lock(db: &TestDatabase) {
    eventually(SOON, async || {
        let waits: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database() \
             WHERE l.locktype = 'advisory' AND l.classid = 1347571761 AND l.objid = 1 AND NOT l.granted)",
        )
        .fetch_one(db.pool())
        .await
        .map_err(|error| error.to_string())?;
        if waits { Ok(()) } else { Err("nobody waits".to_owned()) }
    })
    .await;
}

// ---------------------------------------------------------------------------------------------------- what happened when

/// A message of a transaction that committed.
#[derive(Clone, Copy)]
struct Published {
    id: Uuid,
    topic: &'static str,
    /// Just before its publishing.
    begun: Instant,
    /// Just after the commit returned.
    committed: Instant,
}

/// If A's commit returned before B's publishing began, A is before B.
fn assert_causal(order: &[ledger::Entry], published: &HashMap<Uuid, Published>) {
    let mut earliest_commit_behind: Option<(Instant, Uuid)> = None;
    for entry in order.iter().rev() {
        let Some(this) = entry.id.and_then(|id| published.get(&id)) else {
            continue;
        };
        if let Some((committed, behind)) = earliest_commit_behind {
            assert!(
                committed >= this.begun,
                "{behind} was committed before {} was begun and comes after it",
                this.id
            );
        }
        if earliest_commit_behind.is_none_or(|(earliest, _)| this.committed < earliest) {
            earliest_commit_behind = Some((this.committed, this.id));
        }
    }
}

/// What a publisher did.
#[derive(Default)]
struct Deeds {
    committed: Vec<Published>,
    aborted: Vec<Uuid>,
}

impl Deeds {
    fn commit(&mut self, messages: Pending) {
        let committed = Instant::now();
        self.committed
            .extend(messages.into_iter().map(|(id, topic, begun)| Published {
                id,
                topic,
                begun,
                committed,
            }));
    }

    fn abort(&mut self, messages: Pending) {
        self.aborted.extend(messages.into_iter().map(|(id, ..)| id));
    }
}

/// Messages of a transaction that has not ended: each with the instant just before its publishing.
type Pending = Vec<(Uuid, &'static str, Instant)>;

/// One to three messages, some with a pause before, one by one or as a batch.
async fn publish_some(tx: &mut Transaction<'_, Postgres>, dice: &mut Dice) -> Pending {
    let mut messages = Vec::new();
    if dice.below(4) == 0 {
        let topic = TOPICS[dice.below(3) as usize];
        let begun = Instant::now();
        let batch: Vec<Outgoing> = (0..dice.below(40)).map(|n| Outgoing::json(topic, &n)).collect();
        let ids = tx.publish_all(batch).await.expect("a batch");
        messages.extend(ids.into_iter().map(|id| (id.as_uuid(), topic, begun)));
        return messages;
    }
    for _ in 0..=dice.below(3) {
        if dice.below(3) == 0 {
            // Not to wait for anything: so that transactions overlap in many ways.
            tokio::time::sleep(Duration::from_millis(dice.below(6))).await;
        }
        let topic = TOPICS[dice.below(3) as usize];
        let begun = Instant::now();
        messages.push((publish(tx, topic, "x").await, topic, begun));
    }
    messages
}

/// A publisher that does everything that a transaction can do.
async fn publish_wildly(db: &TestDatabase, publisher: u64, transactions: u64) -> Deeds {
    let mut connection = db.connect().await.expect("a connection");
    let mut dice = Dice::new(publisher + 1);
    let mut deeds = Deeds::default();
    for n in 0..transactions {
        let mut tx = connection.begin().await.expect("a transaction");
        match dice.below(10) {
            0 | 1 => {
                let messages = publish_some(&mut tx, &mut dice).await;
                tx.rollback().await.expect("rolled back");
                deeds.abort(messages);
            }
            2 | 3 => {
                let mut kept = publish_some(&mut tx, &mut dice).await;
                let mut inner = tx.begin().await.expect("a savepoint");
                let within = publish_some(&mut inner, &mut dice).await;
                if dice.below(2) == 0 {
                    inner.rollback().await.expect("back to the savepoint");
                    deeds.abort(within);
                } else {
                    inner.commit().await.expect("released");
                    kept.extend(within);
                }
                kept.extend(publish_some(&mut tx, &mut dice).await);
                tx.commit().await.expect("committed");
                deeds.commit(kept);
            }
            4 | 5 => {
                run(&mut tx, "SET LOCAL postbox.two_phase = on").await;
                let messages = publish_some(&mut tx, &mut dice).await;
                let name = format!("{}-{publisher}-{n}", db.name());
                run(&mut tx, format!("PREPARE TRANSACTION '{name}'")).await;
                // It only says that no transaction is open.
                tx.commit().await.expect("a warning");
                tokio::time::sleep(Duration::from_millis(dice.below(8))).await;
                if dice.below(3) == 0 {
                    run(&mut connection, format!("ROLLBACK PREPARED '{name}'")).await;
                    deeds.abort(messages);
                } else {
                    run(&mut connection, format!("COMMIT PREPARED '{name}'")).await;
                    deeds.commit(messages);
                }
            }
            kind => {
                if kind == 6 {
                    run(&mut tx, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE").await;
                }
                if kind == 7 {
                    // Its xid is older than its messages.
                    run(&mut tx, "SELECT pg_current_xact_id()").await;
                    tokio::time::sleep(Duration::from_millis(dice.below(10))).await;
                }
                let messages = publish_some(&mut tx, &mut dice).await;
                if kind == 8 {
                    tokio::time::sleep(Duration::from_millis(dice.below(20))).await;
                }
                tx.commit().await.expect("committed");
                deeds.commit(messages);
            }
        }
    }
    deeds
}

/// Reads a topic from its beginning as a consumer does, until `stop`, and returns the ids in the order in which it saw them.
async fn read_along(db: Arc<TestDatabase>, topic: &'static str, stop: Arc<AtomicBool>) -> Vec<Uuid> {
    let mut connection = db.connect().await.expect("a connection");
    let mut next = Offset::ZERO;
    let mut seen = Vec::new();
    loop {
        let last_look = stop.load(Ordering::SeqCst);
        let found = segments(&mut connection, topic, next, 50)
            .await
            .expect("segments");
        let end = found.last().map_or(next, postbox::log::Segment::end);
        let read = messages(
            &mut connection,
            topic,
            &found,
            next,
            end,
            &Filters::NONE,
            |_, _| true,
        )
        .await
        .expect("messages");
        for message in read {
            assert_eq!(message.offset, next, "{topic} is read without a gap");
            next = Offset::new(next.get() + 1);
            seen.push(message.id.as_uuid());
        }
        assert_eq!(next, end, "{topic}: an offset has no message");
        if last_look && found.is_empty() {
            return seen;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_committed_message_has_one_offset_under_all_that_transactions_can_do() {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let stop = Arc::new(AtomicBool::new(false));

    let mut open_connection = db.connect().await.unwrap();
    let mut open = open_connection.begin().await.unwrap();
    let mut open_messages = Vec::new();
    for topic in TOPICS {
        open_messages.push((publish(&mut open, topic, "first").await, topic, Instant::now()));
    }

    // Real dispatchers, and others that step as often as they can.
    let dispatchers = [
        Dispatcher::new(db.connect_pool(2)).start().await.unwrap(),
        Dispatcher::new(db.connect_pool(2)).start().await.unwrap(),
    ];
    let mut steppers = JoinSet::new();
    let steps = Arc::new(AtomicUsize::new(0));
    for _ in 0..3 {
        let (db, stop, steps) = (db.clone(), stop.clone(), steps.clone());
        steppers.spawn(async move {
            let mut connection = db.connect().await.expect("a connection");
            while !stop.load(Ordering::SeqCst) {
                if step(&mut connection).await > 0 {
                    steps.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
    }
    let readers: Vec<_> = TOPICS
        .iter()
        .map(|topic| tokio::spawn(read_along(db.clone(), topic, stop.clone())))
        .collect();

    let mut publishers = JoinSet::new();
    for publisher in 0..10 {
        let db = db.clone();
        publishers.spawn(async move { publish_wildly(&db, publisher, 100).await });
    }
    let mut deeds = Deeds::default();
    while let Some(done) = publishers.join_next().await {
        let done = done.unwrap();
        deeds.committed.extend(done.committed);
        deeds.aborted.extend(done.aborted);
    }

    // The open transaction has held up nobody else.
    let sequenced = async || -> i64 {
        sqlx::query_scalar("SELECT coalesce(sum(postbox.next_offset(name)), 0)::bigint FROM postbox.topic")
            .fetch_one(db.pool())
            .await
            .expect("the heads")
    };
    let others = deeds.committed.len() as i64;
    eventually(SOON, async || match sequenced().await {
        n if n == others => Ok(()),
        n => Err(format!("{n} of {others} have an offset")),
    })
    .await;

    for topic in TOPICS {
        open_messages.push((publish(&mut open, topic, "last").await, topic, Instant::now()));
    }
    open.commit().await.unwrap();
    deeds.commit(open_messages.clone());
    eventually(SOON, async || match sequenced().await {
        n if n == deeds.committed.len() as i64 => Ok(()),
        n => Err(format!("{n} of {} have an offset", deeds.committed.len())),
    })
    .await;
    stop.store(true, Ordering::SeqCst);
    while let Some(done) = steppers.join_next().await {
        done.unwrap();
    }
    for dispatcher in dispatchers {
        dispatcher.shutdown().await;
    }

    // By whomever: how the dispatchers and the others share them is the machine's affair.
    let ticks: i64 = sqlx::query_scalar("SELECT last_value FROM postbox.tick_id")
        .fetch_one(db.pool())
        .await
        .unwrap();
    assert!(
        ticks > 50 && steps.load(Ordering::SeqCst) > 0,
        "many steps beside the publishers: {ticks}, {steps:?} by hand"
    );
    let published: HashMap<Uuid, Published> = deeds.committed.iter().map(|p| (p.id, *p)).collect();
    let aborted: HashSet<Uuid> = deeds.aborted.iter().copied().collect();
    assert!(
        aborted.len() > 200 && published.len() > 1_000,
        "the dice were fair"
    );
    for (topic, reader) in TOPICS.into_iter().zip(readers) {
        let order = complete(&db, topic).await;
        let ids: Vec<Uuid> = order.iter().filter_map(|entry| entry.id).collect();
        let expected: HashSet<Uuid> = published
            .values()
            .filter(|p| p.topic == topic)
            .map(|p| p.id)
            .collect();
        assert_eq!(ids.iter().copied().collect::<HashSet<_>>(), expected);
        assert!(ids.iter().all(|id| !aborted.contains(id)));
        assert_causal(&order, &published);
        assert_eq!(reader.await.unwrap(), ids, "who read along saw the same order");
    }
}

// ------------------------------------------------------------------------------------------------- one thing at a time

#[tokio::test]
async fn a_transaction_that_commits_last_delays_only_its_own_messages() {
    let db = TestDatabase::new().await.unwrap();
    let (mut one, mut other) = (db.connect().await.unwrap(), db.connect().await.unwrap());
    let mut early = one.begin().await.unwrap();
    publish(&mut early, "t", "first inserted").await;
    for n in 0..3 {
        publish_alone(&mut other, "t", &n.to_string()).await;
        assert_eq!(step(db.pool()).await, 1, "an open transaction holds nobody up");
    }
    early.commit().await.unwrap();
    assert_eq!(step(db.pool()).await, 1);
    assert_eq!(step(db.pool()).await, 0);
    assert_eq!(texts(&db, "t").await, ["0", "1", "2", "first inserted"]);
}

#[tokio::test]
async fn a_message_inserted_late_in_an_old_transaction_follows_what_was_committed_before() {
    let db = TestDatabase::new().await.unwrap();
    let (mut one, mut other) = (db.connect().await.unwrap(), db.connect().await.unwrap());
    // Once within one step, once with a step between.
    for between in [false, true] {
        let topic = if between { "with" } else { "without" };
        let mut old = one.begin().await.unwrap();
        run(&mut old, "SELECT pg_current_xact_id()").await;
        publish_alone(&mut other, topic, "before").await;
        if between {
            assert_eq!(step(db.pool()).await, 1);
        }
        publish(&mut old, topic, "late in an old transaction").await;
        old.commit().await.unwrap();
        publish_alone(&mut other, topic, "after").await;
        step(db.pool()).await;
        assert_eq!(
            texts(&db, topic).await,
            ["before", "late in an old transaction", "after"]
        );
    }
}

#[tokio::test]
async fn messages_of_a_transaction_keep_their_order_over_savepoints() {
    let db = TestDatabase::new().await.unwrap();
    let mut connection = db.connect().await.unwrap();
    let mut tx = connection.begin().await.unwrap();
    publish(&mut tx, "t", "0").await;
    let mut released = tx.begin().await.unwrap();
    publish(&mut released, "t", "1").await;
    let mut inner = released.begin().await.unwrap();
    publish(&mut inner, "t", "never").await;
    inner.rollback().await.unwrap();
    publish(&mut released, "t", "2").await;
    released.commit().await.unwrap();
    let batch: Vec<Outgoing> = (3..6).map(|n| Outgoing::json("t", &n.to_string())).collect();
    tx.publish_all(batch).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(step(db.pool()).await, 6);
    assert_eq!(texts(&db, "t").await, ["0", "1", "2", "3", "4", "5"]);
}

#[tokio::test]
async fn a_prepared_transaction_is_sequenced_when_it_is_committed_and_not_before() {
    let db = TestDatabase::new().await.unwrap();
    let mut connection = db.connect().await.unwrap();
    for (end, found) in [("COMMIT", 1), ("ROLLBACK", 0)] {
        let name = format!("{}-{end}", db.name());
        let mut tx = connection.begin().await.unwrap();
        run(&mut tx, "SET LOCAL postbox.two_phase = on").await;
        publish(&mut tx, "t", end).await;
        run(&mut tx, format!("PREPARE TRANSACTION '{name}'")).await;
        tx.commit().await.unwrap();
        publish_alone(&mut connection, "other", end).await;
        assert_eq!(step(db.pool()).await, 1, "only the other one");
        run(&mut connection, format!("{end} PREPARED '{name}'")).await;
        assert_eq!(step(db.pool()).await, found);
    }
    assert_eq!(texts(&db, "t").await, ["COMMIT"]);
}

#[tokio::test]
async fn offsets_go_on_over_steps_and_topics_do_not_share_them() {
    let db = TestDatabase::new().await.unwrap();
    let mut connection = db.connect().await.unwrap();
    for round in 0..5 {
        for topic in TOPICS {
            publish_alone(&mut connection, topic, &round.to_string()).await;
        }
        let mut found: Vec<(String, i64, i64)> = sqlx::query_as("SELECT * FROM postbox.sequence()")
            .fetch_all(&mut connection)
            .await
            .unwrap();
        found.sort();
        let mut expected = TOPICS.map(|topic| (topic.to_owned(), round + 1, 1)).to_vec();
        expected.sort();
        assert_eq!(found, expected, "topic, next offset, messages");
    }
    for topic in TOPICS {
        assert_eq!(texts(&db, topic).await, ["0", "1", "2", "3", "4"]);
    }
}

#[tokio::test]
async fn a_step_that_finds_nothing_writes_nothing() {
    let db = TestDatabase::new().await.unwrap();
    let mut connection = db.connect().await.unwrap();
    publish_alone(&mut connection, "t", "x").await;
    let ticks = async || -> i64 {
        sqlx::query_scalar("SELECT count(*) FROM postbox.tick")
            .fetch_one(db.pool())
            .await
            .unwrap()
    };
    for expected in [1, 0, 0] {
        assert_eq!(step(&mut connection).await, expected);
        // So that the next step has another snapshot.
        run(
            &mut connection,
            "CREATE TEMP TABLE IF NOT EXISTS note (n int); INSERT INTO note VALUES (1)",
        )
        .await;
    }
    assert_eq!(ticks().await, 1);
}

// ------------------------------------------------------------------------------------------------------ a caller that remembers

/// Takes steps as a dispatcher does: passes back what the last one returned, and is handed small messages.
#[derive(Default)]
struct Caller {
    tick: Option<i64>,
    look: Option<String>,
    seq: Option<i64>,
    slot: Option<i16>,
    topic: Option<String>,
    head: Option<i64>,
}

/// What it returned, as far as it is not to be passed back: messages, announcement and payloads.
type Stepped = (i64, Option<String>, Vec<String>);

impl Caller {
    async fn step(&mut self, db: &TestDatabase) -> Stepped {
        let mut connection = db.pool().acquire().await.expect("a connection");
        // As a dispatcher does, so that rows come in the order of the index.
        run(
            &mut connection,
            "SET enable_seqscan = off; SET enable_bitmapscan = off; SET plan_cache_mode = force_generic_plan",
        )
        .await;
        let row = sqlx::query(
            "SELECT last_tick, last_look::text, last_seq, last_slot, last_topic, last_head, messages, news, \
                 ARRAY(SELECT convert_from(r.payload, 'UTF8') FROM unnest(rows) r) \
             FROM postbox.step($1, $2::text::pg_snapshot, $3, $4, $5, $6, 100)",
        )
        .bind(self.tick)
        .bind(&self.look)
        .bind(self.seq)
        .bind(self.slot)
        .bind(&self.topic)
        .bind(self.head)
        .fetch_one(&mut *connection)
        .await
        .expect("a step");
        (self.tick, self.look) = (row.get(0), row.get(1));
        (self.seq, self.slot) = (row.get(2), row.get(3));
        (self.topic, self.head) = (row.get(4), row.get(5));
        (row.get(6), row.get(7), row.get(8))
    }

    /// Goes on until it is known up to which number all are dealt with: at a step at which nobody on the server, where other tests run, has
    /// a transaction open.
    async fn is_up_to_date(&mut self, db: &TestDatabase, connection: &mut PgConnection) {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            publish_alone(connection, "other", "").await;
            self.step(db).await;
            if self.seq.is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("there was always a transaction open on the server");
    }

    /// Takes a step that finds so many messages, all of one topic, and hands them over.
    async fn lean_step(&mut self, db: &TestDatabase, topic: &str, messages: i64) {
        let rows = self.small_step(db, topic, messages).await;
        let texts: Vec<String> = texts(db, topic).await;
        assert_eq!(rows, texts[texts.len() - messages as usize..]);
        assert!(self.seq.is_some());
    }

    /// Takes a step that finds so many messages, all of one topic, and says where they are; what it hands over.
    async fn small_step(&mut self, db: &TestDatabase, topic: &str, messages: i64) -> Vec<String> {
        let (found, announcement, rows) = self.step(db).await;
        assert_eq!(found, messages);
        let announcement = announcement.expect("somebody wants it");
        let [of, head, place] = announcement.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{announcement}");
        };
        let head: i64 = head.parse().expect("as postbox.step says it");
        let mut connection = db.connect().await.expect("as postbox.step says it");
        let stored = segments(&mut connection, topic, Offset::new(head - 1), 1)
            .await
            .expect("as postbox.step says it");
        assert_eq!(of, topic);
        assert_eq!(stored, [Segment::parse(head, place).expect("a place")]);
        assert_eq!(stored[0].base(), Offset::new(head - messages));
        rows.iter()
            .map(|row| serde_json::from_str(row).expect("as postbox.step says it"))
            .collect()
    }

    /// Takes a step that finds so many messages in the other way.
    async fn large_step(&mut self, db: &TestDatabase, messages: i64) {
        let (found, announcement, rows) = self.step(db).await;
        assert_eq!(found, messages);
        assert!(announcement.is_some_and(|text| text.ends_with(" -")));
        assert!(rows.is_empty());
    }
}

/// Few messages of one topic take another way through a step than many, or several topics', or those of transactions that were running at the last look.
#[tokio::test]
async fn small_steps_and_large_ones_continue_each_other_whoever_takes_them() {
    let db = TestDatabase::new().await.unwrap();
    let (mut one, mut other, mut listener) = (
        db.connect().await.unwrap(),
        db.connect().await.unwrap(),
        db.connect().await.unwrap(),
    );
    run(&mut listener, "SELECT pg_advisory_lock_shared(1347571761, 3)").await;
    let (mut caller, mut second) = (Caller::default(), Caller::default());

    publish_alone(&mut one, "orders", "0").await;
    caller.small_step(&db, "orders", 1).await;
    caller.is_up_to_date(&db, &mut one).await;
    publish_alone(&mut one, "orders", "1").await;
    caller.lean_step(&db, "orders", 1).await;
    // Where the topic goes on is not what this caller remembers.
    publish_alone(&mut one, "orders", "2").await;
    second.small_step(&db, "orders", 1).await;
    publish_alone(&mut one, "orders", "3").await;
    caller.small_step(&db, "orders", 1).await;
    assert_eq!(caller.step(&db).await, (0, None, Vec::new()));
    // Nor after a step over several topics.
    publish_alone(&mut one, "orders", "4").await;
    publish_alone(&mut one, "payments", "0").await;
    caller.large_step(&db, 2).await;
    caller.is_up_to_date(&db, &mut one).await;
    publish_alone(&mut one, "orders", "5").await;
    caller.lean_step(&db, "orders", 1).await;
    publish_alone(&mut one, "payments", "1").await;
    caller.lean_step(&db, "payments", 1).await;
    // By number.
    for (from, to) in [(6, 70), (70, 135)] {
        let mut tx = one.begin().await.unwrap();
        for n in from..to {
            publish(&mut tx, "orders", &n.to_string()).await;
        }
        tx.commit().await.unwrap();
        match to - from {
            64 => caller.lean_step(&db, "orders", 64).await,
            more => caller.large_step(&db, more).await,
        }
    }
    caller.is_up_to_date(&db, &mut one).await;
    // A large payload is not handed over.
    publish_alone(&mut one, "letters", &"x".repeat(200)).await;
    let (found, announcement, rows) = caller.step(&db).await;
    assert!(found == 1 && announcement.is_some_and(|text| !text.ends_with(" -")) && rows.is_empty());
    // What ran at the last look has an older number than that look's newest.
    let mut open = other.begin().await.unwrap();
    publish(&mut open, "orders", "135").await;
    publish_alone(&mut one, "orders", "136").await;
    assert!(caller.small_step(&db, "orders", 1).await.is_empty());
    assert_eq!(caller.seq, None);
    publish_alone(&mut one, "orders", "137").await;
    caller.small_step(&db, "orders", 1).await;
    open.commit().await.unwrap();
    caller.small_step(&db, "orders", 1).await;
    assert_eq!(caller.step(&db).await, (0, None, Vec::new()));
    caller.is_up_to_date(&db, &mut one).await;
    publish_alone(&mut one, "orders", "138").await;
    caller.lean_step(&db, "orders", 1).await;
    // Others that publish nothing.
    run(&mut one, "SELECT pg_current_xact_id()").await;
    assert_eq!(caller.step(&db).await, (0, None, Vec::new()));
    assert!(caller.look.is_some() && caller.seq.is_some());
    // Two topics.
    publish_alone(&mut one, "orders", "139").await;
    publish_alone(&mut one, "payments", "2").await;
    caller.large_step(&db, 2).await;
    caller.is_up_to_date(&db, &mut one).await;
    // A transaction that had its id before another one, and its number after it.
    let mut early = other.begin().await.unwrap();
    run(&mut early, "SELECT pg_current_xact_id()").await;
    publish_alone(&mut one, "orders", "140").await;
    publish(&mut early, "orders", "141").await;
    early.commit().await.unwrap();
    caller.small_step(&db, "orders", 2).await;
    caller.is_up_to_date(&db, &mut one).await;
    // A number that nobody has any more might be anybody's.
    let mut open = other.begin().await.unwrap();
    publish(&mut open, "orders", "not this").await;
    open.rollback().await.unwrap();
    publish_alone(&mut one, "orders", "142").await;
    assert!(caller.small_step(&db, "orders", 1).await.is_empty());
    // A transaction with an id that the last look's snapshot does not know yet, and its message in another slot, like nothing before.
    caller.is_up_to_date(&db, &mut one).await;
    let here = caller.slot.expect("the slot of what was found last");
    let mut open = other.begin().await.unwrap();
    insert_in_slot(&mut open, (here + 1) % 8, 0, 0).await;
    publish_alone(&mut one, "payments", "3").await;
    caller.small_step(&db, "payments", 1).await;
    open.commit().await.unwrap();
    publish_alone(&mut one, "payments", "4").await;
    caller.large_step(&db, 2).await;
    // The same, if its id is newer than all that the look knows, for as long as nobody else on the server gets one.
    for n in 0..20 {
        publish_alone(&mut one, "letters", "").await;
        let mut open = other.begin().await.unwrap();
        insert_in_slot(&mut open, (here + 1) % 8, 1 + n, 1 + n).await;
        let mut late = Caller::default();
        late.small_step(&db, "letters", 1).await;
        open.commit().await.unwrap();
        publish_alone(&mut one, "letters", "").await;
        late.large_step(&db, 2).await;
    }

    // Segments are of one slot.
    insert_in_slot(&mut one, (here + 2) % 8, 21, 21).await;
    insert_in_slot(&mut one, (here + 3) % 8, 22, 23).await;
    caller.large_step(&db, 3).await;
    let expected: Vec<String> = (0..=23).map(|n| n.to_string()).collect();
    assert_eq!(texts(&db, "t").await, expected);

    let mut expected: Vec<String> = (0..=142).map(|n| n.to_string()).collect();
    // It was committed last.
    expected[135..138].rotate_left(1);
    assert_eq!(texts(&db, "orders").await, expected);
    assert_eq!(texts(&db, "payments").await, ["0", "1", "2", "3", "4"]);
}

// --------------------------------------------------------------------------------------------------- the shape of segments

async fn shape(db: &TestDatabase, topic: &str) -> Vec<(i64, i32, i16)> {
    sqlx::query_as("SELECT base, count, slot FROM postbox.segment WHERE topic = $1 ORDER BY base")
        .bind(topic)
        .fetch_all(db.pool())
        .await
        .expect("the segments")
}

#[tokio::test]
async fn segments_are_cut_at_1024_messages() {
    let db = TestDatabase::new().await.unwrap();
    for (topic, messages, counts) in [
        ("a", 1_023, vec![1_023]),
        ("b", 1_024, vec![1_024]),
        ("c", 1_025, vec![1_024, 1]),
        ("d", 10_000, [vec![1_024; 9], vec![784]].concat()),
    ] {
        let mut tx = db.pool().begin().await.unwrap();
        let batch: Vec<Outgoing> = (0..messages)
            .map(|n| Outgoing::json(topic, &n.to_string()))
            .collect();
        tx.publish_all(batch).await.unwrap();
        tx.commit().await.unwrap();
        // A step more, so that a cut counts from the step's first message.
        assert_eq!(step(db.pool()).await, messages);
        let cut: Vec<i32> = shape(&db, topic)
            .await
            .into_iter()
            .map(|(_, count, _)| count)
            .collect();
        assert_eq!(cut, counts);
        let expected: Vec<String> = (0..messages).map(|n| n.to_string()).collect();
        assert_eq!(texts(&db, topic).await, expected);
    }
}

/// As the clock does it at a slot's boundary, which a test cannot wait for.
async fn insert_in_slot(connection: &mut PgConnection, slot: i16, from: i64, to: i64) {
    sqlx::query(
        "INSERT INTO postbox.outbox (slot, topic, key, payload) \
         SELECT $1, 't', n::text, convert_to('\"' || n || '\"', 'UTF8') FROM generate_series($2, $3) n",
    )
    .bind(slot)
    .bind(from)
    .bind(to)
    .execute(connection)
    .await
    .expect("inserted");
}

#[tokio::test]
async fn around_the_boundary_of_a_slot_messages_keep_their_order_and_segments_do_not_mix_slots() {
    let db = TestDatabase::new().await.unwrap();
    let (mut one, mut other) = (db.connect().await.unwrap(), db.connect().await.unwrap());
    // The older transaction's first message is in the old slot, then others are in the next one, then it goes on.
    let mut old = one.begin().await.unwrap();
    insert_in_slot(&mut old, 3, 0, 0).await;
    insert_in_slot(&mut other, 4, 1, 2).await;
    insert_in_slot(&mut old, 3, 3, 4).await;
    insert_in_slot(&mut old, 4, 5, 5).await;
    old.commit().await.unwrap();
    // The cuts by slot and by number are independent, and offsets go on over both.
    insert_in_slot(&mut other, 4, 6, 1_499).await;
    insert_in_slot(&mut other, 7, 1_500, 1_500).await;
    insert_in_slot(&mut other, 0, 1_501, 4_000).await;
    assert_eq!(step(db.pool()).await, 4_001);

    let expected: Vec<String> = (0..=4_000).map(|n| n.to_string()).collect();
    assert_eq!(texts(&db, "t").await, expected);
    let shape = shape(&db, "t").await;
    assert_eq!(shape[..3], [(0, 1, 3), (1, 2, 4), (3, 2, 3)]);
    let turns: Vec<i16> = shape
        .iter()
        .map(|&(.., slot)| slot)
        .fold(Vec::new(), |mut turns, slot| {
            if turns.last() != Some(&slot) {
                turns.push(slot);
            }
            turns
        });
    assert_eq!(turns, [3, 4, 3, 4, 7, 0]);
    assert!(shape.iter().all(|&(_, count, _)| count <= 1_024));

    // And it is read so.
    let mut connection = db.connect().await.unwrap();
    let found = segments(&mut connection, "t", Offset::ZERO, 100).await.unwrap();
    let read = messages(
        &mut connection,
        "t",
        &found,
        Offset::ZERO,
        Offset::new(4_001),
        &Filters::NONE,
        |_, _| true,
    )
    .await
    .unwrap();
    let read: Vec<String> = read
        .into_iter()
        .map(|message| message.key.expect("its key").into_string())
        .collect();
    assert_eq!(read, expected);
}

#[tokio::test]
async fn a_transaction_of_half_a_million_messages_is_one_step_of_many_segments() {
    const MESSAGES: i64 = 500_000;
    let db = TestDatabase::new().await.unwrap();
    let mut connection = db.connect().await.unwrap();
    sqlx::query(
        "INSERT INTO postbox.outbox (topic, key, payload) SELECT 'huge', (n % 1000)::text, '1' FROM generate_series(1, $1) n",
    )
    .bind(MESSAGES)
    .execute(&mut connection)
    .await
    .unwrap();
    publish_alone(&mut connection, "small", "x").await;
    assert_eq!(step(&mut connection).await, MESSAGES + 1);
    // Dense, each row once and in the order of insertion, without reading half a million rows into the test.
    let found: Vec<(i64, Vec<i64>)> =
        sqlx::query_as("SELECT base, seqs FROM postbox.segment WHERE topic = 'huge' ORDER BY base")
            .fetch_all(&mut connection)
            .await
            .unwrap();
    assert_eq!(found.len() as i64, (MESSAGES + 1_023) / 1_024);
    let mut next = 0;
    for (base, seqs) in &found {
        assert_eq!(*base, next);
        next += seqs.len() as i64;
    }
    assert_eq!(next, MESSAGES);
    let seqs = found.iter().flat_map(|(_, seqs)| seqs);
    assert!(
        seqs.is_sorted_by(|a, b| a < b),
        "in the order of insertion, each once"
    );
    assert_eq!(step(&mut connection).await, 0);
}

// ------------------------------------------------------------------------------------------------ steps among themselves

#[tokio::test]
async fn a_step_that_waited_for_another_sees_what_that_one_did() {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let mut connection = db.connect().await.unwrap();
    publish_alone(&mut connection, "t", "a").await;
    let mut first = db.pool().begin().await.unwrap();
    assert_eq!(step(&mut *first).await, 1);
    let waiting = tokio::spawn({
        let db = db.clone();
        async move { step(db.pool()).await }
    });
    somebody_waits_for_the_sequencers_lock(&db).await;
    publish_alone(&mut connection, "t", "b").await;
    first.commit().await.unwrap();
    assert_eq!(waiting.await.unwrap(), 1, "only what is new");
    assert_eq!(texts(&db, "t").await, ["a", "b"]);
}

#[tokio::test]
async fn a_step_that_is_rolled_back_or_killed_loses_nothing() {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let mut connection = db.connect().await.unwrap();
    publish_alone(&mut connection, "t", "a").await;
    let mut given_up = db.pool().begin().await.unwrap();
    assert_eq!(step(&mut *given_up).await, 1);
    given_up.rollback().await.unwrap();
    assert_eq!(complete_after(&db, 1).await, ["a"]);

    publish_alone(&mut connection, "t", "b").await;
    let mut victim = db.connect().await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
        .fetch_one(&mut victim)
        .await
        .unwrap();
    run(&mut victim, "BEGIN").await;
    assert_eq!(step(&mut victim).await, 1);
    let next = tokio::spawn({
        let db = db.clone();
        async move { step(db.pool()).await }
    });
    somebody_waits_for_the_sequencers_lock(&db).await;
    run(&mut connection, format!("SELECT pg_terminate_backend({pid})")).await;
    assert_eq!(next.await.unwrap(), 1, "the next one does its work");
    assert_eq!(texts(&db, "t").await, ["a", "b"]);
}

async fn complete_after(db: &TestDatabase, messages: i64) -> Vec<String> {
    assert_eq!(step(db.pool()).await, messages);
    texts(db, "t").await
}

#[tokio::test]
async fn a_step_is_refused_where_its_snapshot_would_be_older_than_its_lock() {
    let db = TestDatabase::new().await.unwrap();
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let mut tx = db.pool().begin().await.unwrap();
        run(&mut tx, format!("SET TRANSACTION ISOLATION LEVEL {level}")).await;
        let refused = sqlx::query("SELECT * FROM postbox.sequence()")
            .execute(&mut *tx)
            .await
            .expect_err("refused");
        let code = refused.as_database_error().and_then(|error| error.code());
        assert_eq!(code.as_deref(), Some("PB008"), "{refused}");
        assert!(
            refused.to_string().contains("must run in READ COMMITTED"),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn a_step_in_a_transaction_that_publishes_is_refused_or_loses_nothing() {
    let db = TestDatabase::new().await.unwrap();
    // It may publish before, after, or both; or step twice.
    let mut expected = Vec::new();
    for (n, (before, steps, after)) in [
        (true, 1, true),
        (true, 1, false),
        (false, 1, true),
        (true, 2, true),
    ]
    .into_iter()
    .enumerate()
    {
        let mut tx = db.pool().begin().await.unwrap();
        let mut stepped = Ok(());
        if before {
            publish(&mut tx, "t", &format!("{n} before")).await;
        }
        for _ in 0..steps {
            if stepped.is_ok() {
                let sql = "SELECT * FROM postbox.sequence()";
                stepped = sqlx::query(sql).execute(&mut *tx).await.map(drop);
            }
        }
        if let Err(error) = stepped {
            assert!(error.to_string().contains("transaction of its own"), "{error}");
            tx.rollback().await.unwrap();
            continue;
        }
        expected.extend(before.then(|| format!("{n} before")));
        if after {
            publish(&mut tx, "t", &format!("{n} after")).await;
            expected.push(format!("{n} after"));
        }
        tx.commit().await.unwrap();
        step(db.pool()).await;
    }
    assert_eq!(texts(&db, "t").await, expected);
}

// ------------------------------------------------------------------------------------------------------- crashes

/// Publishes until `stop`, through every crash. Returns what was committed for certain, and what may have been.
async fn publish_through_crashes(
    db: Arc<TestDatabase>,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
) -> (Deeds, Vec<Uuid>) {
    let mut deeds = Deeds::default();
    let mut uncertain = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let Ok(mut connection) = db.connect().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        while !stop.load(Ordering::SeqCst) {
            let begun = Instant::now();
            let batch: Vec<Outgoing> = (0..3).map(|n| Outgoing::json("t", &n)).collect();
            let ids: Vec<_> = batch
                .iter()
                .map(|outgoing| (outgoing.id().as_uuid(), "t", begun))
                .collect();
            let done = async {
                let mut tx = connection.begin().await?;
                tx.publish_all(batch).await?;
                tx.commit().await?;
                Ok::<_, postbox::Error>(())
            };
            if done.await.is_err() {
                uncertain.extend(ids.into_iter().map(|(id, ..)| id));
                break;
            }
            deeds.commit(ids);
            acknowledged.fetch_add(1, Ordering::SeqCst);
        }
    }
    (deeds, uncertain)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_the_server_neither_loses_nor_doubles_a_message() {
    let server = TestPostgres::private().await.unwrap();
    let db = Arc::new(server.database().await.unwrap());
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let publishers: Vec<_> = (0..4)
        .map(|_| {
            tokio::spawn(publish_through_crashes(
                db.clone(),
                stop.clone(),
                acknowledged.clone(),
            ))
        })
        .collect();
    let some_more = async |more: usize| {
        let enough = acknowledged.load(Ordering::SeqCst) + more;
        eventually(SOON, async || match acknowledged.load(Ordering::SeqCst) {
            n if n >= enough => Ok(()),
            n => Err(format!("{n} of {enough} acknowledged")),
        })
        .await;
    };
    for round in 0..2 {
        some_more(150).await;
        if round % 2 == 0 {
            server.kill().await.unwrap();
        } else {
            server.stop_immediate().await.unwrap();
        }
        server.start().await.unwrap();
    }
    some_more(100).await;
    stop.store(true, Ordering::SeqCst);
    let (mut published, mut uncertain) = (HashMap::new(), HashSet::new());
    for publisher in publishers {
        let (deeds, maybe) = publisher.await.unwrap();
        published.extend(deeds.committed.into_iter().map(|message| (message.id, message)));
        uncertain.extend(maybe);
    }
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM postbox.outbox")
        .fetch_one(&mut db.connect().await.unwrap())
        .await
        .unwrap();
    eventually(SOON, async || {
        let head: i64 = sqlx::query_scalar("SELECT postbox.next_offset('t')")
            .fetch_one(db.pool())
            .await
            .map_err(|error| error.to_string())?;
        if head == rows {
            Ok(())
        } else {
            Err(format!("{head} of {rows} have an offset"))
        }
    })
    .await;
    dispatcher.shutdown().await;

    let order = entries(db.pool(), "t").await;
    let ids: HashSet<Uuid> = order.iter().filter_map(|entry| entry.id).collect();
    assert!(
        published.keys().all(|id| ids.contains(id)),
        "every acknowledged message is there"
    );
    assert!(
        ids.iter()
            .all(|id| published.contains_key(id) || uncertain.contains(id)),
        "and nothing else, but for commits that were cut off"
    );
    assert_causal(&order, &published);
}
