//! Messages for later: never early, in due order, not lost by whatever is open, cancelled or restarted at the time; and when messages expire.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use postbox::{MessageId, Outgoing, Publish};
use postbox_dispatcher::{Dispatcher, DispatcherHandle};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use uuid::Uuid;

mod ledger;
mod role;

const SOON: Duration = Duration::from_secs(30);
/// Well before the poll of a second that would find a message which did not ring.
const PROMPT: Duration = Duration::from_millis(800);

async fn dispatcher(db: &TestDatabase) -> DispatcherHandle {
    Dispatcher::new(db.connect_pool(2))
        .start()
        .await
        .expect("a dispatcher")
}

fn text(text: &str) -> Outgoing {
    Outgoing::json("t", text).key("k")
}

async fn publish(pool: &PgPool, message: Outgoing) -> MessageId {
    let mut tx = pool.begin().await.expect("a transaction");
    let id = tx.publish(message).await.expect("published");
    tx.commit().await.expect("committed");
    id
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql)
        .fetch_one(pool)
        .await
        .expect("the query runs")
}

async fn pending(pool: &PgPool) -> i64 {
    number(pool, "SELECT count(*) FROM postbox.scheduled").await
}

/// What was delivered, in the order of the topic.
async fn delivered(db: &TestDatabase) -> Vec<String> {
    ledger::complete(db, "t")
        .await
        .iter()
        .map(ledger::Entry::text)
        .collect()
}

async fn has_delivered(pool: &PgPool, messages: i64) {
    eventually(SOON, async || {
        match number(pool, "SELECT postbox.next_offset('t')").await {
            n if n >= messages => Ok(()),
            n => Err(format!("{n} of {messages}")),
        }
    })
    .await;
}

/// Promotes by hand what is due now.
async fn promote(connection: &mut PgConnection) -> i64 {
    sqlx::query_scalar("SELECT promoted FROM postbox.promote(NULL, NULL, NULL, NULL, 1000)")
        .fetch_one(connection)
        .await
        .expect("a promotion")
}

async fn order_in_the_outbox(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT convert_from(payload, 'UTF8')::jsonb #>> '{}' FROM postbox.outbox ORDER BY seq",
    )
    .fetch_all(pool)
    .await
    .expect("the outbox")
}

// ------------------------------------------------------------------------------------------------------------- when it comes

#[tokio::test]
async fn a_scheduled_message_comes_when_it_is_due_and_is_what_was_published() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    let deliver_at = Utc::now() + TimeDelta::seconds(3);
    let message = Outgoing::bytes("t", "text/plain", "hello")
        .message_type("greeting")
        .key("k")
        .header("tenant", "acme")
        .deliver_at(deliver_at);
    let id = publish(db.pool(), message).await;
    has_delivered(db.pool(), 1).await;
    let row: (Uuid, String, String, String, String, bool) = sqlx::query_as(
        "SELECT id, type, key, headers ->> 'tenant', content_type || ' ' || convert_from(payload, 'UTF8'), published_at >= $1 \
         FROM postbox.outbox",
    )
    .bind(deliver_at)
    .fetch_one(db.pool())
    .await
    .unwrap();
    let expected = (
        "greeting".into(),
        "k".into(),
        "acme".into(),
        "text/plain hello".into(),
    );
    assert_eq!(
        row,
        (id.as_uuid(), expected.0, expected.1, expected.2, expected.3, true)
    );
    assert_eq!(pending(db.pool()).await, 0);
    // It learns of it by the answer.
    eventually(SOON, async || match dispatcher.stats() {
        stats if (stats.promoted, stats.fired) == (1, 0) => Ok(()),
        stats => Err(format!("{stats:?}")),
    })
    .await;
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn in_the_past_means_now() {
    let db = TestDatabase::new().await.unwrap();
    let past = Utc::now() - TimeDelta::hours(1);
    publish(db.pool(), text("past").deliver_at(past)).await;
    publish(db.pool(), text("no delay").delay(Duration::ZERO)).await;
    publish(db.pool(), text("long ago").deliver_at(DateTime::<Utc>::MIN_UTC)).await;
    sqlx::query("SELECT postbox.publish(topic => 't', payload => '\"sql\"', deliver_at => '-infinity')")
        .execute(db.pool())
        .await
        .unwrap();
    assert_eq!(pending(db.pool()).await, 0);
    assert_eq!(
        order_in_the_outbox(db.pool()).await,
        ["past", "no delay", "long ago", "sql"]
    );
}

