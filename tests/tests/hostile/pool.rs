//! The pool of transactional handlers: a group that hangs, fails or panics takes nothing from the others, nor from the application.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::support::{Bench, PATIENCE, Step, bench, publish_steps, step};
use postbox_consumer::{Consumer, Extract, HandlerDefinition, HandlerError, Retry, Tx};
use postbox_testkit::eventually;
use sqlx::PgPool;

type Latencies = Arc<Mutex<Vec<Duration>>>;

#[derive(Clone, Copy)]
enum Manner {
    Works,
    Hangs,
    Fails,
    Panics,
}

/// A transactional handler of a group of its own. What works notes how long after its publication it began.
fn handler(group: String, manner: Manner, latencies: &Latencies, published: Instant) -> HandlerDefinition {
    let latencies = latencies.clone();
    HandlerDefinition::new("handler")
        .group(group)
        .timeout(Duration::from_secs(3600))
        .retry(Retry::fixed(Duration::from_millis(100)).unlimited())
        .argument::<Step>()
        .argument::<Tx>()
        .call(move |mut invocation| {
            let latencies = latencies.clone();
            Box::pin(async move {
                let step = <Step as Extract>::extract(&mut invocation).await?;
                let mut tx = <Tx as Extract>::extract(&mut invocation).await?;
                sqlx::query("SELECT $1").bind(step.n).execute(&mut *tx).await?;
                match manner {
                    Manner::Works => latencies.lock().unwrap().push(published.elapsed()),
                    Manner::Hangs => std::future::pending().await,
                    Manner::Fails => return Err(HandlerError::retry("it fails")),
                    Manner::Panics => std::panic::resume_unwind(Box::new("it panics")),
                }
                Ok(())
            })
        })
}

/// Runs `groups` groups, of which the first are of these manners, until the others have handled all; how long that took, and the slowest hundredth.
async fn run(
    bench: &Bench,
    pool: PgPool,
    name: &str,
    groups: usize,
    manners: &[Manner],
) -> (Duration, Duration) {
    const EACH: i64 = 40;
    let latencies = Latencies::default();
    let all: Vec<Step> = (0..EACH).map(|n| step(n, n)).collect();
    publish_steps(bench.db.pool(), &all).await;
    let begun = Instant::now();
    let handlers = (0..groups).map(|n| {
        let manner = manners.get(n).copied().unwrap_or(Manner::Works);
        handler(format!("{name}/{n}"), manner, &latencies, begun)
    });
    let consumer = Consumer::new(pool.clone())
        .handlers(handlers)
        .shutdown_grace(Duration::ZERO)
        .start()
        .await
        .unwrap();
    let published = bench.number("SELECT count(*) FROM postbox.outbox").await as usize;
    let all = (groups - manners.len()) * published;
    eventually(PATIENCE * 4, || async {
        match latencies.lock().unwrap().len() {
            handled if handled >= all => Ok(()),
            handled => Err(format!("{handled} of {all}")),
        }
    })
    .await;
    let took = begun.elapsed();
    // The application's own queries, while all of that goes on.
    let asked: i32 = tokio::time::timeout(PATIENCE, sqlx::query_scalar("SELECT 1").fetch_one(&pool))
        .await
        .expect("the application has its connections")
        .unwrap();
    assert_eq!(asked, 1);
    consumer.shutdown().await.unwrap();
    let mut latencies = latencies.lock().unwrap().clone();
    latencies.sort_unstable();
    (took, latencies[latencies.len() * 99 / 100])
}

