//! Retention: nothing is truncated that a subscription has not passed (I5), and nobody waits for it.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use postbox_consumer::{HandlerError, State, Tx, handler, handlers};
use postbox_dispatcher::retention::{self, Turn};
use postbox_dispatcher::{doctor, status};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use support::{Bench, History, PATIENCE, Step, bench, publish_steps, step, steps};

const HOUR: Duration = Duration::from_secs(3600);
const SLOT: Duration = Duration::from_secs(12 * 3600);

#[handler(group = "keeper", retry(backoff = "fixed(5ms)"))]
async fn keep(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

#[handler(group = "writer", retry(backoff = "fixed(5ms)"))]
async fn write(step: Step, mut tx: Tx) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO written (key, n) VALUES ($1, $2)")
        .bind(&step.key)
        .bind(step.n)
        .execute(&mut *tx)
        .await?;
    Ok(())
}

/// Without `bench`'s dispatcher, which turns the ring by itself, a step and a turn are taken when the test says so.
async fn database() -> TestDatabase {
    let db = TestDatabase::new().await.unwrap();
    into_a_slot(&db).await;
    db
}

/// Three hours into a slot, whatever the time of the day.
async fn into_a_slot(db: &TestDatabase) {
    let seconds = number(
        db.pool(),
        "SELECT 43200 - extract(epoch FROM clock_timestamp())::bigint % 43200 + 10800",
    )
    .await;
    db.advance(Duration::from_secs(seconds as u64)).await.unwrap();
}

async fn number(pool: &PgPool, sql: &str) -> i64 {
    sqlx::query_scalar(AssertSqlSafe(sql.to_owned()))
        .fetch_one(pool)
        .await
        .unwrap()
}

async fn run(pool: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(pool)
        .await
        .unwrap();
}

async fn sequence(pool: &PgPool) {
    run(pool, "SELECT * FROM postbox.sequence()").await;
}

async fn subscribe(pool: &PgPool, group: &str) {
    let sql = format!(
        "SELECT * FROM postbox.subscribe('{group}', 'steps', 4::smallint, 'key', NULL, 'earliest', NULL)"
    );
    run(pool, &sql).await;
}

async fn outcome(turn: &Turn, slot: i64) -> String {
    turn.slots[slot as usize].outcome.clone()
}

/// Until nobody is in the way: another test's statements do not count here, but the machine may be slow.
async fn turned(pool: &PgPool) -> Turn {
    eventually(PATIENCE, async || {
        let turn = retention::turn(pool).await.map_err(|error| error.to_string())?;
        match turn.slots.iter().find(|slot| slot.outcome == "busy") {
            Some(slot) => Err(format!("{slot:?}")),
            None => Ok(turn),
        }
    })
    .await
}

async fn slot_now(pool: &PgPool) -> i64 {
    number(pool, "SELECT postbox.slot_of(postbox.clock())::bigint").await
}

/// Turns the ring by a slot, with two looks: one carries, one truncates.
async fn next_slot(db: &TestDatabase) -> Vec<Turn> {
    db.advance(SLOT).await.unwrap();
    vec![turned(db.pool()).await, turned(db.pool()).await]
}

#[tokio::test]
async fn a_slot_is_truncated_when_it_is_old_and_passed_and_offsets_never_restart() {
    let db = database().await;
    let pool = db.pool();
    publish_steps(pool, &steps(5, 10)).await;
    sequence(pool).await;
    let slot = slot_now(pool).await;
    for n in 1..=5 {
        for turn in next_slot(&db).await {
            assert_eq!(turn.truncated(), 0, "slot turn {n}: {turn:?}");
        }
    }
    // Three days and an hour after it was filled.
    db.advance(SLOT + HOUR).await.unwrap();
    let turn = turned(pool).await;
    assert_eq!(outcome(&turn, slot).await, "truncated", "{turn:?}");
    assert_eq!(turn.slots[slot as usize].messages, 50);
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.outbox").await, 0);
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.segment").await, 0);
    assert_eq!(number(pool, "SELECT postbox.next_offset('steps')").await, 50);
    assert_eq!(number(pool, "SELECT postbox.first_offset('steps')").await, 50);

    // The newest tick outlived its slot: nothing old is found again, and what is new is found.
    publish_steps(pool, &[step("a", 0)]).await;
    sequence(pool).await;
    assert_eq!(number(pool, "SELECT base FROM postbox.segment").await, 50);
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.segment").await, 1);
}

