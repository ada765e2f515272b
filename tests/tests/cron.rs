//! Recurring messages: each due time fires once, whatever the number of dispatchers, and never early.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Timelike, Utc};
use postbox::cron::{self, Cron, Missed, SCHEDULED_AT, Schedule};
use postbox::{Outgoing, Publish};
use postbox_consumer::{
    Consumer, Delivery, HandlerDefinition, HandlerError, ScheduledAt, State, Tx, handlers,
};
use postbox_dispatcher::{Dispatcher, DispatcherHandle};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::PgPool;

const SOON: Duration = Duration::from_secs(30);

async fn dispatcher(db: &TestDatabase) -> DispatcherHandle {
    Dispatcher::new(db.connect_pool(2))
        .start()
        .await
        .expect("a dispatcher")
}

fn every(expression: &str) -> Cron {
    let schedule = Schedule::parse(expression, "UTC").expect("a schedule");
    Cron::new("c", schedule, Outgoing::json("ticks", &7).key("k"))
}

async fn register(pool: &PgPool, cron: Cron) -> DateTime<Utc> {
    let mut tx = pool.begin().await.expect("a transaction");
    let next = tx.register(cron).await.expect("registered");
    tx.commit().await.expect("committed");
    next.expect("a next due time")
}

/// The due times of the firings, in the order of the outbox, each with when it was published.
async fn firings(pool: &PgPool) -> Vec<(DateTime<Utc>, DateTime<Utc>)> {
    sqlx::query_as(
        "SELECT (headers ->> 'postbox-scheduled-at')::timestamptz, published_at FROM postbox.outbox \
         WHERE topic = 'ticks' AND headers ->> 'postbox-cron' = 'c' ORDER BY seq",
    )
    .fetch_all(pool)
    .await
    .expect("the outbox")
}

async fn has_fired(pool: &PgPool, times: usize) -> Vec<(DateTime<Utc>, DateTime<Utc>)> {
    eventually(SOON, async || {
        let firings = firings(pool).await;
        if firings.len() >= times {
            return Ok(firings);
        }
        Err(format!("{} of {times}", firings.len()))
    })
    .await
}

// ------------------------------------------------------------------------------------------------------------------ firing

#[tokio::test]
async fn every_due_time_fires_once_and_not_early_with_several_dispatchers() {
    let db = TestDatabase::new().await.unwrap();
    let dispatchers = [
        dispatcher(&db).await,
        dispatcher(&db).await,
        dispatcher(&db).await,
    ];
    let first = register(db.pool(), every("* * * * * *")).await;
    let fired = has_fired(db.pool(), 5).await;
    for dispatcher in dispatchers {
        dispatcher.shutdown().await;
    }
    for (n, (due, published)) in fired.iter().enumerate() {
        assert_eq!(
            *due,
            first + TimeDelta::seconds(n as i64),
            "firing {n} of {fired:?}"
        );
        assert!(published >= due, "{due} fired at {published}");
        // Generous: the machine may be busy.
        assert!(
            *published - due < TimeDelta::seconds(10),
            "{due} fired at {published}"
        );
    }
}

#[tokio::test]
async fn of_many_who_fire_one_due_time_one_does() {
    let db = TestDatabase::new().await.unwrap();
    let next_at = register(db.pool(), every("* * * * * *")).await;
    db.advance(Duration::from_secs(2)).await.unwrap();
    let fire = || async {
        let fired: bool = sqlx::query_scalar(
            "SELECT postbox.fire('c', '* * * * * *', 'UTC', $1, ARRAY[$1], $1 + interval '1 second')",
        )
        .bind(next_at)
        .fetch_one(db.pool())
        .await
        .unwrap();
        usize::from(fired)
    };
    let fired = futures_util::future::join_all((0..10).map(|_| fire())).await;
    assert_eq!(fired.iter().sum::<usize>(), 1);
    assert_eq!(firings(db.pool()).await.len(), 1);
    let early = sqlx::query(
        "SELECT postbox.fire('c', '* * * * * *', 'UTC', $1, ARRAY[now() + interval '1 hour'], NULL)",
    )
    .bind(next_at + TimeDelta::seconds(1))
    .execute(db.pool())
    .await;
    assert!(early.unwrap_err().to_string().contains("would be early"));
}

