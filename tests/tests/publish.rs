//! Publishing: what is stored, what is refused, what is deduplicated, what is ordered, and that it waits for nobody.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::{Error, MAX_HEADERS, MessageId, Outgoing, Publish};
use postbox_consumer::{Consumer, Delivery, Raw, State, handler, handlers};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestDatabase, eventually};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, Postgres, Transaction};
use uuid::Uuid;

mod ledger;
mod role;
use ledger::step;
use role::Role;

const SOON: Duration = Duration::from_secs(30);

async fn run(connection: &mut PgConnection, sql: impl Into<String>) {
    try_run(connection, sql).await.expect("a statement of the test");
}

async fn try_run(connection: &mut PgConnection, sql: impl Into<String>) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(sql.into()))
        .execute(connection)
        .await
        .map(drop)
}

async fn begin(pool: &PgPool) -> Transaction<'static, Postgres> {
    pool.begin().await.expect("a transaction")
}

async fn publish(tx: &mut Transaction<'_, Postgres>, outgoing: Outgoing) -> Uuid {
    tx.publish(outgoing).await.expect("published").as_uuid()
}

/// In a transaction of its own.
async fn publish_alone(pool: &PgPool, outgoing: Outgoing) -> Uuid {
    let mut tx = begin(pool).await;
    let id = publish(&mut tx, outgoing).await;
    tx.commit().await.expect("committed");
    id
}

async fn stored(pool: &PgPool) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM postbox.outbox")
        .fetch_one(pool)
        .await
        .expect("the outbox")
}

/// Publishing waits for no lock at all, so any wait is an error.
async fn waits_for_no_lock(connection: &mut PgConnection) {
    run(connection, "SET lock_timeout = '1s'").await;
}

/// Waits until so many backends of this database wait for a lock.
async fn waiters(db: &TestDatabase, expected: i64) {
    eventually(SOON, async || {
        let waiting: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
        .fetch_one(db.pool())
        .await
        .map_err(|error| error.to_string())?;
        if waiting == expected { Ok(()) } else { Err(format!("{waiting} of {expected} wait")) }
    })
    .await;
}

// ------------------------------------------------------------------------------------------------------ what is stored

#[derive(Debug, PartialEq, sqlx::FromRow)]
struct Row {
    topic: String,
    r#type: Option<String>,
    key: Option<String>,
    headers: Option<serde_json::Value>,
    content_type: Option<String>,
    payload: Vec<u8>,
}

const ROWS: &str = "SELECT topic, type, key, headers, content_type, payload FROM postbox.outbox ORDER BY seq";

#[derive(Clone, Debug, PartialEq)]
struct Seen {
    message_type: Option<String>,
    key: Option<String>,
    headers: postbox::Headers,
    content_type: String,
    payload: Vec<u8>,
}

type All = Arc<Mutex<Vec<Seen>>>;

#[handler(group = "g", topic = "t")]
async fn see(delivery: Delivery, raw: Raw, State(all): State<All>) {
    all.lock().expect("no panic").push(Seen {
        message_type: delivery.message_type.as_deref().map(str::to_owned),
        key: delivery.key,
        headers: delivery.headers,
        content_type: raw.content_type,
        payload: raw.payload,
    });
}

