//! Panics where nobody expects one: what panicked is started again, the rest goes on, and what cannot go on ends where it is seen.
//!
//! Whatever writes a log line can panic, since an application's subscriber is called there. So a subscriber that panics at a certain line is a panic
//! at that place, without a word of it in the product.
#![allow(clippy::unwrap_used)]

mod support;

use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use postbox_consumer::{Extract, HandlerDefinition, HandlerError, Retry};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestDatabase, eventually};
use support::{History, PATIENCE, Step, bench, publish_steps, settled, step, steps};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// Longer than six starts take.
const UNTIL_GIVEN_UP: Duration = Duration::from_secs(120);

/// Panics at events with this text, so many times.
static AT: Mutex<&str> = Mutex::new("");
static TIMES: AtomicU32 = AtomicU32::new(0);
static PANICS: AtomicU32 = AtomicU32::new(0);

/// Not the driver's, since a test has the driver write some, too.
const EVERY_LINE_OF_OURS: &str = "every line";

struct Panics;

impl<S: Subscriber> Layer<S> for Panics {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let at = *AT.lock().unwrap();
        if at.is_empty() {
            return;
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        let is_meant = match at {
            EVERY_LINE_OF_OURS => event.metadata().target().starts_with("postbox"),
            at => text.0.contains(at),
        };
        let is_hit = is_meant
            && TIMES
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
                .is_ok();
        if is_hit {
            PANICS.fetch_add(1, Ordering::SeqCst);
            panic!("the subscriber panics");
        }
    }
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, _: &Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, "{value:?} ");
    }
}

/// What panics is the process's: one test at a time. Taken first, so that it is dropped last.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

struct Alone {
    _guard: tokio::sync::MutexGuard<'static, ()>,
}

async fn alone() -> Alone {
    let guard = ALONE.lock().await;
    let _ = tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Panics));
    PANICS.store(0, Ordering::SeqCst);
    Alone { _guard: guard }
}

impl Drop for Alone {
    fn drop(&mut self) {
        TIMES.store(0, Ordering::SeqCst);
        *AT.lock().unwrap() = "";
    }
}

impl Alone {
    fn panic_at(&self, text: &'static str, times: u32) {
        TIMES.store(times, Ordering::SeqCst);
        *AT.lock().unwrap() = text;
    }
}

async fn there_were(panics: u32) {
    eventually(PATIENCE, || async {
        match PANICS.load(Ordering::SeqCst) {
            found if found >= panics => Ok(()),
            found => Err(format!("{found} of {panics} panics")),
        }
    })
    .await;
}

fn handler(
    group: &'static str,
    history: &History,
    decide: impl Fn(&Step) -> Result<(), HandlerError> + Send + Sync + 'static,
) -> HandlerDefinition {
    let (history, decide) = (history.clone(), std::sync::Arc::new(decide));
    HandlerDefinition::new("handler")
        .group(group)
        .retry(Retry::fixed(Duration::from_millis(50)))
        .argument::<Step>()
        .call(move |mut invocation| {
            let (history, decide) = (history.clone(), decide.clone());
            Box::pin(async move {
                let step = <Step as Extract>::extract(&mut invocation).await?;
                let began = Instant::now();
                decide(&step)?;
                history.note(&step, began);
                Ok(())
            })
        })
}

