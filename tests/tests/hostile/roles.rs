//! What a role may do: each kind what it needs, proven by running the real thing as it, and nothing else, proven by trying everything else.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{TimeDelta, Utc};
use postbox::{Message, Outgoing, Publish};
use postbox_consumer::{Consumer, HandlerError, ScheduledAt, Tx, handler, handlers};
use postbox_dispatcher::{Dispatcher, dead_letters, doctor, messages, status, subscriptions};
use postbox_testkit::{TestDatabase, eventually};
use serde::{Deserialize, Serialize};
use sqlx::{AssertSqlSafe, PgPool};

use crate::role::Role;

const SOON: Duration = Duration::from_secs(30);
const KINDS: [&str; 4] = ["publisher", "consumer", "operator", "viewer"];

async fn grant(db: &TestDatabase, role: &Role, kind: &str) {
    sqlx::query("SELECT postbox.grant($1::text::regrole, $2)")
        .bind(&role.name)
        .bind(kind)
        .execute(db.pool())
        .await
        .unwrap_or_else(|error| panic!("grant {kind}: {error}"));
}

fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error()?.code().map(String::from)
}

async fn refused(pool: &PgPool, sql: &str) {
    let mut tx = pool.begin().await.unwrap();
    let tried = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
        .execute(&mut *tx)
        .await;
    let error = tried.err().unwrap_or_else(|| panic!("{sql} is allowed"));
    assert_eq!(code(&error).as_deref(), Some("42501"), "{sql}: {error}");
}

/// Everything in the schema that a role has any right to.
async fn rights(db: &TestDatabase, role: &Role) -> BTreeSet<String> {
    const RIGHTS: &str = "
        SELECT p.privilege || ' ' || c.relname
        FROM pg_class c, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS p (privilege)
        WHERE c.relnamespace = 'postbox'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND has_table_privilege($1, c.oid, p.privilege)
        UNION ALL
        SELECT p.privilege || ' ' || c.relname || '.' || a.attname
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped,
            unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS p (privilege)
        WHERE c.relnamespace = 'postbox'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
            AND has_column_privilege($1, c.oid, a.attnum, p.privilege) AND NOT has_table_privilege($1, c.oid, p.privilege)
        UNION ALL
        SELECT p.privilege || ' ' || c.relname FROM pg_class c, unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) AS p (privilege)
        WHERE c.relnamespace = 'postbox'::regnamespace AND c.relkind = 'S' AND has_sequence_privilege($1, c.oid, p.privilege)
        UNION ALL
        SELECT 'EXECUTE ' || f.proname FROM pg_proc f
        WHERE f.pronamespace = 'postbox'::regnamespace AND f.prosecdef AND has_function_privilege($1, f.oid, 'EXECUTE')
        UNION ALL
        SELECT 'CREATE in the schema' WHERE has_schema_privilege($1, 'postbox', 'CREATE')";
    let rights: Vec<String> = sqlx::query_scalar(RIGHTS)
        .bind(&role.name)
        .fetch_all(db.pool())
        .await
        .unwrap();
    rights.into_iter().collect()
}

#[tokio::test]
async fn a_publisher_has_these_rights_and_no_other() {
    let db = TestDatabase::new().await.unwrap();
    let role = Role::new(&db).await;
    grant(&db, &role, "publisher").await;
    let content = [
        "id",
        "topic",
        "type",
        "key",
        "headers",
        "content_type",
        "payload",
        "expires_at",
    ];
    let mut expected: BTreeSet<String> = content
        .iter()
        .flat_map(|column| {
            [
                format!("INSERT outbox.{column}"),
                format!("INSERT own_scheduled.{column}"),
            ]
        })
        .collect();
    expected.extend(
        [
            "INSERT own_scheduled.deliver_at",
            "SELECT own_scheduled.id",
            "UPDATE own_scheduled.deliver_at",
            "DELETE own_scheduled",
            "USAGE outbox_seq",
            "USAGE scheduled_n",
            "EXECUTE scheduled_by",
            "SELECT deduplicated.id",
            "INSERT deduplicated.dedup_key",
            "INSERT deduplicated.dedup_window",
            "INSERT deduplicated.deliver_at",
            "INSERT deduplicated.delay",
            "INSERT deduplicated.expires_in",
        ]
        .map(String::from),
    );
    expected.extend(content.map(|column| format!("INSERT deduplicated.{column}")));
    assert_eq!(rights(&db, &role).await, expected);
    role.drop(&db).await;
}

