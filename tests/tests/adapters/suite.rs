//! What holds for every client. What sqlx 0.9 writes is the measure.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use postbox::cron::{Cron, Schedule};
use postbox::{Error, MessageId, Outgoing, Publish};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::PgPool;
use uuid::Uuid;

use crate::messages::{KINDS, at, hostile, mixed, mixed_and_special, refused};
use crate::script::{Client, End, Ran, Said, Step, pause};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

async fn database<C: Client>() -> (TestDatabase, C) {
    let db = TestDatabase::new().await.expect("a database");
    let client = C::connect(db.url()).await;
    (db, client)
}

/// In a transaction that commits, and in which nothing fails.
async fn done<C: Client>(client: &mut C, steps: Vec<Step>) -> Vec<Said> {
    all_said(client.run(steps, End::Commit).await)
}

/// In one that is rolled back.
async fn undone<C: Client>(client: &mut C, steps: Vec<Step>) -> Vec<Said> {
    all_said(client.run(steps, End::Rollback).await)
}

fn all_said(ran: Ran) -> Vec<Said> {
    ran.ended.expect("it ends");
    ran.said.into_iter().map(|said| said.expect("done")).collect()
}

fn id(said: &[Said]) -> MessageId {
    match said {
        [Said::Id(id)] => *id,
        other => panic!("{other:?}"),
    }
}

fn ids(said: &[Said]) -> Vec<MessageId> {
    match said {
        [Said::Ids(ids)] => ids.clone(),
        other => panic!("{other:?}"),
    }
}

fn due(said: &[Said]) -> DateTime<Utc> {
    match said {
        [Said::Due(Some(due))] => *due,
        other => panic!("{other:?}"),
    }
}

fn json(n: i64) -> Outgoing {
    Outgoing::json("orders", &n)
}

pub(crate) async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("a number")
}

const WRITTEN: &str = "SELECT (SELECT count(*) FROM postbox.outbox) + (SELECT count(*) FROM postbox.scheduled) + (SELECT count(*) FROM postbox.cron)";

pub(crate) async fn nothing_is_written(pool: &PgPool) {
    assert_eq!(number(pool, WRITTEN).await, 0);
}

/// Each method, once.
pub(crate) fn every_method() -> Vec<Step> {
    vec![
        Step::Publish(json(1)),
        Step::Publish(json(1).ordered().key("k")),
        Step::PublishAll(vec![json(1), json(2)]),
        Step::Cancel(MessageId::new()),
        Step::Reschedule(MessageId::new(), at(2100)),
        Step::Register(nightly("nightly")),
    ]
}

/// By sqlx 0.9.
async fn published(pool: &PgPool, messages: Vec<Outgoing>) -> Vec<MessageId> {
    let mut tx = pool.begin().await.expect("a transaction");
    let mut ids = Vec::new();
    match <[Outgoing; 1]>::try_from(messages) {
        Ok([message]) => ids.push(tx.publish(message).await.expect("published")),
        Err(messages) => ids.extend(tx.publish_all(messages).await.expect("published")),
    }
    tx.commit().await.expect("committed");
    ids
}

/// What there is of a message, but for its id, its place and the times at which it was written; and when it is due and when it expires.
type Row = (serde_json::Value, Option<DateTime<Utc>>, Option<DateTime<Utc>>);

const ROWS: &str = "SELECT coalesce(to_jsonb(o) - '{id,slot,seq,xid,published_at,expires_at}'::text[], \
         to_jsonb(s) - '{id,n,xid,deliver_at,expires_at,scheduled_at}'::text[]), \
         CASE WHEN s.deliver_at < '9999-01-01' THEN s.deliver_at END, coalesce(o.expires_at, s.expires_at) \
     FROM unnest($1::uuid[]) WITH ORDINALITY AS u (id, n) \
     LEFT JOIN postbox.outbox o ON o.id = u.id LEFT JOIN postbox.scheduled s ON s.id = u.id ORDER BY u.n";

async fn rows(pool: &PgPool, ids: &[MessageId]) -> Vec<Row> {
    let ids: Vec<Uuid> = ids.iter().map(|id| id.as_uuid()).collect();
    sqlx::query_as(ROWS)
        .bind(ids)
        .fetch_all(pool)
        .await
        .expect("they are stored")
}