/// The same message by every way there is; returns the ids.
async fn by_every_way(
    db: &TestDatabase,
    outgoing: impl Fn() -> Outgoing,
    values: &str,
    by_function: &str,
) -> Vec<Uuid> {
    let mut tx = begin(db.pool()).await;
    let mut ids = vec![publish(&mut tx, outgoing()).await];
    ids.extend(
        tx.publish_all([outgoing()])
            .await
            .expect("it works")
            .iter()
            .map(MessageId::as_uuid),
    );
    ids.push(publish(&mut tx, outgoing().ordered()).await);
    ids.push(publish(&mut tx, outgoing().dedup_key("d")).await);
    for sql in [
        format!(
            "INSERT INTO postbox.outbox (topic, type, key, headers, content_type, payload) VALUES ({values}) RETURNING id"
        ),
        format!("SELECT {by_function}"),
    ] {
        let id = sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_one(&mut *tx)
            .await
            .expect("it works");
        ids.push(id);
    }
    tx.commit().await.expect("it works");
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_way_of_publishing_stores_and_delivers_the_same() {
    let db = TestDatabase::new().await.unwrap();
    let mut ids = by_every_way(
        &db,
        || {
            Outgoing::json("t", "hé")
                .message_type("a.b")
                .key("k ü")
                .header("tenant", "acme")
        },
        "'t', 'a.b', 'k ü', '{\"tenant\": \"acme\"}', NULL, convert_to('\"hé\"', 'UTF8')",
        "postbox.publish('t', '\"hé\"', key => 'k ü', type => 'a.b', headers => '{\"tenant\": \"acme\"}')",
    )
    .await;
    ids.extend(
        by_every_way(
            &db,
            || Outgoing::bytes("t", "image/png", [0, 255, 10, 92]),
            "'t', NULL, NULL, NULL, 'image/png', '\\x00ff0a5c'",
            "postbox.publish_bytes('t', '\\x00ff0a5c', 'image/png', headers => '{}')",
        )
        .await
        .into_iter()
        // The deduplication key is the first message's.
        .enumerate()
        .filter(|(way, _)| *way != 3)
        .map(|(_, id)| id),
    );
    let json = Row {
        topic: "t".into(),
        r#type: Some("a.b".into()),
        key: Some("k ü".into()),
        headers: Some(serde_json::json!({"tenant": "acme"})),
        content_type: None,
        payload: "\"hé\"".into(),
    };
    let bytes = Row {
        topic: "t".into(),
        r#type: None,
        key: None,
        headers: None,
        content_type: Some("image/png".into()),
        payload: vec![0, 255, 10, 92],
    };
    let rows: Vec<Row> = sqlx::query_as(ROWS).fetch_all(db.pool()).await.unwrap();
    assert_eq!(rows.len(), 11);
    assert!(rows[..6].iter().all(|row| *row == json), "{rows:#?}");
    assert!(rows[6..].iter().all(|row| *row == bytes), "{rows:#?}");
    let by_seq: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM postbox.outbox ORDER BY seq")
        .fetch_all(db.pool())
        .await
        .unwrap();
    assert_eq!(by_seq, ids, "the ids that were returned");

    let all = All::default();
    let dispatcher = Dispatcher::new(db.pool().clone()).start().await.unwrap();
    let consumer = Consumer::new(db.pool().clone())
        .state(all.clone())
        .handlers(handlers![see])
        .start()
        .await
        .unwrap();
    eventually(SOON, async || match all.lock().expect("no panic").len() {
        11 => Ok(()),
        n => Err(format!("{n} delivered")),
    })
    .await;
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
    let all = all.lock().unwrap().clone();
    let (of_json, of_bytes): (Vec<Seen>, Vec<Seen>) = all.into_iter().partition(|seen| seen.key.is_some());
    assert_eq!(of_json.len(), 6);
    for seen in of_json {
        assert_eq!(
            (seen.message_type.as_deref(), seen.key.as_deref()),
            (Some("a.b"), Some("k ü"))
        );
        assert_eq!(seen.headers, [("tenant", "acme")].into_iter().collect());
        assert_eq!(
            (seen.content_type.as_str(), seen.payload.as_slice()),
            ("application/json", "\"hé\"".as_bytes())
        );
    }
    for seen in of_bytes {
        assert_eq!((seen.message_type, seen.headers.is_empty()), (None, true));
        assert_eq!(
            (seen.content_type.as_str(), seen.payload),
            ("image/png", vec![0, 255, 10, 92])
        );
    }
}

#[tokio::test]
async fn ids_are_returned_in_order_unique_and_of_version_7() {
    let db = TestDatabase::new().await.unwrap();
    let mut tx = begin(db.pool()).await;
    let batch: Vec<Outgoing> = (0..500).map(|n| Outgoing::json("t", &n)).collect();
    let announced: Vec<MessageId> = batch.iter().map(Outgoing::id).collect();
    let ids = tx.publish_all(batch).await.unwrap();
    assert_eq!(ids, announced, "the id is known before");
    let deduplicated = (0..100).map(|n| Outgoing::json("t", &n).dedup_key(n.to_string()));
    let more = tx.publish_all(deduplicated).await.unwrap();
    let mut from_sql: Vec<Uuid> =
        sqlx::query_scalar("SELECT postbox.publish('t', to_jsonb(n)) FROM generate_series(1, 100) n")
            .fetch_all(&mut *tx)
            .await
            .unwrap();
    tx.commit().await.unwrap();
    let stored: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM postbox.outbox ORDER BY seq")
        .fetch_all(db.pool())
        .await
        .unwrap();
    let mut all: Vec<Uuid> = ids.iter().chain(&more).map(MessageId::as_uuid).collect();
    assert!(all.is_sorted(), "as they were made");
    all.append(&mut from_sql);
    assert_eq!(stored, all);
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), 700);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_millis();
    for id in all {
        assert_eq!(
            (id.get_version_num(), id.get_variant()),
            (7, uuid::Variant::RFC4122)
        );
        let (seconds, nanos) = id.get_timestamp().expect("a time in it").to_unix();
        let made = u128::from(seconds) * 1_000 + u128::from(nanos / 1_000_000);
        assert!(now.abs_diff(made) < 60_000, "{id} was made now");
    }
}