#[tokio::test]
async fn a_stuck_subscription_keeps_its_messages_and_is_named_with_what_it_holds_back() {
    let db = database().await;
    let pool = db.pool();
    subscribe(pool, "stuck").await;
    publish_steps(pool, &steps(5, 10)).await;
    sequence(pool).await;
    let slot = slot_now(pool).await;
    for _ in 0..7 {
        next_slot(&db).await;
    }
    let turn = turned(pool).await;
    assert_eq!(outcome(&turn, slot).await, "held", "{turn:?}");
    assert_eq!(
        turn.slots[slot as usize].detail.as_deref(),
        Some("stuck on steps")
    );
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.outbox").await, 50);

    let status = status::read(pool).await.unwrap();
    let stuck = &status.subscriptions[0];
    assert_eq!((stuck.held_messages, stuck.backlog), (50, 50));
    assert!(stuck.held_bytes > 0 && stuck.held_since.is_some() && !stuck.live);
    let ring = &status.slots[slot as usize];
    assert!(
        ring.overdue && ring.held_by.as_deref() == Some("stuck on steps"),
        "{ring:?}"
    );
    let findings = doctor::examine(pool).await.unwrap();
    let finding = findings
        .iter()
        .find(|finding| finding.name == "no-consumer")
        .unwrap();
    assert!(
        finding.what.contains("stuck on steps") && finding.what.contains("holds back 50 messages"),
        "{finding:?}"
    );

    // Whole turns later it is all there, with what came meanwhile in the same slots.
    for n in 0..16 {
        next_slot(&db).await;
        publish_steps(pool, &[step("later", n)]).await;
        sequence(pool).await;
    }
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.outbox").await, 66);
    // Once it has passed them, they go.
    run(pool, "UPDATE postbox.lane SET position = 66").await;
    for _ in 0..8 {
        next_slot(&db).await;
    }
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.outbox").await, 0);
    assert_eq!(number(pool, "SELECT postbox.next_offset('steps')").await, 66);
}

#[tokio::test]
async fn one_lane_or_one_pending_message_is_enough_to_hold_a_slot() {
    let db = database().await;
    let pool = db.pool();
    subscribe(pool, "slow").await;
    publish_steps(pool, &steps(5, 10)).await;
    sequence(pool).await;
    let slot = slot_now(pool).await;
    let lane = number(pool, "SELECT postbox.lane_at('steps', 7, 4)::bigint").await;
    let other = (lane + 1) % 4;
    for _ in 0..7 {
        next_slot(&db).await;
    }
    for (held, update) in [
        (
            true,
            format!("UPDATE postbox.lane SET position = CASE lane WHEN {lane} THEN 49 ELSE 50 END"),
        ),
        (
            true,
            "UPDATE postbox.lane SET position = 50, pending = '{7}'".to_owned(),
        ),
        // Another lane's offset means nothing there.
        (
            false,
            format!(
                "UPDATE postbox.lane SET pending = CASE lane WHEN {other} THEN '{{7}}'::bigint[] ELSE '{{}}' END"
            ),
        ),
    ] {
        run(pool, &update).await;
        let expected = if held { "held" } else { "truncated" };
        assert_eq!(outcome(&turned(pool).await, slot).await, expected, "{update}");
    }
}

#[tokio::test]
async fn a_transaction_older_than_its_slot_is_delivered_in_causal_order() {
    let db = database().await;
    let pool = db.pool();
    let mut old = db.connect().await.unwrap();
    let mut tx = old.begin().await.unwrap();
    publish_steps(pool, &[step("a", 0)]).await;
    // Its row is of this slot.
    sqlx::query("INSERT INTO postbox.outbox (topic, key, payload) VALUES ('steps', 'old', 'x')")
        .execute(&mut *tx)
        .await
        .unwrap();
    sequence(pool).await;
    let slot = slot_now(pool).await;
    // The ring turns nearly once round.
    for n in 1..=7 {
        db.advance(SLOT).await.unwrap();
        retention::turn(pool).await.unwrap();
        publish_steps(pool, &[step("a", n)]).await;
        sequence(pool).await;
    }
    let turn = retention::turn(pool).await.unwrap();
    assert_eq!(outcome(&turn, slot).await, "busy", "{turn:?}");
    assert!(
        turn.slots[slot as usize]
            .detail
            .as_deref()
            .unwrap()
            .starts_with("process ")
    );
    tx.commit().await.unwrap();
    // Committed and not sequenced: it would be lost.
    let turn = turned(pool).await;
    assert_eq!(outcome(&turn, slot).await, "unsequenced", "{turn:?}");
    publish_steps(pool, &[step("a", 8)]).await;
    sequence(pool).await;
    // What was published after its commit is behind it.
    let offset_of = |condition: &str| {
        format!(
            "SELECT s.base + e.n - 1 FROM postbox.segment s, unnest(s.seqs) WITH ORDINALITY e (seq, n), postbox.outbox o \
             WHERE o.seq = e.seq AND {condition}"
        )
    };
    let late = number(pool, &offset_of("o.key = 'old'")).await;
    let nth = |n: i64| format!("o.key = 'a' AND convert_from(o.payload, 'UTF8')::jsonb ->> 'n' = '{n}'");
    assert!(late > number(pool, &offset_of(&nth(7))).await);
    assert!(late < number(pool, &offset_of(&nth(8))).await);
    // It is as young as when it was sequenced.
    assert_eq!(outcome(&turned(pool).await, slot).await, "carried");
    assert_eq!(outcome(&turned(pool).await, slot).await, "young");
}