/// Instants are exact; what counts from now is the same but for the time between the two.
fn is_about(ours: Option<DateTime<Utc>>, theirs: Option<DateTime<Utc>>) -> bool {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours > at(2090) => ours == theirs,
        (Some(ours), Some(theirs)) => (theirs - ours).abs() < TimeDelta::minutes(10),
        (ours, theirs) => ours == theirs,
    }
}

async fn are_written_alike(pool: &PgPool, ours: &[MessageId], theirs: &[MessageId], what: &str) {
    let (ours, theirs) = (rows(pool, ours).await, rows(pool, theirs).await);
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (n, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        assert_eq!(theirs.0, ours.0, "{what}, {n}");
        assert!(
            is_about(ours.1, theirs.1),
            "{what}, {n}: due {:?}, {:?}",
            ours.1,
            theirs.1
        );
        assert!(
            is_about(ours.2, theirs.2),
            "{what}, {n}: ends {:?}, {:?}",
            ours.2,
            theirs.2
        );
        let lives = |row: &Row| Some(row.2? - row.1?);
        assert_eq!(lives(theirs), lives(ours), "{what}, {n}");
    }
}

/// Those of these that are in the outbox, then those that wait, each in the order in which they were written.
async fn in_order_of_writing(pool: &PgPool, ids: &[MessageId]) -> Vec<Uuid> {
    let ids: Vec<Uuid> = ids.iter().map(|id| id.as_uuid()).collect();
    sqlx::query_scalar(
        "SELECT id FROM (SELECT 1, seq, id FROM postbox.outbox WHERE id = ANY ($1) \
             UNION ALL SELECT 2, n, id FROM postbox.scheduled WHERE id = ANY ($1)) AS m (part, n, id) ORDER BY part, n",
    )
    .bind(ids)
    .fetch_all(pool)
    .await
    .expect("ids")
}

fn uuids(ids: &[MessageId]) -> Vec<Uuid> {
    ids.iter().map(|id| id.as_uuid()).collect()
}

pub(crate) async fn what_is_committed_is_there_and_what_is_rolled_back_is_not<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let steps = || {
        vec![
            Step::Sql("CREATE TABLE IF NOT EXISTS orders (n bigint); INSERT INTO orders VALUES (1)"),
            Step::Publish(json(1)),
            Step::Savepoint(
                vec![Step::Publish(json(2)), Step::PublishAll(vec![json(3)])],
                End::Commit,
            ),
            Step::Savepoint(
                vec![
                    Step::Publish(json(4)),
                    Step::PublishAll(vec![json(5).delay(PATIENCE)]),
                ],
                End::Rollback,
            ),
            Step::Publish(json(6)),
        ]
    };
    undone(&mut client, steps()).await;
    nothing_is_written(db.pool()).await;
    let said = done(&mut client, steps()).await;
    assert_eq!(said.len(), 7);
    let kept: Vec<String> =
        sqlx::query_scalar("SELECT convert_from(payload, 'UTF8') FROM postbox.outbox ORDER BY seq")
            .fetch_all(db.pool())
            .await
            .expect("payloads");
    assert_eq!(kept, ["1", "2", "3", "6"]);
    assert_eq!(number(db.pool(), WRITTEN).await, 4);
    assert_eq!(number(db.pool(), "SELECT count(*) FROM orders").await, 1);
}

pub(crate) async fn each_kind_of_message_is_written_as_sqlx_writes_it<C: Client>() {
    let (db, mut client) = database::<C>().await;
    for (what, message) in KINDS {
        let ours = published(db.pool(), vec![message()]).await;
        let theirs = id(&done(&mut client, vec![Step::Publish(message())]).await);
        are_written_alike(db.pool(), &ours, &[theirs], what).await;
        let theirs = ids(&done(&mut client, vec![Step::PublishAll(vec![message()])]).await);
        are_written_alike(db.pool(), &ours, &theirs, what).await;
    }
}

fn batches() -> Vec<Vec<Outgoing>> {
    const FEW: usize = 40;
    // The last of each column is now a text and now a null, and a column may have none at all.
    let mut batches: Vec<Vec<Outgoing>> = (1..FEW).map(|len| (0..len).map(mixed).collect()).collect();
    batches.push((0..5_000).map(mixed).collect());
    batches.push((0..FEW).map(|n| json(1).key(hostile(n))).collect());
    batches.push((0..FEW).map(|n| json(1).header("h", hostile(n))).collect());
    batches.push((0..FEW).map(|_| json(1)).collect());
    batches.push(vec![json(1).key("a"), json(1), json(1).key("b"), json(1)]);
    batches
}

