//! Connections that are dead without a word, at either end: every wait has a bound, and what it was for goes on over another connection.

use std::time::{Duration, Instant};

use crate::proxy::{Proxy, Way};
use crate::support::{History, Step, publish, publish_steps, step};
use postbox::Outgoing;
use postbox_consumer::{Consumer, HandlerError, State, Tx, handler, handlers};
use postbox_core::link;
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestDatabase, TestPostgres, eventually};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

/// The bounds are seconds, up to thirty for a commit that may wait for a standby; a busy machine takes longer.
const PATIENCE: Duration = Duration::from_secs(150);

#[handler(group = "tx", concurrency = 4)]
async fn in_a_transaction(step: Step, mut tx: Tx) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO public.effect (key, n) VALUES ($1, $2)")
        .bind(&step.key)
        .bind(step.n)
        .execute(&mut *tx)
        .await?;
    // So that some are under way when the connections are lost.
    tokio::time::sleep(Duration::from_millis(20)).await;
    Ok(())
}

#[handler(group = "plain")]
async fn plain(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

async fn publish_some(pool: &PgPool, from: i64) {
    let steps: Vec<Step> = (from..from + 40).map(|n| step(n % 8, n)).collect();
    publish(pool, &steps).await;
}

async fn all_have_effects(pool: &PgPool, history: &History, count: i64) {
    eventually(PATIENCE, || async {
        let (effects, distinct): (i64, i64) =
            sqlx::query_as("SELECT count(*), count(DISTINCT n) FROM public.effect")
                .fetch_one(pool)
                .await
                .unwrap();
        assert_eq!(effects, distinct, "an effect came twice");
        let handled: std::collections::HashSet<i64> = history.runs().iter().map(|run| run.n).collect();
        match (effects, handled.len() as i64) {
            (effects, handled) if effects == count && handled == count => Ok(()),
            other => Err(format!("{other:?} of {count}")),
        }
    })
    .await;
}

async fn goes_on_when_it_loses(way: Way) {
    let db = TestDatabase::new().await.unwrap();
    sqlx::raw_sql("CREATE TABLE public.effect (key text, n bigint)")
        .execute(db.pool())
        .await
        .unwrap();
    let direct = (*db.pool().connect_options()).clone();
    let proxy = Proxy::to(&direct).await;
    // What an application has by default.
    let pool = PgPoolOptions::new()
        .max_connections(5)
        .connect_lazy_with(proxy.options(&direct));
    let history = History::default();
    let dispatcher = Dispatcher::new(pool.clone()).start().await.unwrap();
    let consumer = Consumer::new(pool.clone())
        .state(history.clone())
        .handlers(handlers![in_a_transaction, plain])
        .shutdown_grace(Duration::from_secs(5))
        .start()
        .await
        .unwrap();
    publish_some(db.pool(), 0).await;
    all_have_effects(db.pool(), &history, 40).await;
    // In the middle of what runs, and again while what came of that is put right.
    publish_some(db.pool(), 40).await;
    tokio::time::sleep(Duration::from_millis(60)).await;
    proxy.lose(way);
    publish_some(db.pool(), 80).await;
    all_have_effects(db.pool(), &history, 120).await;
    // The application's pool has all its connections again.
    let mut held = Vec::new();
    for _ in 0..3 {
        let acquired = tokio::time::timeout(PATIENCE, pool.acquire())
            .await
            .expect("in time");
        held.push(acquired.unwrap());
    }
    drop(held);
    let begun = Instant::now();
    proxy.lose(Way::Both);
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
    assert!(begun.elapsed() < PATIENCE, "stopping took {:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_to_the_server_may_be_lost() {
    goes_on_when_it_loses(Way::ToServer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_server_answers_may_be_lost() {
    goes_on_when_it_loses(Way::ToClient).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_ways_may_be_lost() {
    goes_on_when_it_loses(Way::Both).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starting_in_the_dark_fails_in_time_and_says_what_it_did() {
    let db = TestDatabase::new().await.unwrap();
    let direct = (*db.pool().connect_options()).clone();
    let proxy = Proxy::to(&direct).await;
    proxy.dark(true);
    let pool = PgPoolOptions::new().connect_lazy_with(proxy.options(&direct));
    let starting = Dispatcher::new(pool.clone()).start();
    let error = tokio::time::timeout(PATIENCE, starting)
        .await
        .expect("in time")
        .expect_err("refused");
    assert!(
        error
            .to_string()
            .contains("did not answer within 10s (connecting)"),
        "{error}"
    );
    let starting = Consumer::new(pool.clone())
        .handlers(handlers![plain])
        .state(History::default())
        .start();
    let error = tokio::time::timeout(PATIENCE, starting)
        .await
        .expect("in time")
        .expect_err("refused");
    assert!(
        error
            .to_string()
            .contains("did not answer within 10s (connecting)"),
        "{error}"
    );
    proxy.dark(false);
    let own = link::pool(proxy.options(&direct), 1, "");
    sqlx::query("SELECT 1").execute(&own).await.unwrap();
}

#[handler(broadcast)]
async fn seen_by_all(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

/// After a reconnect a broadcast compares what it has seen with the log. It may be in the middle of that when the session is lost again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_ends_while_a_broadcast_waits_for_a_session_to_check_the_log() {
    let server = TestPostgres::private().await.unwrap();
    let db = server.database().await.unwrap();
    let history = History::default();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let consumer = Consumer::new(db.connect_pool(2))
        .handlers(handlers![seen_by_all])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    publish_steps(db.pool(), &[step(1, 1)]).await;
    history.has(1).await;
    dispatcher.shutdown().await;
    let mut holder = db.pool().begin().await.unwrap();
    sqlx::raw_sql("LOCK TABLE postbox.segment IN ACCESS EXCLUSIVE MODE")
        .execute(&mut *holder)
        .await
        .unwrap();
    sqlx::raw_sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'postbox%'",
    )
    .execute(db.pool())
    .await
    .unwrap();
    eventually(PATIENCE, || async {
        let waits: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'postbox reader' AND wait_event_type = 'Lock')",
        )
        .fetch_one(db.pool())
        .await
        .unwrap();
        waits.then_some(()).ok_or_else(|| "it does not check the log".to_owned())
    })
    .await;
    drop(holder);
    server.stop_immediate().await.unwrap();
    // So that it has tried once more, without a session.
    tokio::time::sleep(Duration::from_secs(5)).await;
    tokio::time::timeout(PATIENCE, consumer.shutdown())
        .await
        .expect("in time")
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn starting_fails_in_time_when_the_network_goes_dark_once_it_is_connected() {
    let db = TestDatabase::new().await.unwrap();
    let direct = (*db.pool().connect_options()).clone();
    for of_consumer in [false, true] {
        let proxy = Proxy::to(&direct).await;
        let pool = PgPoolOptions::new().connect_lazy_with(proxy.options(&direct));
        // It waits for this when it looks which schema there is.
        let mut holder = db.pool().begin().await.unwrap();
        sqlx::raw_sql("LOCK TABLE postbox.schema_migration IN ACCESS EXCLUSIVE MODE")
            .execute(&mut *holder)
            .await
            .unwrap();
        let starting = tokio::spawn(async move {
            match of_consumer {
                false => {
                    let starting = Dispatcher::new(pool).start();
                    starting.await.err().map(|error| error.to_string())
                }
                true => {
                    let consumer = Consumer::new(pool)
                        .handlers(handlers![plain])
                        .state(History::default());
                    consumer.start().await.err().map(|error| error.to_string())
                }
            }
        });
        eventually(PATIENCE, || async {
            let waits: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'postbox upkeep' AND wait_event_type = 'Lock' \
                    AND datname = current_database())",
            )
            .fetch_one(db.pool())
            .await
            .unwrap();
            waits.then_some(()).ok_or_else(|| "it does not look".to_owned())
        })
        .await;
        proxy.lose(Way::ToClient);
        let error = tokio::time::timeout(PATIENCE, starting)
            .await
            .expect("in time")
            .unwrap()
            .expect("refused");
        assert!(
            error.contains("did not answer within 10s (looking at the schema)"),
            "{error}"
        );
        holder.rollback().await.unwrap();
    }
}

/// What connects and fails at once does not do so a dozen times a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_at_its_first_statement_waits_longer_and_longer() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.pool().clone()).start().await.unwrap();
    // Every step that finds something fails from now on.
    sqlx::raw_sql(
        "CREATE SEQUENCE public.steps; \
         CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS $$ \
             BEGIN PERFORM nextval('public.steps'); RAISE EXCEPTION 'not today' USING ERRCODE = '42501'; END $$; \
         CREATE TRIGGER fail BEFORE INSERT ON postbox.tick_0 FOR EACH ROW EXECUTE FUNCTION public.fail(); \
         DO $$ BEGIN FOR n IN 1..7 LOOP EXECUTE format('CREATE TRIGGER fail BEFORE INSERT ON postbox.tick_%s FOR EACH ROW \
             EXECUTE FUNCTION public.fail()', n); END LOOP; END $$",
    )
    .execute(db.pool())
    .await
    .unwrap();
    publish(db.pool(), [Outgoing::json("orders", &1)]).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    let tried: i64 = sqlx::query_scalar("SELECT last_value FROM public.steps")
        .fetch_one(db.pool())
        .await
        .unwrap();
    // 50, 100, 200, … ms are at most eight in eight seconds; without, they were a hundred.
    assert!((2..=12).contains(&tried), "{tried} attempts in 8 s");
    sqlx::raw_sql("DROP FUNCTION public.fail() CASCADE")
        .execute(db.pool())
        .await
        .unwrap();
    eventually(PATIENCE, || async {
        let sequenced: i64 = sqlx::query_scalar("SELECT postbox.next_offset('orders')")
            .fetch_one(db.pool())
            .await
            .unwrap();
        (sequenced == 1)
            .then_some(())
            .ok_or_else(|| "not sequenced".to_owned())
    })
    .await;
    dispatcher.shutdown().await;
}
