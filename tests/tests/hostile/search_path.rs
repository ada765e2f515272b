//! A role that may create in a schema of others' search_path gets nothing of its own to run in their place.

use std::time::Duration;

use crate::support::{PATIENCE, Step, step};
use postbox::{Outgoing, Publish};
use postbox_consumer::{Batch, Consumer, HandlerError, Tx, handler, handlers};
use postbox_core::link;
use postbox_dispatcher::{Dispatcher, doctor, retention, status};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::PgPool;

/// Namesakes of all functions and operators of the server, with the same arguments, or with concrete ones where the server's take any; each says
/// which it is, in a sequence, which no rollback takes back, and fails.
const TRAPS: &str = r#"
CREATE SEQUENCE public.trapped;
CREATE TABLE public.trap (id bigint GENERATED ALWAYS AS IDENTITY, name text);
DO $traps$
DECLARE
    f record;
    n bigint;
BEGIN
    FOR f IN
        WITH concrete (array_type, element) AS (VALUES ('bigint[]', 'bigint'), ('integer[]', 'integer'), ('smallint[]', 'smallint'),
            ('text[]', 'text'), ('uuid[]', 'uuid'), ('bytea[]', 'bytea'), ('jsonb[]', 'jsonb'), ('xid8[]', 'xid8'), ('boolean[]', 'boolean'),
            ('timestamptz[]', 'timestamptz'))
        SELECT p.proname AS name, pg_get_function_identity_arguments(p.oid) AS of, format_type(p.prorettype, NULL) AS result
        FROM pg_proc p
        WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind <> 'p' AND p.provariadic = 0
            AND NOT EXISTS (SELECT FROM unnest(p.proargtypes || p.prorettype) AS t (oid) JOIN pg_type y ON y.oid = t.oid WHERE y.typtype = 'p')
            AND pg_get_function_identity_arguments(p.oid) !~ '(OUT|VARIADIC|ORDER BY) '
        UNION
        SELECT p.name, replace(replace(p.of, 'anyarray', c.array_type), 'anyelement', c.element),
            replace(replace(p.result, 'anyarray', c.array_type), 'anyelement', c.element)
        FROM concrete c, (VALUES ('unnest', 'anyarray', 'anyelement'), ('cardinality', 'anyarray', 'integer'), ('array_length', 'anyarray, integer', 'integer'),
            ('array_agg', 'anyelement', 'anyarray'), ('array_remove', 'anyarray, anyelement', 'anyarray'), ('array_position', 'anyarray, anyelement', 'integer'),
            ('array_to_string', 'anyarray, text', 'text'), ('array_to_string', 'anyarray, text, text', 'text'), ('count', 'anyelement', 'bigint'),
            ('format', 'text, anyelement', 'text'), ('to_jsonb', 'anyelement', 'jsonb'), ('concat_ws', 'text, text', 'text'),
            ('pg_advisory_xact_lock', 'smallint, integer', 'void'), ('octet_length', 'varchar', 'integer')) AS p (name, of, result)
    LOOP
        INSERT INTO public.trap (name) VALUES (f.name || '(' || f.of || ')') RETURNING id INTO n;
        BEGIN
            EXECUTE format('CREATE FUNCTION public.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L', f.name, f.of, f.result,
                format('BEGIN PERFORM pg_catalog.setval(''public.trapped'', %s); RAISE EXCEPTION ''trap %%'', %s; END', n, n));
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
    FOR f IN
        SELECT o.oprname AS name, format_type(nullif(o.oprleft, 0), NULL) AS l, format_type(o.oprright, NULL) AS r, format_type(o.oprresult, NULL) AS result
        FROM pg_operator o
        WHERE o.oprnamespace = 'pg_catalog'::regnamespace
            AND NOT EXISTS (SELECT FROM unnest(ARRAY[o.oprleft, o.oprright, o.oprresult]) AS t (oid) JOIN pg_type y ON y.oid = t.oid WHERE y.typtype = 'p')
        UNION
        SELECT o, a || '[]', a || '[]', CASE o WHEN '||' THEN a || '[]' ELSE 'boolean' END
        FROM unnest('{=,<>,||,@>,&&}'::text[]) o, unnest('{bigint,integer,smallint,text}'::text[]) a
    LOOP
        INSERT INTO public.trap (name) VALUES (concat_ws(' ', f.l, f.name, f.r)) RETURNING id INTO n;
        BEGIN
            EXECUTE format('CREATE FUNCTION public.trap_%s(%s) RETURNS %s LANGUAGE plpgsql AS %L', n, concat_ws(', ', f.l, f.r), f.result,
                format('BEGIN PERFORM pg_catalog.setval(''public.trapped'', %s); RAISE EXCEPTION ''trap %%'', %s; END', n, n));
            EXECUTE format('CREATE OPERATOR public.%s (FUNCTION = public.trap_%s, %s RIGHTARG = %s)', f.name, n,
                CASE WHEN f.l IS NOT NULL THEN format('LEFTARG = %s,', f.l) ELSE '' END, f.r);
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
END $traps$;
-- Types are looked up in the path, too.
CREATE DOMAIN public.timestamptz AS pg_catalog.text CHECK (false);
CREATE DOMAIN public.uuid AS pg_catalog.text CHECK (false);
CREATE DOMAIN public.text AS pg_catalog.int4 CHECK (false);
CREATE DOMAIN public.xid8 AS pg_catalog.text CHECK (false);
CREATE DOMAIN public.pg_snapshot AS pg_catalog.text CHECK (false);
DO $$ BEGIN EXECUTE pg_catalog.format('ALTER DATABASE %I SET search_path = public, pg_catalog', pg_catalog.current_database()); END $$;
"#;

