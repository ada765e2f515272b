//! Rows that break rules, or that a program cannot read: each costs itself and nobody else, and says so.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::role::Role;
use crate::support::{Bench, PATIENCE, bench};
use postbox::{Outgoing, Publish};
use postbox_consumer::{Delivery, Extract, HandlerDefinition, HandlerError, Raw, Retry};
use postbox_dispatcher::{Dispatcher, doctor, messages, rejects, status};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgPool};
use uuid::Uuid;

/// How often each payload was handled, by group.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<BTreeMap<(&'static str, String), u32>>>);

impl Seen {
    fn times(&self, group: &'static str, payload: &str) -> u32 {
        let seen = self.0.lock().unwrap();
        seen.get(&(group, payload.to_owned())).copied().unwrap_or(0)
    }

    /// Takes every type of the topic.
    fn handler(&self, group: &'static str) -> HandlerDefinition {
        let seen = self.clone();
        HandlerDefinition::new("handler")
            .group(group)
            .topic("t")
            .retry(Retry::fixed(Duration::from_millis(50)))
            .argument::<Raw>()
            .call(move |mut invocation| {
                let seen = seen.clone();
                Box::pin(async move {
                    let raw = <Raw as Extract>::extract(&mut invocation).await?;
                    let _ = <Delivery as Extract>::extract(&mut invocation).await?;
                    let payload = String::from_utf8_lossy(&raw.payload).into_owned();
                    *seen.0.lock().unwrap().entry((group, payload)).or_default() += 1;
                    Ok::<(), HandlerError>(())
                })
            })
    }

