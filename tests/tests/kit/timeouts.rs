//! What `settled` says when it gives up.

use std::sync::Arc;
use std::time::Duration;

use postbox_consumer::{Delivery, HandlerError, State, handler, handlers};
use postbox_testkit::{Kit, Span};

use crate::messages::{Log, OrderPaid, paid};

/// The message with which `settled_within` gives up.
async fn message_of_time_out(kit: &Kit, patience: Duration) -> String {
    let kit = kit.clone();
    let waiting = tokio::spawn(async move { kit.settled_within(patience).await });
    let panic = waiting.await.unwrap_err().into_panic();
    *panic.downcast::<String>().unwrap()
}

/// Waits until the message has all of this: what it tells of may not have begun yet.
async fn says(kit: &Kit, parts: &[String]) {
    let mut message = String::new();
    for _ in 0..60 {
        message = message_of_time_out(kit, 500.milliseconds()).await;
        if parts.iter().all(|part| message.contains(part)) {
            return;
        }
    }
    panic!("{message}\nhas all of {parts:#?}");
}

#[handler(group = "hanging", timeout = "1h")]
async fn hang(_order: OrderPaid) {
    std::future::pending().await
}

#[postbox_testkit::test]
async fn a_handler_that_hangs_is_named_with_its_message(kit: Kit) {
    kit.consumer(handlers![hang]).start().await;
    let id = kit.publish(&paid(7)).await;
    let parts = [
        "not settled within 500ms (awaited at tests/tests/kit/timeouts.rs:".to_owned(),
        "group hanging on topic orders: 1 run, 0 more are ready".to_owned(),
        format!("hang of group hanging on topic orders: message {id} of key \"7\", attempt 1, for "),
    ];
    says(&kit, &parts).await;
}

#[postbox_testkit::test]
async fn a_handler_that_blocks_its_thread_is_named_too(kit: Kit) {
    #[handler(group = "blocking")]
    async fn block(_order: OrderPaid, State(gate): State<Arc<std::sync::Barrier>>) {
        gate.wait();
    }
    let gate = Arc::new(std::sync::Barrier::new(2));
    kit.consumer(handlers![block]).state(gate.clone()).start().await;
    kit.publish(&paid(7)).await;
    says(&kit, &["block of group blocking on topic orders".to_owned()]).await;
    gate.wait();
    kit.settled().await;
}

#[postbox_testkit::test]
async fn what_fails_is_told_with_its_last_error(kit: Kit) {
    #[handler(group = "failing", retry(backoff = "fixed(1h)"))]
    async fn fail(_order: OrderPaid, delivery: Delivery) -> Result<(), HandlerError> {
        Err(HandlerError::retry(format!(
            "the printer is out of paper, {}",
            delivery.attempt
        )))
    }
    kit.consumer(handlers![hang, fail]).start().await;
    let id = kit.publish(&paid(7)).await;
    let parts = [
        format!("group failing on topic orders: message {id} of key \"7\" runs again in "),
        "after 1 attempts, last error: the printer is out of paper, 1".to_owned(),
    ];
    says(&kit, &parts).await;
}

/// The limit lets one go in an hour.
#[postbox_testkit::test]
async fn what_waits_for_a_rate_limit_is_told(kit: Kit) {
    #[handler(group = "slow", instance_rate = 0.0003)]
    async fn slow(order: OrderPaid, State(log): State<Log>) {
        log.note(order.order_id);
    }
    let log = Log::default();
    kit.consumer(handlers![slow]).state(log.clone()).start().await;
    kit.publish(&paid(1)).await;
    let part = "group slow on topic orders: 0 run, 1 more are ready".to_owned();
    says(&kit, &[part]).await;
    kit.advance(2.hours()).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["1"]);
}

#[postbox_testkit::test]
async fn a_schedule_that_cannot_fire_is_named(kit: Kit) {
    sqlx::query(
        "INSERT INTO postbox.cron (name, schedule, time_zone, missed, topic, payload, next_at) \
         VALUES ('strange', 'no schedule at all', 'UTC', 'once', 'orders', '', postbox.clock())",
    )
    .execute(kit.pool())
    .await
    .unwrap();
    says(&kit, &["cron schedules are due: strange".to_owned()]).await;
}

#[postbox_testkit::test]
async fn a_test_sets_its_patience(kit: Kit) {
    kit.consumer(handlers![hang]).start().await;
    kit.publish(&paid(7)).await;
    kit.patience(200.milliseconds());
    let waiting = tokio::spawn({
        let kit = kit.clone();
        async move { kit.settled().await }
    });
    let panic = waiting.await.unwrap_err().into_panic();
    let message = panic.downcast::<String>().unwrap();
    assert!(message.starts_with("not settled within 200ms"), "{message}");
}

#[postbox_testkit::test]
async fn what_was_not_settled_in_time_can_be_later(kit: Kit) {
    #[handler(group = "waiting")]
    async fn wait(_order: OrderPaid, State(gate): State<Arc<tokio::sync::Notify>>) {
        gate.notified().await;
    }
    let gate = Arc::new(tokio::sync::Notify::new());
    kit.consumer(handlers![wait]).state(gate.clone()).start().await;
    kit.publish(&paid(7)).await;
    message_of_time_out(&kit, 50.milliseconds()).await;
    gate.notify_one();
    kit.settled().await;
}

#[postbox_testkit::test]
#[should_panic(expected = "the consumer does not start: ")]
async fn a_consumer_that_cannot_start_says_why(kit: Kit) {
    #[handler(group = "stateful")]
    async fn stateful(_order: OrderPaid, _log: State<Log>) {}
    kit.consumer(handlers![stateful]).start().await;
}
