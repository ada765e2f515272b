//! In a database whose settings nobody expects everything works: what Postbox relies on it says itself, and its functions refuse what they cannot
//! work with.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::proxy::Proxy;
use crate::support::{PATIENCE, Step, step};
use chrono::Utc;
use postbox::{Outgoing, Publish};
use postbox_consumer::{Consumer, Delivery, HandlerError, State, Tx, handler, handlers};
use postbox_core::link;
use postbox_dispatcher::{Dispatcher, doctor, retention, status};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, PgPool};

/// What the handlers saw: names and numbers, with what their transactions were like.
type Seen = Arc<Mutex<Vec<String>>>;

#[handler(group = "tx", retry(max_attempts = 3, backoff = "fixed(50ms)"))]
async fn in_a_transaction(
    step: Step,
    mut tx: Tx,
    about: Delivery,
    State(seen): State<Seen>,
) -> Result<(), HandlerError> {
    if step.n == 1 && about.attempt == 1 {
        // It is not for the next one, on the same connection.
        sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY")
            .execute(&mut *tx)
            .await?;
        return Err(HandlerError::retry("a failure with a \u{e9}"));
    }
    let like: String = sqlx::query_scalar(
        "SELECT pg_catalog.concat_ws(' ', pg_catalog.current_setting('transaction_isolation'), \
             pg_catalog.current_setting('transaction_read_only'), pg_catalog.current_setting('TimeZone'))",
    )
    .fetch_one(&mut *tx)
    .await?;
    sqlx::query("INSERT INTO public.effect (key, n) VALUES ($1, $2)")
        .bind(&step.key)
        .bind(step.n)
        .execute(&mut *tx)
        .await?;
    tx.publish(Outgoing::json("followed", &step.n).key(&step.key))
        .await?;
    seen.lock().unwrap().push(format!("tx {like}"));
    Ok(())
}

#[handler(group = "dead", retry(max_attempts = 2, backoff = "fixed(50ms)"))]
async fn gives_up(step: Step) -> Result<(), HandlerError> {
    match step.n % 4 {
        0 => Err(HandlerError::retry("never")),
        _ => Ok(()),
    }
}

/// The pool of an application that sets nothing but what lets it write and wait at all.
fn application(db: &TestDatabase) -> PgPool {
    db.connect_pool(6)
}