pub(crate) async fn a_batch_of_hostile_messages_arrives_whole_and_in_its_order<C: Client>() {
    let (db, mut client) = database::<C>().await;
    for (messages, again) in batches().into_iter().zip(batches()) {
        let what = format!("{} messages", messages.len());
        let ours = published(db.pool(), messages).await;
        let theirs = ids(&done(&mut client, vec![Step::PublishAll(again)]).await);
        assert_eq!(
            in_order_of_writing(db.pool(), &theirs).await,
            uuids(&theirs),
            "{what}"
        );
        are_written_alike(db.pool(), &ours, &theirs, &what).await;
    }
    let nothing = done(&mut client, vec![Step::PublishAll(Vec::new())]).await;
    assert_eq!(ids(&nothing), []);
}

pub(crate) async fn a_batch_with_special_messages_is_written_as_sqlx_writes_it<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let batch = |run: &str| (0..500).map(|n| mixed_and_special(n, run)).collect::<Vec<_>>();
    let ours = published(db.pool(), batch("ours")).await;
    let theirs = ids(&done(&mut client, vec![Step::PublishAll(batch("theirs"))]).await);
    are_written_alike(db.pool(), &ours, &theirs, "special").await;
    let waits: Vec<bool> = (rows(db.pool(), &theirs).await.iter())
        .map(|row| row.1.is_some())
        .collect();
    let of = |what: bool| {
        (theirs.iter().zip(&waits))
            .filter(move |(_, waits)| **waits == what)
            .map(|(id, _)| id.as_uuid())
    };
    let expected: Vec<Uuid> = of(false).chain(of(true)).collect();
    assert_eq!(in_order_of_writing(db.pool(), &theirs).await, expected);
    let again = ids(&done(&mut client, vec![Step::PublishAll(batch("theirs"))]).await);
    let same = theirs
        .iter()
        .zip(&again)
        .filter(|(first, again)| first == again)
        .count();
    assert_eq!(
        same,
        (0..500).filter(|n| matches!(n % 9, 1 | 4)).count(),
        "deduplicated"
    );
}

pub(crate) async fn a_batch_of_any_size_arrives_whole<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let batch = (0..20_003).map(|n| json(n).key("k")).collect();
    let many = ids(&done(&mut client, vec![Step::PublishAll(batch)]).await);
    assert_eq!(many.len(), 20_003);
    assert_eq!(in_order_of_writing(db.pool(), &many).await, uuids(&many));
    assert_eq!(number(db.pool(), WRITTEN).await, 20_003);
    let large = |n: u8| Outgoing::bytes("large", "a/b", vec![n; 1024 * 1024]);
    let batch = (0..33).map(large).collect();
    let large = ids(&done(&mut client, vec![Step::PublishAll(batch)]).await);
    assert_eq!(in_order_of_writing(db.pool(), &large).await, uuids(&large));
    let bytes = "SELECT sum(length(payload))::bigint FROM postbox.outbox WHERE topic = 'large'";
    assert_eq!(number(db.pool(), bytes).await, 33 * 1024 * 1024);
}

pub(crate) async fn what_the_database_and_the_role_default_to_changes_nothing<C: Client>() {
    let db = TestDatabase::new().await.expect("a database");
    db.pervert().await.expect("perverted");
    // What may end a transaction that does nothing wrong is for the application to set.
    for setting in [
        "default_transaction_read_only",
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
        "idle_session_timeout",
    ] {
        let reset = format!("ALTER DATABASE {} RESET {setting}", db.name());
        sqlx::raw_sql(sqlx::AssertSqlSafe(reset))
            .execute(db.pool())
            .await
            .expect("reset");
    }
    let batch = |run: &str| (0..100).map(|n| mixed_and_special(n, run)).collect::<Vec<_>>();
    let plain = || (0..100).map(mixed).collect::<Vec<_>>();
    let mut client = C::connect(db.url()).await;
    let ours = published(db.pool(), batch("ours")).await;
    let theirs = ids(&done(&mut client, vec![Step::PublishAll(batch("theirs"))]).await);
    are_written_alike(db.pool(), &ours, &theirs, "special").await;
    let ours = published(db.pool(), plain()).await;
    let theirs = ids(&done(&mut client, vec![Step::PublishAll(plain())]).await);
    are_written_alike(db.pool(), &ours, &theirs, "plain").await;
    for (what, message) in KINDS {
        let ours = published(db.pool(), vec![message()]).await;
        let theirs = id(&done(&mut client, vec![Step::Publish(message())]).await);
        are_written_alike(db.pool(), &ours, &[theirs], what).await;
    }
    let at = at(2100);
    let scheduled = id(&done(&mut client, vec![Step::Publish(json(1).delay(PATIENCE))]).await);
    let steps = vec![Step::Reschedule(scheduled, at), Step::Cancel(scheduled)];
    assert_eq!(
        done(&mut client, steps).await,
        [Said::Whether(true), Said::Whether(true)]
    );
    due(&done(&mut client, vec![Step::Register(nightly("nightly"))]).await);
}