#[tokio::test]
async fn no_instant_is_too_far_away_but_infinity_and_two_instants_are_refused() {
    let db = TestDatabase::new().await.unwrap();
    publish(db.pool(), text("a").deliver_at(DateTime::<Utc>::MAX_UTC)).await;
    publish(
        db.pool(),
        text("b").delay(Duration::from_secs(5_000 * 365 * 86_400)),
    )
    .await;
    assert_eq!(pending(db.pool()).await, 2);
    for (argument, says) in [
        ("deliver_at => 'infinity'", "cannot be due at infinity"),
        (
            "deliver_at => now() + interval '1 day', delay => '1 day'",
            "exclude each other",
        ),
    ] {
        let sql = format!("SELECT postbox.publish(topic => 't', payload => '1', {argument})");
        let refused = sqlx::query(AssertSqlSafe(sql))
            .execute(db.pool())
            .await
            .unwrap_err();
        assert!(refused.to_string().contains(says), "{refused}");
    }
}

#[tokio::test]
async fn messages_come_in_the_order_in_which_they_are_due_whatever_the_order_of_scheduling() {
    let db = TestDatabase::new().await.unwrap();
    let hour = Utc::now() + TimeDelta::hours(1);
    let at = |minutes| hour + TimeDelta::minutes(minutes);
    let mut tx = db.pool().begin().await.unwrap();
    let batch = [
        text("third").deliver_at(at(2)),
        text("now"),
        text("first").deliver_at(at(0)),
        text("second").deliver_at(at(1)),
        text("second too").deliver_at(at(1)),
    ];
    tx.publish_all(batch).await.unwrap();
    tx.commit().await.unwrap();
    // Another transaction, and rows elsewhere in the table.
    publish(db.pool(), text("second as well").deliver_at(at(1))).await;
    publish(db.pool(), text("much later").deliver_at(at(10_000))).await;
    let mut connection = db.connect().await.unwrap();
    assert_eq!(promote(&mut connection).await, 0, "nothing is early");
    // While no dispatcher runs.
    db.advance(Duration::from_secs(2 * 3600)).await.unwrap();
    let dispatcher = dispatcher(&db).await;
    has_delivered(db.pool(), 6).await;
    assert_eq!(
        delivered(&db).await,
        ["now", "first", "second", "second too", "second as well", "third"]
    );
    assert_eq!(pending(db.pool()).await, 1);
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn a_moved_clock_makes_messages_due() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    publish(db.pool(), text("tomorrow").delay(Duration::from_secs(86_400))).await;
    publish(
        db.pool(),
        text("next week").delay(Duration::from_secs(7 * 86_400)),
    )
    .await;
    db.advance(Duration::from_secs(86_401)).await.unwrap();
    has_delivered(db.pool(), 1).await;
    db.advance(Duration::from_secs(86_400)).await.unwrap();
    publish(db.pool(), text("today")).await;
    has_delivered(db.pool(), 2).await;
    db.advance(Duration::from_secs(5 * 86_400)).await.unwrap();
    has_delivered(db.pool(), 3).await;
    assert_eq!(delivered(&db).await, ["tomorrow", "today", "next week"]);
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn a_message_due_before_the_one_that_is_waited_for_wakes_the_timers() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    publish(db.pool(), text("later").delay(Duration::from_secs(3600))).await;
    for n in 1..=5 {
        asleep(db.pool()).await;
        let delay = Duration::from_millis(100);
        publish(db.pool(), text("sooner").delay(delay)).await;
        let committed = Instant::now();
        has_delivered(db.pool(), n).await;
        assert!(committed.elapsed() < delay + PROMPT, "{:?}", committed.elapsed());
    }
    dispatcher.shutdown().await;
}

/// Waits until a dispatcher's timers sleep.
async fn asleep(pool: &PgPool) {
    eventually(SOON, async || {
        let sleeps = number(
            pool,
            "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database() \
             WHERE l.locktype = 'advisory' AND l.classid = 1347571761 AND l.objid = 5 AND l.mode = 'ExclusiveLock' AND l.granted",
        )
        .await;
        if sleeps == 1 { Ok(()) } else { Err("they do not sleep") }
    })
    .await;
}