#[tokio::test]
async fn no_kind_may_write_the_log_truncate_or_do_as_the_owner_does() {
    let db = TestDatabase::new().await.unwrap();
    for kind in KINDS {
        let role = Role::new(&db).await;
        grant(&db, &role, kind).await;
        let rights = rights(&db, &role).await;
        for right in &rights {
            let (privilege, object) = right.split_once(' ').unwrap();
            let table = object.split('.').next().unwrap();
            let allowed = match privilege {
                "TRUNCATE" | "REFERENCES" | "TRIGGER" | "CREATE" => false,
                "SELECT" if table == "run" => kind == "consumer",
                "SELECT" => kind != "publisher" || ["own_scheduled", "deduplicated"].contains(&table),
                "EXECUTE" => kind == "publisher",
                "USAGE" => kind != "viewer",
                _ => match kind {
                    "publisher" => ["outbox", "own_scheduled", "deduplicated"].contains(&table),
                    "viewer" => false,
                    _ => ![
                        "outbox",
                        "segment",
                        "tick",
                        "topic",
                        "cluster",
                        "installation",
                        "schema_migration",
                        "role_grant",
                        "dedup",
                    ]
                    .contains(&table),
                },
            };
            assert!(allowed, "a {kind} has {right}");
        }
        sqlx::query("SELECT postbox.revoke($1::text::regrole, $2)")
            .bind(&role.name)
            .bind(kind)
            .execute(db.pool())
            .await
            .unwrap();
        refused(&role.pool, "SELECT postbox.publish('t', '1')").await;
        role.drop(&db).await;
    }
}

#[tokio::test]
async fn a_publisher_that_tries_everything_on_every_table_is_refused() {
    let db = TestDatabase::new().await.unwrap();
    let role = Role::new(&db).await;
    grant(&db, &role, "publisher").await;
    let tables: Vec<(String, String)> = sqlx::query_as(
        "SELECT c.relname::text, (SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum = 1) FROM pg_class c \
         WHERE c.relnamespace = 'postbox'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm') ORDER BY 1",
    )
    .fetch_all(db.pool())
    .await
    .unwrap();
    assert!(tables.len() > 60, "{tables:?}");
    for (table, first) in tables {
        refused(&role.pool, &format!("SELECT * FROM postbox.{table}")).await;
        if table == "deduplicated" {
            continue;
        }
        if table == "own_scheduled" {
            refused(&role.pool, "UPDATE postbox.own_scheduled SET publisher = 'x'").await;
            continue;
        }
        refused(
            &role.pool,
            &format!("UPDATE postbox.{table} SET \"{first}\" = DEFAULT"),
        )
        .await;
        refused(&role.pool, &format!("DELETE FROM postbox.{table}")).await;
        refused(&role.pool, &format!("TRUNCATE postbox.{table}")).await;
        refused(&role.pool, &format!("LOCK TABLE postbox.{table} IN SHARE MODE")).await;
        if table != "outbox" {
            refused(&role.pool, &format!("INSERT INTO postbox.{table} DEFAULT VALUES")).await;
        }
    }
    for sequence in ["outbox_seq", "tick_id", "scheduled_n", "checkpoint_id"] {
        refused(&role.pool, &format!("SELECT setval('postbox.{sequence}', 1)")).await;
    }
    for sql in [
        "INSERT INTO postbox.outbox (topic, payload, xid) VALUES ('t', '1', '3')",
        "INSERT INTO postbox.outbox (topic, payload, seq) VALUES ('t', '1', 1)",
        "INSERT INTO postbox.own_scheduled (deliver_at, topic, payload, xid) VALUES (now(), 't', '1', '3')",
        "INSERT INTO postbox.own_scheduled (deliver_at, topic, payload, publisher) VALUES (now(), 't', '1', 'x')",
        "UPDATE postbox.own_scheduled SET xid = '3'",
        "UPDATE postbox.own_scheduled SET payload = '2'",
        "SELECT postbox.grant(current_user::regrole, 'operator')",
        "SELECT postbox.set_retention('1 minute')",
        "SELECT postbox.redrive('{1}')",
        "SELECT * FROM postbox.sequence()",
        "CREATE TABLE postbox.mine (a int)",
        "CREATE OR REPLACE FUNCTION postbox.clock() RETURNS timestamptz LANGUAGE sql RETURN now()",
        "ALTER TABLE postbox.outbox DISABLE TRIGGER ALL",
    ] {
        refused(&role.pool, sql).await;
    }
    role.drop(&db).await;
}

