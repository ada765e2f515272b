//! `advance`: everything that goes by the time of day comes when it is due.

use std::time::Duration;

use postbox::{Publish, message};
use postbox_consumer::{Delivery, HandlerError, ScheduledAt, State, cron, handler, handlers};
use postbox_dispatcher::subscriptions::{self, Change};
use postbox_testkit::{Kit, Span};

use crate::messages::{Log, OrderPaid, Reminder, audit, paid};

#[handler(group = "reminding")]
async fn remind(reminder: Reminder, State(log): State<Log>) {
    log.note(reminder.order_id);
}

#[postbox_testkit::test]
async fn a_message_for_later_comes_when_it_is_due_and_not_before(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![remind]).state(log.clone()).start().await;
    let late = Reminder { order_id: 2 };
    let early = Reminder { order_id: 1 };
    kit.publish(message(&late).delay(2.days())).await;
    kit.publish(message(&early).delay(1.hours())).await;
    kit.advance(59.minutes()).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 0);
    kit.advance(2.minutes()).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["1"]);
    kit.advance(2.days()).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["1", "2"]);
}

/// Between the moment at which it is due and the one at which it is published nothing looks settled.
#[postbox_testkit::test]
async fn whatever_becomes_due_is_waited_for_a_hundred_times(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![remind]).state(log.clone()).start().await;
    for n in 1..=100 {
        kit.publish(message(&Reminder { order_id: n }).delay(1.hours()))
            .await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, n - 1);
        kit.advance(1.hours()).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, n);
    }
}

#[handler(group = "retrying", retry(backoff = "fixed(10m)", max_attempts = 100))]
async fn third_time(
    order: OrderPaid,
    delivery: Delivery,
    State(log): State<Log>,
) -> Result<(), HandlerError> {
    log.note(format!("order {} attempt {}", order.order_id, delivery.attempt));
    match delivery.attempt {
        ..=2 => Err(HandlerError::retry("not yet")),
        _ => Ok(()),
    }
}

#[postbox_testkit::test]
async fn a_retry_comes_when_it_is_due_and_not_before(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![third_time])
        .state(log.clone())
        .start()
        .await;
    for order in 0..20 {
        kit.publish(&paid(order)).await;
        for attempt in 1..=3 {
            kit.settled().await;
            let before = log.lines().len();
            assert_eq!(
                before as i64,
                order * 3 + attempt,
                "attempt {attempt} of order {order}"
            );
            // Its wait is lengthened by up to a quarter.
            kit.advance(if attempt == 3 { 1.hours() } else { 5.minutes() })
                .await;
            kit.settled().await;
            assert_eq!(log.lines().len(), before, "it is not due");
            kit.advance(10.minutes()).await;
        }
    }
}

/// Each is less than what is taken for a clock that was set.
#[postbox_testkit::test]
async fn small_steps_add_up(kit: Kit) {
    #[handler(group = "soon", retry(backoff = "fixed(1m)"))]
    async fn soon(_order: OrderPaid, State(log): State<Log>) -> Result<(), HandlerError> {
        log.note("failed");
        Err(HandlerError::retry("never"))
    }
    let log = Log::default();
    kit.advance(1.days()).await;
    kit.consumer(handlers![soon]).state(log.clone()).start().await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    for _ in 0..100 {
        kit.advance(500.milliseconds()).await;
    }
    kit.settled().await;
    assert_eq!(log.lines().len(), 1, "it is not due after 50 s");
    for _ in 0..60 {
        kit.advance(500.milliseconds()).await;
    }
    kit.settled().await;
    assert_eq!(log.lines().len(), 2, "it was due after 75 s at the latest");
}

#[postbox_testkit::test]
async fn a_message_that_a_handler_postpones_comes_when_it_says(kit: Kit) {
    #[handler(group = "postponing")]
    async fn postpone(order: OrderPaid, State(log): State<Log>) -> Result<(), HandlerError> {
        log.note(order.order_id);
        match log.lines().len() {
            1 => Err(HandlerError::postpone(Duration::from_secs(3600), "later")),
            _ => Ok(()),
        }
    }
    let log = Log::default();
    kit.consumer(handlers![postpone]).state(log.clone()).start().await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 1);
    kit.advance(59.minutes()).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 1);
    kit.advance(1.minutes()).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 2);
}

#[cron("0 * * * *", name = "hourly")]
async fn hourly(at: ScheduledAt, State(log): State<Log>) {
    log.note(at.0.format("%M"));
}

#[postbox_testkit::test]
async fn a_cron_schedule_fires_at_each_of_its_times(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![hourly]).state(log.clone()).start().await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 0);
    for hour in 1..=24 {
        kit.advance(1.hours()).await;
        kit.settled().await;
        assert_eq!(log.lines().len(), hour);
    }
    assert!(
        log.lines().iter().all(|minute| minute == "00"),
        "{:?}",
        log.lines()
    );
}

