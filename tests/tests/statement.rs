//! `Outgoing::statement` through another driver: the same message as `Publish` writes, whatever is said about it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use postbox::{Error, MessageId, Outgoing, Parameter, Publish, Statement};
use postbox_testkit::TestDatabase;
use sqlx::PgPool;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, GenericClient, NoTls};

/// What the guide shows.
async fn execute(
    client: &impl GenericClient,
    statement: &Statement,
) -> Result<MessageId, tokio_postgres::Error> {
    let parameters: Vec<&(dyn ToSql + Sync)> = statement
        .parameters()
        .iter()
        .map(|parameter| match parameter {
            Parameter::Text(text) => text as &(dyn ToSql + Sync),
            Parameter::Bytes(bytes) => bytes,
        })
        .collect();
    let row = client.query_opt(statement.sql(), &parameters).await?;
    let id = row.map(|row| row.get::<_, String>(0).parse().expect("an id"));
    Ok(id.unwrap_or(statement.id()))
}

async fn connect(db: &TestDatabase) -> Client {
    let (client, connection) = tokio_postgres::connect(db.url(), NoTls)
        .await
        .expect("a connection");
    tokio::spawn(connection);
    client
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("a number")
}

/// What there is of the message, but for its id, its place and the times at which it was written.
const STORED: &str = "SELECT to_jsonb(o) - '{id,slot,seq,xid,published_at}'::text[] FROM postbox.outbox o WHERE o.id = $1 \
     UNION ALL \
     SELECT to_jsonb(s) - '{id,n,xid,deliver_at,expires_at,scheduled_at}'::text[] FROM postbox.scheduled s WHERE s.id = $1";

async fn stored(pool: &PgPool, id: MessageId) -> serde_json::Value {
    sqlx::query_scalar(STORED)
        .bind(id.as_uuid())
        .fetch_one(pool)
        .await
        .expect("it is stored")
}

fn at(year: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(year.saturating_sub(1970) * 31_556_952, 123_456_789).expect("an instant")
}