#[tokio::test]
async fn each_message_of_a_batch_has_its_own_topic_and_type() {
    let db = TestDatabase::new().await.unwrap();
    let kinds: [&[(&str, Option<&str>)]; 5] = [
        &[("t", None), ("t", None)],
        &[("t", Some("a")), ("t", Some("a"))],
        &[("t", Some("a")), ("t", Some("b"))],
        &[("t", Some("a")), ("t", None)],
        &[("t", Some("a")), ("u", Some("a"))],
    ];
    for batch in kinds {
        let mut tx = begin(db.pool()).await;
        let messages = batch.iter().map(|(topic, message_type)| {
            let message = Outgoing::json(*topic, "x");
            match message_type {
                Some(message_type) => message.message_type(*message_type),
                None => message,
            }
        });
        tx.publish_all(messages).await.unwrap();
        let stored: Vec<(String, Option<String>)> =
            sqlx::query_as("SELECT topic, type FROM postbox.outbox ORDER BY seq")
                .fetch_all(&mut *tx)
                .await
                .unwrap();
        let stored: Vec<_> = stored
            .iter()
            .map(|(topic, message_type)| (topic.as_str(), message_type.as_deref()))
            .collect();
        assert_eq!(stored, batch);
        tx.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn up_to_ten_thousand_messages_are_one_statement_and_keep_their_order() {
    let db = TestDatabase::new().await.unwrap();
    // The trigger is called once a statement.
    run(
        &mut db.connect().await.unwrap(),
        "CREATE TABLE statements (n serial); \
         CREATE FUNCTION note_statement() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN INSERT INTO statements DEFAULT VALUES; RETURN NULL; END'; \
         CREATE TRIGGER note AFTER INSERT ON postbox.outbox FOR EACH STATEMENT EXECUTE FUNCTION note_statement()",
    )
    .await;
    let megabyte = vec![0; 1024 * 1024];
    for (batch, statements) in [(0..0, 0_i64), (0..10_000, 1), (0..10_001, 2)] {
        let mut tx = begin(db.pool()).await;
        let messages = batch.clone().map(|n: i64| Outgoing::json("t", &n.to_string()));
        let ids = tx.publish_all(messages).await.unwrap();
        assert_eq!(ids.len() as i64, batch.end);
        let seen: i64 = sqlx::query_scalar("SELECT count(*) FROM statements")
            .fetch_one(&mut *tx)
            .await
            .unwrap();
        assert_eq!(seen, statements, "for {} messages", batch.end);
        let stored: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM postbox.outbox ORDER BY seq")
            .fetch_all(&mut *tx)
            .await
            .unwrap();
        assert_eq!(stored, ids.iter().map(MessageId::as_uuid).collect::<Vec<_>>());
        tx.rollback().await.unwrap();
    }
    // And up to 32 MiB.
    let mut tx = begin(db.pool()).await;
    tx.publish_all((0..33).map(|_| Outgoing::bytes("t", "x/y", megabyte.clone())))
        .await
        .unwrap();
    let seen: i64 = sqlx::query_scalar("SELECT count(*) FROM statements")
        .fetch_one(&mut *tx)
        .await
        .unwrap();
    assert_eq!(seen, 2);
    tx.rollback().await.unwrap();
}

#[tokio::test]
async fn what_is_rolled_back_was_never_published() {
    let db = TestDatabase::new().await.unwrap();
    let mut tx = begin(db.pool()).await;
    publish(&mut tx, Outgoing::json("t", "x")).await;
    tx.rollback().await.unwrap();
    let mut tx = begin(db.pool()).await;
    publish(&mut tx, Outgoing::json("t", "x")).await;
    drop(tx);
    assert_eq!(stored(db.pool()).await, 0);
    assert_eq!(step(db.pool()).await, 0);
}

// ----------------------------------------------------------------------------------------------------- what is refused

struct NoJson;

impl serde::Serialize for NoJson {
    fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("it has no JSON"))
    }
}

fn ok() -> Outgoing {
    Outgoing::json("t", "ok")
}