#[tokio::test]
async fn a_prepared_transaction_keeps_its_slot() {
    let db = database().await;
    let pool = db.pool();
    let mut old = db.connect().await.unwrap();
    publish_steps(pool, &[step("a", 0)]).await;
    sequence(pool).await;
    let name = format!("retention-{}", db.name());
    run_on(&mut old, "BEGIN; SET LOCAL postbox.two_phase = on; INSERT INTO postbox.outbox (topic, payload) VALUES ('steps', 'x')").await;
    run_on(&mut old, &format!("PREPARE TRANSACTION '{name}'")).await;
    let slot = slot_now(pool).await;
    for _ in 0..7 {
        db.advance(SLOT).await.unwrap();
        retention::turn(pool).await.unwrap();
    }
    let turn = retention::turn(pool).await.unwrap();
    assert_eq!(outcome(&turn, slot).await, "busy", "{turn:?}");
    assert_eq!(
        turn.slots[slot as usize].detail.as_deref(),
        Some("a prepared transaction")
    );
    run_on(&mut old, &format!("COMMIT PREPARED '{name}'")).await;
    assert_eq!(outcome(&turned(pool).await, slot).await, "unsequenced");
    sequence(pool).await;
    assert_eq!(number(pool, "SELECT postbox.next_offset('steps')").await, 2);
}

async fn run_on(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(connection)
        .await
        .unwrap();
}

#[tokio::test]
async fn where_a_lane_stands_outlives_its_checkpoints_and_settlements() {
    let db = database().await;
    let pool = db.pool();
    subscribe(pool, "g").await;
    publish_steps(pool, &steps(5, 10)).await;
    sequence(pool).await;
    let lane = number(pool, "SELECT postbox.lane_at('steps', 7, 4)::bigint").await;
    run(
        pool,
        "INSERT INTO postbox.consumer (id, name, pid, subscriptions, lease) VALUES (1, 'c', 1, '{1}', '1h')",
    )
    .await;
    run(
        pool,
        "SELECT * FROM postbox.claim(1, 1, '{0,1,2,3}', '{0,0,0,0}', '{f,f,f,f}')",
    )
    .await;
    run(pool, "SELECT postbox.checkpoint(1, '{1,1,1,1}', '{0,1,2,3}', '{1,1,1,1}', '{20,20,20,20}', '{1,1}', '{7,8}')").await;
    // Settled with its effect after the checkpoint: one that was pending, one beyond; and one that says nothing any more.
    run(pool, &format!("INSERT INTO postbox.settlement (subscription_id, lane, \"offset\") VALUES (1, {lane}, 7), (1, {lane}, 30), (1, {lane}, 2)")).await;
    let claim = format!(
        "SELECT position, pending, array(SELECT unnest(done) ORDER BY 1) FROM postbox.claim(1, 1, '{{{lane}}}', '{{1}}', '{{f}}')"
    );
    let claim = || async {
        let mut tx = pool.begin().await.unwrap();
        let row: (i64, Vec<i64>, Vec<i64>) = sqlx::query_as(AssertSqlSafe(claim.clone()))
            .fetch_one(&mut *tx)
            .await
            .unwrap();
        tx.rollback().await.unwrap();
        row
    };
    let before = claim().await;
    assert_eq!(before, (20, vec![7, 8], vec![7, 30]));
    for turn in 0..12 {
        next_slot(&db).await;
        assert_eq!(claim().await, before, "turn {turn}");
        assert_eq!(number(pool, "SELECT count(*) FROM postbox.checkpoint").await, 0);
        assert_eq!(number(pool, "SELECT count(*) FROM postbox.settlement").await, 2);
    }
    // A checkpoint of the same owner counts again.
    run(
        pool,
        "SELECT postbox.checkpoint(1, '{1,1,1,1}', '{0,1,2,3}', '{1,1,1,1}', '{40,40,40,40}', '{}', '{}')",
    )
    .await;
    assert_eq!(claim().await, (40, vec![], vec![]));
}