#[tokio::test]
async fn a_firing_is_an_ordinary_message_with_its_due_time() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    let schedule = Schedule::parse("0 6 * * *", "Europe/Berlin").unwrap();
    let message = Outgoing::json("ticks", &serde_json::json!({"a": 1}))
        .message_type("tick")
        .key("k")
        .header("tenant", "acme")
        .expires_in(Duration::from_secs(60));
    let next_at = register(db.pool(), Cron::new("c", schedule, message)).await;
    db.advance(Duration::from_secs(86_400)).await.unwrap();
    let fired = has_fired(db.pool(), 1).await;
    assert_eq!(fired.len(), 1);
    assert_eq!(fired[0].0, next_at);
    let row: (String, String, String, i32, String) = sqlx::query_as(
        "SELECT type, key, headers ->> 'tenant', extract(epoch FROM expires_at - published_at)::integer, convert_from(payload, 'UTF8') \
         FROM postbox.outbox",
    )
    .fetch_one(db.pool())
    .await
    .unwrap();
    let expected = ("tick".into(), "k".into(), "acme".into(), 60, r#"{"a":1}"#.into());
    assert_eq!(row, expected);
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn missed_due_times_fire_by_the_policy() {
    for (missed, least, most) in [(Missed::Skip, 0, 2), (Missed::Once, 1, 2), (Missed::All, 60, 62)] {
        let db = TestDatabase::new().await.unwrap();
        let next_at = register(db.pool(), every("* * * * *").missed(missed)).await;
        // No dispatcher for an hour.
        db.advance(Duration::from_secs(3_600)).await.unwrap();
        let dispatcher = dispatcher(&db).await;
        eventually(SOON, async || {
            let found = cron::find(&mut db.pool().acquire().await.unwrap(), "c")
                .await
                .unwrap();
            match found.and_then(|found| found.next_at) {
                Some(moved) if moved > next_at + TimeDelta::minutes(58) => Ok(()),
                other => Err(format!("next is {other:?}")),
            }
        })
        .await;
        let fired = firings(db.pool()).await;
        let found = cron::find(&mut db.pool().acquire().await.unwrap(), "c").await;
        let after = found.unwrap().and_then(|found| found.next_at).unwrap();
        // A minute may have begun meanwhile.
        assert!(
            (least..=most).contains(&fired.len()),
            "{missed:?}: {}",
            fired.len()
        );
        let due: HashSet<_> = fired.iter().map(|(due, _)| *due).collect();
        assert_eq!(due.len(), fired.len(), "{missed:?}: each once");
        assert!(fired.is_sorted(), "{missed:?}: in order");
        assert!(fired.iter().all(|(due, _)| *due < after && due.second() == 0));
        dispatcher.shutdown().await;
    }
}

#[tokio::test]
async fn a_due_time_does_not_fire_again_when_the_clock_is_set_back_or_the_schedule_registered_anew() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    let due = register(db.pool(), every("0 0 * * *")).await;
    db.advance(Duration::from_secs(86_400)).await.unwrap();
    has_fired(db.pool(), 1).await;
    // Back by a day, and twice another schedule.
    sqlx::raw_sql("CREATE OR REPLACE FUNCTION postbox.clock() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE RETURN clock_timestamp()")
        .execute(db.pool())
        .await
        .unwrap();
    register(db.pool(), every("@daily")).await;
    let next = register(db.pool(), every("0 0 * * *")).await;
    assert_eq!(next, due + TimeDelta::days(1));
    dispatcher.shutdown().await;
}

// ---------------------------------------------------------------------------------------------------------------- the register