#[tokio::test]
async fn bad_input_is_refused_and_the_transaction_stays_usable() {
    let db = TestDatabase::new().await.unwrap();
    type Case = (fn() -> Outgoing, fn(&Error) -> bool);
    let cases: [Case; 21] = [
        (|| ok().topic(""), |e| matches!(e, Error::InvalidTopic(_))),
        (|| ok().topic("a b"), |e| matches!(e, Error::InvalidTopic(_))),
        (|| ok().topic("a\n"), |e| matches!(e, Error::InvalidTopic(_))),
        (
            || ok().topic("t".repeat(256)),
            |e| matches!(e, Error::InvalidTopic(_)),
        ),
        (|| ok().message_type(""), |e| matches!(e, Error::InvalidType(_))),
        (|| ok().message_type("ä"), |e| matches!(e, Error::InvalidType(_))),
        (
            || ok().key("é".repeat(513)),
            |e| matches!(e, Error::KeyTooLong(1_026)),
        ),
        (
            || ok().key("a\0"),
            |e| matches!(e, Error::NulCharacter { field: "key" }),
        ),
        (
            || ok().header("a b", ""),
            |e| matches!(e, Error::InvalidHeaderName(_)),
        ),
        (
            || ok().header("", ""),
            |e| matches!(e, Error::InvalidHeaderName(_)),
        ),
        (
            || ok().header("postbox-x", ""),
            |e| matches!(e, Error::InvalidHeaderName(_)),
        ),
        (
            || ok().header("a", "\0"),
            |e| matches!(e, Error::NulCharacter { field: "headers" }),
        ),
        (
            || ok().header("a", "v".repeat(MAX_HEADERS)),
            |e| matches!(e, Error::HeadersTooLarge(_)),
        ),
        (
            || Outgoing::bytes("t", "", []),
            |e| matches!(e, Error::InvalidContentType(_)),
        ),
        (
            || Outgoing::bytes("t", "a/b\0", []),
            |e| matches!(e, Error::InvalidContentType(_)),
        ),
        (
            || Outgoing::bytes("t", "a/b", vec![0; 1024 * 1024 + 1]),
            |e| {
                matches!(
                    e,
                    Error::PayloadTooLarge {
                        size: 1_048_577,
                        limit: 1_048_576
                    }
                )
            },
        ),
        (|| ok().dedup_key(""), |e| matches!(e, Error::InvalidDedupKey(0))),
        (
            || ok().dedup_key("a\0"),
            |e| matches!(e, Error::NulCharacter { .. }),
        ),
        (
            || ok().dedup_key("a").dedup_window(Duration::ZERO),
            |e| matches!(e, Error::InvalidDedupWindow(_)),
        ),
        (
            || {
                ok().dedup_key("a")
                    .dedup_window(Duration::from_secs(11 * 366 * 86_400))
            },
            |e| matches!(e, Error::InvalidDedupWindow(_)),
        ),
        (|| Outgoing::json("t", &NoJson), |e| matches!(e, Error::Encode(_))),
    ];
    let mut tx = begin(db.pool()).await;
    for (n, (bad, is_expected)) in cases.iter().enumerate() {
        let error = tx.publish(bad()).await.expect_err("refused");
        assert!(is_expected(&error), "case {n}: {error:?}");
        let batch = [ok(), ok(), bad(), ok()];
        match tx.publish_all(batch).await.expect_err("refused") {
            Error::InBatch { index: 2, source } => assert!(is_expected(&source), "case {n}: {source:?}"),
            other => panic!("case {n}: {other:?}"),
        }
        publish(&mut tx, ok().key(n.to_string())).await;
    }
    tx.commit().await.unwrap();
    let keys: Vec<Option<String>> = sqlx::query_scalar("SELECT key FROM postbox.outbox ORDER BY seq")
        .fetch_all(db.pool())
        .await
        .unwrap();
    let expected: Vec<_> = (0..cases.len()).map(|n| Some(n.to_string())).collect();
    assert_eq!(keys, expected, "the good ones, and none of a refused batch");
}