fn is_refused(error: &Error, says: &str) {
    assert!(
        !matches!(error, Error::Database(_) | Error::NoTransaction),
        "{error:?}"
    );
    assert!(error.to_string().contains(says), "{error} says {says:?}");
}

pub(crate) async fn what_breaks_a_limit_is_refused_and_the_transaction_goes_on<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let (mut steps, mut expected) = (Vec::new(), Vec::new());
    for (message, says) in refused() {
        steps.push(Step::Publish(message));
        expected.push(says);
    }
    steps.push(Step::Publish(json(1)));
    let ran = client.run(steps, End::Commit).await;
    ran.ended.expect("committed");
    for (said, says) in ran.said.iter().zip(&expected) {
        is_refused(said.as_ref().expect_err(says), says);
    }
    assert!(matches!(ran.said.last(), Some(Ok(Said::Id(_)))));
    assert_eq!(number(db.pool(), WRITTEN).await, 1);
}

pub(crate) async fn a_refused_batch_says_which_and_publishes_none<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let wrong = || refused().into_iter().enumerate();
    let mut steps: Vec<Step> = wrong()
        .map(|(n, (message, _))| {
            let mut batch: Vec<Outgoing> = (0..30).map(|n| json(n).ordered()).collect();
            batch.insert(n, message);
            Step::PublishAll(batch)
        })
        .collect();
    steps.push(Step::PublishAll(vec![json(1), json(2)]));
    let ran = client.run(steps, End::Commit).await;
    ran.ended.expect("committed");
    for (said, (n, (_, says))) in ran.said.iter().zip(wrong()) {
        match said {
            Err(Error::InBatch { index, source }) if *index == n => is_refused(source, says),
            other => panic!("{says}: {other:?}"),
        }
    }
    assert_eq!(number(db.pool(), WRITTEN).await, 2);
}

pub(crate) async fn what_waits_can_be_cancelled_once<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let waits = id(&done(&mut client, vec![Step::Publish(json(1).delay(PATIENCE * 100))]).await);
    let does_not = id(&done(&mut client, vec![Step::Publish(json(1))]).await);
    let twice = || vec![Step::Cancel(waits), Step::Cancel(waits)];
    let (yes, no) = (Said::Whether(true), Said::Whether(false));
    assert_eq!(undone(&mut client, twice()).await, [yes.clone(), no.clone()]);
    assert_eq!(
        number(db.pool(), "SELECT count(*) FROM postbox.scheduled").await,
        1
    );
    assert_eq!(done(&mut client, twice()).await, [yes, no.clone()]);
    assert_eq!(
        number(db.pool(), "SELECT count(*) FROM postbox.scheduled").await,
        0
    );
    for id in [waits, does_not, MessageId::new()] {
        assert_eq!(
            done(&mut client, vec![Step::Cancel(id)]).await,
            std::slice::from_ref(&no)
        );
    }
}