#[tokio::test(flavor = "multi_thread")]
async fn all_who_register_the_same_at_once_are_told_its_next_due_time() {
    let db = TestDatabase::new().await.unwrap();
    for round in 0..20 {
        sqlx::query("DELETE FROM postbox.cron")
            .execute(db.pool())
            .await
            .unwrap();
        let pool = db.connect_pool(8);
        let registering = (0..8).map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { register(&pool, every("0 3 * * *")).await })
        });
        let mut due = Vec::new();
        for registering in registering.collect::<Vec<_>>() {
            due.push(registering.await.unwrap());
        }
        assert!(due.iter().all(|next| *next == due[0]), "round {round}: {due:?}");
    }
}

#[tokio::test]
async fn registering_again_changes_nothing_unless_something_changed() {
    let db = TestDatabase::new().await.unwrap();
    let next_at = register(db.pool(), every("0 0 1 1 *")).await;
    db.advance(Duration::from_secs(10)).await.unwrap();
    let version = async || -> String {
        sqlx::query_scalar("SELECT ctid::text || xmin::text FROM postbox.cron")
            .fetch_one(db.pool())
            .await
            .unwrap()
    };
    let before = version().await;
    assert_eq!(register(db.pool(), every("0 0 1 1 *")).await, next_at);
    assert_eq!(version().await, before, "nothing was written");
    assert_eq!(
        register(db.pool(), every("0 0 1 1 *").missed(Missed::All)).await,
        next_at
    );
    let changed = register(db.pool(), every("0 12 * * *")).await;
    assert!(changed < Utc::now() + TimeDelta::days(2), "{changed}");
}

#[tokio::test]
async fn a_paused_schedule_does_not_fire_nor_make_up_for_it_when_it_is_resumed() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = dispatcher(&db).await;
    register(db.pool(), every("0 0 * * *").missed(Missed::All)).await;
    let mut connection = db.connect().await.unwrap();
    assert!(cron::pause(&mut connection, "c").await.unwrap());
    assert!(!cron::pause(&mut connection, "no such").await.unwrap());
    db.advance(Duration::from_secs(3 * 86_400)).await.unwrap();
    assert!(cron::resume(&mut connection, "c").await.unwrap());
    assert!(!cron::resume(&mut connection, "no such").await.unwrap());
    let resumed = cron::find(&mut connection, "c").await.unwrap().unwrap();
    assert!(
        resumed.next_at.unwrap() > Utc::now() + TimeDelta::days(2),
        "{resumed:?}"
    );
    db.advance(Duration::from_secs(86_400)).await.unwrap();
    let fired = has_fired(db.pool(), 1).await;
    assert_eq!(fired.len(), 1, "{fired:?}");
    assert_eq!(Some(fired[0].0), resumed.next_at);

    assert!(cron::remove(&mut connection, "c").await.unwrap());
    assert!(!cron::remove(&mut connection, "c").await.unwrap());
    assert!(cron::list(&mut connection).await.unwrap().is_empty());
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn a_schedule_that_cannot_be_read_holds_up_no_other() {
    let db = TestDatabase::new().await.unwrap();
    sqlx::query("INSERT INTO postbox.cron (name, schedule, time_zone, missed, topic, payload, next_at) VALUES ('bad', 'every day', 'UTC', 'once', 'x', '1', postbox.clock())")
        .execute(db.pool())
        .await
        .unwrap();
    let dispatcher = dispatcher(&db).await;
    register(db.pool(), every("* * * * * *")).await;
    has_fired(db.pool(), 2).await;
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn what_a_recurring_message_cannot_have_is_refused() {
    let db = TestDatabase::new().await.unwrap();
    let mut tx = db.pool().begin().await.unwrap();
    let schedule = || Schedule::parse("@daily", "UTC").unwrap();
    let message = || Outgoing::json("t", &1);
    for (cron, says) in [
        (Cron::new("a b", schedule(), message()), "cron name \"a b\""),
        (
            Cron::new("a", schedule(), message().delay(SOON)),
            "no deliver_at or delay",
        ),
        (
            Cron::new("a", schedule(), message().dedup_key("d")),
            "no dedup_key",
        ),
        (Cron::new("a", schedule(), message().ordered()), "no ordered"),
        (
            Cron::new("a", schedule(), message().expires_at(Utc::now())),
            "no expires_at",
        ),
        (
            Cron::new("a", schedule(), message().topic("a b")),
            "topic \"a b\"",
        ),
    ] {
        let error = tx.register(cron).await.unwrap_err().to_string();
        assert!(error.contains(says), "{error:?} says {says:?}");
    }
}

// -------------------------------------------------------------------------------------------------------------- handlers in code

type Runs = Arc<Mutex<Vec<(DateTime<Utc>, String)>>>;

#[postbox_consumer::cron("* * * * * *", tz = "Europe/Berlin", missed = "all")]
async fn tick(
    at: ScheduledAt,
    delivery: Delivery,
    State(runs): State<Runs>,
    mut tx: Tx,
) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO effect (due) VALUES ($1)")
        .bind(at.0)
        .execute(&mut *tx)
        .await?;
    assert_eq!(
        delivery.headers.get(SCHEDULED_AT).map(str::parse),
        Some(Ok(at.0)),
        "the header that the extractor reads"
    );
    runs.lock()
        .expect("no other panics")
        .push((at.0, delivery.topic.to_string()));
    Ok(())
}

