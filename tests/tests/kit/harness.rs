//! What becomes of a test when it ends, however it does.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postbox_consumer::{State, handler, handlers};
use postbox_testkit::{Kit, TestPostgres, eventually};

use crate::messages::{Log, OrderPaid, audit, paid};

/// A test inside of a test, on another thread since it has a runtime of its own; gives the name of its database and how it ended.
async fn run_test<F: Future<Output = ()>>(
    test: impl FnOnce(Kit) -> F + Send + 'static,
) -> (String, std::thread::Result<()>) {
    let name = Arc::new(Mutex::new(String::new()));
    let noted = name.clone();
    let outcome = tokio::task::spawn_blocking(move || {
        let thread = std::thread::spawn(move || {
            postbox_testkit::__private::run(Default::default(), |kit: Kit| {
                *noted.lock().unwrap() = kit.database().name().to_owned();
                test(kit)
            })
        });
        thread.join()
    });
    let outcome = outcome.await.unwrap();
    let name = name.lock().unwrap().clone();
    (name, outcome)
}

async fn is_gone(name: &str) {
    let server = TestPostgres::shared().await.unwrap();
    let pool = sqlx::PgPool::connect(server.url()).await.unwrap();
    eventually(Duration::from_secs(60), async || {
        let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
            .bind(name)
            .fetch_one(&pool)
            .await
            .map_err(|error| error.to_string())?;
        if there {
            Err(format!("{name} is still there"))
        } else {
            Ok(())
        }
    })
    .await;
}

#[tokio::test]
async fn the_database_goes_with_a_test_that_passes() {
    let (name, outcome) = run_test(async |kit| {
        kit.consumer(handlers![audit]).state(Log::default()).start().await;
        kit.publish(&paid(1)).await;
        kit.settled().await;
    })
    .await;
    assert!(outcome.is_ok());
    is_gone(&name).await;
}

#[tokio::test]
async fn the_database_goes_with_a_test_that_panics_and_the_panic_is_its_own() {
    let (name, outcome) = run_test(async |kit| {
        kit.consumer(handlers![audit]).state(Log::default()).start().await;
        kit.publish(&paid(1)).await;
        panic!("as it was to be shown");
    })
    .await;
    let panic = outcome.unwrap_err();
    assert_eq!(panic.downcast_ref::<&str>(), Some(&"as it was to be shown"));
    is_gone(&name).await;
}

#[handler(group = "hanging", timeout = "1h")]
async fn hang(_order: OrderPaid, State(log): State<Log>) {
    log.note("it runs");
    let _noted = Noted(log);
    std::future::pending().await
}

struct Noted(Log);

impl Drop for Noted {
    fn drop(&mut self) {
        self.0.note("it ended");
    }
}

/// What hangs is cancelled, and what holds the kit does not keep it.
#[tokio::test]
async fn a_test_ends_although_its_handlers_do_not() {
    let log = Log::default();
    let noted = log.clone();
    let begun = Instant::now();
    let (name, outcome) = run_test(async move |kit| {
        kit.consumer(handlers![hang]).state(noted.clone()).start().await;
        kit.publish(&paid(1)).await;
        let held = kit.clone();
        tokio::spawn(async move {
            let _kit = held;
            std::future::pending::<()>().await;
        });
        eventually(Duration::from_secs(60), async || match noted.lines().len() {
            0 => Err("it does not run"),
            _ => Ok(()),
        })
        .await;
    })
    .await;
    assert!(outcome.is_ok());
    assert_eq!(log.lines(), ["it runs", "it ended"]);
    is_gone(&name).await;
    assert!(
        begun.elapsed() < Duration::from_secs(120),
        "the grace of a consumer and more"
    );
}

#[postbox_testkit::test]
async fn a_test_may_return_an_error(kit: Kit) -> Result<(), Box<dyn std::error::Error>> {
    let one: i64 = sqlx::query_scalar("SELECT 1::bigint")
        .fetch_one(kit.pool())
        .await?;
    assert_eq!(one, 1);
    Ok(())
}

#[postbox_testkit::test]
#[should_panic(expected = "as ordinary tests do")]
async fn other_attributes_stay(kit: Kit) {
    drop(kit);
    panic!("as ordinary tests do");
}

#[postbox_testkit::test]
#[ignore = "it is ignored, or it fails"]
async fn an_ignored_test_does_not_run(_kit: Kit) {
    panic!("it runs");
}

/// It goes on although a handler blocks one of the runtime's.
#[postbox_testkit::test]
async fn the_test_has_a_thread_of_its_own(kit: Kit) {
    #[handler(group = "blocking")]
    async fn block(_order: OrderPaid, State(gate): State<Arc<std::sync::Barrier>>) {
        gate.wait();
    }
    let gate = Arc::new(std::sync::Barrier::new(2));
    kit.consumer(handlers![block]).state(gate.clone()).start().await;
    kit.publish(&paid(1)).await;
    gate.wait();
    kit.settled().await;
}

/// For who has a harness of his own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kit_can_be_made_by_hand() {
    let kit = Kit::new().await.unwrap();
    let log = Log::default();
    kit.consumer(handlers![audit]).state(log.clone()).start().await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 1);
    let name = kit.database().name().to_owned();
    assert!(kit.url().contains(&name), "{} is {name}'s", kit.url());
    drop(kit);
    is_gone(&name).await;
}