#[tokio::test]
async fn a_publisher_changes_what_it_has_scheduled_and_nobody_elses() {
    let db = TestDatabase::new().await.unwrap();
    let (mine, other) = (Role::new(&db).await, Role::named(&db, "other").await);
    for role in [&mine, &other] {
        grant(&db, role, "publisher").await;
    }
    let later = |text: &str| Outgoing::json("t", &text).delay(Duration::from_secs(3_600));
    let schedule = async |role: &Role, message: Outgoing| {
        let mut tx = role.pool.begin().await.unwrap();
        let id = tx.publish(message).await.unwrap();
        tx.commit().await.unwrap();
        id
    };
    let hour = Utc::now() + TimeDelta::hours(2);
    for dedup in [false, true] {
        let message = |text: &str| match dedup {
            true => later(text).dedup_key(text.to_owned()),
            false => later(text),
        };
        let (a, b) = (
            schedule(&mine, message("a")).await,
            schedule(&other, message("b")).await,
        );
        let mut tx = mine.pool.begin().await.unwrap();
        let error = tx.cancel(b).await.unwrap_err().to_string();
        assert!(
            error.contains(&format!("was scheduled by role {}", other.name)),
            "{error}"
        );
        drop(tx);
        let mut tx = mine.pool.begin().await.unwrap();
        assert!(tx.reschedule(b, hour).await.is_err());
        drop(tx);
        let mut tx = mine.pool.begin().await.unwrap();
        assert!(tx.reschedule(a, hour).await.unwrap());
        assert!(tx.cancel(a).await.unwrap());
        assert!(!tx.cancel(a).await.unwrap(), "it is gone");
        tx.commit().await.unwrap();
        // By hand as well.
        let all = sqlx::query("DELETE FROM postbox.own_scheduled")
            .execute(&mine.pool)
            .await
            .unwrap();
        assert_eq!(all.rows_affected(), 0);
        let moved = sqlx::query("UPDATE postbox.own_scheduled SET deliver_at = now()")
            .execute(&mine.pool)
            .await
            .unwrap();
        assert_eq!(moved.rows_affected(), 0);
        // Its members and operators may.
        sqlx::raw_sql(AssertSqlSafe(format!("GRANT {} TO {}", other.name, mine.name)))
            .execute(db.pool())
            .await
            .unwrap();
        let mut tx = mine.pool.begin().await.unwrap();
        assert!(tx.reschedule(b, hour).await.unwrap());
        tx.commit().await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(format!("REVOKE {} FROM {}", other.name, mine.name)))
            .execute(db.pool())
            .await
            .unwrap();
        let operator = Role::named(&db, "operator").await;
        grant(&db, &operator, "operator").await;
        let mut tx = operator.pool.begin().await.unwrap();
        assert!(tx.cancel(b).await.unwrap());
        tx.commit().await.unwrap();
        operator.drop(&db).await;
    }
    // A due time that is changed by hand is found by the dispatcher, too.
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    schedule(&mine, later("due")).await;
    let moved = sqlx::query("UPDATE postbox.own_scheduled SET deliver_at = now()")
        .execute(&mine.pool)
        .await
        .unwrap();
    assert_eq!(moved.rows_affected(), 1);
    eventually(SOON, async || {
        match sqlx::query_scalar("SELECT count(*) FROM postbox.outbox")
            .fetch_one(db.pool())
            .await
            .unwrap()
        {
            1_i64 => Ok(()),
            n => Err(format!("{n} delivered")),
        }
    })
    .await;
    dispatcher.shutdown().await;
    mine.drop(&db).await;
    other.drop(&db).await;
}