#[tokio::test]
async fn what_is_just_within_the_limits_is_accepted_by_the_database_too() {
    let db = TestDatabase::new().await.unwrap();
    // Characters that JSON writes in other lengths than they have.
    let tricky = "\u{1}\u{8}\u{7f}\"\\/\n\té\u{2028}😀".repeat(100);
    let too_large = ok()
        .header("a", tricky.clone())
        .header("b", "x".repeat(MAX_HEADERS));
    let mut tx = begin(db.pool()).await;
    let Err(Error::HeadersTooLarge(size)) = tx.publish(too_large).await else {
        panic!("its headers are too large");
    };
    let fits = MAX_HEADERS - (size - MAX_HEADERS);
    let largest = |fits: usize| {
        Outgoing::bytes("t".repeat(255), "x".repeat(255), vec![0; 1024 * 1024])
            .message_type("y".repeat(255))
            .key("é".repeat(512))
            .header("a", tricky.clone())
            .header("b", "x".repeat(fits))
            .dedup_key("ü".repeat(512))
            .dedup_window(Duration::from_secs(10 * 366 * 86_400))
    };
    assert!(matches!(
        tx.publish(largest(fits + 1)).await,
        Err(Error::HeadersTooLarge(_))
    ));
    publish(&mut tx, largest(fits)).await;
    publish(&mut tx, Outgoing::bytes("t", "a/b", [])).await;
    tx.commit().await.unwrap();
    let headers: i32 = sqlx::query_scalar("SELECT max(octet_length(headers::text)) FROM postbox.outbox")
        .fetch_one(db.pool())
        .await
        .unwrap();
    assert_eq!(headers as usize, MAX_HEADERS, "both count alike");
}

#[tokio::test]
async fn the_database_refuses_bad_input_of_other_clients() {
    let db = TestDatabase::new().await.unwrap();
    let mut connection = db.connect().await.unwrap();
    for (call, says) in [
        ("publish('', '1')", "topic '' is not allowed"),
        ("publish('a b', '1')", "topic 'a b' is not allowed"),
        ("publish('ä', '1')", "topic 'ä' is not allowed"),
        ("publish(E'a\\n', '1')", "is not allowed: a topic is 1 to 255"),
        (
            "publish(repeat('t', 256), '1')",
            "is not allowed: a topic is 1 to 255",
        ),
        ("publish('t', '1', type => '')", "type '' is not allowed"),
        ("publish('t', '1', type => 'a,b')", "type 'a,b' is not allowed"),
        (
            "publish('t', '1', key => repeat('é', 513))",
            "the key has 1026 bytes",
        ),
        (
            "publish('t', '1', headers => '[]')",
            "the headers are a JSON array",
        ),
        (
            "publish('t', '1', headers => '\"a\"')",
            "the headers are a JSON string",
        ),
        (
            "publish('t', '1', headers => jsonb_build_object('a', repeat('v', 16384)))",
            "the headers have 16393 bytes",
        ),
        (
            "publish_bytes('t', '\\x00', '')",
            "content type '' is not allowed",
        ),
        (
            "publish_bytes('t', '\\x00', repeat('c', 256))",
            "content type 'cccc",
        ),
        (
            "publish('t', '1', dedup_key => '')",
            "deduplication key has 0 bytes",
        ),
        (
            "publish('t', '1', dedup_key => repeat('d', 1025))",
            "deduplication key has 1025 bytes",
        ),
    ] {
        let error = try_run(&mut connection, format!("SELECT postbox.{call}"))
            .await
            .expect_err(call);
        let error = error.as_database_error().expect("by the database");
        assert_eq!(error.code().as_deref(), Some("23514"), "{call}: {error}");
        assert!(error.to_string().contains(says), "{call}: {error}");
    }
    for arguments in ["NULL, '1'", "'t', NULL"] {
        let sql = format!("SELECT postbox.publish({arguments})");
        let error = try_run(&mut connection, sql).await.expect_err("refused");
        let code = error
            .as_database_error()
            .and_then(|error| error.code().map(String::from));
        assert_eq!(code.as_deref(), Some("23502"), "{arguments}");
    }
    assert_eq!(stored(db.pool()).await, 0);
}

// ------------------------------------------------------------------------------------------------- what is deduplicated

fn once(text: &str) -> Outgoing {
    Outgoing::json("t", text).dedup_key("order-42")
}

#[tokio::test]
async fn a_message_published_again_within_the_window_is_the_first_one() {
    let db = TestDatabase::new().await.unwrap();
    let first = publish_alone(db.pool(), once("a")).await;
    assert_eq!(publish_alone(db.pool(), once("b")).await, first);
    let by_sql: Uuid = sqlx::query_scalar("SELECT postbox.publish('t', '1', dedup_key => 'order-42')")
        .fetch_one(db.pool())
        .await
        .unwrap();
    assert_eq!(by_sql, first, "in SQL too");
    // Within one batch and transaction, among others.
    let mut tx = begin(db.pool()).await;
    let new = |key: &str| Outgoing::json("t", key).dedup_key(key.to_owned());
    let ids = tx
        .publish_all([new("n"), once("c"), Outgoing::json("t", "plain"), new("n")])
        .await
        .unwrap();
    let again = publish(&mut tx, new("n")).await;
    tx.commit().await.unwrap();
    assert_eq!(ids[1].as_uuid(), first);
    assert_eq!((ids[3], again), (ids[0], ids[0].as_uuid()));
    // Another topic's keys are others.
    assert_ne!(publish_alone(db.pool(), once("d").topic("u")).await, first);
    let stored: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM postbox.outbox ORDER BY seq")
        .fetch_all(db.pool())
        .await
        .unwrap();
    assert_eq!(stored[..3], [first, ids[0].as_uuid(), ids[2].as_uuid()]);
    assert_eq!(stored.len(), 4);
}