#[tokio::test]
async fn a_transaction_that_commits_after_its_message_was_due_delivers_it_at_once() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    let mut late = db.connect().await.unwrap();
    let mut tx = late.begin().await.unwrap();
    tx.publish(text("late").delay(Duration::from_millis(50)))
        .await
        .unwrap();
    // Others are promoted past it.
    for n in 1..=3 {
        publish(db.pool(), text("other").delay(Duration::from_millis(100))).await;
        has_delivered(db.pool(), n).await;
    }
    tx.commit().await.unwrap();
    let committed = Instant::now();
    has_delivered(db.pool(), 4).await;
    assert!(committed.elapsed() < PROMPT, "{:?}", committed.elapsed());
    assert_eq!(delivered(&db).await[3], "late");
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn what_is_rolled_back_is_not_delivered() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    let mut tx = db.pool().begin().await.unwrap();
    tx.publish(text("never").delay(Duration::from_millis(50)))
        .await
        .unwrap();
    tx.rollback().await.unwrap();
    publish(db.pool(), text("only").delay(Duration::from_millis(100))).await;
    has_delivered(db.pool(), 1).await;
    assert_eq!(delivered(&db).await, ["only"]);
    dispatcher.shutdown().await;
}

// ------------------------------------------------------------------------------------------------------- cancel, reschedule