/// Every number once at least, in order but for what comes again.
fn is_complete(history: &History, key: &str, count: i64) {
    let mut numbers = history.of(key);
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers, (0..count).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_panics_is_read_again() {
    let alone = alone().await;
    let bench = bench().await;
    // A line of sqlx for each statement, in the task that reads for all groups.
    alone.panic_at("FROM postbox.outbox o WHERE o.slot", 2);
    let (one, two) = (History::default(), History::default());
    let consumer = bench
        .start(vec![
            handler("one", &one, |_| Ok(())),
            handler("two", &two, |_| Ok(())),
        ])
        .await;
    // Steps of more messages than come along with the announcement.
    publish_steps(bench.db.pool(), &steps(5, 30)).await;
    for n in 0..10 {
        publish_steps(bench.db.pool(), &[step("lone", n)]).await;
    }
    settled(bench.db.pool(), "one").await;
    settled(bench.db.pool(), "two").await;
    there_were(1).await;
    is_complete(&one, "lone", 10);
    is_complete(&two, "0", 30);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_that_panics_is_started_again_and_the_others_go_on() {
    let alone = alone().await;
    let bench = bench().await;
    alone.panic_at("the handler discards the message", 3);
    let (sick, well) = (History::default(), History::default());
    let discards = |step: &Step| match step.n {
        3 => Err(HandlerError::discard("not wanted")),
        _ => Ok(()),
    };
    let consumer = bench
        .start(vec![
            handler("sick", &sick, discards),
            handler("well", &well, |_| Ok(())),
        ])
        .await;
    publish_steps(bench.db.pool(), &steps(1, 8)).await;
    settled(bench.db.pool(), "well").await;
    assert_eq!(well.of("0"), (0..8).collect::<Vec<_>>(), "each once, in order");
    settled(bench.db.pool(), "sick").await;
    assert_eq!(PANICS.load(Ordering::SeqCst), 3);
    let mut numbers = sick.of("0");
    numbers.dedup();
    assert!(
        numbers.ends_with(&[4, 5, 6, 7]),
        "it goes on behind it: {numbers:?}"
    );
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_that_panics_goes_on_from_where_it_stood() {
    let alone = alone().await;
    let bench = bench().await;
    alone.panic_at("the handler discards the message", 2);
    let history = History::default();
    let discards = |step: &Step| match step.n {
        3 => Err(HandlerError::discard("not wanted")),
        _ => Ok(()),
    };
    let seen = history.clone();
    let broadcast = HandlerDefinition::new("handler")
        .broadcast()
        .argument::<Step>()
        .call(move |mut invocation| {
            let seen = seen.clone();
            Box::pin(async move {
                let step = <Step as Extract>::extract(&mut invocation).await?;
                let began = Instant::now();
                discards(&step)?;
                seen.note(&step, began);
                Ok(())
            })
        });
    let consumer = bench.start(vec![broadcast]).await;
    publish_steps(bench.db.pool(), &steps(1, 8)).await;
    eventually(PATIENCE, || async {
        match history.of("0").contains(&7) {
            true => Ok(()),
            false => Err(format!("{:?}", history.of("0"))),
        }
    })
    .await;
    let numbers = history.of("0");
    assert!(
        [0, 1, 2, 4, 5, 6].iter().all(|n| numbers.contains(n)),
        "{numbers:?}"
    );
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_executor_that_panics_for_ever_ends_the_consumer_and_it_says_so() {
    let alone = alone().await;
    let bench = bench().await;
    alone.panic_at("the handler discards the message", u32::MAX);
    let history = History::default();
    let consumer = bench
        .start(vec![handler("sick", &history, |_| {
            Err(HandlerError::discard("not wanted"))
        })])
        .await;
    publish_steps(bench.db.pool(), &steps(1, 2)).await;
    let why = tokio::time::timeout(UNTIL_GIVEN_UP, consumer.ended())
        .await
        .expect("it ends");
    assert!(
        why.contains("group sick on topic steps") && why.contains("the subscriber panics"),
        "{why}"
    );
    let error = consumer.shutdown().await.expect_err("and says why");
    assert!(error.to_string().contains("the subscriber panics"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_panics_is_opened_again() {
    let alone = alone().await;
    let bench = bench().await;
    alone.panic_at("claimed lanes", 2);
    let history = History::default();
    let consumer = bench.start(vec![handler("group", &history, |_| Ok(()))]).await;
    there_were(2).await;
    publish_steps(bench.db.pool(), &steps(3, 5)).await;
    settled(bench.db.pool(), "group").await;
    is_complete(&history, "0", 5);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_the_dispatcher_that_panics_is_started_again() {
    let alone = alone().await;
    let db = TestDatabase::new().await.unwrap();
    // Each is in another part: the sequencer, the timers (promotion, cron) and expiry.
    for at in ["postbox.step", "postbox.promote", "DELETE FROM postbox.dedup"] {
        alone.panic_at(at, 1);
        PANICS.store(0, Ordering::SeqCst);
        let dispatcher = Dispatcher::new(db.pool().clone()).start().await.unwrap();
        there_were(1).await;
        let before: i64 = count(&db).await;
        sqlx::raw_sql("SELECT postbox.publish('t', '1'); SELECT postbox.publish('t', '2', delay => '1 ms')")
            .execute(db.pool())
            .await
            .unwrap();
        eventually(PATIENCE, || async {
            match count(&db).await - before {
                2 => Ok(()),
                sequenced => Err(format!("{sequenced} of 2 sequenced after a panic at {at}")),
            }
        })
        .await;
        dispatcher.shutdown().await;
    }
}

async fn count(db: &TestDatabase) -> i64 {
    sqlx::query_scalar("SELECT coalesce(sum(count), 0)::bigint FROM postbox.segment")
        .fetch_one(db.pool())
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_the_dispatcher_that_panics_for_ever_ends_it_and_it_says_so() {
    let alone = alone().await;
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.pool().clone());
    let run = tokio::spawn(dispatcher.run_until(std::future::pending()));
    alone.panic_at("postbox.promote", u32::MAX);
    let ended = tokio::time::timeout(UNTIL_GIVEN_UP, run)
        .await
        .expect("it ends")
        .unwrap();
    let error = ended.expect_err("and says why").to_string();
    assert!(
        error.contains("timers") && error.contains("the subscriber panics"),
        "{error}"
    );
}

/// As where the standard error is a pipe that nobody reads any more: nothing can be said, and so nothing could be started again; but it ends where it
/// is seen, since nobody should stand there without a part.
#[tokio::test(flavor = "multi_thread")]
async fn where_every_line_of_the_log_panics_it_ends_or_goes_on_and_never_stands_still() {
    let alone = alone().await;
    let mut bench = bench().await;
    let history = History::default();
    let mut consumer = bench.start(vec![handler("group", &history, |_| Ok(()))]).await;
    publish_steps(bench.db.pool(), &steps(1, 1)).await;
    history.has(1).await;
    for n in 1..4 {
        alone.panic_at(EVERY_LINE_OF_OURS, u32::MAX);
        sqlx::query("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'postbox%' AND datname = current_database()")
            .execute(bench.db.pool())
            .await
            .unwrap();
        // Who runs it waits for `ended`, and starts it again.
        publish_steps(bench.db.pool(), &[step("0", n)]).await;
        let came = tokio::time::timeout(UNTIL_GIVEN_UP, async {
            while history.of("0").last() != Some(&n) {
                tokio::select! {
                    _ = bench.dispatcher.ended() => {
                        alone.panic_at("", 0);
                        bench.dispatcher = Dispatcher::new(bench.db.pool().clone()).start().await.unwrap();
                    }
                    _ = consumer.ended() => {
                        alone.panic_at("", 0);
                        consumer = bench.start(vec![handler("group", &history, |_| Ok(()))]).await;
                    }
                    () = tokio::time::sleep(Duration::from_millis(50)) => {}
                }
            }
        });
        assert!(
            came.await.is_ok(),
            "message {n} waits for somebody who has not said that he ended"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_panics_before_it_begins_has_failed() {
    let _alone = alone().await;
    let bench = bench().await;
    let history = History::default();
    let seen = history.clone();
    let attempts = std::sync::Arc::new(AtomicU32::new(0));
    let handler = HandlerDefinition::new("handler")
        .group("group")
        .retry(Retry::fixed(Duration::from_millis(50)))
        .argument::<Step>()
        .call(move |mut invocation| {
            if attempts.fetch_add(1, Ordering::SeqCst) == 0 {
                panic!("before there is a future");
            }
            let seen = seen.clone();
            Box::pin(async move {
                let step = <Step as Extract>::extract(&mut invocation).await?;
                seen.note(&step, Instant::now());
                Ok(())
            })
        });
    let consumer = bench.start(vec![handler]).await;
    publish_steps(bench.db.pool(), &steps(1, 3)).await;
    settled(bench.db.pool(), "group").await;
    assert_eq!(history.of("0"), [0, 1, 2], "in order, each once");
    assert_eq!(consumer.stats()[0].failed, 1);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_of_any_length_is_only_a_wait() {
    let _alone = alone().await;
    let bench = bench().await;
    let history = History::default();
    let decide = |step: &Step| match step.key.as_str() {
        "0" => Err(HandlerError::retry_in(Duration::MAX, "much later")),
        "1" => Err(HandlerError::postpone(Duration::MAX, "later")),
        _ => Ok(()),
    };
    let endless = handler("endless", &History::default(), |_| {
        Err(HandlerError::retry("down"))
    })
    .retry(Retry::fixed(Duration::MAX));
    let consumer = bench
        .consumer(vec![handler("group", &history, decide), endless])
        .shutdown_grace(Duration::MAX)
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(4, 5)).await;
    history.has(10).await;
    assert_eq!(history.of("3"), (0..5).collect::<Vec<_>>());
    consumer.shutdown().await.unwrap();
}