/// Which was run last.
async fn trapped(pool: &PgPool) -> Option<String> {
    sqlx::query_scalar("SELECT t.name::pg_catalog.text FROM public.trap t, public.trapped s WHERE s.is_called AND t.id = s.last_value")
        .fetch_optional(pool)
        .await
        .unwrap()
}

#[handler(group = "tx")]
async fn in_a_transaction(step: Step, mut tx: Tx) -> Result<(), HandlerError> {
    if step.n == 1 {
        return Err(HandlerError::dead_letter("on purpose"));
    }
    tx.publish(Outgoing::json("followed", &step.key).key(&step.key))
        .await?;
    Ok(())
}

#[handler(group = "batch", batch = 10)]
async fn in_a_batch(steps: Batch<Step>, mut tx: Tx) -> Result<(), HandlerError> {
    for step in &steps {
        tx.publish(Outgoing::json("batched", &step.message.key)).await?;
    }
    Ok(())
}

#[handler(group = "plain")]
async fn plain(_step: Step) {}

#[tokio::test]
async fn traps_in_public_are_never_sprung() {
    let db = TestDatabase::new().await.unwrap();
    let own = link::pool(db.pool().connect_options().as_ref().clone(), 2, "");
    let mut connection = own.acquire().await.unwrap();
    sqlx::raw_sql("SET client_min_messages = warning")
        .execute(&mut *connection)
        .await
        .unwrap();
    sqlx::raw_sql(TRAPS).execute(&mut *connection).await.unwrap();
    drop(connection);
    let planted: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_proc WHERE pronamespace = to_regnamespace('public')::oid",
    )
    .fetch_one(&own)
    .await
    .unwrap();
    assert!(planted > 2_000, "only {planted} traps");

    // The application's connections have the path with the traps.
    let pool = db.connect_pool(6);
    let sprung = sqlx::raw_sql("SELECT lower('A')")
        .execute(&pool)
        .await
        .expect_err("a trap");
    assert!(sprung.to_string().contains("trap"), "{sprung}");
    sqlx::raw_sql("SELECT pg_catalog.setval('public.trapped', 1, false)")
        .execute(&pool)
        .await
        .unwrap();

    let dispatcher = Dispatcher::new(pool.clone()).start().await.unwrap();
    let consumer = Consumer::new(pool.clone())
        .handlers(handlers![in_a_transaction, in_a_batch, plain])
        .start()
        .await
        .unwrap();
    let mut tx = pool.begin().await.unwrap();
    tx.publish(&step("a", 0)).await.unwrap();
    let steps: Vec<Step> = (0..10).map(|n| step(n, n)).collect();
    tx.publish_all(&steps).await.unwrap();
    tx.publish(Outgoing::from(&step("late", 0)).delay(Duration::from_millis(200)))
        .await
        .unwrap();
    tx.publish(
        Outgoing::from(&step("once", 0))
            .dedup_key("once")
            .ordered()
            .expires_in(Duration::from_secs(60)),
    )
    .await
    .unwrap();
    sqlx::raw_sql("SELECT postbox.publish('steps', '{\"key\": \"sql\", \"n\": 0}', key => 'sql', type => 'step', ordered => true, dedup_key => 'k', delay => '1 ms')")
        .execute(&mut *tx)
        .await
        .unwrap();
    let never = tx
        .publish(Outgoing::from(&step("never", 0)).delay(Duration::from_secs(600)))
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    assert!(
        tx.reschedule(never, chrono::Utc::now() + Duration::from_secs(900))
            .await
            .unwrap()
    );
    assert!(tx.cancel(never).await.unwrap());
    tx.commit().await.unwrap();
    let refused = sqlx::raw_sql("SELECT postbox.publish('no topic', '{}')")
        .execute(&pool)
        .await
        .expect_err("refused");
    assert!(refused.to_string().contains("not allowed"), "{refused}");
    // By hand.
    sqlx::raw_sql("SELECT * FROM postbox.sequence()")
        .execute(&pool)
        .await
        .unwrap();
    sqlx::raw_sql("SELECT * FROM postbox.step(NULL, NULL)")
        .execute(&pool)
        .await
        .unwrap();

    eventually(PATIENCE, || async {
        if let Some(trap) = trapped(&pool).await {
            return Err(format!("{trap} of public was run"));
        }
        let (followed, batched, letters): (i64, i64, i64) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM postbox.outbox WHERE topic = 'followed'), (SELECT count(*) FROM postbox.outbox WHERE topic = 'batched'), \
                 (SELECT count(*) FROM postbox.dead_letter)",
        )
        .fetch_one(&own)
        .await
        .unwrap();
        match (followed, batched, letters) {
            (13, 14, 1) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    status::read(&own).await.unwrap();
    doctor::examine(&own).await.unwrap();
    retention::turn(&own).await.unwrap();
    for call in [
        "SELECT postbox.redrive('{1}')",
        "SELECT postbox.seek(1, 'earliest')",
        "SELECT postbox.replay(1, 0, 5)",
        "SELECT * FROM postbox.lock_holders('0s')",
        "SELECT * FROM postbox.unsequenced()",
        "SELECT * FROM postbox.slots()",
        "SELECT * FROM postbox.backlog(1)",
        "SELECT postbox.set_retention('2 days')",
        "SELECT * FROM postbox.watch_subscriptions()",
        "SELECT * FROM postbox.rebase(true)",
    ] {
        let done = sqlx::raw_sql(call).execute(&pool).await;
        assert_eq!(trapped(&pool).await, None, "{call}: {done:?}");
    }
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
    assert_eq!(trapped(&pool).await, None);
}

/// Those that are called for every message and qualify all that they name, which the test above proves.
const QUALIFIED: [&str; 8] = [
    "broken_rule",
    "publish_bytes",
    "refused_by",
    "ring_bell",
    "ring_timers",
    "settle",
    "settle_batch",
    "step",
];

#[tokio::test]
async fn every_function_has_a_fixed_search_path() {
    let db = TestDatabase::new().await.unwrap();
    let without: Vec<String> = sqlx::query_scalar(
        "SELECT DISTINCT p.proname::text FROM pg_proc p WHERE p.pronamespace = 'postbox'::regnamespace AND p.prosqlbody IS NULL \
             AND NOT EXISTS (SELECT FROM unnest(p.proconfig) c WHERE c = 'search_path=pg_catalog, pg_temp') ORDER BY 1",
    )
    .fetch_all(db.pool())
    .await
    .unwrap();
    assert_eq!(without, QUALIFIED);
}