#[tokio::test]
async fn a_cancelled_message_is_not_delivered_and_cancelling_says_whether_it_was_pending() {
    let db = TestDatabase::new().await.unwrap();
    let cancelled = publish(db.pool(), text("cancelled").delay(Duration::from_secs(60))).await;
    let kept = publish(db.pool(), text("kept").delay(Duration::from_secs(60))).await;
    let now = publish(db.pool(), text("now")).await;
    let mut tx = db.pool().begin().await.unwrap();
    assert!(tx.cancel(cancelled).await.unwrap());
    assert!(!tx.cancel(cancelled).await.unwrap(), "it is cancelled already");
    assert!(!tx.cancel(now).await.unwrap(), "it was never scheduled");
    assert!(!tx.cancel(MessageId::new()).await.unwrap(), "there is none such");
    tx.commit().await.unwrap();
    let mut tx = db.pool().begin().await.unwrap();
    assert!(tx.cancel(kept).await.unwrap());
    tx.rollback().await.unwrap();

    db.advance(Duration::from_secs(61)).await.unwrap();
    let dispatcher = dispatcher(&db).await;
    has_delivered(db.pool(), 2).await;
    let mut tx = db.pool().begin().await.unwrap();
    assert!(!tx.cancel(kept).await.unwrap(), "it was delivered");
    tx.commit().await.unwrap();
    assert_eq!(delivered(&db).await, ["now", "kept"]);
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn a_rescheduled_message_comes_at_its_new_time_whether_earlier_or_later() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    let hour = Duration::from_secs(3600);
    let earlier = publish(db.pool(), text("earlier").delay(10 * hour)).await;
    let later = publish(db.pool(), text("later").delay(hour)).await;
    let past = publish(db.pool(), text("past").delay(hour)).await;
    publish(db.pool(), text("between").delay(2 * hour)).await;
    asleep(db.pool()).await;
    let mut tx = db.pool().begin().await.unwrap();
    assert!(
        tx.reschedule(earlier, Utc::now() + TimeDelta::milliseconds(150))
            .await
            .unwrap()
    );
    assert!(
        tx.reschedule(later, Utc::now() + TimeDelta::hours(3))
            .await
            .unwrap()
    );
    assert!(
        tx.reschedule(past, Utc::now() - TimeDelta::hours(3))
            .await
            .unwrap()
    );
    assert!(!tx.reschedule(MessageId::new(), Utc::now()).await.unwrap());
    tx.commit().await.unwrap();
    let committed = Instant::now();
    has_delivered(db.pool(), 2).await;
    assert!(committed.elapsed() < PROMPT, "{:?}", committed.elapsed());
    db.advance(hour + hour / 2).await.unwrap();
    db.advance(hour).await.unwrap();
    has_delivered(db.pool(), 3).await;
    db.advance(hour).await.unwrap();
    has_delivered(db.pool(), 4).await;
    assert_eq!(delivered(&db).await, ["past", "earlier", "between", "later"]);
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn an_open_transaction_that_cancels_a_due_message_holds_up_no_other_and_may_still_roll_back() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    let mut canceller = db.connect().await.unwrap();
    let delay = Duration::from_secs(2);
    let held = publish(db.pool(), text("held").delay(delay)).await;
    let mut tx = canceller.begin().await.unwrap();
    assert!(tx.cancel(held).await.unwrap());
    for n in 1..=3 {
        publish(db.pool(), text("other").delay(delay / n as u32)).await;
        has_delivered(db.pool(), n).await;
    }
    tx.rollback().await.unwrap();
    let rolled_back = Instant::now();
    has_delivered(db.pool(), 4).await;
    assert!(rolled_back.elapsed() < PROMPT, "{:?}", rolled_back.elapsed());
    assert_eq!(delivered(&db).await, ["other", "other", "other", "held"]);
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn of_a_promotion_and_a_cancellation_at_the_same_time_exactly_one_wins() {
    const MESSAGES: usize = 300;
    let db = TestDatabase::new().await.unwrap();
    let dispatchers = [dispatcher(&db).await, dispatcher(&db).await];
    let due = Utc::now() + TimeDelta::milliseconds(700);
    let batch =
        (0..MESSAGES).map(|n| text(&n.to_string()).deliver_at(due + TimeDelta::milliseconds(n as i64)));
    let mut tx = db.pool().begin().await.unwrap();
    let ids = tx.publish_all(batch).await.unwrap();
    tx.commit().await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    let mut cancelled = 0;
    for id in ids.iter().rev() {
        let mut tx = db.pool().begin().await.unwrap();
        cancelled += usize::from(tx.cancel(*id).await.unwrap());
        tx.commit().await.unwrap();
    }
    assert_eq!(pending(db.pool()).await, 0);
    has_delivered(db.pool(), (MESSAGES - cancelled) as i64).await;
    let delivered = delivered(&db).await;
    println!("{cancelled} cancelled, {} delivered", delivered.len());
    assert_eq!(delivered.len(), MESSAGES - cancelled);
    let numbers: Vec<usize> = delivered.iter().map(|n| n.parse().unwrap()).collect();
    assert!(numbers.is_sorted(), "in due order: {numbers:?}");
    for dispatcher in dispatchers {
        dispatcher.shutdown().await;
    }
}

// ------------------------------------------------------------------------------------------------- deduplication, order, rights

#[tokio::test]
async fn a_deduplication_key_covers_messages_for_later() {
    let db = TestDatabase::new().await.unwrap();
    let message = |n| text(n).dedup_key("d").delay(Duration::from_secs(60));
    let first = publish(db.pool(), message("first")).await;
    assert_eq!(publish(db.pool(), message("second")).await, first);
    assert_eq!(
        publish(db.pool(), text("third").dedup_key("d").ordered()).await,
        first
    );
    assert_eq!(pending(db.pool()).await, 1);
    assert_eq!(number(db.pool(), "SELECT count(*) FROM postbox.outbox").await, 0);
}

#[tokio::test]
async fn a_role_that_may_publish_may_schedule_and_cancel_but_not_read_what_others_scheduled() {
    let db = TestDatabase::new().await.unwrap();
    let role = role::Role::new(&db).await;
    let grant = format!("SELECT postbox.grant_publish('{}')", role.name);
    sqlx::query(AssertSqlSafe(grant))
        .execute(db.pool())
        .await
        .unwrap();
    let id = publish(
        &role.pool,
        text("a").delay(Duration::from_secs(60)).expires_in(SOON),
    )
    .await;
    publish(&role.pool, text("b").expires_in(SOON)).await;
    let mut tx = role.pool.begin().await.unwrap();
    assert!(tx.reschedule(id, Utc::now() + TimeDelta::hours(1)).await.unwrap());
    assert!(tx.cancel(id).await.unwrap());
    tx.commit().await.unwrap();
    let reading = sqlx::query("SELECT payload FROM postbox.scheduled")
        .execute(&role.pool)
        .await;
    assert!(reading.unwrap_err().to_string().contains("permission denied"));
    role.drop(&db).await;
}

// ------------------------------------------------------------------------------------------------------------------ restarts

#[tokio::test]
async fn a_dispatcher_that_was_down_delivers_what_became_due_in_due_order() {
    let db = TestDatabase::new().await.unwrap();
    let first = dispatcher(&db).await;
    let mut tx = db.pool().begin().await.unwrap();
    // Of one moment, however long the statement takes.
    let hour = Utc::now() + TimeDelta::hours(1);
    let batch = (0..2_500).map(|n: i64| {
        // Neighbours are far apart in time.
        let number = n * 7_919 % 2_500;
        text(&number.to_string()).deliver_at(hour + TimeDelta::seconds(number))
    });
    tx.publish_all(batch).await.unwrap();
    tx.commit().await.unwrap();
    first.shutdown().await;
    db.advance(Duration::from_secs(2 * 3_600)).await.unwrap();
    let second = dispatcher(&db).await;
    has_delivered(db.pool(), 2_500).await;
    let numbers: Vec<i64> = delivered(&db).await.iter().map(|n| n.parse().unwrap()).collect();
    assert_eq!(numbers, (0..2_500).collect::<Vec<_>>());
    second.shutdown().await;
}

#[tokio::test]
async fn another_dispatchers_timers_step_in_for_one_that_does_not_answer() {
    let db = TestDatabase::new().await.unwrap();
    // As a dispatcher that sleeps at the bell and never wakes.
    let mut frozen = db.connect().await.unwrap();
    sqlx::query("SELECT pg_advisory_lock(1347571761, 5)")
        .execute(&mut frozen)
        .await
        .unwrap();
    let dispatcher = dispatcher(&db).await;
    for n in 1..=5 {
        publish(db.pool(), text("x").delay(Duration::from_millis(200))).await;
        let committed = Instant::now();
        has_delivered(db.pool(), n).await;
        assert!(
            committed.elapsed() < Duration::from_secs(3),
            "{:?}",
            committed.elapsed()
        );
    }
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn timers_survive_a_lost_connection() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    for n in 1..=3 {
        publish(db.pool(), text("x").delay(Duration::from_millis(200))).await;
        let killed = number(
            db.pool(),
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'postbox timers'",
        )
        .await;
        assert_eq!(killed, 1);
        has_delivered(db.pool(), n).await;
        asleep(db.pool()).await;
    }
    dispatcher.shutdown().await;
}

/// The timers are rung through the sequencer's connection.
#[tokio::test]
async fn what_is_scheduled_while_nobody_listens_is_not_left_to_the_poll() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    // Twice: each loss soon after the last one makes the wait before connecting again longer.
    for n in 1..=2 {
        asleep(db.pool()).await;
        let killed = number(
            db.pool(),
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
             WHERE datname = current_database() AND application_name = 'postbox dispatcher'",
        )
        .await;
        assert_eq!(killed, 1);
        let delay = Duration::from_millis(100);
        publish(db.pool(), text("x").delay(delay)).await;
        let committed = Instant::now();
        eventually(SOON, async || match pending(db.pool()).await {
            0 => Ok(()),
            n => Err(format!("{n} are pending")),
        })
        .await;
        assert!(committed.elapsed() < delay + PROMPT, "{:?}", committed.elapsed());
        has_delivered(db.pool(), n).await;
    }
    dispatcher.shutdown().await;
}