#[postbox_testkit::test]
async fn an_open_breaker_tries_the_next_message_when_its_probe_is_due(kit: Kit) {
    #[handler(group = "outage", retry(backoff = "fixed(10h)"))]
    async fn outage(order: OrderPaid, State(log): State<Log>) -> Result<(), HandlerError> {
        log.note(order.order_id);
        match log.lines().len() {
            ..=40 => Err(HandlerError::retry("everything fails")),
            _ => Ok(()),
        }
    }
    let log = Log::default();
    let consumer = kit.consumer(handlers![outage]).state(log.clone()).start().await;
    kit.publish_all((0..60).map(paid).collect::<Vec<_>>().iter())
        .await;
    kit.settled().await;
    let failed = log.lines().len();
    assert!(
        (20..60).contains(&failed),
        "{failed} ran before the breaker opened"
    );
    assert!(consumer.stats()[0].breaker_open);
    // One probe at a time, each half a minute after the last at most.
    for probe in 1..=(40 - failed) {
        kit.advance(31.seconds()).await;
        kit.settled().await;
        assert_eq!(log.lines().len(), failed + probe);
    }
    kit.advance(31.seconds()).await;
    kit.settled().await;
    assert!(!consumer.stats()[0].breaker_open, "the probe succeeded");
    assert_eq!(log.lines().len(), 60, "all others ran");
    kit.advance(10.hours()).await;
    kit.advance(10.hours()).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 100, "those that failed had their retries");
}

#[postbox_testkit::test]
async fn a_window_opens_and_closes(kit: Kit) {
    #[handler(group = "nightly")]
    async fn at_night(order: OrderPaid, State(log): State<Log>) {
        log.note(order.order_id);
    }
    let log = Log::default();
    kit.consumer(handlers![at_night]).state(log.clone()).start().await;
    // From two hours on, for two hours, by the database's clock.
    let window: String = sqlx::query_scalar(
        "SELECT format('%s-%s UTC', to_char(n.at + interval '2 h', 'HH24:MI'), to_char(n.at + interval '4 h', 'HH24:MI')) \
         FROM (SELECT postbox.clock() AT TIME ZONE 'UTC' AS at) n",
    )
    .fetch_one(kit.pool())
    .await
    .unwrap();
    let window = Change::DrainWindow(subscriptions::Override::To(window.parse().unwrap()));
    subscriptions::change(kit.pool(), "nightly", None, &window)
        .await
        .unwrap();
    kit.settled().await;
    for day in 0..5 {
        kit.publish(&paid(day)).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, day, "it is closed");
        kit.advance(3.hours()).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, day + 1, "it is open");
        kit.advance(21.hours()).await;
    }
}

#[postbox_testkit::test]
async fn a_message_expires_while_its_group_is_paused(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![audit]).state(log.clone()).start().await;
    let pause = |paused| {
        subscriptions::change(
            kit.pool(),
            "audit",
            None,
            if paused {
                &Change::Paused(true)
            } else {
                &Change::Paused(false)
            },
        )
    };
    pause(true).await.unwrap();
    kit.settled().await;
    kit.publish(message(&paid(1)).expires_in(1.hours())).await;
    kit.publish(message(&paid(2)).expires_in(3.hours())).await;
    kit.settled().await;
    kit.advance(2.hours()).await;
    pause(false).await.unwrap();
    kit.settled().await;
    assert_eq!(log.lines(), ["order 2 attempt 1"]);
}

#[postbox_testkit::test]
async fn a_message_is_given_up_when_its_retries_are_too_old(kit: Kit) {
    #[handler(group = "old", retry(backoff = "fixed(1h)", max_age = "1d"))]
    async fn old(_order: OrderPaid) -> Result<(), HandlerError> {
        Err(HandlerError::retry("never"))
    }
    kit.consumer(handlers![old]).start().await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    kit.advance(20.hours()).await;
    kit.settled().await;
    assert_eq!(kit.dead_letters().await.len(), 0);
    kit.advance(20.hours()).await;
    kit.settled().await;
    let letters = kit.dead_letters().await;
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].attempts, 3);
}

#[postbox_testkit::test]
async fn everything_goes_on_over_months(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![audit]).state(log.clone()).start().await;
    for month in 1..=12 {
        kit.publish(&paid(month)).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, month);
        kit.advance(30.days()).await;
        kit.settled().await;
    }
}

/// A consumer that starts after the clock was moved knows of it.
#[postbox_testkit::test]
async fn a_consumer_that_comes_later_goes_by_the_moved_clock(kit: Kit) {
    let log = Log::default();
    kit.advance(3.days()).await;
    let first = kit
        .consumer(handlers![third_time])
        .state(log.clone())
        .start()
        .await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    first.stop().await;
    kit.advance(1.hours()).await;
    kit.consumer(handlers![third_time])
        .state(log.clone())
        .start()
        .await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 2, "its retry was due when the other one came");
    kit.advance(15.minutes()).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 3);
}

#[postbox_testkit::test]
async fn what_a_transaction_schedules_is_rolled_back_with_it(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![remind]).state(log.clone()).start().await;
    let mut tx = kit.pool().begin().await.unwrap();
    tx.publish(message(&Reminder { order_id: 1 }).delay(1.hours()))
        .await
        .unwrap();
    tx.rollback().await.unwrap();
    kit.advance(2.hours()).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 0);
}