pub(crate) async fn what_waits_can_be_rescheduled_to_the_microsecond<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let waits = id(&done(&mut client, vec![Step::Publish(json(1).deliver_at(at(2050)))]).await);
    let does_not = id(&done(&mut client, vec![Step::Publish(json(1))]).await);
    let moved = "SELECT count(*) FROM postbox.scheduled WHERE deliver_at = '2100-01-02 03:04:05.678901+00'";
    let to: DateTime<Utc> = "2100-01-02T03:04:05.678901Z".parse().expect("an instant");
    let (yes, no) = (Said::Whether(true), Said::Whether(false));
    assert_eq!(
        undone(&mut client, vec![Step::Reschedule(waits, to)]).await,
        std::slice::from_ref(&yes)
    );
    assert_eq!(number(db.pool(), moved).await, 0);
    // Twice is no wonder: it still waits.
    for _ in 0..2 {
        assert_eq!(
            done(&mut client, vec![Step::Reschedule(waits, to)]).await,
            std::slice::from_ref(&yes)
        );
        assert_eq!(number(db.pool(), moved).await, 1);
    }
    let finer = to - TimeDelta::nanoseconds(999);
    assert_eq!(
        done(&mut client, vec![Step::Reschedule(waits, finer)]).await,
        std::slice::from_ref(&yes)
    );
    assert_eq!(number(db.pool(), moved).await, 1, "not earlier than asked for");
    done(&mut client, vec![Step::Cancel(waits)]).await;
    for id in [waits, does_not, MessageId::new()] {
        assert_eq!(
            done(&mut client, vec![Step::Reschedule(id, to)]).await,
            std::slice::from_ref(&no)
        );
    }
}

pub(crate) async fn a_deduplicated_message_has_the_id_of_the_first<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let message = |n: i64| json(n).dedup_key("checkout '42'");
    let rolled_back = id(&undone(&mut client, vec![Step::Publish(message(0))]).await);
    nothing_is_written(db.pool()).await;
    let first = id(&done(&mut client, vec![Step::Publish(message(1))]).await);
    assert_ne!(first, rolled_back, "the key was free");
    assert_eq!(
        id(&done(&mut client, vec![Step::Publish(message(2))]).await),
        first
    );
    let batch = vec![json(3), message(4), message(5)];
    let batch = ids(&done(&mut client, vec![Step::PublishAll(batch)]).await);
    assert_eq!(batch[1..], [first, first]);
    assert_eq!(number(db.pool(), WRITTEN).await, 2);
}

pub(crate) async fn who_publishes_to_an_ordered_key_second_waits_for_the_first<C: Client>() {
    let (db, mut first) = database::<C>().await;
    let ordered = |n: i64| json(n).key("k").ordered();
    for batch in [false, true] {
        let publish = |n: i64| match batch {
            false => Step::Publish(ordered(n)),
            true => Step::PublishAll(vec![ordered(n), ordered(n)]),
        };
        let (pause, mut paused) = pause();
        let steps = vec![publish(1), Step::Pause(pause)];
        let holds = tokio::spawn(async move {
            done(&mut first, steps).await;
            first
        });
        paused.reached().await;
        let mut second = C::connect(db.url()).await;
        let steps = vec![publish(2)];
        let waits = tokio::spawn(async move { done(&mut second, steps).await });
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' \
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
        eventually(PATIENCE, async || match number(db.pool(), waiting).await {
            1 => Ok(()),
            others => Err(format!("{others} wait")),
        })
        .await;
        assert!(!waits.is_finished());
        paused.go();
        first = holds.await.expect("no panic");
        waits.await.expect("no panic");
    }
    let order: Vec<String> =
        sqlx::query_scalar("SELECT convert_from(payload, 'UTF8') FROM postbox.outbox ORDER BY seq")
            .fetch_all(db.pool())
            .await
            .expect("payloads");
    assert_eq!(order, ["1", "2", "1", "1", "2", "2"]);
}

fn nightly(name: &str) -> Cron {
    let schedule = Schedule::parse("30 3 * * *", "Europe/Berlin").expect("a schedule");
    let message = Outgoing::bytes("ticks", "text/plain", b"\0\xff\\".to_vec())
        .key("it's \"NULL\"")
        .message_type("tick")
        .header("h", "\\ {}")
        .expires_in(Duration::from_micros(90_000_001));
    Cron::new(name, schedule, message)
}

const REGISTERED: &str =
    "SELECT count(DISTINCT to_jsonb(c) - '{name,computed_at,created_at}'::text[]) FROM postbox.cron c";