// --------------------------------------------------------------------------------------------------------------------- load

/// The lateness of each message of topic `t` whose payload is its due time in microseconds, sorted.
async fn lateness_ms(pool: &PgPool) -> Vec<f64> {
    sqlx::query_scalar(
        "SELECT (extract(epoch FROM published_at) * 1000 - (convert_from(payload, 'UTF8')::numeric / 1000))::float8 AS late \
         FROM postbox.outbox WHERE topic = 't' ORDER BY late",
    )
    .fetch_all(pool)
    .await
    .expect("the outbox")
}

/// Schedules messages that are due evenly over a span that begins after `lead`.
async fn schedule_evenly(pool: &PgPool, messages: i64, span: Duration, lead: Duration) {
    let start = Utc::now() + lead;
    let step = span.as_micros() as i64 / messages.max(1);
    let mut tx = pool.begin().await.expect("a transaction");
    let batch = (0..messages).map(|n| {
        let due = start + TimeDelta::microseconds(n * step);
        Outgoing::json("t", &due.timestamp_micros()).deliver_at(due)
    });
    tx.publish_all(batch).await.expect("published");
    tx.commit().await.expect("committed");
}

#[tokio::test]
async fn under_load_no_message_is_early_and_few_are_late() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    schedule_evenly(db.pool(), 2_000, Duration::from_secs(2), Duration::from_secs(4)).await;
    has_delivered(db.pool(), 2_000).await;
    let late = lateness_ms(db.pool()).await;
    let (least, p99) = (late[0], late[late.len() * 99 / 100]);
    println!(
        "lateness: least {least:.3} ms, p50 {:.3} ms, p99 {p99:.3} ms",
        late[1_000]
    );
    assert!(least >= 0.0, "{least} ms early");
    assert!(p99 < 1_000.0, "p99 {p99} ms");
    dispatcher.shutdown().await;
}