#[postbox_consumer::cron("0 25 * * *", name = "wrong")]
async fn wrong(_at: ScheduledAt) {}

#[tokio::test]
async fn a_cron_handler_runs_once_for_each_due_time_on_one_of_its_instances() {
    let db = TestDatabase::new().await.unwrap();
    sqlx::raw_sql("CREATE TABLE effect (due timestamptz PRIMARY KEY)")
        .execute(db.pool())
        .await
        .unwrap();
    let dispatcher = dispatcher(&db).await;
    let runs = Runs::default();
    let consumer = || {
        Consumer::new(db.pool().clone())
            .handlers(handlers![tick])
            .state(runs.clone())
    };
    let consumers = [
        consumer().start().await.unwrap(),
        consumer().start().await.unwrap(),
    ];
    eventually(SOON, async || match runs.lock().unwrap().len() {
        n if n >= 4 => Ok(()),
        n => Err(format!("{n} runs")),
    })
    .await;
    for consumer in consumers {
        consumer.shutdown().await.unwrap();
    }
    let runs = runs.lock().unwrap().clone();
    for pair in runs.windows(2) {
        assert_eq!(pair[1].0 - pair[0].0, TimeDelta::seconds(1), "{runs:?}");
    }
    assert_eq!(runs[0].1, "cron/postbox-tests/tick");
    let registered = cron::list(&mut db.pool().acquire().await.unwrap()).await.unwrap();
    assert_eq!(registered[0].name, "postbox-tests/tick");
    assert_eq!(registered[0].time_zone, "Europe/Berlin");
    assert_eq!(registered[0].missed, "all");
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn a_wrong_schedule_is_an_error_at_the_start_that_shows_where_it_is_wrong() {
    let db = TestDatabase::new().await.unwrap();
    let start =
        |handlers: Vec<HandlerDefinition>| Consumer::new(db.pool().clone()).handlers(handlers).start();
    let error = start(handlers![wrong]).await.unwrap_err().to_string();
    assert!(
        error
            .ends_with("cron expression \"0 25 * * *\", column 3: \"25\" is no hour (0 to 23, with * , - /)")
            && error.contains("::wrong"),
        "{error}"
    );
    let zone = HandlerDefinition::new("zone")
        .cron("zone", "@daily", "Europe/Berlyn")
        .call(|_| Box::pin(async { Ok(()) }));
    let error = start(vec![zone]).await.unwrap_err().to_string();
    assert!(
        error.contains("time zone \"Europe/Berlyn\" is not known"),
        "{error}"
    );
    assert!(
        cron::list(&mut db.pool().acquire().await.unwrap())
            .await
            .unwrap()
            .is_empty()
    );
}