#[tokio::test]
async fn a_publisher_can_silence_nobody_by_a_deduplication_key_without_a_message_of_its_own() {
    let db = TestDatabase::new().await.unwrap();
    let role = Role::new(&db).await;
    grant(&db, &role, "publisher").await;
    let direct = "INSERT INTO postbox.deduplicated (id, topic, dedup_key, payload, content_type, delay) \
        VALUES (gen_random_uuid(), 't', 'k', '1', 'application/json', NULL)";
    sqlx::query(direct).execute(&role.pool).await.unwrap();
    let (rows, published): (i64, i64) =
        sqlx::query_as("SELECT (SELECT count(*) FROM postbox.dedup), (SELECT count(*) FROM postbox.outbox)")
            .fetch_one(db.pool())
            .await
            .unwrap();
    assert_eq!((rows, published), (1, 1), "each row came with a message");
    let wrong = direct.replace("'t'", "'no topic'").replace("'k'", "'l'");
    assert!(
        sqlx::query(AssertSqlSafe(wrong))
            .execute(&role.pool)
            .await
            .is_err(),
        "its limits hold"
    );
    // What is for later is its own, whatever it says.
    let (given, named) = (
        direct
            .replace("'k'", "'m'")
            .replace("delay)", "publisher)")
            .replace("NULL)", "'postgres')"),
        direct.replace("'k'", "'n'").replace("NULL)", "'1 hour')"),
    );
    refused(&role.pool, &given).await;
    sqlx::query(AssertSqlSafe(named))
        .execute(&role.pool)
        .await
        .unwrap();
    let publisher: String = sqlx::query_scalar("SELECT publisher::text FROM postbox.scheduled")
        .fetch_one(db.pool())
        .await
        .unwrap();
    assert_eq!(publisher, role.name);
    for forbidden in [
        "SELECT postbox.publish_once()",
        "UPDATE postbox.deduplicated SET id = NULL",
        "DELETE FROM postbox.deduplicated",
    ] {
        let tried = sqlx::query(forbidden).execute(&role.pool).await;
        assert!(tried.is_err(), "{forbidden}");
    }
    role.drop(&db).await;
}

// ------------------------------------------------------------------------------------------------------------- the real thing

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders", type = "placed", key = id)]
struct Placed {
    id: i64,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "bills", type = "billed", key = id)]
struct Billed {
    id: i64,
}

#[handler(group = "billing", retry(max_attempts = 2, backoff = "fixed(10ms)"))]
async fn bill(order: Placed, mut tx: Tx) -> Result<(), HandlerError> {
    if order.id % 5 == 0 {
        return Err(HandlerError::retry("no money"));
    }
    tx.publish(&Billed { id: order.id }).await?;
    Ok(())
}

#[handler(group = "count", retry(max_attempts = 3, backoff = "fixed(10ms)"))]
async fn count(order: Placed) -> Result<(), HandlerError> {
    match order.id % 7 {
        0 => Err(HandlerError::retry("seven")),
        _ => Ok(()),
    }
}

#[postbox_consumer::cron("* * * * * *")]
async fn tick(_at: ScheduledAt) {}