/// The state that a caller of postbox.promote passes back.
type State = (String, String, i64, Vec<Uuid>, i64, bool);

async fn look(connection: &mut PgConnection, state: &mut Option<State>) -> i64 {
    let before = state.take();
    let (last, at, n, held) = match before {
        Some((last, at, n, held, ..)) => (Some(last), Some(at), Some(n), Some(held)),
        None => (None, None, None, None),
    };
    let next: State = sqlx::query_as(
        "SELECT last_look::text, start_at::text, start_n, held, promoted, is_full \
         FROM postbox.promote($1::pg_snapshot, $2::timestamptz, $3, $4, 1000)",
    )
    .bind(last)
    .bind(at)
    .bind(n)
    .bind(held)
    .fetch_one(connection)
    .await
    .expect("a look");
    let promoted = next.4;
    *state = Some(next);
    promoted
}

/// The median of how long it takes to promote one message that was just scheduled.
async fn median_look(pool: &PgPool, connection: &mut PgConnection, state: &mut Option<State>) -> Duration {
    let mut took = Vec::new();
    for _ in 0..50 {
        publish(pool, text("x").delay(Duration::from_millis(1))).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
        let begun = Instant::now();
        assert_eq!(look(connection, state).await, 1);
        took.push(begun.elapsed());
    }
    took.sort();
    took[took.len() / 2]
}

#[tokio::test]
async fn looks_do_not_grow_slower_with_what_was_promoted_and_cancelled_while_another_session_holds_the_horizon()
 {
    const MESSAGES: i64 = 20_000;
    let db = TestDatabase::new().await.unwrap();
    let mut connection = db.connect().await.unwrap();
    // Not the time of the disk.
    sqlx::raw_sql("SET synchronous_commit = off")
        .execute(&mut connection)
        .await
        .unwrap();
    let mut state = None;
    look(&mut connection, &mut state).await;
    let before = median_look(db.pool(), &mut connection, &mut state).await;
    let mut holder = db.connect().await.unwrap();
    sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_current_xact_id()")
        .execute(&mut holder)
        .await
        .unwrap();

    // Half is promoted, half is cancelled, and something is there behind them all.
    let hour = Duration::from_secs(3_600);
    schedule_evenly(db.pool(), MESSAGES, Duration::from_secs(1), hour).await;
    schedule_evenly(db.pool(), MESSAGES, Duration::from_secs(1), 3 * hour).await;
    publish(db.pool(), text("behind").delay(10 * hour)).await;
    db.advance(2 * hour).await.unwrap();
    let mut promoted = 0;
    while promoted < MESSAGES {
        promoted += look(&mut connection, &mut state).await;
    }
    sqlx::query("SELECT count(postbox.cancel(id)) FROM postbox.scheduled WHERE topic = 't' AND key IS NULL")
        .execute(db.pool())
        .await
        .unwrap();
    db.advance(2 * hour).await.unwrap();
    // One look passes the dead; from then on they are behind.
    assert_eq!(look(&mut connection, &mut state).await, 0);
    assert_eq!(pending(db.pool()).await, 1);

    let after = median_look(db.pool(), &mut connection, &mut state).await;
    println!(
        "median look before {before:?}, with {} dead rows {after:?}",
        2 * MESSAGES
    );
    assert!(
        after < 3 * before + Duration::from_millis(5),
        "{after:?}, before {before:?}"
    );
}