#[tokio::test(flavor = "multi_thread")]
async fn of_thirty_groups_one_hangs_one_fails_and_one_panics_and_the_others_do_not_notice() {
    let calm = bench().await;
    let without = run(&calm, calm.db.connect_pool(20), "calm", 30, &[]).await;
    drop(calm);
    let manners = [Manner::Hangs, Manner::Fails, Manner::Panics];
    let hostile = bench().await;
    let with = run(&hostile, hostile.db.connect_pool(20), "hostile", 30, &manners).await;
    println!(
        "30 groups, a pool of 20: {without:?} calm, {with:?} with a hung, a failing and a panicking one (all, p99)"
    );
    // Three fewer do the work; what is left for noise is a busy machine's.
    assert!(with.1 < without.1 * 3, "{with:?}, {without:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_that_hang_with_all_that_they_may_borrow_leave_the_others_their_own() {
    let bench = bench().await;
    // The last has fewer connections than groups, which take turns.
    for (connections, hung) in [(8, 3), (10, 1), (4, 1)] {
        let name = format!("hung{connections}");
        let manners = vec![Manner::Hangs; hung];
        let took = run(&bench, bench.db.connect_pool(connections), &name, 5, &manners).await;
        println!("{hung} of 5 groups hang with a pool of {connections}: {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_can_be_given_to_a_group_and_a_pool_to_all_handlers() {
    let bench = bench().await;
    let latencies = Latencies::default();
    publish_steps(bench.db.pool(), &(0..50).map(|n| step(n, n)).collect::<Vec<_>>()).await;
    let begun = Instant::now();
    let hangs = handler("hangs".to_owned(), Manner::Hangs, &latencies, begun).connections(3);
    let works = handler("works".to_owned(), Manner::Works, &latencies, begun);
    let (application, of_handlers) = (bench.db.connect_pool(1), bench.db.connect_pool(4));
    let consumer = Consumer::new(application.clone())
        .tx_pool(of_handlers.clone())
        .handlers([hangs, works])
        .shutdown_grace(Duration::ZERO)
        .start()
        .await
        .unwrap();
    eventually(PATIENCE, || async {
        let handled = latencies.lock().unwrap().len();
        let (busy, idle) = (of_handlers.size() as usize, of_handlers.num_idle());
        match handled == 50 && busy - idle == 3 {
            true => Ok(()),
            false => Err(format!("{handled} handled, {busy} connections, {idle} idle")),
        }
    })
    .await;
    let asked: i32 = sqlx::query_scalar("SELECT 1")
        .fetch_one(&application)
        .await
        .unwrap();
    assert_eq!(asked, 1);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_connection_is_in_status_and_doctor_for_as_long_as_it_lasts() {
    let bench = bench().await;
    let latencies = Latencies::default();
    publish_steps(bench.db.pool(), &(0..10).map(|n| step(n, n)).collect::<Vec<_>>()).await;
    let pool = bench.db.connect_pool(3);
    // Not a handler's fault: the application has all of them.
    let mut taken = Vec::new();
    for _ in 0..3 {
        taken.push(pool.acquire().await.unwrap());
    }
    let works = handler("works".to_owned(), Manner::Works, &latencies, Instant::now());
    let application = bench.db.connect_pool(3);
    let consumer = Consumer::new(application)
        .tx_pool(pool)
        .handlers([works])
        .start()
        .await
        .unwrap();
    let finds = async |wanted: bool| {
        eventually(PATIENCE, || async {
            let findings = postbox_dispatcher::doctor::examine(bench.db.pool())
                .await
                .unwrap();
            let found = findings.iter().any(|finding| finding.name == "no-connection");
            (found == wanted).then_some(()).ok_or(format!("{findings:?}"))
        })
        .await;
    };
    finds(true).await;
    let status = postbox_dispatcher::status::read(bench.db.pool()).await.unwrap();
    assert!(
        status.subscriptions[0]
            .kept_by
            .iter()
            .any(|why| why.contains("for a connection")),
        "{:?}",
        status.subscriptions[0].kept_by
    );
    drop(taken);
    finds(false).await;
    assert_eq!(latencies.lock().unwrap().len(), 10);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_lent_with_somebodys_open_transaction_is_closed_and_the_message_handled() {
    let bench = bench().await;
    let latencies = Latencies::default();
    let of_handlers = bench.db.connect_pool(1);
    bench.sql("CREATE TABLE note (n bigint)").await;
    // What a begin() that was cancelled leaves behind, and one that failed there: sqlx does not know of either.
    for n in ["1", "1 / 0"] {
        let _ = sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
            "BEGIN; INSERT INTO note VALUES ({n})"
        )))
        .execute(&of_handlers)
        .await;
        latencies.lock().unwrap().clear();
        publish_steps(bench.db.pool(), &[step(n, 0)]).await;
        let consumer = Consumer::new(bench.pool())
            .tx_pool(of_handlers.clone())
            .handlers([handler(
                "works".to_owned(),
                Manner::Works,
                &latencies,
                Instant::now(),
            )])
            .start()
            .await
            .unwrap();
        eventually(PATIENCE, || async {
            match latencies.lock().unwrap().len() {
                1 => Ok(()),
                handled => Err(format!("{handled} handled")),
            }
        })
        .await;
        consumer.shutdown().await.unwrap();
    }
    assert_eq!(bench.number("SELECT count(*) FROM note").await, 0);
}