#[tokio::test]
async fn everything_works_whatever_database_and_role_default_to() {
    let db = TestDatabase::new().await.unwrap();
    sqlx::raw_sql("CREATE TABLE public.effect (key text, n bigint)")
        .execute(db.pool())
        .await
        .unwrap();
    db.pervert().await.unwrap();
    let pool = application(&db);
    let dispatcher = Dispatcher::new(pool.clone()).start().await.unwrap();
    let seen = Seen::default();
    let consumer = Consumer::new(pool.clone())
        .state(seen.clone())
        .handlers(handlers![in_a_transaction, gives_up])
        .start()
        .await
        .unwrap();

    let mut tx = pool.begin().await.unwrap();
    let steps: Vec<Step> = (0..20).map(|n| step(n % 4, n)).collect();
    tx.publish_all(&steps).await.unwrap();
    tx.publish(Outgoing::from(&step("late", 20)).delay(Duration::from_millis(300)))
        .await
        .unwrap();
    let once = || {
        Outgoing::from(&step("once", 21))
            .dedup_key("once")
            .expires_in(Duration::from_secs(3600))
    };
    let id = tx.publish(once()).await.unwrap();
    assert_eq!(tx.publish(once()).await.unwrap(), id);
    sqlx::query("SELECT postbox.publish('steps', '{\"key\": \"sql\", \"n\": 22}', key => 'sql', type => 'step', ordered => true, headers => '{\"a\": \"b\"}')")
        .execute(&mut *tx)
        .await
        .unwrap();
    let cancelled = tx
        .publish(Outgoing::from(&step("never", 23)).deliver_at(Utc::now() + Duration::from_secs(600)))
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    assert!(tx.cancel(cancelled).await.unwrap());
    tx.commit().await.unwrap();

    eventually(PATIENCE, || async {
        let own = link::pool(pool.connect_options().as_ref().clone(), 1, "");
        let (effects, letters): (i64, i64) = sqlx::query_as(
            "SELECT (SELECT count(*) FROM public.effect), (SELECT count(*) FROM postbox.dead_letter)",
        )
        .fetch_one(&own)
        .await
        .map_err(|error| error.to_string())?;
        link::close(&own).await;
        match (effects, letters) {
            (23, 6) => Ok(()),
            other => Err(format!("{other:?} effects and dead letters")),
        }
    })
    .await;
    for like in seen.lock().unwrap().iter() {
        // The time zone is the application's (sqlx says UTC when it connects).
        assert_eq!(like, "tx read committed off UTC");
    }
    // An operator's pool, as the command makes it.
    let own = link::pool(pool.connect_options().as_ref().clone(), 2, "");
    assert_eq!(status::read(&own).await.unwrap().dispatchers, 1);
    let findings = doctor::examine(&own).await.unwrap();
    for name in ["read-only", "statement-timeout", "isolation"] {
        assert!(
            findings.iter().any(|finding| finding.name == name),
            "no {name} in {findings:?}"
        );
    }
    retention::turn(&own).await.unwrap();
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn migrating_works_whatever_database_and_role_default_to() {
    let db = TestDatabase::empty().await.unwrap();
    db.pervert().await.unwrap();
    // Nothing is set here, not even that it may write.
    let bare: PgPool = PgPool::connect(db.url()).await.unwrap();
    let migrated = postbox::migrate(&bare).await.unwrap();
    assert!(migrated.functions && !migrated.steps.is_empty());
    assert_eq!(
        postbox::migrate(&bare).await.unwrap(),
        postbox::Migrated::default()
    );
}

#[handler(group = "plain")]
async fn plain(step: Step, State(seen): State<Seen>) {
    seen.lock().unwrap().push(format!("plain {}", step.n));
}

/// Nothing may count on being faster than that: another machine, or a busier one, is not.
#[tokio::test(flavor = "multi_thread")]
async fn where_a_transaction_may_be_idle_for_a_millisecond_only_all_starts_and_works() {
    let db = TestDatabase::new().await.unwrap();
    let name = db
        .pool()
        .connect_options()
        .get_database()
        .unwrap_or_default()
        .to_owned();
    let set = format!("ALTER DATABASE \"{name}\" SET idle_in_transaction_session_timeout = '1ms'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(set))
        .execute(db.pool())
        .await
        .unwrap();
    // A network that takes longer.
    let options = db.pool().connect_options();
    let proxy = Proxy::to(&options).await;
    proxy.slow(Duration::from_millis(5));
    let pool = || {
        PgPoolOptions::new()
            .max_connections(4)
            .connect_lazy_with(proxy.options(&options))
    };
    let dispatcher = Dispatcher::new(pool()).start().await.unwrap();
    let seen = Seen::default();
    for round in 0..2 {
        let consumer = Consumer::new(pool())
            .handlers(handlers![plain])
            .state(seen.clone())
            .start()
            .await
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        // The pool is older than the setting.
        let mut tx = db.pool().begin().await.unwrap();
        tx.publish(&step("k", round)).await.unwrap();
        tx.commit().await.unwrap();
        eventually(PATIENCE, || async {
            let seen = seen.lock().unwrap();
            match seen.contains(&format!("plain {round}")) {
                true => Ok(()),
                false => Err(format!("{seen:?}")),
            }
        })
        .await;
        consumer.shutdown().await.unwrap();
    }
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn what_relies_on_read_committed_refuses_anything_else() {
    let db = TestDatabase::new().await.unwrap();
    let mut connection = db.connect().await.unwrap();
    let arguments: i16 =
        sqlx::query_scalar("SELECT pronargs FROM pg_proc WHERE oid = 'postbox.record'::regproc")
            .fetch_one(&mut connection)
            .await
            .unwrap();
    let record = format!(
        "SELECT postbox.record(1{})",
        ", '{}'".repeat(arguments as usize - 1)
    );
    for call in [
        record.as_str(),
        "SELECT postbox.claim(1, 1, '{0}', '{0}', '{f}')",
        "SELECT postbox.checkpoint(1, '{1}', '{0}', '{0}', '{0}', '{}', '{}')",
        "SELECT postbox.seek(1, 'latest')",
        "SELECT postbox.copy_parked(1, 0::smallint, 0, 1)",
        "SELECT postbox.truncate_log(0::smallint)",
        "SELECT postbox.rebase()",
        "SELECT postbox.promote(NULL, NULL, NULL, NULL, 1)",
        "SELECT postbox.sequence()",
        "CALL postbox.settle(1, 1, 0, 0, 0)",
        "SELECT postbox.settle_batch(1, 1, '{0}', '{0}', '{0}', '{0}')",
    ] {
        for level in ["REPEATABLE READ", "SERIALIZABLE"] {
            let mut tx = connection.begin().await.unwrap();
            sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
                "SET TRANSACTION ISOLATION LEVEL {level}"
            )))
            .execute(&mut *tx)
            .await
            .unwrap();
            let error = sqlx::raw_sql(sqlx::AssertSqlSafe(call))
                .execute(&mut *tx)
                .await
                .expect_err(call);
            assert!(error.to_string().contains("READ COMMITTED"), "{call}: {error}");
        }
    }
}
