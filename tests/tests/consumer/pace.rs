//! Pace: pause, rate limits, daily windows.

use std::time::{Duration, Instant};

use crate::support::{Bench, History, PATIENCE, Step, bench, publish_steps, settled, step, steps};
use postbox_consumer::{HandlerDefinition, State, handler, handlers};
use postbox_dispatcher::subscriptions::{self, Change, Override};
use postbox_testkit::eventually;

#[handler(group = "coded", rate = 400, instance_rate = 300.5, window = "00:00-24:00")]
async fn handle_as_coded(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

#[handler(group = "coded", topic = "steps", type = "other", window = "00:00-23:00")]
async fn disagree() {}

#[handler(group = "paced", concurrency = 64)]
async fn handle(step: Step, State(history): State<History>) {
    history.note(&step, Instant::now());
}

async fn change(bench: &Bench, change: Change) {
    let changed = subscriptions::change(bench.db.pool(), "paced", None, &change)
        .await
        .unwrap();
    assert_eq!(changed, 1);
}

/// How many runs began in each of these seconds.
fn in_span(history: &History, from: Instant, span: Duration) -> usize {
    history
        .runs()
        .iter()
        .filter(|run| run.began >= from && run.began < from + span)
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_stops_within_a_second_and_a_resume_goes_on() {
    let bench = bench().await;
    let history = History::default();
    let consumer = bench
        .consumer(handlers![handle])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    change(&bench, Change::RateLimit(Override::To(500.0))).await;
    // Running consumers follow within half a second; a fast machine would have handled all by then.
    tokio::time::sleep(Duration::from_secs(1)).await;
    publish_steps(&bench.pool(), &steps(50, 60)).await;
    history.has(100).await;
    change(&bench, Change::Paused(true)).await;
    let paused = Instant::now();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let then = history.len();
    assert!(then < 3_000);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(
        history.len(),
        then,
        "something ran later than a second after the pause, at {paused:?}"
    );
    let status = postbox_dispatcher::status::subscriptions(bench.db.pool())
        .await
        .unwrap();
    assert!(
        status[0].paused && status[0].backlog == 3_000 - then as i64,
        "{status:?}"
    );
    change(&bench, Change::RateLimit(Override::Default)).await;
    change(&bench, Change::Paused(false)).await;
    history.has(3_000).await;
    history.assert_in_order_and_alone(50, 60);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_starts_paused_runs_nothing() {
    let bench = bench().await;
    let history = History::default();
    let consumer = bench
        .consumer(handlers![handle])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    consumer.shutdown().await.unwrap();
    change(&bench, Change::Paused(true)).await;
    publish_steps(&bench.pool(), &steps(5, 5)).await;
    let consumer = bench
        .consumer(handlers![handle])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    eventually(PATIENCE, async || {
        let owned = bench
            .number("SELECT count(*) FROM postbox.lane WHERE consumer_id IS NOT NULL")
            .await;
        if owned == 32 { Ok(()) } else { Err(owned) }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(history.len(), 0);
    change(&bench, Change::Paused(false)).await;
    settled(bench.db.pool(), "paced").await;
    assert_eq!(history.len(), 25);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_limit_holds_over_two_instances_and_an_instance_limit_for_each() {
    let bench = bench().await;
    let (first, second) = (History::default(), History::default());
    let one = bench
        .consumer(handlers![handle])
        .state(first.clone())
        .start()
        .await
        .unwrap();
    change(&bench, Change::Paused(true)).await;
    change(&bench, Change::RateLimit(Override::To(800.0))).await;
    publish_steps(&bench.pool(), &steps(640, 20)).await;
    let two = bench
        .consumer(handlers![handle])
        .state(second.clone())
        .start()
        .await
        .unwrap();
    eventually(PATIENCE, async || {
        let least = bench
            .number("SELECT coalesce(min(n), 0) FROM (SELECT count(*) n FROM postbox.lane WHERE consumer_id IS NOT NULL GROUP BY consumer_id) t")
            .await;
        if least == 16 { Ok(()) } else { Err(format!("the least has {least} lanes")) }
    })
    .await;
    change(&bench, Change::Paused(false)).await;
    let before = first.len() + second.len();
    eventually(PATIENCE, async || {
        if first.len() + second.len() > before {
            Ok(())
        } else {
            Err("nothing runs")
        }
    })
    .await;
    let from = Instant::now();
    let span = Duration::from_secs(6);
    tokio::time::sleep(span).await;
    let (a, b) = (in_span(&first, from, span), in_span(&second, from, span));
    // At most what the limit says. What a slow machine misses for longer than 50 ms is not made up for.
    assert!((3_000..=5_040).contains(&(a + b)), "{a} and {b} in {span:?}");
    assert!(a.min(b) * 5 >= a.max(b) * 4, "shared fairly: {a} and {b}");

    change(&bench, Change::InstanceRateLimit(Override::To(100.0))).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let from = Instant::now();
    let span = Duration::from_secs(5);
    tokio::time::sleep(span).await;
    for history in [&first, &second] {
        let ran = in_span(history, from, span);
        assert!((300..=525).contains(&ran), "{ran} in {span:?}");
    }
    change(&bench, Change::RateLimit(Override::Default)).await;
    change(&bench, Change::InstanceRateLimit(Override::Default)).await;
    settled(bench.db.pool(), "paced").await;
    assert_eq!(first.len() + second.len(), 12_800);
    one.shutdown().await.unwrap();
    two.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_opens_and_closes_by_the_clock_of_its_zone() {
    let bench = bench().await;
    let history = History::default();
    let consumer = bench
        .consumer(handlers![handle])
        .state(history.clone())
        .start()
        .await
        .unwrap();
    // Noon in Berlin on the next day.
    let to_noon: f64 = sqlx::query_scalar(
        "SELECT extract(epoch FROM (date_trunc('day', now() AT TIME ZONE 'Europe/Berlin') + interval '36 hours') \
             AT TIME ZONE 'Europe/Berlin' - now())::float8",
    )
    .fetch_one(bench.db.pool())
    .await
    .unwrap();
    bench.db.advance(Duration::from_secs_f64(to_noon)).await.unwrap();
    change(
        &bench,
        Change::DrainWindow(Override::To("22:00-06:00 Europe/Berlin".parse().unwrap())),
    )
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let hour = Duration::from_secs(3600);
    let mut n = 0;
    for (hours, open) in [(0, false), (9, false), (2, true), (4, true), (4, false)] {
        // At 12, 21, 23, 03 and 07, or an hour later in the night in which the clocks go forward.
        bench.db.advance(hour * hours).await.unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before = history.len();
        publish_steps(&bench.pool(), &[step("k", n)]).await;
        n += 1;
        if open {
            history.has(n as usize).await;
        } else {
            tokio::time::sleep(Duration::from_millis(800)).await;
            assert_eq!(history.len(), before, "it ran {n} outside the window");
        }
    }
    change(&bench, Change::DrainWindow(Override::Default)).await;
    history.has(5).await;
    history.assert_in_order_and_alone(1, 5);
    consumer.shutdown().await.unwrap();
}

/// Rate, rate of an instance, and window that hold for the group.
async fn held(bench: &Bench) -> (Option<f64>, Option<f64>, Option<String>) {
    let status = postbox_dispatcher::status::subscriptions(bench.db.pool())
        .await
        .unwrap();
    let coded = status.into_iter().find(|one| one.group_name == "coded").unwrap();
    (coded.rate_limit, coded.instance_rate_limit, coded.drain_window)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_code_says_holds_until_an_operator_says_otherwise() {
    let bench = bench().await;
    let history = History::default();
    let change = async |change: Change| {
        let changed = subscriptions::change(bench.db.pool(), "coded", Some("steps"), &change)
            .await
            .unwrap();
        assert_eq!(changed, 1);
    };
    let start = async || {
        bench
            .consumer(handlers![handle_as_coded])
            .state(history.clone())
            .start()
            .await
            .unwrap()
    };
    let consumer = start().await;
    let all_day = "00:00-24:00 UTC".to_owned();
    assert_eq!(
        held(&bench).await,
        (Some(400.0), Some(300.5), Some(all_day.clone()))
    );

    // It is not only shown: the single instance may start 300.5 a second.
    publish_steps(&bench.pool(), &steps(100, 20)).await;
    history.has(50).await;
    let from = Instant::now();
    let span = Duration::from_secs(3);
    tokio::time::sleep(span).await;
    let ran = in_span(&history, from, span);
    assert!((540..=960).contains(&ran), "{ran} in {span:?}");

    for (say, holds) in [
        (Override::To(50_000.0), Some(50_000.0)),
        (Override::Off, None),
        (Override::Default, Some(400.0)),
        (Override::Off, None),
    ] {
        change(Change::RateLimit(say)).await;
        assert_eq!(held(&bench).await.0, holds, "{say:?}");
    }
    change(Change::InstanceRateLimit(Override::Off)).await;
    change(Change::DrainWindow(Override::Off)).await;
    assert_eq!(held(&bench).await, (None, None, None));
    let begun = Instant::now();
    history.has(2_000).await;
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "nothing limits it any more: {:?}",
        begun.elapsed()
    );
    consumer.shutdown().await.unwrap();

    // A new start does not take back what the operator said.
    start().await.shutdown().await.unwrap();
    assert_eq!(held(&bench).await, (None, None, None));
    change(Change::DrainWindow(Override::Default)).await;
    assert_eq!(held(&bench).await, (None, None, Some(all_day)));
}

#[tokio::test]
async fn a_pace_that_cannot_be_kept_is_refused_at_start() {
    let bench = bench().await;
    let define = || {
        HandlerDefinition::new("defined")
            .topic("steps")
            .call(|_| Box::pin(async { Ok(()) }))
    };
    let cases = [
        (handlers![handle_as_coded, disagree], "disagree on window"),
        (
            vec![define().group("g").rate(0.0)],
            "rate of handler defined is 0",
        ),
        (
            vec![define().group("g").instance_rate(f64::NAN)],
            "instance_rate of handler defined is NaN",
        ),
        (
            vec![define().group("g").window("22:00-06:00 Berlin")],
            "\"Berlin\" is not a time zone",
        ),
        (
            vec![define().broadcast().rate(5.0)],
            "is a broadcast and has a rate or a window",
        ),
    ];
    for (handlers, says) in cases {
        let error = bench
            .consumer(handlers)
            .state(History::default())
            .start()
            .await
            .expect_err(says)
            .to_string();
        assert!(error.contains(says), "{error:?} says {says:?}");
    }
}