#[tokio::test]
async fn a_checkpoint_does_not_count_again_when_a_newer_one_was_truncated_before_it() {
    let db = database().await;
    let pool = db.pool();
    subscribe(pool, "g").await;
    publish_steps(pool, &steps(5, 10)).await;
    sequence(pool).await;
    run(
        pool,
        "INSERT INTO postbox.consumer (id, name, pid, subscriptions, lease) VALUES (1, 'c', 1, '{1}', '1h')",
    )
    .await;
    run(
        pool,
        "SELECT * FROM postbox.claim(1, 1, '{0,1,2,3}', '{0,0,0,0}', '{f,f,f,f}')",
    )
    .await;
    let now = slot_now(pool).await;
    for (slot, position) in [(3, 20), (5, 40)] {
        let slot = (now + slot) % 8;
        run(
            pool,
            &format!(
                "INSERT INTO postbox.checkpoint (slot, subscription_id, consumer_id, lanes, epochs, positions, pending) \
                 VALUES ({slot}, 1, 1, '{{0,1,2,3}}', '{{1,1,1,1}}', '{{{position},{position},{position},{position}}}', '{{}}')"
            ),
        )
        .await;
    }
    for slot in [5, 3] {
        let slot = (now + slot) % 8;
        let outcome: String = sqlx::query_scalar("SELECT postbox.truncate_records($1, 'checkpoint')")
            .bind(slot as i16)
            .fetch_one(pool)
            .await
            .unwrap();
        assert_eq!(outcome, "truncated");
        assert_eq!(number(pool, "SELECT postbox.settled_below(1)").await, 40);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_updates_no_row_and_what_it_said_outlives_its_slot() {
    let bench = bench().await;
    let pool = bench.db.pool();
    let consumer = bench
        .consumer(handlers![keep])
        .state(History::default())
        .start()
        .await
        .unwrap();
    let written = "SELECT c.xmin::text::bigint FROM postbox.consumer c WHERE c.report = '{}'";
    let before = number(pool, written).await;
    eventually(PATIENCE, async || {
        let beaten = "SELECT count(*) FROM postbox.sessions() s WHERE s.beat >= 2";
        let reports = number(pool, "SELECT count(*) FROM postbox.heartbeat").await;
        match number(pool, beaten).await {
            1 if reports >= 2 => Ok(()),
            _ => Err(format!("its heartbeats do not go on after {reports}")),
        }
    })
    .await;
    assert_eq!(
        number(pool, written).await,
        before,
        "the row is as it was inserted"
    );
    let said = &status::read(pool).await.unwrap().consumers[0];
    assert_eq!((said.live, &said.report[0]["group"]), (true, &"keeper".into()));
    consumer.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_last_report_of_an_instance_outlives_its_slot() {
    let db = database().await;
    let pool = db.pool();
    run(
        pool,
        "INSERT INTO postbox.consumer (id, name, pid, subscriptions, lease) VALUES (1, 'a', 1, '{}', '10 s'), (2, 'b', 2, '{}', '10 s')",
    )
    .await;
    for (said, last) in [(r#"{"n": 1}"#, "NULL"), (r#"{"n": 2}"#, "1")] {
        run(pool, &format!("SELECT postbox.heartbeat(1, '{said}', {last})")).await;
    }
    let last = "SELECT (r.report ->> 'n')::bigint FROM postbox.last_report(1) r WHERE r.heartbeat_at > clock_timestamp() - interval '1 minute'";
    assert_eq!(number(pool, last).await, 2);
    for _ in 0..8 {
        next_slot(&db).await;
    }
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.heartbeat").await, 0);
    assert_eq!(number(pool, last).await, 2);
    assert_eq!(
        number(pool, "SELECT count(*) FROM postbox.consumer WHERE report = '{}'").await,
        1
    );
}

#[tokio::test]
async fn a_new_group_starts_at_the_earliest_retained() {
    let db = database().await;
    let pool = db.pool();
    for n in 0..8 {
        publish_steps(pool, &[step("a", n)]).await;
        sequence(pool).await;
        next_slot(&db).await;
    }
    let first = number(pool, "SELECT min(base) FROM postbox.segment").await;
    assert!(first > 0, "something was truncated");
    subscribe(pool, "late").await;
    assert_eq!(
        number(pool, "SELECT min(position) FROM postbox.lane").await,
        first
    );
    assert_eq!(
        number(pool, "SELECT postbox.start_offset('steps', 'offset', '0')").await,
        first
    );
    assert_eq!(
        number(pool, "SELECT postbox.start_offset('steps', 'time', '2020-01-01')").await,
        first
    );
}

#[tokio::test]
async fn a_topic_has_no_hole_above_its_first_offset() {
    let db = database().await;
    let pool = db.pool();
    // Another topic's subscription holds the first slot, not the second.
    run(
        pool,
        "SELECT * FROM postbox.subscribe('stuck', 'other', 4::smallint, 'key', NULL, 'earliest', NULL)",
    )
    .await;
    run(
        pool,
        "INSERT INTO postbox.outbox (topic, payload) VALUES ('other', 'x')",
    )
    .await;
    for n in 0..8 {
        publish_steps(pool, &[step("a", n)]).await;
        sequence(pool).await;
        next_slot(&db).await;
    }
    let bases: Vec<i64> =
        sqlx::query_scalar("SELECT base FROM postbox.segment WHERE topic = 'steps' ORDER BY base")
            .fetch_all(pool)
            .await
            .unwrap();
    assert_eq!(bases[0], 0, "its slot is held");
    assert!(bases[1] > 1, "a later one is not: {bases:?}");
    assert_eq!(
        number(pool, "SELECT postbox.first_offset('steps')").await,
        bases[1]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn several_turns_of_the_ring_under_load_lose_nothing_and_repeat_nothing() {
    let bench = bench().await;
    into_a_slot(&bench.db).await;
    bench.sql("CREATE TABLE written (key text, n bigint)").await;
    let history = History::default();
    let consumer = bench
        .consumer(handlers![keep, write])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    let pool = bench.pool();
    let slots = 26;
    let mut truncated = 0;
    for slot in 0..slots {
        // Around the boundary of the slot: what is in flight belongs to both.
        let publishing = async {
            for n in 0..5 {
                let round: Vec<Step> = (0..20).map(|key| step(key, slot * 5 + n)).collect();
                publish_steps(&pool, &round).await;
            }
        };
        let ((), advanced) = tokio::join!(publishing, bench.db.advance(SLOT));
        advanced.unwrap();
        truncated += retention::turn(&pool).await.unwrap().truncated();
        truncated += retention::turn(&pool).await.unwrap().truncated();
        settled_up_to(&bench, (slot + 1) * 100).await;
    }
    history.has(100 * slots as usize).await;
    history.assert_in_order_and_alone(20, slots * 5);
    assert_eq!(bench.number("SELECT count(*) FROM written").await, 100 * slots);
    assert_eq!(
        bench.number("SELECT count(DISTINCT (key, n)) FROM written").await,
        100 * slots
    );
    assert!(truncated >= 12, "{truncated} slots were truncated");
    assert!(bench.number("SELECT count(*) FROM postbox.outbox").await <= 100 * 9);
    assert_eq!(
        bench.number("SELECT postbox.next_offset('steps')").await,
        100 * slots
    );
    consumer.shutdown().await.unwrap();
}

async fn settled_up_to(bench: &Bench, head: i64) {
    eventually(PATIENCE, async || {
        let status = status::subscriptions(bench.db.pool())
            .await
            .map_err(|error| error.to_string())?;
        match status
            .iter()
            .all(|one| one.next_offset == head && one.backlog == 0)
        {
            true => Ok(()),
            false => Err(format!("{head} to settle: {status:?}")),
        }
    })
    .await;
}

/// With one slot of steps that is carried and old enough; returns the slot.
async fn with_a_due_slot(db: &TestDatabase) -> i64 {
    publish_steps(db.pool(), &steps(5, 10)).await;
    sequence(db.pool()).await;
    let slot = slot_now(db.pool()).await;
    next_slot(db).await;
    db.advance(5 * SLOT + HOUR).await.unwrap();
    slot
}

/// For a truncation with so much patience that the test can do something while it waits for a lock. Before the transactions that it is to
/// meet: those that are older than a second it does not wait for.
async fn patient(db: &TestDatabase) -> PgConnection {
    run(
        db.pool(),
        "ALTER FUNCTION postbox.truncate_log SET lock_timeout = '20s'",
    )
    .await;
    db.connect().await.unwrap()
}

/// Truncates a slot in the background.
fn truncating(mut connection: PgConnection, slot: i64) -> tokio::task::JoinHandle<String> {
    tokio::spawn(async move {
        sqlx::query_scalar("SELECT outcome FROM postbox.truncate_log($1)")
            .bind(slot as i16)
            .fetch_one(&mut connection)
            .await
            .unwrap()
    })
}

/// Until the truncation waits for this lock.
async fn waits_for(pool: &PgPool, lock: &str) {
    let sql = format!(
        "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid WHERE NOT l.granted AND {lock} \
         AND a.datname = current_database() AND a.query LIKE '%postbox.truncate_log(%' AND a.pid <> pg_backend_pid()"
    );
    eventually(PATIENCE, async || match number(pool, &sql).await {
        1 => Ok(()),
        _ => Err(format!("it does not wait for {lock}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_comes_into_a_slot_while_it_is_being_truncated_is_not_lost() {
    let db = database().await;
    let slot = with_a_due_slot(&db).await;
    let (mut reader, mut publisher) = (db.connect().await.unwrap(), db.connect().await.unwrap());
    let patient = patient(&db).await;
    run_on(
        &mut reader,
        &format!("BEGIN; SELECT count(*) FROM postbox.segment_{slot}"),
    )
    .await;
    let outcome = truncating(patient, slot);
    waits_for(
        db.pool(),
        &format!("l.relation = 'postbox.segment_{slot}'::regclass"),
    )
    .await;
    // After it has looked who is there. As of a clock that was set back.
    run_on(
        &mut publisher,
        &format!("BEGIN; INSERT INTO postbox.outbox (slot, topic, payload) VALUES ({slot}, 'steps', 'x')"),
    )
    .await;
    run_on(&mut reader, "COMMIT").await;
    waits_for(
        db.pool(),
        &format!("l.relation = 'postbox.outbox_{slot}'::regclass"),
    )
    .await;
    run_on(&mut publisher, "COMMIT").await;
    assert_eq!(outcome.await.unwrap(), "unsequenced");
    sequence(db.pool()).await;
    assert_eq!(number(db.pool(), "SELECT postbox.next_offset('steps')").await, 51);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_gets_a_segment_while_it_is_being_truncated_stays() {
    let db = database().await;
    let slot = with_a_due_slot(&db).await;
    let mut subscriber = db.connect().await.unwrap();
    let patient = patient(&db).await;
    run_on(
        &mut subscriber,
        "BEGIN; LOCK TABLE postbox.subscription IN ROW EXCLUSIVE MODE",
    )
    .await;
    let outcome = truncating(patient, slot);
    waits_for(db.pool(), "l.relation = 'postbox.subscription'::regclass").await;
    run(
        db.pool(),
        &format!("INSERT INTO postbox.outbox (slot, topic, payload) VALUES ({slot}, 'steps', 'x')"),
    )
    .await;
    sequence(db.pool()).await;
    run_on(&mut subscriber, "COMMIT").await;
    assert_eq!(outcome.await.unwrap(), "busy");
    assert_eq!(number(db.pool(), "SELECT count(*) FROM postbox.outbox").await, 51);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seek_beside_a_truncation_comes_before_it_and_holds_the_slot_or_after_it_and_finds_it_gone() {
    let db = database().await;
    subscribe(db.pool(), "back").await;
    let slot = with_a_due_slot(&db).await;
    run(db.pool(), "UPDATE postbox.lane SET position = 50").await;
    let seek = |connection: PgConnection| async move {
        let mut connection = connection;
        let to: i64 = sqlx::query_scalar("SELECT postbox.seek(1, 'earliest')")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        (to, connection)
    };

    // Before: the truncation had found the slot passed, and looks again.
    let mut operator = db.connect().await.unwrap();
    let (first, second) = (patient(&db).await, patient(&db).await);
    run_on(&mut operator, "BEGIN").await;
    let (to, mut operator) = seek(operator).await;
    assert_eq!(to, 0);
    let outcome = truncating(first, slot);
    waits_for(db.pool(), "l.relation = 'postbox.subscription'::regclass").await;
    run_on(&mut operator, "COMMIT").await;
    assert_eq!(outcome.await.unwrap(), "held");
    assert_eq!(number(db.pool(), "SELECT count(*) FROM postbox.outbox").await, 50);

    // After: the seek waits for a truncation that has looked.
    run(db.pool(), "UPDATE postbox.lane SET position = 50").await;
    let mut sequencer = db.connect().await.unwrap();
    run_on(&mut sequencer, "SELECT pg_advisory_lock(1347571761, 1)").await;
    let outcome = truncating(second, slot);
    waits_for(db.pool(), "l.locktype = 'advisory' AND l.objid = 1").await;
    let seeking = tokio::spawn(seek(operator));
    eventually(PATIENCE, async || {
        let waiting = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid WHERE NOT l.granted \
             AND a.datname = current_database() AND a.query LIKE '%postbox.seek(%' AND a.pid <> pg_backend_pid()";
        match seeking.is_finished() || number(db.pool(), waiting).await == 1 {
            true => Ok(()),
            false => Err("it neither waits nor has ended"),
        }
    })
    .await;
    run_on(&mut sequencer, "SELECT pg_advisory_unlock(1347571761, 1)").await;
    assert_eq!(outcome.await.unwrap(), "truncated");
    let (to, _) = seeking.await.unwrap();
    assert_eq!(to, 50, "it goes back to messages that are gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_truncation_that_cannot_have_its_lock() {
    let db = database().await;
    let pool = db.pool().clone();
    publish_steps(&pool, &steps(5, 10)).await;
    sequence(&pool).await;
    // Carried, and then old enough.
    next_slot(&db).await;
    db.advance(5 * SLOT + HOUR).await.unwrap();
    // A reader that began just now, so that the truncation queues for its lock, and stays.
    let mut reader = db.connect().await.unwrap();
    let mut tx = reader.begin().await.unwrap();
    sqlx::query("SELECT count(*) FROM postbox.segment")
        .execute(&mut *tx)
        .await
        .unwrap();
    let truncating = async {
        let turn = retention::turn(&pool).await.unwrap();
        assert_eq!(turn.truncated(), 0, "{turn:?}");
        assert!(turn.slots.iter().any(|slot| slot.outcome == "busy"), "{turn:?}");
    };
    let publishing = async {
        let mut longest = Duration::ZERO;
        let mut other = db.connect().await.unwrap();
        let end = Instant::now() + Duration::from_millis(700);
        while Instant::now() < end {
            let begun = Instant::now();
            sqlx::query("SELECT count(*) FROM postbox.segment WHERE topic = 'steps'")
                .execute(&mut other)
                .await
                .unwrap();
            sqlx::query("INSERT INTO postbox.outbox (topic, payload) VALUES ('others', 'x')")
                .execute(&mut other)
                .await
                .unwrap();
            longest = longest.max(begun.elapsed());
        }
        longest
    };
    let ((), longest) = tokio::join!(truncating, publishing);
    assert!(longest < Duration::from_secs(2), "one waited for {longest:?}");
    // Once it has gone the slot goes.
    tx.rollback().await.unwrap();
    eventually(PATIENCE, async || match retention::turn(&pool).await {
        Ok(turn) if turn.truncated() == 1 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publishers_and_readers_hardly_wait_while_the_ring_turns() {
    let db = database().await;
    let pool = db.connect_pool(4);
    publish_steps(&pool, &steps(5, 10)).await;
    let stop = Arc::new(AtomicBool::new(false));
    let work = |sql: &'static str| {
        let (pool, stop) = (pool.clone(), stop.clone());
        tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                sqlx::query(sql).execute(&pool).await.unwrap();
                longest = longest.max(begun.elapsed());
            }
            longest
        })
    };
    let publishing = work("INSERT INTO postbox.outbox (topic, payload) VALUES ('steps', 'x')");
    let reading = work(
        "SELECT count(*) FROM (SELECT FROM postbox.segment s JOIN postbox.outbox o USING (slot) WHERE s.topic = 'steps' LIMIT 100) t",
    );
    // Who waits for a lock, by the server's word.
    let watching = {
        let (pool, stop) = (pool.clone(), stop.clone());
        tokio::spawn(async move {
            let mut longest = 0.0_f64;
            while !stop.load(Ordering::Relaxed) {
                let waited: f64 = sqlx::query_scalar(
                    "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - l.waitstart)), 0)::float8 FROM pg_locks l \
                     JOIN pg_stat_activity a ON a.pid = l.pid \
                     WHERE NOT l.granted AND a.datname = current_database() AND a.query NOT LIKE '%truncate%'",
                )
                .fetch_one(&pool)
                .await
                .unwrap();
                longest = longest.max(waited);
            }
            longest
        })
    };
    let mut truncated = 0;
    for _ in 0..20 {
        sequence(db.pool()).await;
        db.advance(SLOT).await.unwrap();
        for _ in 0..2 {
            truncated += retention::turn(db.pool()).await.unwrap().truncated();
        }
    }
    stop.store(true, Ordering::Relaxed);
    assert!(truncated >= 6, "{truncated} slots were truncated");
    let (publishing, reading) = (publishing.await.unwrap(), reading.await.unwrap());
    let waited = watching.await.unwrap();
    println!(
        "a publisher took {publishing:?} at most, a reader {reading:?}; the longest wait for a lock was {waited:.3} s"
    );
    assert!(waited < 2.0, "somebody waited {waited} s for a lock");
}

#[tokio::test]
async fn an_abandoned_subscription_is_dropped_only_by_policy_and_only_while_somebody_watches() {
    let db = database().await;
    let pool = db.pool();
    subscribe(pool, "gone").await;
    for _ in 0..20 {
        db.advance(SLOT).await.unwrap();
        assert!(turned(pool).await.expired.is_empty(), "off by default");
    }
    retention::set_expiry(pool, Some(Duration::from_secs(10 * 86_400)))
        .await
        .unwrap();
    // Nobody watched for twelve hours each time, so nothing is known.
    assert!(turned(pool).await.expired.is_empty());
    let mut days = 0.0;
    let expired = loop {
        db.advance(HOUR - Duration::from_secs(60)).await.unwrap();
        days += 59.0 / 60.0 / 24.0;
        // Only this: a whole turn is slow, and there are hundreds.
        let expired: Vec<String> = sqlx::query_scalar("SELECT expired FROM postbox.watch_subscriptions()")
            .fetch_all(pool)
            .await
            .unwrap();
        if !expired.is_empty() {
            break expired;
        }
        assert!(days < 12.0, "it is never dropped");
    };
    assert_eq!(expired, ["gone on steps"]);
    assert!((10.0..10.5).contains(&days), "after {days} days");
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.lane").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_that_is_served_cannot_be_dropped() {
    let bench = bench().await;
    let consumer = bench
        .consumer(handlers![keep])
        .state(History::default())
        .start()
        .await
        .unwrap();
    let id = postbox_dispatcher::subscriptions::find(bench.db.pool(), "keeper", "steps")
        .await
        .unwrap();
    let error = postbox_dispatcher::subscriptions::forget(bench.db.pool(), id)
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("keeper on steps is served by a live consumer"),
        "{error}"
    );
    consumer.shutdown().await.unwrap();
    postbox_dispatcher::subscriptions::forget(bench.db.pool(), id)
        .await
        .unwrap();
    assert!(
        postbox_dispatcher::subscriptions::find(bench.db.pool(), "keeper", "steps")
            .await
            .is_err()
    );
}

#[tokio::test]
async fn how_long_messages_are_kept_decides_how_long_a_slot_is() {
    let db = database().await;
    let pool = db.pool();
    for (seconds, accepted) in [
        (59, false),
        (60, true),
        (7 * 86_400, true),
        (11 * 366 * 86_400, false),
    ] {
        assert_eq!(
            retention::set_keep(pool, Duration::from_secs(seconds))
                .await
                .is_ok(),
            accepted,
            "{seconds} s"
        );
    }
    retention::set_keep(pool, Duration::from_secs(3600))
        .await
        .unwrap();
    publish_steps(pool, &[step("a", 0)]).await;
    sequence(pool).await;
    let slot = slot_now(pool).await;
    turned(pool).await;
    db.advance(Duration::from_secs(600)).await.unwrap();
    assert_eq!(slot_now(pool).await, (slot + 1) % 8);
    db.advance(Duration::from_secs(3300)).await.unwrap();
    turned(pool).await;
    assert_eq!(outcome(&turned(pool).await, slot).await, "truncated");
}

#[tokio::test]
async fn the_backlog_is_exact_wherever_the_lanes_stand() {
    let db = database().await;
    let pool = db.pool();
    subscribe(pool, "g").await;
    publish_steps(pool, &steps(37, 60)).await;
    sequence(pool).await;
    for (positions, pending) in [
        ([0, 0, 0, 0], "{}"),
        ([2220; 4], "{}"),
        ([100, 900, 1500, 2000], "{3,50,99,400}"),
        ([2220, 2220, 2220, 0], "{5}"),
    ] {
        for (lane, position) in positions.iter().enumerate() {
            run(
                pool,
                &format!(
                    "UPDATE postbox.lane SET position = {position}, pending = '{pending}' WHERE lane = {lane}"
                ),
            )
            .await;
        }
        let counted = number(pool, "SELECT count(*) FROM generate_series(0, 2219) n \
            JOIN postbox.lane l ON l.lane = postbox.lane_at('steps', n, 4) WHERE n >= l.position OR n = ANY (l.pending)").await;
        let (messages, exact): (i64, bool) = sqlx::query_as("SELECT messages, exact FROM postbox.backlog(1)")
            .fetch_one(pool)
            .await
            .unwrap();
        assert_eq!((messages, exact), (counted, true), "{positions:?} {pending}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_outlives_its_slot() {
    let bench = bench().await;
    let history = History::default();
    let consumer = bench
        .consumer(handlers![refuse_at_first])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    publish_steps(&bench.pool(), &steps(2, 1)).await;
    // Key 0 waits for its next attempt.
    eventually(PATIENCE, async || {
        let passed = bench
            .number("SELECT coalesce(min(postbox.settled_below(id)), 0) FROM postbox.subscription")
            .await;
        if passed == 2 {
            Ok(())
        } else {
            Err(format!("passed {passed} of 2"))
        }
    })
    .await;
    consumer.shutdown().await.unwrap();
    for _ in 0..8 {
        next_slot(&bench.db).await;
    }
    assert_eq!(bench.number("SELECT count(*) FROM postbox.outbox").await, 0);
    let consumer = bench
        .consumer(handlers![keep_refused])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    eventually(PATIENCE, async || {
        let of = history.of("0");
        if of == [0] { Ok(()) } else { Err(format!("{of:?}")) }
    })
    .await;
    consumer.shutdown().await.unwrap();
}

/// A key that waits for long does not hold the slots of the topic: what it has parked is copied.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_outlives_its_slot_and_holds_none() {
    let bench = bench().await;
    let history = History::default();
    let consumer = |handlers| bench.consumer(handlers).state(history.clone()).window(16);
    let first = consumer(handlers![refuse_at_first]).start().await.unwrap();
    for slot in 0..12 {
        let round: Vec<Step> = (0..20)
            .flat_map(|n| [step("0", slot * 20 + n), step("1", slot * 20 + n)])
            .collect();
        publish_steps(&bench.pool(), &round).await;
        history.has((slot as usize + 1) * 20).await;
        next_slot(&bench.db).await;
    }
    let first_offset = bench.number("SELECT postbox.first_offset('steps')").await;
    assert!(first_offset >= 80, "{first_offset}: the slots are held");
    let copies = bench
        .number("SELECT count(*) FROM postbox.redelivery WHERE state = 'parked'")
        .await;
    let in_the_log = bench
        .number("SELECT sum(postbox.parked(id))::bigint FROM postbox.subscription")
        .await;
    assert!(copies > 0 && in_the_log > 0);
    assert_eq!(copies + in_the_log, 239, "{copies} copies");
    first.shutdown().await.unwrap();
    let second = consumer(handlers![keep_refused]).start().await.unwrap();
    bench.db.advance(2 * HOUR).await.unwrap();
    history.has(480).await;
    settled_up_to(&bench, 480).await;
    history.assert_in_order_and_alone(2, 240);
    second.shutdown().await.unwrap();
}

#[handler(group = "refuser", retry(backoff = "fixed(1h)"))]
async fn refuse_at_first(step: Step, State(history): State<History>) -> Result<(), HandlerError> {
    if step.key == "0" {
        return Err(HandlerError::retry("not yet"));
    }
    history.note(&step, Instant::now());
    Ok(())
}

#[handler(group = "refuser", retry(backoff = "fixed(5ms)"))]
async fn keep_refused(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

#[tokio::test]
async fn a_healthy_database_has_no_findings_but_the_missing_dispatcher() {
    let db = TestDatabase::new().await.unwrap();
    let findings = doctor::examine(db.pool()).await.unwrap();
    let named: Vec<&str> = findings
        .iter()
        .map(|finding| finding.name)
        .filter(|name| {
            ![
                "fsync",
                "synchronous-commit",
                "full-page-writes",
                "autovacuum",
                "connections",
            ]
            .contains(name)
        })
        .collect();
    assert_eq!(named, ["no-dispatcher"], "{findings:?}");
    let mut old = db.connect().await.unwrap();
    let mut tx = old.begin().await.unwrap();
    publish_steps(db.pool(), &[step("a", 0)]).await;
    sqlx::query("SELECT pg_current_xact_id()")
        .execute(&mut *tx)
        .await
        .unwrap();
    let findings = doctor::examine(db.pool()).await.unwrap();
    assert!(
        findings
            .iter()
            .any(|finding| finding.name == "no-dispatcher" && finding.severity == doctor::Severity::Error),
        "{findings:?}"
    );
}