    async fn has(&self, groups: &[&'static str], payloads: &[String]) {
        eventually(PATIENCE, || async {
            for group in groups {
                for payload in payloads {
                    if self.times(group, payload) == 0 {
                        return Err(format!("{group} has not handled {payload}"));
                    }
                }
            }
            Ok(())
        })
        .await;
    }
}

async fn sql(pool: &PgPool, sql: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(sql.into()))
        .execute(pool)
        .await
        .unwrap();
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

async fn becomes(pool: &PgPool, wanted: i64, sql: &'static str) {
    eventually(PATIENCE, || async {
        match number(pool, sql).await {
            found if found == wanted => Ok(()),
            found => Err(format!("{found}, not {wanted}: {sql}")),
        }
    })
    .await;
}

/// Columns and values of a plain INSERT; what becomes of it.
const HANDLED: [(&str, &str, &str); 7] = [
    ("forever", "expires_at", "'infinity'"),
    ("the-year-294276", "expires_at", "'294276-12-31 23:59:59+00'"),
    ("published-never", "published_at", "'infinity'"),
    ("published-ever", "published_at", "'-infinity'"),
    ("huge-number", "headers", "'{\"n\": 1e400}'"),
    (
        "deep",
        "headers",
        "('{\"d\": ' || repeat('[', 6000) || repeat(']', 6000) || '}')::jsonb",
    ),
    (
        "no-texts",
        "headers",
        "'{\"a\": null, \"b\": true, \"c\": {\"d\": 1}}'",
    ),
];
const BURIED: [(&str, &str, &str); 8] = [
    ("type", "type", "'a b'"),
    ("long-type", "type", "repeat('x', 256)"),
    ("long-key", "key", "repeat('k', 1025)"),
    ("reserved", "headers", "'{\"postbox-x\": \"1\"}'"),
    ("header-name", "headers", "'{\"a b\": \"1\"}'"),
    ("no-object", "headers", "'[1]'"),
    (
        "large-headers",
        "headers",
        "jsonb_build_object('a', repeat('x', 17000))",
    ),
    ("content-type", "content_type", "E'a\\nb'"),
];

fn insert(name: &str, column: &str, value: &str) -> String {
    format!("INSERT INTO postbox.outbox (topic, payload, {column}) VALUES ('t', '{name}', {value});")
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_row_holds_its_neighbours_are_handled() {
    let bench = bench().await;
    let pool = bench.db.pool();
    let seen = Seen::default();
    let groups = ["one", "two"];
    let consumer = bench
        .start(groups.map(|group| seen.handler(group)).to_vec())
        .await;
    // All in one transaction, so in one block of the log.
    let mut all = String::from(
        "BEGIN; INSERT INTO postbox.outbox (topic, payload, expires_at) VALUES ('t', 'late', '-infinity');",
    );
    for (n, (name, column, value)) in HANDLED.iter().chain(&BURIED).enumerate() {
        all += &format!(
            "INSERT INTO postbox.outbox (topic, key, payload) VALUES ('t', 'k{}', 'neighbour-{n}');",
            n % 3
        );
        all += &insert(name, column, value);
    }
    sql(pool, all + "COMMIT").await;
    let neighbours = (0..HANDLED.len() + BURIED.len()).map(|n| format!("neighbour-{n}"));
    let handled: Vec<String> = neighbours.chain(HANDLED.map(|row| row.0.to_owned())).collect();
    seen.has(&groups, &handled).await;
    becomes(
        pool,
        2 * BURIED.len() as i64,
        "SELECT count(*) FROM postbox.dead_letter",
    )
    .await;
    for (name, ..) in BURIED {
        assert_eq!(seen.times("one", name), 0, "{name} breaks a rule");
        let reasons: Vec<String> = sqlx::query_scalar(
            "SELECT reason FROM postbox.dead_letter WHERE payload = convert_to($1, 'UTF8')",
        )
        .bind(name)
        .fetch_all(pool)
        .await
        .unwrap();
        assert_eq!(reasons.len(), 2, "{name}: one a group, with the payload");
        assert!(
            ["allowed", "object", "at most"]
                .iter()
                .any(|says| reasons[0].contains(says)),
            "{name}: {reasons:?}"
        );
    }
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.redelivery").await, 0);
    assert!(
        handled.iter().all(|payload| seen.times("one", payload) == 1),
        "each once"
    );

    // Everything that shows messages shows these.
    let ids: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM postbox.outbox")
        .fetch_all(pool)
        .await
        .unwrap();
    for id in ids {
        messages::show(pool, id).await.unwrap().expect("it is there");
    }
    let status = status::read(pool).await.unwrap();
    assert!(
        status
            .subscriptions
            .iter()
            .all(|subscription| subscription.backlog == 0),
        "all is settled: {status:?}"
    );
    doctor::examine(pool).await.unwrap();

    // An operator can have a letter run all the same.
    let letter: i64 = sqlx::query_scalar(
        "SELECT id FROM postbox.dead_letter WHERE payload = 'reserved' ORDER BY id LIMIT 1",
    )
    .fetch_one(pool)
    .await
    .unwrap();
    sqlx::query("SELECT postbox.redrive(ARRAY[$1])")
        .bind(letter)
        .execute(pool)
        .await
        .unwrap();
    eventually(PATIENCE, || async {
        match groups
            .iter()
            .map(|group| seen.times(group, "reserved"))
            .sum::<u32>()
        {
            1 => Ok(()),
            times => Err(format!("{times} runs")),
        }
    })
    .await;
    consumer.shutdown().await.unwrap();
}

/// Text that is no UTF-8, as a database in SQL_ASCII or a damaged row may have it.
#[tokio::test(flavor = "multi_thread")]
async fn text_that_is_none_is_a_dead_letter_with_its_payload() {
    let bench = bench().await;
    let pool = bench.db.pool();
    let seen = Seen::default();
    let consumer = bench.start(vec![seen.handler("one"), seen.handler("two")]).await;
    sql(
        pool,
        "CREATE CAST (bytea AS text) WITHOUT FUNCTION;
         BEGIN;
         INSERT INTO postbox.outbox (topic, key, payload) VALUES ('t', 'k', 'before');
         INSERT INTO postbox.outbox (topic, key, payload) VALUES ('t', '\\xff6b'::bytea::text, 'the key');
         INSERT INTO postbox.outbox (topic, type, payload) VALUES ('t', '\\xfe'::bytea::text, 'the type');
         INSERT INTO postbox.outbox (topic, key, payload) VALUES ('t', 'k', 'after');
         COMMIT",
    )
    .await;
    seen.has(&["one", "two"], &["before".to_owned(), "after".to_owned()])
        .await;
    becomes(pool, 4, "SELECT count(*) FROM postbox.dead_letter WHERE reason LIKE 'it cannot be handled:%' AND payload LIKE 'the %'").await;
    // A broadcast from memory has nowhere to put it: it is passed and counted.
    assert_eq!(consumer.stats().iter().map(|stats| stats.dead).sum::<u64>(), 4);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_the_server_cannot_give_is_found_among_its_neighbours() {
    let bench = bench().await;
    let pool = bench.db.pool();
    // The server refuses every statement that reads this row, as it does for a damaged one.
    let role = Role::new(&bench.db).await;
    sql(
        pool,
        format!(
            "GRANT USAGE ON SCHEMA postbox TO {0}; GRANT ALL ON ALL TABLES IN SCHEMA postbox TO {0};
             GRANT ALL ON ALL SEQUENCES IN SCHEMA postbox TO {0};
             ALTER TABLE postbox.outbox ENABLE ROW LEVEL SECURITY;
             CREATE POLICY damaged ON postbox.outbox FOR SELECT TO {0}
                USING (CASE WHEN payload = 'damaged' THEN 1 / (length(topic) - 1) > 0 ELSE true END)",
            role.name
        ),
    )
    .await;
    let seen = Seen::default();
    let consumer = postbox_consumer::Consumer::new(role.pool.clone())
        .handlers(vec![seen.handler("one")])
        .start()
        .await
        .unwrap();
    let names: Vec<String> = (0..40).map(|n| format!("neighbour-{n}")).collect();
    let mut tx = pool.begin().await.unwrap();
    for (n, name) in names.iter().enumerate() {
        if n == 17 || n == 30 {
            tx.publish(Outgoing::bytes("t", "a/b", "damaged").key("d"))
                .await
                .unwrap();
        }
        tx.publish(Outgoing::bytes("t", "a/b", name.as_bytes()).key(format!("k{}", n % 5)))
            .await
            .unwrap();
    }
    tx.commit().await.unwrap();
    seen.has(&["one"], &names).await;
    becomes(pool, 2, "SELECT count(*) FROM postbox.dead_letter WHERE reason LIKE '%division by zero%' AND headers ? 'postbox-not-copied'").await;
    assert!(names.iter().all(|name| seen.times("one", name) == 1), "each once");
    consumer.shutdown().await.unwrap();
    role.drop(&bench.db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_not_allowed_costs_itself_and_can_be_admitted() {
    let bench = bench().await;
    let pool = bench.db.pool();
    let seen = Seen::default();
    let consumer = bench.start(vec![seen.handler("one")]).await;
    // Alone, which is a small step; and among others, which is a full one.
    sql(
        pool,
        "INSERT INTO postbox.outbox (topic, key, payload) VALUES ('or ders', 'k', 'x')",
    )
    .await;
    becomes(pool, 1, "SELECT count(*) FROM postbox.reject").await;
    sql(
        pool,
        "BEGIN;
         INSERT INTO postbox.outbox (topic, payload) VALUES ('t', 'first');
         INSERT INTO postbox.outbox (topic, payload, expires_at) VALUES ((SELECT string_agg(md5(i::text), '') FROM generate_series(1, 190) i), 'y', 'infinity');
         INSERT INTO postbox.outbox (topic, payload) VALUES ('', 'z'), (E'\\x1b[31m', 'w'), ('t', 'second');
         COMMIT",
    )
    .await;
    seen.has(&["one"], &["first".to_owned(), "second".to_owned()])
        .await;
    becomes(
        pool,
        4,
        "SELECT count(*) FROM postbox.reject WHERE reason LIKE 'topic %not allowed%'",
    )
    .await;
    sql(
        pool,
        "INSERT INTO postbox.outbox (topic, payload) VALUES ('t', 'third')",
    )
    .await;
    seen.has(&["one"], &["third".to_owned()]).await;
    assert_eq!(
        number(pool, "SELECT sum(count)::bigint FROM postbox.segment").await,
        3,
        "offsets are dense"
    );

    let findings = doctor::examine(pool).await.unwrap();
    let finding = findings
        .iter()
        .find(|finding| finding.name == "rejects")
        .expect("doctor finds them");
    assert!(finding.what.contains("or ders"), "{finding:?}");
    assert_eq!(status::read(pool).await.unwrap().rejects, 4);
    let list = rejects::list(pool, 0, 10).await.unwrap();
    let refused = rejects::readmit(pool, list[0].seq, &rejects::Changes::default()).await;
    assert!(
        refused.unwrap_err().to_string().contains("not allowed"),
        "it still breaks the rule"
    );
    let changes = rejects::Changes {
        topic: Some("t".to_owned()),
        ..Default::default()
    };
    let id = rejects::readmit(pool, list[0].seq, &changes).await.unwrap();
    assert_eq!(id.map(|id| id.as_uuid()), list[0].id, "under its id");
    seen.has(&["one"], &["x".to_owned()]).await;
    let rest: Vec<i64> = list[1..].iter().map(|reject| reject.seq).collect();
    assert_eq!(rejects::discard(pool, &rest).await.unwrap(), 3);
    assert_eq!(rejects::readmit(pool, rest[0], &changes).await.unwrap(), None);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_with_which_every_step_fails_is_set_aside() {
    let db = TestDatabase::new().await.unwrap();
    let pool = db.pool();
    // As an index entry that is too large or text that cannot be converted would: it fails with this row, whatever else there is.
    sql(
        pool,
        "CREATE OR REPLACE FUNCTION postbox.key_hash(key text) RETURNS integer LANGUAGE plpgsql IMMUTABLE AS $$
         BEGIN
             IF key = 'bad' THEN RAISE data_exception USING MESSAGE = 'this key cannot be hashed'; END IF;
             RETURN (hashtextextended(key, 0) & 2147483647)::integer;
         END $$;
         BEGIN;
         INSERT INTO postbox.outbox (topic, key, payload) SELECT 't' || i % 3, 'k' || i % 50, i::text::bytea FROM generate_series(1, 700) i;
         INSERT INTO postbox.outbox (topic, key, payload) VALUES ('t1', 'bad', 'x');
         INSERT INTO postbox.outbox (topic, key, payload) SELECT 't' || i % 3, NULL, i::text::bytea FROM generate_series(701, 1000) i;
         INSERT INTO postbox.outbox (topic, key, payload) VALUES ('t2', 'bad', 'x');
         COMMIT",
    )
    .await;
    let dispatcher = Dispatcher::new(pool.clone()).start().await.unwrap();
    becomes(
        pool,
        1000,
        "SELECT coalesce(sum(count), 0)::bigint FROM postbox.segment",
    )
    .await;
    becomes(
        pool,
        2,
        "SELECT count(*) FROM postbox.reject WHERE reason LIKE '%this key cannot be hashed%' AND key = 'bad'",
    )
    .await;
    assert_eq!(number(pool, DISORDER).await, 0, "each topic by its numbers");
    // It goes on as if nothing had been.
    sql(
        pool,
        "INSERT INTO postbox.outbox (topic, payload) VALUES ('t1', 'later')",
    )
    .await;
    becomes(pool, 1001, "SELECT sum(count)::bigint FROM postbox.segment").await;
    becomes(pool, 0, "SELECT count(*) FROM (SELECT part_look FROM postbox.tick ORDER BY id DESC LIMIT 1) t WHERE part_look IS NOT NULL").await;
    dispatcher.shutdown().await;
}

/// Messages that are not behind the one before them, or whose offset is not the next.
const DISORDER: &str = "SELECT count(*) FROM (
        SELECT s.topic, s.base + u.n - 1 AS \"offset\", u.seq, lag(u.seq) OVER w AS before, lag(s.base + u.n - 1) OVER w AS last
        FROM postbox.segment s, unnest(s.seqs) WITH ORDINALITY AS u (seq, n)
        WINDOW w AS (PARTITION BY s.topic ORDER BY s.base, u.n)
    ) m WHERE m.before >= m.seq OR m.last + 1 <> m.\"offset\"";

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_cannot_be_done_at_once_is_done_in_parts() {
    let db = TestDatabase::new().await.unwrap();
    let pool = db.pool();
    sql(
        pool,
        "INSERT INTO postbox.outbox (topic, key, payload) SELECT 't' || i % 3, CASE WHEN i % 2 = 0 THEN 'k' || i END, 'x'
         FROM generate_series(1, 60000) i",
    )
    .await;
    // A transaction that is open meanwhile, and commits in the middle of it or after it: nothing of it is lost, nothing comes twice.
    let mut open = pool.begin().await.unwrap();
    sqlx::raw_sql(
        "INSERT INTO postbox.outbox (topic, payload) SELECT 't1', 'late' FROM generate_series(1, 100)",
    )
    .execute(&mut *open)
    .await
    .unwrap();
    sql(pool, "INSERT INTO postbox.outbox (topic, payload) SELECT 't' || i % 3, 'y' FROM generate_series(1, 40000) i").await;
    // For connections that are made from now on.
    sql(
        pool,
        format!(
            "ALTER DATABASE {0} SET temp_file_limit = '256kB'; ALTER DATABASE {0} SET work_mem = '64kB'",
            db.name()
        ),
    )
    .await;
    let dispatcher = Dispatcher::new(pool.clone()).start().await.unwrap();
    // The test itself counts without these limits.
    let options: PgConnectOptions = db.url().parse().unwrap();
    let options = options.options([("temp_file_limit", "-1"), ("work_mem", "64MB")]);
    let pool = &PgPoolOptions::new().connect_lazy_with(options);
    eventually(PATIENCE, || async {
        match number(
            pool,
            "SELECT coalesce(sum(count), 0)::bigint FROM postbox.segment",
        )
        .await
        {
            0 => Err("nothing yet".to_owned()),
            _ => Ok(()),
        }
    })
    .await;
    open.commit().await.unwrap();
    becomes(pool, 100_100, "SELECT sum(count)::bigint FROM postbox.segment").await;
    let distinct = "SELECT count(DISTINCT u) FROM postbox.segment s, unnest(s.seqs) u";
    assert_eq!(number(pool, distinct).await, 100_100, "each once");
    assert!(
        number(
            pool,
            "SELECT count(*) FROM postbox.tick WHERE part_seq IS NOT NULL"
        )
        .await
            > 3,
        "in parts"
    );
    assert_eq!(number(pool, "SELECT count(*) FROM postbox.reject").await, 0);
    let keyed = "SELECT count(*) FROM postbox.segment s, unnest(s.seqs, s.keys) AS u (seq, hash)
         JOIN postbox.outbox o ON o.seq = u.seq WHERE u.hash IS DISTINCT FROM postbox.key_hash(o.key)";
    assert_eq!(number(pool, keyed).await, 0, "with the hash of its key, or none");
    dispatcher.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rules_are_the_same_in_sql_and_in_rust() {
    let db = TestDatabase::new().await.unwrap();
    let pool = db.pool();
    let texts = [
        "",
        "a",
        "a b",
        "ä",
        "a\n",
        "\n",
        " a",
        "a/b",
        "order.placed",
        "A-Z_0:9",
        "a,b",
        "\u{1b}[31m",
        "\u{7f}",
        "postbox-x",
        "postbox-cron",
        "Postbox-x",
        "a\u{a0}",
        "a;b=c",
    ];
    let texts = texts.iter().map(|text| (*text).to_owned());
    let lengths = [128, 129, 255, 256, 1024, 1025, 16_370, 16_400].map(|length| "x".repeat(length));
    // 255 and 256 characters of two bytes each, and 512 and 513.
    let wide = [64, 128, 512, 513].map(|length| "é".repeat(length));
    let mut verdicts = 0;
    for text in texts.chain(lengths).chain(wide) {
        let (topic, message_type, key, content_type) = (
            Outgoing::bytes(text.clone(), "a/b", ""),
            Outgoing::bytes("t", "a/b", "").message_type(text.clone()),
            Outgoing::bytes("t", "a/b", "").key(text.clone()),
            Outgoing::bytes("t", text.clone(), ""),
        );
        let name = Outgoing::bytes("t", "a/b", "").header(text.clone(), "v");
        let value = Outgoing::bytes("t", "a/b", "").header("h", text.clone());
        let dedup = Outgoing::bytes("t", "a/b", "").dedup_key(text.clone());
        let calls = [
            (topic, "topic => $1, payload => '', content_type => 'a/b'"),
            (
                message_type,
                "topic => 't', payload => '', content_type => 'a/b', type => $1",
            ),
            (
                key,
                "topic => 't', payload => '', content_type => 'a/b', key => $1",
            ),
            (content_type, "topic => 't', payload => '', content_type => $1"),
            (
                name,
                "topic => 't', payload => '', content_type => 'a/b', headers => jsonb_build_object($1, 'v')",
            ),
            (
                value,
                "topic => 't', payload => '', content_type => 'a/b', headers => jsonb_build_object('h', $1)",
            ),
            (
                dedup,
                "topic => 't', payload => '', content_type => 'a/b', dedup_key => $1",
            ),
        ];
        for (outgoing, call) in calls {
            let mut tx = pool.begin().await.unwrap();
            let rust = tx.publish(outgoing).await;
            tx.rollback().await.unwrap();
            let mut tx = pool.begin().await.unwrap();
            let server = sqlx::query(AssertSqlSafe(format!(
                "SELECT postbox.publish_bytes({})",
                call.replace("$1", "$1::text")
            )))
            .bind(&text)
            .execute(&mut *tx)
            .await;
            tx.rollback().await.unwrap();
            assert_eq!(
                rust.is_ok(),
                server.is_ok(),
                "{call} with {text:.40?} ({} bytes): {rust:?}, {server:?}",
                text.len()
            );
            verdicts += u32::from(rust.is_err());
        }
    }
    assert!(verdicts > 20, "some were refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_client_can_read_is_refused_at_the_door_in_one_line() {
    let db = TestDatabase::new().await.unwrap();
    let pool = db.pool();
    for (call, says) in [
        ("topic => null, payload => '1'", "the topic is missing"),
        ("'t', null", "the payload is missing"),
        ("'or ders', '1'", "topic 'or ders' is not allowed"),
        ("'t', '1', headers => '{\"postbox-x\": \"1\"}'", "reserved"),
        ("'t', '1', headers => '[1]'", "JSON array"),
        ("'t', '1', expires_at => 'infinity'", "cannot expire at infinity"),
        (
            "'t', '1', expires_at => '-infinity'",
            "cannot expire at -infinity",
        ),
        ("'t', '1', expires_at => '270000-01-01'", "before the year"),
        ("'t', '1', deliver_at => 'infinity'", "cannot be due at infinity"),
        ("'t', '1', deliver_at => '270000-01-01'", "before the year"),
        ("'t', '1', delay => '300000 years'", "10,000 years"),
        ("'t', '1', expires_in => '300000 years'", "10,000 years"),
        ("'t', '1', expires_in => '0'", "more than zero"),
        (
            "'t', '1', deliver_at => now(), delay => '1 s'",
            "exclude each other",
        ),
        (
            "'t', '1', dedup_key => 'a', dedup_window => '0'",
            "more than zero",
        ),
        ("'t', '1', dedup_key => ''", "0 bytes"),
    ] {
        let error = sqlx::query(AssertSqlSafe(format!("SELECT postbox.publish({call})")))
            .execute(pool)
            .await
            .expect_err(call);
        let error = error.as_database_error().unwrap();
        let error = error.downcast_ref::<sqlx::postgres::PgDatabaseError>();
        assert!(error.message().contains(says), "{call}: {}", error.message());
        assert_eq!((error.detail(), error.hint()), (None, None), "{call}");
        assert!(!error.message().contains('\n'), "{call}");
        assert_eq!(
            error.r#where().unwrap_or_default().lines().count(),
            1,
            "{call}: {:?}",
            error.r#where()
        );
    }
    for (call, key) in [
        ("'t', '1', key => 42", "42"),
        ("'t', '1', key => 42::bigint", "42"),
        ("'t', '1', '42'", "42"),
        ("'t', '1', key => 'k'::varchar", "k"),
        (
            "'t', '1', key => '01234567-89ab-7def-8123-456789abcdef'::uuid",
            "01234567-89ab-7def-8123-456789abcdef",
        ),
        ("'t', '1', key => 1.50", "1.50"),
    ] {
        let id: Uuid = sqlx::query_scalar(AssertSqlSafe(format!("SELECT postbox.publish({call})")))
            .fetch_one(pool)
            .await
            .unwrap();
        let stored: Option<String> = sqlx::query_scalar("SELECT key FROM postbox.outbox WHERE id = $1")
            .bind(id)
            .fetch_one(pool)
            .await
            .unwrap();
        assert_eq!(stored.as_deref(), Some(key), "{call}");
    }
    let error = sqlx::query("SELECT postbox.reschedule(postbox.uuid7(), 'infinity')")
        .execute(pool)
        .await;
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("cannot be due at infinity")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_ordered_keys_take_few_locks_and_still_exclude_each_other() {
    let db = TestDatabase::new().await.unwrap();
    let pool = db.pool();
    let held = "SELECT count(DISTINCT (classid, objid)) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";
    let message = |n: usize| Outgoing::bytes("t", "a/b", "").key(format!("key-{n}")).ordered();
    let mut one_by_one = pool.begin().await.unwrap();
    sqlx::raw_sql("SELECT postbox.publish('t', '1', key => 'key-' || i, ordered => true) FROM generate_series(0, 15999) i")
        .execute(&mut *one_by_one)
        .await
        .unwrap();
    let locks: i64 = sqlx::query_scalar(held)
        .fetch_one(&mut *one_by_one)
        .await
        .unwrap();
    assert!(locks <= 256, "{locks} locks for 16,000 keys");

    // Every one of the keys is held, those that were locked by themselves and those by the bucket; by each other way, too.
    for n in [0, 10, 63, 64, 65, 1_000, 15_999] {
        let mut other = pool.begin().await.unwrap();
        sqlx::raw_sql("SET LOCAL lock_timeout = '100ms'")
            .execute(&mut *other)
            .await
            .unwrap();
        let error = other
            .publish(message(n))
            .await
            .expect_err("the key is held")
            .to_string();
        assert!(error.contains("lock timeout"), "{error}");
    }
    one_by_one.rollback().await.unwrap();

    let mut single = pool.begin().await.unwrap();
    single.publish(message(7)).await.unwrap();
    let mut batch = pool.begin().await.unwrap();
    sqlx::raw_sql("SET LOCAL lock_timeout = '100ms'")
        .execute(&mut *batch)
        .await
        .unwrap();
    let error = batch
        .publish_all((0..1000).map(message))
        .await
        .expect_err("the key is held")
        .to_string();
    assert!(error.contains("lock timeout"), "{error}");
    batch.rollback().await.unwrap();
    // Few keys do not meet others.
    let mut other = pool.begin().await.unwrap();
    sqlx::raw_sql("SET LOCAL lock_timeout = '5s'")
        .execute(&mut *other)
        .await
        .unwrap();
    other
        .publish_all((100..160).map(message))
        .await
        .expect("other keys are free");
    other.rollback().await.unwrap();
    single.rollback().await.unwrap();
    let mut batch = pool.begin().await.unwrap();
    batch.publish_all((0..16_000).map(message)).await.unwrap();
    let locks: i64 = sqlx::query_scalar(held).fetch_one(&mut *batch).await.unwrap();
    assert!(locks <= 256, "{locks} locks for 16,000 keys");
    batch.rollback().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_scheduled_by_hand_for_never_holds_up_nothing() {
    let bench: Bench = bench().await;
    let pool = bench.db.pool();
    let seen = Seen::default();
    let consumer = bench.start(vec![seen.handler("one")]).await;
    sql(
        pool,
        "INSERT INTO postbox.scheduled (deliver_at, topic, payload, expires_at) VALUES
            ('infinity', 't', 'never', 'infinity'), ('-infinity', 't', 'at once', NULL), ('294000-01-01', 't', 'hardly', NULL);
         INSERT INTO postbox.cron (name, schedule, time_zone, missed, topic, payload, next_at)
            VALUES ('never', '* * * * *', 'UTC', 'skip', 't', 'cron', 'infinity');
         SELECT postbox.publish_bytes('t', 'soon', 'a/b', delay => '10 ms')",
    )
    .await;
    seen.has(&["one"], &["at once".to_owned(), "soon".to_owned()])
        .await;
    let ids: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM postbox.scheduled")
        .fetch_all(pool)
        .await
        .unwrap();
    assert_eq!(ids.len(), 2);
    for id in ids {
        messages::show(pool, id).await.unwrap().expect("it is there");
    }
    let mut connection = pool.acquire().await.unwrap();
    assert_eq!(postbox::cron::list(&mut connection).await.unwrap().len(), 1);
    consumer.shutdown().await.unwrap();
}