#[tokio::test]
async fn services_of_every_kind_run_with_the_rights_of_their_kind() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let (service, viewer, operator) = (
        Role::new(&db).await,
        Role::named(&db, "viewer").await,
        Role::named(&db, "operator").await,
    );
    grant(&db, &service, "consumer").await;
    grant(&db, &service, "publisher").await;
    grant(&db, &viewer, "viewer").await;
    grant(&db, &operator, "operator").await;

    let consumer = Consumer::new(service.pool.clone())
        .handlers(handlers![bill, count, tick])
        .start()
        .await
        .unwrap();
    let mut tx = service.pool.begin().await.unwrap();
    tx.publish_all((1..=20).map(|id| Outgoing::from(&Placed { id })))
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let state = async || {
        let all = status::subscriptions(&viewer.pool).await.unwrap();
        let of = |group: &str| {
            all.iter()
                .find(|s| s.group_name == group && s.topic == "orders")
                .map(|s| (s.backlog, s.retrying, s.dead))
        };
        (of("billing"), of("count"))
    };
    let comes_to = async |billing: i64, count: i64| {
        eventually(SOON, async || match state().await {
            (Some((0, 0, b)), Some((0, 0, c))) if (b, c) == (billing, count) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    };
    comes_to(4, 2).await;

    // Who looks.
    let seen = status::read(&viewer.pool).await.unwrap();
    assert!(
        seen.dispatchers == 1 && seen.consumers.iter().any(|consumer| consumer.live),
        "{seen:?}"
    );
    let findings = doctor::examine(&viewer.pool).await.unwrap();
    assert!(
        findings.iter().all(|finding| finding.name != "privilege"),
        "{findings:?}"
    );
    refused(&viewer.pool, "UPDATE postbox.subscription SET paused = true").await;
    let letters: Vec<(i64, uuid::Uuid)> =
        sqlx::query_as("SELECT id, message_id FROM postbox.dead_letter ORDER BY id")
            .fetch_all(&viewer.pool)
            .await
            .unwrap();
    assert!(
        messages::show(&viewer.pool, letters[0].1)
            .await
            .unwrap()
            .is_some()
    );

    // Who operates.
    let ids: Vec<i64> = letters.iter().map(|(id, _)| *id).collect();
    let [first, second, rest @ ..] = &ids[..] else {
        panic!("{ids:?}")
    };
    assert_eq!(dead_letters::discard(&operator.pool, &[*first]).await.unwrap(), 1);
    assert_eq!(
        dead_letters::redrive(&operator.pool, &[*second], None)
            .await
            .unwrap(),
        1
    );
    assert!(!rest.is_empty());
    for paused in [true, false] {
        let change = subscriptions::Change::Paused(paused);
        assert_eq!(
            subscriptions::change(&operator.pool, "count", None, &change)
                .await
                .unwrap(),
            1
        );
    }
    let count = subscriptions::find(&operator.pool, "count", "orders")
        .await
        .unwrap();
    let (_, replayed) = subscriptions::replay(&operator.pool, count, 0, 1, 10)
        .await
        .unwrap();
    assert_eq!(replayed, 1);
    subscriptions::seek(&operator.pool, count, subscriptions::Position::Earliest)
        .await
        .unwrap();
    for sql in [
        "SELECT postbox.set_retention('3 days')",
        "UPDATE postbox.cron SET paused = true",
        "DELETE FROM postbox.cron",
    ] {
        let ran = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
            .execute(&operator.pool)
            .await;
        assert!(
            ran.as_ref().err().and_then(code).as_deref() != Some("42501"),
            "{sql}: {ran:?}"
        );
    }
    refused(
        &operator.pool,
        "INSERT INTO postbox.outbox (topic, payload) VALUES ('t', '1')",
    )
    .await;
    refused(&operator.pool, "SELECT * FROM postbox.sequence()").await;
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
    for role in [service, viewer, operator] {
        role.drop(&db).await;
    }
}

#[tokio::test]
async fn doctor_says_to_any_role_which_grant_is_missing() {
    let db = TestDatabase::new().await.unwrap();
    let role = Role::new(&db).await;
    let says = async || {
        let findings = doctor::examine(&role.pool).await.expect("findings, no error");
        findings
            .iter()
            .filter(|finding| finding.name == "privilege")
            .map(|finding| format!("{} {}", finding.what, finding.hint))
            .collect::<Vec<_>>()
            .join("\n")
    };
    let mend = format!("`postbox grant {} --as viewer`", role.name);
    assert!(says().await.contains(&mend), "{}", says().await);
    for kind in ["publisher", "consumer"] {
        grant(&db, &role, kind).await;
        assert!(says().await.contains(&mend), "{kind}: {}", says().await);
    }
    grant(&db, &role, "viewer").await;
    assert_eq!(says().await, "");
    role.drop(&db).await;
}