/// Figures, not a guarantee: `cargo test --release -p postbox-tests --test scheduled -- --ignored --nocapture`, on a quiet machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, for a quiet machine"]
async fn measure_lateness_and_a_burst() {
    let show = |name: &str, late: &[f64]| {
        let at = |share: f64| late[((late.len() - 1) as f64 * share) as usize];
        println!(
            "{name}: {} messages, least {:.2} ms, p50 {:.2}, p99 {:.2}, max {:.2}",
            late.len(),
            at(0.0),
            at(0.5),
            at(0.99),
            at(1.0)
        );
    };
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    schedule_evenly(db.pool(), 20_000, Duration::from_secs(10), Duration::from_secs(4)).await;
    has_delivered(db.pool(), 20_000).await;
    show("2,000 due a second", &lateness_ms(db.pool()).await);

    // A million due within a second, and a message published at once every 20 ms meanwhile.
    let rows: i64 = std::env::var("BURST").map_or(1_000_000, |n| n.parse().unwrap());
    let begun = Instant::now();
    sqlx::query(
        "INSERT INTO postbox.scheduled (deliver_at, topic, payload) \
         SELECT clock_timestamp() + interval '60 s' + n * interval '1 us', 'burst', '1' FROM generate_series(1, $1) n",
    )
    .bind(rows)
    .execute(db.pool())
    .await
    .unwrap();
    println!("{rows} scheduled in {:?}", begun.elapsed());
    db.advance(Duration::from_secs(120)).await.unwrap();
    let begun = Instant::now();
    let mut immediate = Vec::new();
    loop {
        let done = number(db.pool(), "SELECT postbox.next_offset('burst')").await;
        if done >= rows {
            break;
        }
        let before = number(db.pool(), "SELECT postbox.next_offset('now')").await;
        publish(db.pool(), Outgoing::json("now", &1)).await;
        let committed = Instant::now();
        while number(db.pool(), "SELECT postbox.next_offset('now')").await == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        immediate.push(committed.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("{rows} drained in {:?}", begun.elapsed());
    immediate.sort_by(f64::total_cmp);
    show("published meanwhile, commit to sequenced", &immediate);
    dispatcher.shutdown().await;
}

// ------------------------------------------------------------------------------------------------------------------- expiry

#[tokio::test]
async fn the_log_says_when_a_message_expires() {
    let db = TestDatabase::new().await.unwrap();
    let instant = Utc::now() + TimeDelta::days(1);
    let mut tx = db.pool().begin().await.unwrap();
    tx.publish_all([
        text("never"),
        text("at").expires_at(instant),
        text("in").expires_in(Duration::from_secs(60)),
        text("after delay")
            .delay(Duration::from_secs(600))
            .expires_in(Duration::from_secs(60)),
    ])
    .await
    .unwrap();
    tx.commit().await.unwrap();
    sqlx::query("SELECT postbox.publish(topic => 't', payload => '\"sql\"', expires_in => '2 hours')")
        .execute(db.pool())
        .await
        .unwrap();
    db.advance(Duration::from_secs(601)).await.unwrap();
    let mut connection = db.connect().await.unwrap();
    assert_eq!(promote(&mut connection).await, 1);
    ledger::step(db.pool()).await;
    let segments = postbox::log::segments(&mut connection, "t", postbox::Offset::ZERO, 10)
        .await
        .unwrap();
    let (zero, five) = (postbox::Offset::ZERO, postbox::Offset::new(5));
    let messages = postbox::log::messages(
        &mut connection,
        "t",
        &segments,
        zero,
        five,
        &postbox::log::Filters::NONE,
        |_, _| true,
    )
    .await
    .unwrap();
    let lifetimes: Vec<Option<i64>> = messages
        .iter()
        .map(|message| {
            message
                .expires_at
                .map(|at| (at - message.published_at).num_seconds())
        })
        .collect();
    assert_eq!(lifetimes[0], None);
    assert_eq!(lifetimes[1].unwrap() / 60, 24 * 60 - 1);
    assert!((59..=60).contains(&lifetimes[2].unwrap()), "{lifetimes:?}");
    assert!((7199..=7200).contains(&lifetimes[3].unwrap()), "{lifetimes:?}");
    assert!((55..=60).contains(&lifetimes[4].unwrap()), "{lifetimes:?}");
}