/// What is said of it, and the same message each time.
type Named = (&'static str, fn() -> Outgoing);

fn messages() -> Vec<Named> {
    vec![
        ("plain", || {
            Outgoing::json("orders", &serde_json::json!({"a": "\u{1F980} '\"\\"}))
        }),
        ("everything plain", || {
            Outgoing::json("orders", &1)
                .key("it's; DROP TABLE \u{e9}")
                .message_type("order.placed")
                .header("tenant", "acme \"and\" \\ sons")
        }),
        ("bytes", || {
            Outgoing::bytes("thumbnails", "image/png", vec![0, 1, 0xff, b'\\'])
        }),
        ("nothing", || {
            Outgoing::bytes("thumbnails", "image/png", Vec::new())
        }),
        ("ordered", || Outgoing::json("orders", &1).key("k").ordered()),
        ("later", || {
            Outgoing::json("orders", &1).delay(Duration::from_secs(3600))
        }),
        ("at an instant", || {
            Outgoing::json("orders", &1).deliver_at(at(2100)).key("k")
        }),
        ("in the past", || {
            Outgoing::json("orders", &1).deliver_at(at(1900))
        }),
        ("far away", || Outgoing::json("orders", &1).deliver_at(at(12_000))),
        ("with an end", || {
            Outgoing::json("orders", &1).expires_at(at(2100))
        }),
        ("later, with an end", || {
            Outgoing::json("orders", &1)
                .delay(Duration::from_secs(60))
                .expires_in(Duration::from_micros(1_500_001))
        }),
    ]
}

#[tokio::test]
async fn a_statement_writes_what_publish_writes() {
    let db = TestDatabase::new().await.expect("a database");
    let mut client = connect(&db).await;
    for (what, message) in messages() {
        let mut tx = db.pool().begin().await.expect("a transaction");
        let ours = tx.publish(message()).await.expect(what);
        tx.commit().await.expect("committed");
        let theirs = client.transaction().await.expect("a transaction");
        let id = execute(&theirs, &message().statement().expect(what))
            .await
            .expect(what);
        theirs.commit().await.expect("committed");
        assert_eq!(
            stored(db.pool(), id).await,
            stored(db.pool(), ours).await,
            "{what}"
        );
    }
    let apart = "SELECT count(*) FROM postbox.scheduled a JOIN postbox.scheduled b ON a.id < b.id \
         WHERE abs(extract(epoch FROM a.deliver_at - b.deliver_at)) < 600";
    assert_eq!(
        number(db.pool(), apart).await,
        4,
        "each pair is due at the same time"
    );
    let exact = "SELECT count(*) FROM postbox.scheduled a JOIN postbox.scheduled b ON a.id < b.id AND a.deliver_at = b.deliver_at";
    assert_eq!(number(db.pool(), exact).await, 2, "instants are exact");
    let lives =
        "SELECT count(*) FROM postbox.scheduled WHERE expires_at - deliver_at = interval '1.500001 seconds'";
    assert_eq!(number(db.pool(), lives).await, 2, "lives are exact");
}

#[tokio::test]
async fn a_statement_goes_with_its_transaction() {
    let db = TestDatabase::new().await.expect("a database");
    let mut client = connect(&db).await;
    let message = || Outgoing::json("orders", &1).key("k");
    for (made, kept) in [
        (message as fn() -> Outgoing, false),
        (message, true),
        (|| Outgoing::json("orders", &1).dedup_key("once"), false),
        (|| Outgoing::json("orders", &1).dedup_key("once"), true),
    ] {
        let before = number(db.pool(), "SELECT count(*) FROM postbox.outbox").await;
        let mut tx = client.transaction().await.expect("a transaction");
        let undone = tx.savepoint("part").await.expect("a savepoint");
        execute(&undone, &made().statement().expect("valid"))
            .await
            .expect("published");
        undone.rollback().await.expect("rolled back");
        execute(&tx, &made().statement().expect("valid"))
            .await
            .expect("published");
        match kept {
            true => tx.commit().await.expect("committed"),
            false => tx.rollback().await.expect("rolled back"),
        }
        let after = number(db.pool(), "SELECT count(*) FROM postbox.outbox").await;
        assert_eq!(after - before, i64::from(kept));
    }
}

#[tokio::test]
async fn a_deduplicated_statement_returns_the_id_of_the_first() {
    let db = TestDatabase::new().await.expect("a database");
    let client = connect(&db).await;
    let statement = |n: i64| {
        Outgoing::json("orders", &n)
            .dedup_key("checkout-42")
            .statement()
            .expect("valid")
    };
    let first = statement(1);
    assert_eq!(execute(&client, &first).await.expect("published"), first.id());
    let second = statement(2);
    assert_eq!(execute(&client, &second).await.expect("found"), first.id());
    assert_ne!(second.id(), first.id());
    assert_eq!(number(db.pool(), "SELECT count(*) FROM postbox.outbox").await, 1);
}

#[tokio::test]
async fn an_ordered_statement_waits_for_the_transaction_before_it() {
    let db = TestDatabase::new().await.expect("a database");
    let (mut first, second) = (connect(&db).await, connect(&db).await);
    let ordered = || {
        Outgoing::json("orders", &1)
            .key("k")
            .ordered()
            .statement()
            .expect("valid")
    };
    let tx = first.transaction().await.expect("a transaction");
    execute(&tx, &ordered()).await.expect("published");
    second
        .batch_execute("SET lock_timeout = '200ms'")
        .await
        .expect("set");
    let refused = execute(&second, &ordered())
        .await
        .expect_err("the first is not committed");
    assert_eq!(
        refused.code().map(|code| code.code()),
        Some("55P03"),
        "{refused:?}"
    );
    tx.commit().await.expect("committed");
    execute(&second, &ordered()).await.expect("published");
}

/// The limits themselves are `tests/publish.rs`'s; that all of them are looked at is told by one of each kind.
#[test]
fn what_breaks_a_limit_is_refused_before_there_is_a_statement() {
    for (message, expected) in [
        (Outgoing::json("or ders", &1), "or ders"),
        (Outgoing::json("orders", &1).key("x".repeat(1_025)), "1025"),
        (Outgoing::json("orders", &1).key("a\0b"), "key"),
        (
            Outgoing::json("orders", &1).header("postbox-cron", "x"),
            "postbox-cron",
        ),
        (
            Outgoing::json("orders", &1).dedup_window(Duration::from_secs(1)),
            "dedup",
        ),
        (
            Outgoing::bytes("orders", "image/png", vec![0; 1024 * 1024 + 1]),
            "1048577",
        ),
    ] {
        let refused: Error = message.statement().expect_err(expected);
        assert!(refused.to_string().contains(expected), "{expected}: {refused}");
    }
}