#[tokio::test]
async fn after_the_window_a_message_is_published_anew() {
    let db = TestDatabase::new().await.unwrap();
    let first = publish_alone(db.pool(), once("a").dedup_window(Duration::from_secs(600))).await;
    let window: f64 = sqlx::query_scalar(
        "SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM postbox.dedup",
    )
    .fetch_one(db.pool())
    .await
    .unwrap();
    assert!((500.0..=600.0).contains(&window), "{window} s");
    let expire = "UPDATE postbox.dedup SET expires_at = clock_timestamp()";
    sqlx::query(expire).execute(db.pool()).await.unwrap();
    let second = publish_alone(db.pool(), once("b")).await;
    assert_ne!(second, first);
    assert_eq!(
        publish_alone(db.pool(), once("c")).await,
        second,
        "its window has begun"
    );
    // Nor does a key that was cleared away matter.
    sqlx::query("DELETE FROM postbox.dedup")
        .execute(db.pool())
        .await
        .unwrap();
    assert_ne!(publish_alone(db.pool(), once("d")).await, second);
    assert_eq!(stored(db.pool()).await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_that_publish_with_one_key_at_once_publish_one_message() {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    // Whether the key is new or its window has just ended.
    for (round, expired) in [(1, false), (2, true)] {
        if expired {
            let expire = "UPDATE postbox.dedup SET expires_at = clock_timestamp()";
            sqlx::query(expire).execute(db.pool()).await.unwrap();
        }
        let mut first = begin(db.pool()).await;
        let first_id = publish(&mut first, once("first")).await;
        let others: Vec<_> = (0..5)
            .map(|_| {
                let db = db.clone();
                tokio::spawn(async move { publish_alone(db.pool(), once("other")).await })
            })
            .collect();
        waiters(&db, 5).await;
        first.commit().await.unwrap();
        for other in others {
            assert_eq!(other.await.unwrap(), first_id);
        }
        assert_eq!(stored(db.pool()).await, round);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deduplication_key_of_a_transaction_that_rolls_back_is_free_again() {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let mut first = begin(db.pool()).await;
    let gone = publish(&mut first, once("first")).await;
    let others: Vec<_> = (0..3)
        .map(|_| {
            let db = db.clone();
            tokio::spawn(async move { publish_alone(db.pool(), once("other")).await })
        })
        .collect();
    waiters(&db, 3).await;
    first.rollback().await.unwrap();
    let mut ids = HashSet::new();
    for other in others {
        ids.insert(other.await.unwrap());
    }
    assert_eq!(ids.len(), 1, "one of the others is the first now");
    assert!(!ids.contains(&gone));
    assert_eq!(stored(db.pool()).await, 1);
    // Also within a transaction, back to a savepoint.
    let mut tx = begin(db.pool()).await;
    let mut inner = tx.begin().await.unwrap();
    publish(&mut inner, once("x").topic("u")).await;
    inner.rollback().await.unwrap();
    publish(&mut tx, once("y").topic("u")).await;
    tx.commit().await.unwrap();
    assert_eq!(stored(db.pool()).await, 2);
}

// ------------------------------------------------------------------------------------------------------ what is ordered

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ordered_transactions_on_one_key_publish_in_the_order_in_which_they_commit() {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let ordered = |text: &str| Outgoing::json("t", text).key("k").ordered();
    for by_sql in [false, true] {
        let mut first = begin(db.pool()).await;
        publish(&mut first, ordered("first")).await;
        let second = tokio::spawn({
            let db = db.clone();
            async move {
                let mut tx = begin(db.pool()).await;
                if by_sql {
                    let sql = "SELECT postbox.publish('t', '\"second\"', key => 'k', ordered => true)";
                    run(&mut tx, sql).await;
                } else {
                    publish(&mut tx, ordered("second")).await;
                }
                tx.commit().await.expect("committed");
            }
        });
        waiters(&db, 1).await;
        // It is not merely told to come later: it has not been written.
        publish(&mut first, ordered("first again")).await;
        first.commit().await.unwrap();
        second.await.unwrap();
        step(db.pool()).await;
    }
    let texts: Vec<String> = ledger::complete(&db, "t")
        .await
        .iter()
        .map(ledger::Entry::text)
        .collect();
    assert_eq!(
        texts,
        ["first", "first again", "second", "first", "first again", "second"]
    );
}

#[tokio::test]
async fn ordered_transactions_on_other_keys_or_topics_do_not_wait() {
    let db = TestDatabase::new().await.unwrap();
    let mut first = begin(db.pool()).await;
    publish(&mut first, Outgoing::json("t", "x").key("k").ordered()).await;
    let mut connection = db.connect().await.unwrap();
    waits_for_no_lock(&mut connection).await;
    let mut second = connection.begin().await.unwrap();
    publish(&mut second, Outgoing::json("t", "x").key("l").ordered()).await;
    publish(&mut second, Outgoing::json("u", "x").key("k").ordered()).await;
    publish(&mut second, Outgoing::json("t", "x").ordered()).await;
    // Nor does who does not ask for it.
    publish(&mut second, Outgoing::json("t", "x").key("k")).await;
    second.commit().await.unwrap();
    first.commit().await.unwrap();
}

/// Batches of these keys, again and again from several connections, in one order and in the opposite one.
async fn publish_in_opposite_orders(db: &Arc<TestDatabase>, one: Vec<String>, other: Vec<String>) {
    let publishers: Vec<_> = (0..4)
        .map(|n| {
            let (db, keys) = (db.clone(), if n % 2 == 0 { one.clone() } else { other.clone() });
            tokio::spawn(async move {
                let mut connection = db.connect().await.expect("a connection");
                for _ in 0..40 {
                    let mut tx = connection.begin().await.expect("a transaction");
                    let batch = keys
                        .iter()
                        .map(|key| Outgoing::json("t", "x").key(key.clone()).ordered());
                    tx.publish_all(batch).await.expect("no deadlock");
                    tx.commit().await.expect("committed");
                }
            })
        })
        .collect();
    for publisher in publishers {
        publisher.await.expect("it works");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_with_ordered_keys_in_opposite_order_do_not_deadlock() {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let keys: Vec<String> = (0..30).map(|n| format!("key {n}")).collect();
    let reversed = keys.iter().rev().cloned().collect();
    publish_in_opposite_orders(&db, keys, reversed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_with_ordered_keys_that_share_a_lock_do_not_deadlock() {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    // Two keys, far from each other, with one lock number, and one between that both batches have.
    let (low, high): (String, String) = sqlx::query_as(
        "SELECT min(k), max(k) FROM (SELECT 'k' || n AS k FROM generate_series(1, 400000) n) k \
         GROUP BY hashtext('t ' || k) HAVING count(*) > 1 ORDER BY min(k) COLLATE \"C\" LIMIT 1",
    )
    .fetch_one(db.pool())
    .await
    .unwrap();
    let between = format!("{low}!");
    assert!(low < between && between < high);
    publish_in_opposite_orders(&db, vec![low, between.clone()], vec![between, high]).await;
}

// ------------------------------------------------------------------------------------------------------ who is waited for

#[tokio::test]
async fn publishing_waits_for_no_other_publisher_step_or_dispatcher() {
    let db = TestDatabase::new().await.unwrap();
    // No dispatcher runs. Another transaction has published to the same topic and key, and is open.
    let mut open = begin(db.pool()).await;
    publish(&mut open, Outgoing::json("t", "open").key("k")).await;
    let mut connection = db.connect().await.unwrap();
    waits_for_no_lock(&mut connection).await;
    let publish_all_ways = async |connection: &mut PgConnection| {
        let mut tx = connection.begin().await.unwrap();
        publish(&mut tx, Outgoing::json("t", "x").key("k")).await;
        tx.publish_all((0..10).map(|n| Outgoing::json("t", &n).key("k")))
            .await
            .unwrap();
        publish(&mut tx, Outgoing::json("t", "x").key("l").ordered()).await;
        publish(
            &mut tx,
            Outgoing::json("t", "x")
                .key("k")
                .dedup_key(Uuid::now_v7().to_string()),
        )
        .await;
        run(&mut tx, "SELECT postbox.publish('t', '1', key => 'k')").await;
        tx.commit().await.unwrap();
    };
    publish_all_ways(&mut connection).await;
    // A step is in progress: it has written, and holds its lock.
    let mut stepping = begin(db.pool()).await;
    assert_eq!(step(&mut *stepping).await, 14);
    publish_all_ways(&mut connection).await;
    // Somebody sleeps at the dispatcher's bell, and somebody takes the consumers'. (Who found nobody asleep holds the former.)
    open.commit().await.unwrap();
    run(
        &mut stepping,
        "SELECT pg_advisory_xact_lock(1347571761, 2), pg_advisory_xact_lock(1347571761, 3)",
    )
    .await;
    publish_all_ways(&mut connection).await;
    stepping.commit().await.unwrap();
    assert_eq!(step(db.pool()).await, 29);
    ledger::complete(&db, "t").await;
}

// ---------------------------------------------------------------------------------------------------------- who may

#[tokio::test]
async fn a_producer_may_publish_and_nothing_else() {
    let db = TestDatabase::new().await.unwrap();
    let role = Role::new(&db).await;
    let mut outsider = begin(&role.pool).await;
    let error = outsider.publish(ok()).await.expect_err("not yet").to_string();
    assert!(error.contains("permission denied for schema postbox"), "{error}");
    drop(outsider);

    sqlx::query("SELECT postbox.grant_publish($1::text::regrole)")
        .bind(&role.name)
        .execute(db.pool())
        .await
        .unwrap();
    let mut tx = begin(&role.pool).await;
    let me: String = sqlx::query_scalar("SELECT current_user::text")
        .fetch_one(&mut *tx)
        .await
        .unwrap();
    assert_eq!(me, role.name);
    publish(&mut tx, ok()).await;
    tx.publish_all([ok(), ok()]).await.unwrap();
    publish(&mut tx, ok().key("k").ordered()).await;
    let first = publish(&mut tx, ok().dedup_key("d")).await;
    assert_eq!(publish(&mut tx, ok().dedup_key("d")).await, first);
    run(
        &mut tx,
        "SELECT postbox.publish('t', '1', key => 'k', dedup_key => 'e', ordered => true)",
    )
    .await;
    run(
        &mut tx,
        "INSERT INTO postbox.outbox (topic, payload) VALUES ('t', '1')",
    )
    .await;
    tx.commit().await.unwrap();
    let expire = "UPDATE postbox.dedup SET expires_at = clock_timestamp()";
    sqlx::query(expire).execute(db.pool()).await.unwrap();
    assert_ne!(publish_alone(&role.pool, ok().dedup_key("d")).await, first);
    assert_eq!(stored(db.pool()).await, 8);

    let mut connection = role.pool.acquire().await.unwrap();
    let mut forbidden: Vec<String> = [
        "SELECT count(*) FROM postbox.outbox",
        "SELECT payload FROM postbox.outbox",
        "UPDATE postbox.outbox SET topic = 'u'",
        "DELETE FROM postbox.outbox",
        "TRUNCATE postbox.outbox",
        "INSERT INTO postbox.outbox (topic, payload) VALUES ('t', '1') RETURNING seq",
        "INSERT INTO postbox.outbox (topic, payload, published_at) VALUES ('t', '1', now())",
        "INSERT INTO postbox.outbox (topic, payload, slot) VALUES ('t', '1', 0::smallint)",
        "INSERT INTO postbox.outbox (topic, payload, xid) VALUES ('t', '1', '1'::xid8)",
        "INSERT INTO postbox.outbox (topic, payload, seq) VALUES ('t', '1', 1)",
        "INSERT INTO postbox.outbox_0 (topic, payload) VALUES ('t', '1')",
        "SELECT setval('postbox.outbox_seq', 1)",
        "DELETE FROM postbox.dedup",
        "SELECT * FROM postbox.sequence()",
    ]
    .map(String::from)
    .to_vec();
    for table in [
        "topic",
        "segment",
        "tick",
        "subscription",
        "consumer",
        "lane",
        "checkpoint",
        "settlement",
        "schema_migration",
    ] {
        forbidden.push(format!("SELECT FROM postbox.{table}"));
        forbidden.push(format!("DELETE FROM postbox.{table}"));
    }
    for sql in forbidden {
        let error = try_run(&mut connection, sql.clone()).await.expect_err(&sql);
        let code = error
            .as_database_error()
            .and_then(|error| error.code().map(String::from));
        assert_eq!(code.as_deref(), Some("42501"), "{sql}: {error}");
    }
    drop(connection);
    assert_eq!(stored(db.pool()).await, 8);
    assert_eq!(step(db.pool()).await, 8);
    role.drop(&db).await;
}