pub(crate) async fn a_recurring_message_is_registered_as_sqlx_registers_it<C: Client>() {
    let (db, mut client) = database::<C>().await;
    undone(&mut client, vec![Step::Register(nightly("nightly"))]).await;
    nothing_is_written(db.pool()).await;
    let first = due(&done(&mut client, vec![Step::Register(nightly("nightly"))]).await);
    let row = "SELECT next_at, xmin::text || ctid::text FROM postbox.cron WHERE name = 'nightly'";
    let read = async || -> (DateTime<Utc>, String) {
        sqlx::query_as(row)
            .fetch_one(db.pool())
            .await
            .expect("a schedule")
    };
    let before = read().await;
    assert_eq!(before.0, first);
    let again = due(&done(&mut client, vec![Step::Register(nightly("nightly"))]).await);
    assert_eq!(
        (again, before),
        (first, read().await),
        "what is the same is not written"
    );
    let mut tx = db.pool().begin().await.expect("a transaction");
    tx.register(nightly("ours")).await.expect("registered");
    tx.commit().await.expect("committed");
    // At half past three one of them would be of the next day.
    if due(&done(&mut client, vec![Step::Register(nightly("theirs"))]).await) == first {
        assert_eq!(number(db.pool(), REGISTERED).await, 1);
    }
}

pub(crate) async fn a_wrong_recurring_message_is_refused_and_the_transaction_goes_on<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let schedule = || Schedule::parse("@hourly", "UTC").expect("a schedule");
    let wrong = [
        (nightly("a name with spaces"), "a name with spaces"),
        (Cron::new("c", schedule(), json(1).ordered()), "ordered"),
        (Cron::new("c", schedule(), json(1).topic("a b")), "topic \"a b\""),
    ];
    let (steps, says): (Vec<Step>, Vec<&str>) = (wrong.into_iter())
        .map(|(cron, says)| (Step::Register(cron), says))
        .unzip();
    let good = [Step::Publish(json(1)), Step::Register(nightly("nightly"))];
    let ran = client
        .run(steps.into_iter().chain(good).collect(), End::Commit)
        .await;
    ran.ended.expect("committed");
    for (said, says) in ran.said.iter().zip(says) {
        is_refused(said.as_ref().expect_err(says), says);
    }
    assert_eq!(number(db.pool(), WRITTEN).await, 2);
}

fn of_the_database(said: postbox::Result<Said>) -> postbox::DatabaseError {
    match said {
        Err(Error::Database(error)) => error,
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn an_error_of_the_server_has_its_code_and_words<C: Client>() {
    let (db, mut client) = database::<C>().await;
    for step in [
        Step::Publish(json(1)),
        Step::PublishAll(vec![json(1)]),
        Step::Register(nightly("n")),
    ] {
        let steps = vec![
            Step::Sql("SET TRANSACTION READ ONLY"),
            step,
            Step::Publish(json(1)),
        ];
        let mut said = client.run(steps, End::Rollback).await.said.into_iter().skip(1);
        let refused = of_the_database(said.next().expect("the first"));
        assert_eq!(refused.code(), Some("25006"), "{refused:?}");
        let text = Error::Database(refused).to_string();
        assert!(text.ends_with("in a read-only transaction"), "{text}");
        let aborted = of_the_database(said.next().expect("the second"));
        if C::TELLS_ALL_CODES {
            assert_eq!(aborted.code(), Some("25P02"), "{aborted:?}");
        }
        assert!(
            aborted.to_string().contains("current transaction is aborted"),
            "{aborted}"
        );
    }
    nothing_is_written(db.pool()).await;
    done(&mut client, vec![Step::Publish(json(1))]).await;
    assert_eq!(number(db.pool(), WRITTEN).await, 1);
}

pub(crate) async fn a_broken_connection_is_an_error_and_nothing_is_written<C: Client>() {
    let (db, mut client) = database::<C>().await;
    let (pause, mut paused) = pause();
    let steps = vec![Step::Publish(json(1)), Step::Pause(pause), Step::Publish(json(2))];
    let breaks = tokio::spawn(async move { client.run(steps, End::Commit).await });
    paused.reached().await;
    let others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
         AND state = 'idle in transaction'";
    assert_eq!(number(db.pool(), others).await, 1);
    sqlx::raw_sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() \
             AND state = 'idle in transaction'",
    )
    .execute(db.pool())
    .await
    .expect("terminated");
    eventually(PATIENCE, async || match number(db.pool(), others).await {
        0 => Ok(()),
        _ => Err("it is still there"),
    })
    .await;
    paused.go();
    let mut ran = breaks.await.expect("no panic");
    let broken = of_the_database(ran.said.pop().expect("the last"));
    assert!(!broken.to_string().is_empty());
    assert!(ran.ended.is_err(), "it cannot have been committed");
    nothing_is_written(db.pool()).await;
    let mut another = C::connect(db.url()).await;
    done(&mut another, vec![Step::Publish(json(3))]).await;
    assert_eq!(number(db.pool(), WRITTEN).await, 1);
}
