//! What operators do with dead letters, and what they see of failed messages, with the `postbox` command.
#![allow(clippy::unwrap_used)] // Clippy allows it in test functions, and here what they call is as much a test.

use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postbox_consumer::{Consumer, Delivery, Exhausted, Extract, HandlerDefinition, HandlerError, Raw, Retry};
use postbox_dispatcher::Dispatcher;
use postbox_dispatcher::dead_letters::{self, Filter};
use postbox_testkit::{TestDatabase, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;

const PATIENCE: Duration = Duration::from_secs(30);

fn command(db: &TestDatabase, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_postbox"));
    command
        .args(arguments)
        .env("DATABASE_URL", db.url())
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Number, and the header `postbox-redriven`.
type Ran = (i64, Option<String>);

fn run(db: &TestDatabase, arguments: &[&str]) -> Output {
    command(db, arguments).output().unwrap()
}

/// Its standard output, with this exit status.
fn ends(output: Output, status: i32) -> String {
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn succeed(output: Output) -> String {
    ends(output, 0)
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn numbers(text: &str) -> Vec<i64> {
    json_lines(text)
        .iter()
        .map(|letter| letter["id"].as_i64().unwrap())
        .collect()
}

async fn sql(db: &TestDatabase, sql: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(sql.into()))
        .execute(db.pool())
        .await
        .unwrap();
}

async fn number(db: &TestDatabase, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(db.pool()).await.unwrap()
}

/// Groups `mail` and `audit` on topic `orders`, with 20 messages that no group has taken yet: their keys are k0 to k4 in turns, their types
/// order.placed.
async fn database() -> TestDatabase {
    let db = TestDatabase::new().await.unwrap();
    sql(
        &db,
        "SELECT postbox.publish(topic => 'orders', key => 'k' || n % 5, type => 'order.placed', payload => jsonb_build_object('n', n))
         FROM generate_series(0, 19) n",
    )
    .await;
    sql(&db, "SELECT * FROM postbox.sequence()").await;
    for group in ["mail", "audit"] {
        sql(
            &db,
            format!(
                "SELECT postbox.subscribe('{group}', 'orders', 4::smallint, 'key', NULL, 'earliest', NULL)"
            ),
        )
        .await;
    }
    db
}

/// A group gives up the messages at these offsets; where halted, they keep their keys.
async fn give_up(db: &TestDatabase, group: &str, offsets: &str, reason: &str, halted: bool) {
    let copy = "SELECT s.id, p.\"offset\", (postbox.key_hash(o.key) % s.lanes)::smallint, o.*, p.seq AS s
         FROM (SELECT base + n - 1 AS \"offset\", seqs[n] AS seq FROM postbox.segment, generate_series(1, count) n) p
         JOIN postbox.outbox o ON o.seq = p.seq CROSS JOIN postbox.subscription s";
    let errors = "[{\"attempt\": 1, \"at\": \"2026-11-25T10:00:00Z\", \"error\": \"first\", \"instance\": \"a\"}, \
         {\"attempt\": 2, \"at\": \"2026-11-25T10:00:01Z\", \"error\": \"connection refused\", \"instance\": \"b\"}]";
    if halted {
        sql(
            db,
            format!(
                "INSERT INTO postbox.redelivery (subscription_id, \"offset\", lane, state, attempt, due_at, errors, seq, id, published_at, type, key,
                     key_hash, headers, content_type, payload)
                 SELECT c.id, c.\"offset\", c.lane, 'halted', 2, now(), '{errors}', c.s, c.message, c.published_at, c.type, c.key,
                     postbox.key_hash(c.key), c.headers, c.content_type, c.payload
                 FROM ({copy}) AS c (id, \"offset\", lane, slot, xid, seq, message, published_at, topic, type, key, headers, content_type, payload, expires_at, s)
                 WHERE c.\"offset\" IN ({offsets}) AND c.id = (SELECT id FROM postbox.subscription WHERE group_name = '{group}')"
            ),
        )
        .await;
    }
    sql(
        db,
        format!(
            "INSERT INTO postbox.dead_letter (subscription_id, \"offset\", lane, reason, halted, attempts, errors, instance, seq, message_id,
                 published_at, type, key, key_hash, headers, content_type, payload)
             SELECT c.id, c.\"offset\", c.lane, '{reason}', {halted}, 2, '{errors}', 'b', c.s, c.message, c.published_at, c.type, c.key,
                 postbox.key_hash(c.key), c.headers, c.content_type, c.payload
             FROM ({copy}) AS c (id, \"offset\", lane, slot, xid, seq, message, published_at, topic, type, key, headers, content_type, payload, expires_at, s)
             WHERE c.\"offset\" IN ({offsets}) AND c.id = (SELECT id FROM postbox.subscription WHERE group_name = '{group}')
             ORDER BY c.\"offset\""
        ),
    )
    .await;
}

#[tokio::test]
async fn a_list_has_the_newest_first_page_by_page_and_by_every_filter() {
    let db = database().await;
    give_up(&db, "mail", "0, 1, 2, 3, 4, 5", "failed 8 times: Timeout", false).await;
    give_up(&db, "audit", "5, 6", "failed 8 times: refused", false).await;
    give_up(&db, "audit", "7", "failed 8 times: refused", true).await;

    assert_eq!(
        numbers(&succeed(run(&db, &["dead-letters", "list", "--json"]))),
        (1..=9).rev().collect::<Vec<_>>()
    );
    let page = succeed(run(&db, &["dead-letters", "list", "--limit", "4", "--json"]));
    assert_eq!(numbers(&page), [9, 8, 7, 6]);
    let page = succeed(run(
        &db,
        &["dead-letters", "list", "--limit", "4", "--before", "6", "--json"],
    ));
    assert_eq!(numbers(&page), [5, 4, 3, 2]);

    let list = |filter: &[&str]| {
        numbers(&succeed(run(
            &db,
            &[&["dead-letters", "list", "--json"], filter].concat(),
        )))
    };
    assert_eq!(list(&["--group", "audit"]), [9, 8, 7]);
    assert_eq!(list(&["--group", "audit", "--halted"]), [9]);
    assert_eq!(list(&["--topic", "orders", "--key", "k0"]), [7, 6, 1]);
    assert_eq!(
        list(&["--type", "order.placed", "--reason", "timeout"]),
        [6, 5, 4, 3, 2, 1]
    );
    assert_eq!(list(&["--type", "order.paid"]), [0; 0]);
    assert_eq!(list(&["--topic", "payments"]), [0; 0]);
    sql(
        &db,
        "UPDATE postbox.dead_letter SET died_at = died_at - interval '3 hours' WHERE id <= 4",
    )
    .await;
    assert_eq!(list(&["--since", "2h"]), [9, 8, 7, 6, 5]);
    assert_eq!(list(&["--until", "2h", "--group", "mail"]), [4, 3, 2, 1]);
    let all = json_lines(&succeed(run(&db, &["dead-letters", "list", "--json"])));
    let message = all[3]["message_id"].as_str().unwrap();
    assert_eq!(list(&["--message", message]), [7, 6]);

    let human = succeed(run(
        &db,
        &["dead-letters", "list", "--group", "audit", "--limit", "2"],
    ));
    assert!(
        human.contains("order.placed") && human.contains("--before 8"),
        "{human}"
    );
    // Its first page is all that the database reads for it.
    sql(&db, "INSERT INTO postbox.dead_letter (subscription_id, \"offset\", lane, reason, attempts, errors, seq, message_id, published_at, payload)
         SELECT 1, n, 0, 'r', 1, '[]', n, gen_random_uuid(), now(), '{}' FROM generate_series(1000, 4999) n; ANALYZE postbox.dead_letter").await;
    let mut plans = String::new();
    for (line,) in sqlx::query_as::<_, (String,)>(
        "EXPLAIN SELECT d.id FROM postbox.dead_letter d JOIN postbox.subscription s ON s.id = d.subscription_id WHERE d.id < 2000 ORDER BY d.id DESC LIMIT 5",
    )
    .fetch_all(db.pool())
    .await
    .unwrap()
    {
        plans.push_str(&line);
    }
    assert!(plans.contains("Index") && !plans.contains("Sort"), "{plans}");
    assert_eq!(
        dead_letters::list(db.pool(), &Filter::default(), None, 3)
            .await
            .unwrap()
            .len(),
        3
    );
}

#[tokio::test]
async fn a_letter_is_shown_whole_and_its_payload_as_text_or_base64() {
    let db = database().await;
    give_up(&db, "mail", "3, 4", "failed 8 times", true).await;
    sql(&db, "UPDATE postbox.dead_letter SET payload = '\\xff00', content_type = 'application/octet-stream' WHERE id = 2").await;
    let text = succeed(run(&db, &["dead-letters", "show", "1", "--json"]));
    let letter: Value = serde_json::from_str(&text).unwrap();
    for (field, value) in [
        ("group", json!("mail")),
        ("topic", json!("orders")),
        ("offset", json!(3)),
        ("type", json!("order.placed")),
        ("key", json!("k3")),
        ("attempts", json!(2)),
        ("halted", json!(true)),
        ("reason", json!("failed 8 times")),
        ("content_type", json!("application/json")),
        ("payload", json!("{\"n\": 3}")),
        ("instance", json!("b")),
    ] {
        assert_eq!(letter[field], value, "{field}");
    }
    assert_eq!(letter["errors"][1]["error"], "connection refused");
    let letter: Value =
        serde_json::from_str(&succeed(run(&db, &["dead-letters", "show", "2", "--json"]))).unwrap();
    assert_eq!(
        (&letter["payload_base64"], &letter["payload"]),
        (&json!("/wA="), &Value::Null)
    );
    let human = succeed(run(&db, &["dead-letters", "show", "1"]));
    assert!(
        human.contains("connection refused") && human.ends_with("{\"n\": 3}\n"),
        "{human}"
    );
    let missing = run(&db, &["dead-letters", "show", "99"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).starts_with("error: there is no dead letter 99"));
}

#[tokio::test]
async fn nothing_is_done_without_yes() {
    let db = database().await;
    give_up(&db, "mail", "0, 1, 2", "failed 8 times", false).await;
    give_up(&db, "audit", "3", "failed 8 times", true).await;
    for action in ["redrive", "discard"] {
        let preview = ends(run(&db, &["dead-letters", action, "--all"]), 3);
        assert!(
            preview.contains(&format!("would {action} 4 dead letters")) && preview.contains("--yes"),
            "{preview}"
        );
        let preview = ends(run(&db, &["dead-letters", action, "1", "2", "--json"]), 3);
        let preview: Value = serde_json::from_str(&preview).unwrap();
        assert_eq!(
            (&preview["action"], &preview["done"], &preview["letters"]),
            (&json!(action), &json!(false), &json!(2))
        );
        assert_eq!(preview["subscriptions"][0]["group"], "mail");
    }
    let preview = ends(run(&db, &["dead-letters", "release", "--all"]), 3);
    assert!(preview.contains("would release 1 dead letter;"), "{preview}");
    assert_eq!(number(&db, "SELECT count(*) FROM postbox.dead_letter").await, 4);
    assert_eq!(
        number(
            &db,
            "SELECT count(*) FROM postbox.redelivery WHERE state = 'halted'"
        )
        .await,
        1
    );
    // Where there is nothing to do, nothing is left undone.
    let none = succeed(run(&db, &["dead-letters", "redrive", "--group", "nobody"]));
    assert!(none.contains("nothing to redrive"), "{none}");
}

#[tokio::test]
async fn redriven_messages_keep_their_ids_and_count_it() {
    let db = database().await;
    give_up(&db, "mail", "0, 1, 2", "failed 8 times: Timeout", false).await;
    give_up(&db, "audit", "3", "failed 8 times", true).await;
    let done = succeed(run(
        &db,
        &[
            "dead-letters",
            "redrive",
            "--reason",
            "timeout",
            "--yes",
            "--json",
        ],
    ));
    let done: Value = serde_json::from_str(&done).unwrap();
    assert_eq!(
        (&done["done"], &done["letters"], &done["interrupted"]),
        (&json!(true), &json!(3), &json!(false))
    );
    assert_eq!(number(&db, "SELECT count(*) FROM postbox.dead_letter").await, 1);
    let redriven: i64 = number(
        &db,
        "SELECT count(*) FROM postbox.redelivery r JOIN postbox.outbox o ON o.id = r.id AND o.payload = r.payload
         WHERE r.state = 'redriven' AND r.attempt = 0 AND r.headers ->> 'postbox-redriven' = '1'",
    )
    .await;
    assert_eq!(redriven, 3);

    // An edited payload, for one message; from standard input as well.
    let edited = std::env::temp_dir().join(format!("{}.json", db.name()));
    std::fs::write(&edited, "{\"n\": \"three\"}").unwrap();
    let done = succeed(run(
        &db,
        &[
            "dead-letters",
            "redrive",
            "4",
            "--payload",
            edited.to_str().unwrap(),
            "--yes",
        ],
    ));
    assert_eq!(done, "redrove 1 dead letter\n");
    std::fs::remove_file(edited).unwrap();
    let payload: Vec<u8> = sqlx::query_scalar(
        "SELECT payload FROM postbox.redelivery WHERE \"offset\" = 3 AND state = 'redriven'",
    )
    .fetch_one(db.pool())
    .await
    .unwrap();
    assert_eq!(payload, b"{\"n\": \"three\"}");
    give_up(&db, "audit", "4", "failed 8 times", false).await;
    let mut child = command(&db, &["dead-letters", "redrive", "5", "--payload", "-", "--yes"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"4").unwrap();
    succeed(child.wait_with_output().unwrap());
    assert_eq!(
        number(&db, "SELECT count(*) FROM postbox.redelivery WHERE payload = '4'").await,
        1
    );
    let gone = run(&db, &["dead-letters", "redrive", "5", "--yes"]);
    assert_eq!(gone.status.code(), Some(1), "{gone:?}");
}

#[tokio::test]
async fn a_halted_key_goes_on_when_its_letter_is_discarded_or_released() {
    let db = database().await;
    give_up(&db, "mail", "0, 1, 2", "failed 8 times", true).await;
    assert_eq!(
        succeed(run(&db, &["dead-letters", "release", "1", "--yes"])),
        "released the keys of 1 dead letter\n"
    );
    assert_eq!(
        succeed(run(&db, &["dead-letters", "discard", "2", "--yes"])),
        "discarded 1 dead letter\n"
    );
    assert_eq!(
        number(
            &db,
            "SELECT count(*) FROM postbox.dead_letter WHERE id = 1 AND NOT halted"
        )
        .await,
        1
    );
    assert_eq!(
        number(&db, "SELECT count(*) FROM postbox.dead_letter WHERE id = 2").await,
        0
    );
    let states: Vec<String> = sqlx::query_scalar("SELECT state FROM postbox.redelivery ORDER BY \"offset\"")
        .fetch_all(db.pool())
        .await
        .unwrap();
    assert_eq!(states, ["released", "released", "halted"]);
    // Only the halted one is left to release.
    let preview: Value = serde_json::from_str(&ends(
        run(&db, &["dead-letters", "release", "--all", "--json"]),
        3,
    ))
    .unwrap();
    assert_eq!(preview["letters"], 1);
}

/// A child that is killed when the test fails.
struct Running(Option<Child>);

impl Running {
    fn output(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[tokio::test]
async fn a_rate_is_kept_and_an_interrupt_leaves_every_letter_in_one_place() {
    let db = database().await;
    sql(
        &db,
        "INSERT INTO postbox.dead_letter (subscription_id, \"offset\", lane, reason, attempts, errors, seq, message_id, published_at, payload)
         SELECT 1, n, 0, 'r', 1, '[]', n, gen_random_uuid(), now(), '{}' FROM generate_series(1000, 1999) n",
    )
    .await;
    let begun = Instant::now();
    let child = command(
        &db,
        &[
            "dead-letters",
            "redrive",
            "--all",
            "--rate",
            "100/s",
            "--yes",
            "--json",
        ],
    )
    .spawn()
    .unwrap();
    let child = Running(Some(child));
    let redriven = "SELECT count(*) FROM postbox.redelivery WHERE state = 'redriven'";
    eventually(PATIENCE, async || match number(&db, redriven).await {
        30.. => Ok(()),
        few => Err(format!("{few} redriven")),
    })
    .await;
    // The first ten go at once.
    assert!(
        begun.elapsed() >= Duration::from_millis(200),
        "{:?}",
        begun.elapsed()
    );
    kill_process(Pid::from_child(child.0.as_ref().unwrap()), Signal::INT).unwrap();
    let done = ends(child.output(), 130);
    let done: Value = serde_json::from_str(&done).unwrap();
    let redriven = number(&db, redriven).await;
    assert_eq!(
        (&done["letters"], &done["interrupted"]),
        (&json!(redriven), &json!(true))
    );
    assert!((30..1000).contains(&redriven), "{redriven}");
    assert_eq!(
        number(&db, "SELECT count(*) FROM postbox.dead_letter").await,
        1000 - redriven
    );
    // Without a rate the rest is done in batches.
    succeed(run(&db, &["dead-letters", "redrive", "--all", "--yes"]));
    assert_eq!(number(&db, "SELECT count(*) FROM postbox.dead_letter").await, 0);
    assert_eq!(
        number(
            &db,
            "SELECT count(*) FROM postbox.redelivery WHERE state = 'redriven'"
        )
        .await,
        1000
    );
}

#[tokio::test]
async fn an_export_has_every_letter_whole_and_overwrites_nothing() {
    let db = database().await;
    sql(
        &db,
        "INSERT INTO postbox.dead_letter (subscription_id, \"offset\", lane, reason, attempts, errors, seq, message_id, published_at, payload)
         SELECT 1, n, 0, 'r', 1, '[]', n, gen_random_uuid(), now(), convert_to(n::text, 'UTF8') FROM generate_series(0, 199) n",
    )
    .await;
    let file = std::env::temp_dir().join(format!("{}.jsonl", db.name()));
    let path = file.to_str().unwrap();
    succeed(run(&db, &["dead-letters", "export", "--out", path]));
    let exported = std::fs::read_to_string(&file).unwrap();
    let payloads: Vec<Value> = json_lines(&exported)
        .iter()
        .map(|letter| letter["payload"].clone())
        .collect();
    assert_eq!(
        payloads,
        (0..200).map(|n| json!(n.to_string())).collect::<Vec<_>>()
    );
    let again = run(&db, &["dead-letters", "export", "--out", path]);
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), exported);
    std::fs::remove_file(file).unwrap();
    assert_eq!(succeed(run(&db, &["dead-letters", "export"])), exported);
    assert_eq!(
        succeed(run(&db, &["dead-letters", "export", "--group", "audit"])),
        ""
    );
}

#[tokio::test]
async fn what_would_be_ambiguous_is_refused() {
    let db = database().await;
    for arguments in [
        &["dead-letters", "redrive", "--yes"][..],
        &["dead-letters", "discard"],
        &["dead-letters", "redrive", "1", "--all"],
        &["dead-letters", "redrive", "1", "--group", "mail"],
        &["dead-letters", "redrive", "--all", "--payload", "-"],
        &["dead-letters", "redrive", "1", "2", "--payload", "-"],
        &["dead-letters", "redrive", "--all", "--rate", "0/s"],
        &["dead-letters", "list", "--since", "yesterday"],
        &["messages", "show", "17"],
    ] {
        let output = run(&db, arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
}

async fn states(db: &TestDatabase, offset: i64) -> Vec<(String, String)> {
    let id: String = sqlx::query_scalar(
        "SELECT id::text FROM postbox.outbox WHERE payload = convert_to(format('{\"n\": %s}', $1), 'UTF8')",
    )
    .bind(offset)
    .fetch_one(db.pool())
    .await
    .unwrap();
    let message: Value =
        serde_json::from_str(&succeed(run(db, &["messages", "show", &id, "--json"]))).unwrap();
    assert_eq!(message["offset"], offset);
    let groups = message["groups"].as_array().unwrap();
    groups
        .iter()
        .map(|group| {
            (
                group["group"].as_str().unwrap().to_owned(),
                group["state"].as_str().unwrap().to_owned(),
            )
        })
        .collect()
}

#[tokio::test]
async fn a_message_is_found_with_its_state_for_each_group() {
    let db = database().await;
    let both = |audit: &str, mail: &str| {
        vec![
            ("audit".to_owned(), audit.to_owned()),
            ("mail".to_owned(), mail.to_owned()),
        ]
    };
    assert_eq!(states(&db, 0).await, both("waiting", "waiting"));

    // Group mail has passed everything below 10 but for offset 2; audit has settled 12 with its transaction.
    sql(
        &db,
        "UPDATE postbox.lane SET position = 10, pending = '{2}' WHERE subscription_id = (SELECT id FROM postbox.subscription WHERE group_name = 'mail');
         INSERT INTO postbox.settlement (subscription_id, lane, \"offset\")
         SELECT id, (postbox.key_hash('k2') % lanes)::smallint, 12 FROM postbox.subscription WHERE group_name = 'audit'",
    )
    .await;
    give_up(&db, "mail", "3", "failed 8 times: Timeout", false).await;
    give_up(&db, "mail", "4, 5, 6, 7, 8", "failed 8 times: Timeout", true).await;
    sql(
        &db,
        "UPDATE postbox.redelivery SET state = CASE \"offset\" WHEN 5 THEN 'retry' WHEN 6 THEN 'parked' WHEN 7 THEN 'redriven' WHEN 8 THEN 'released' ELSE state END;
         DELETE FROM postbox.dead_letter WHERE \"offset\" IN (5, 6, 7); UPDATE postbox.dead_letter SET halted = false WHERE \"offset\" = 8",
    )
    .await;
    for (offset, audit, mail) in [
        (0, "waiting", "delivered"),
        (2, "waiting", "waiting"),
        (3, "waiting", "dead"),
        (4, "waiting", "halted"),
        (5, "waiting", "retrying"),
        (6, "waiting", "parked"),
        (7, "waiting", "redriven"),
        (8, "waiting", "dead"),
        (12, "delivered", "waiting"),
    ] {
        assert_eq!(states(&db, offset).await, both(audit, mail), "offset {offset}");
    }

    let text = succeed(run(&db, &["dead-letters", "show", "1", "--json"]));
    let letter: Value = serde_json::from_str(&text).unwrap();
    let id = letter["message_id"].as_str().unwrap();
    let human = succeed(run(&db, &["messages", "show", id]));
    assert!(
        human.contains("connection refused") && human.contains("k3"),
        "{human}"
    );
    // A copy outlives the log.
    sql(&db, "TRUNCATE postbox.outbox").await;
    let message: Value =
        serde_json::from_str(&succeed(run(&db, &["messages", "show", id, "--json"]))).unwrap();
    assert_eq!(
        (&message["in_log"], &message["topic"]),
        (&json!(false), &json!("orders"))
    );

    // One without an offset yet, and ids that say nothing of the time, or a wrong one.
    for id in [
        "018f0000-0000-7000-8000-000000000000",
        "0b8c9a52-4f9b-4a33-9c51-0d9f0c1b2a3d",
    ] {
        let missing = run(&db, &["messages", "show", id]);
        assert_eq!(missing.status.code(), Some(1), "{missing:?}");
        sql(
            &db,
            format!("SELECT postbox.publish(topic => 'orders', payload => '1', id => '{id}')"),
        )
        .await;
        let message: Value =
            serde_json::from_str(&succeed(run(&db, &["messages", "show", id, "--json"]))).unwrap();
        assert_eq!(
            (&message["offset"], &message["groups"][0]["state"]),
            (&Value::Null, &json!("unsequenced"))
        );
    }
}

#[tokio::test]
async fn status_counts_what_failed_and_says_the_worst_breaker() {
    let db = database().await;
    give_up(&db, "mail", "0, 1", "failed 8 times", false).await;
    give_up(&db, "mail", "2, 3, 4, 5, 6", "failed 8 times", true).await;
    sql(
        &db,
        "UPDATE postbox.redelivery SET state = CASE \"offset\" WHEN 2 THEN 'retry' WHEN 3 THEN 'trying' WHEN 4 THEN 'parked' WHEN 5 THEN 'redriven' ELSE state END",
    )
    .await;
    let of = async |group: &str| {
        let status: Value = serde_json::from_str(&succeed(run(&db, &["status", "--json"]))).unwrap();
        let all = status["subscriptions"].as_array().unwrap().clone();
        all.into_iter().find(|s| s["group_name"] == group).unwrap()
    };
    let mail = of("mail").await;
    for (field, count) in [("retrying", 3), ("parked", 1), ("halted", 1), ("dead", 7)] {
        assert_eq!(mail[field], count, "{field}");
    }
    assert_eq!(
        (&mail["breaker"], &of("audit").await["dead"]),
        (&Value::Null, &json!(0))
    );

    // Two live instances and a dead one.
    let mut session = db.connect().await.unwrap();
    for (breaker, live) in [("closed", true), ("full", true), ("open", false)] {
        let id: i32 = sqlx::query_scalar(
            "INSERT INTO postbox.consumer (name, pid, subscriptions, lease, report)
             SELECT 'test', 1, array_agg(id), '10 s', jsonb_build_array(
                 jsonb_build_object('group', 'mail', 'topic', 'orders', 'breaker', $1::text), jsonb_build_object('group', 'audit', 'topic', 'orders'))
             FROM postbox.subscription RETURNING id",
        )
        .bind(breaker)
        .fetch_one(&mut session)
        .await
        .unwrap();
        if live {
            sqlx::query("SELECT pg_advisory_lock(1347571763, $1)")
                .bind(id)
                .execute(&mut session)
                .await
                .unwrap();
        }
    }
    sql(
        &db,
        "INSERT INTO postbox.consumer (name, pid, subscriptions, lease) VALUES ('new', 1, '{}', '10 s')",
    )
    .await;
    assert_eq!(
        (&of("mail").await["breaker"], &of("audit").await["breaker"]),
        (&json!("full"), &Value::Null)
    );
    let human = succeed(run(&db, &["status"]));
    assert!(human.contains("breaker") && human.contains("full"), "{human}");
}

#[tokio::test]
async fn a_running_group_runs_what_is_redriven_and_goes_on_with_what_is_released() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.pool().clone()).start().await.unwrap();
    let ran: Arc<Mutex<Vec<Ran>>> = Arc::default();
    let noted = ran.clone();
    // Fails for 0 until its payload is mended, and for 5 always.
    let handler = HandlerDefinition::new("mail")
        .group("mail")
        .topic("orders")
        .retry(
            Retry::fixed(Duration::from_millis(5))
                .max_attempts(2)
                .exhausted(Exhausted::Halt),
        )
        .call(move |mut invocation| {
            let noted = noted.clone();
            Box::pin(async move {
                let delivery = <Delivery as Extract>::extract(&mut invocation).await?;
                let raw = <Raw as Extract>::extract(&mut invocation).await?;
                let n: i64 = serde_json::from_slice(&raw.payload)?;
                if n == 0 || n == 5 {
                    return Err(HandlerError::retry("the printer is out of paper"));
                }
                let redriven = delivery.headers.get("postbox-redriven").map(str::to_owned);
                noted.lock().unwrap().push((n, redriven));
                Ok(())
            })
        });
    let consumer = Consumer::new(db.pool().clone())
        .handlers([handler])
        .start()
        .await
        .unwrap();
    // Two keys, five messages each; the first of each fails.
    sql(
        &db,
        "SELECT postbox.publish(topic => 'orders', key => CASE WHEN n < 5 THEN 'a' ELSE 'b' END, payload => to_jsonb(n)) FROM generate_series(0, 9) n",
    )
    .await;
    let halted = "SELECT count(*) FROM postbox.dead_letter WHERE halted";
    eventually(PATIENCE, async || match number(&db, halted).await {
        2 => Ok(()),
        few => Err(format!("{few} halted")),
    })
    .await;
    let letters = json_lines(&succeed(run(&db, &["dead-letters", "list", "--json"])));
    let letter_of = |key: &str| letters.iter().find(|letter| letter["key"] == key).unwrap();
    assert_eq!(letter_of("a")["attempts"], 2);
    assert!(letter_of("a")["errors"].to_string().contains("out of paper"));
    let id = letter_of("a")["message_id"].as_str().unwrap();
    let shown: Value = serde_json::from_str(&succeed(run(&db, &["messages", "show", id, "--json"]))).unwrap();
    assert_eq!(shown["groups"][0]["state"], "halted");
    let status: Value = serde_json::from_str(&succeed(run(&db, &["status", "--json"]))).unwrap();
    let mail = &status["subscriptions"][0];
    assert_eq!((&mail["halted"], &mail["dead"]), (&json!(2), &json!(2)), "{mail}");
    assert!(ran.lock().unwrap().is_empty());

    // Key a: mended. Key b: without its first.
    let number_of = |key: &str| letter_of(key)["id"].as_i64().unwrap().to_string();
    let mut child = command(
        &db,
        &[
            "dead-letters",
            "redrive",
            &number_of("a"),
            "--payload",
            "-",
            "--yes",
        ],
    )
    .stdin(Stdio::piped())
    .spawn()
    .unwrap();
    child.stdin.take().unwrap().write_all(b"100").unwrap();
    succeed(child.wait_with_output().unwrap());
    succeed(run(&db, &["dead-letters", "release", &number_of("b"), "--yes"]));
    eventually(PATIENCE, async || match ran.lock().unwrap().len() {
        9 => Ok(()),
        ran => Err(format!("{ran} ran")),
    })
    .await;
    let ran = ran.lock().unwrap().clone();
    let of_a: Vec<_> = ran.iter().filter(|(n, _)| *n < 5 || *n == 100).cloned().collect();
    let plain = |n| (n, None);
    assert_eq!(
        of_a,
        [
            (100, Some("1".to_owned())),
            plain(1),
            plain(2),
            plain(3),
            plain(4)
        ]
    );
    let of_b: Vec<i64> = ran
        .iter()
        .map(|(n, _)| *n)
        .filter(|n| (5..10).contains(n))
        .collect();
    assert_eq!(of_b, [6, 7, 8, 9]);
    consumer.shutdown().await.unwrap();
    assert_eq!(number(&db, "SELECT count(*) FROM postbox.redelivery").await, 0);
    assert_eq!(
        number(
            &db,
            "SELECT count(*) FROM postbox.dead_letter WHERE key = 'b' AND NOT halted"
        )
        .await,
        1
    );
    let shown: Value = serde_json::from_str(&succeed(run(&db, &["messages", "show", id, "--json"]))).unwrap();
    assert_eq!(shown["groups"][0]["state"], "delivered");
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn a_rebase_is_for_a_database_that_needs_it() {
    let db = database().await;
    assert!(succeed(run(&db, &["rebase", "--check"])).starts_with("not needed"));
    assert!(succeed(run(&db, &["rebase"])).starts_with("not needed"));
    sql(&db, "UPDATE postbox.cluster SET system_identifier = 17").await;
    let check = ends(run(&db, &["rebase", "--check", "--json"]), 3);
    let check: Value = serde_json::from_str(&check).unwrap();
    assert_eq!(check["needed"], true);
    let done: Value = serde_json::from_str(&succeed(run(&db, &["rebase", "--json"]))).unwrap();
    assert_eq!(
        (&done["sequenced"], &done["unsequenced"]),
        (&json!(20), &json!(0))
    );
    let again: Value = serde_json::from_str(&succeed(run(&db, &["rebase", "--json"]))).unwrap();
    assert_eq!(again["needed"], false);
    assert!(succeed(run(&db, &["rebase", "--force"])).contains("20 messages keep their offsets"));
}
