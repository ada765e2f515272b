//! Several consumers: of other groups, of the same group, nodes.

use postbox_consumer::{State, handler, handlers};
use postbox_testkit::Kit;

use crate::messages::{Log, OrderPaid, audit, mail, paid, ship};

#[postbox_testkit::test]
async fn instances_of_a_group_share_its_messages_and_hand_them_over(kit: Kit) {
    let log = Log::default();
    let first = kit.consumer(handlers![audit]).state(log.clone()).start().await;
    kit.publish_all((0..100).map(paid).collect::<Vec<_>>().iter())
        .await;
    let second = kit.consumer(handlers![audit]).state(log.clone()).start().await;
    kit.publish_all((100..200).map(paid).collect::<Vec<_>>().iter())
        .await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 200);
    first.stop().await;
    kit.publish_all((200..300).map(paid).collect::<Vec<_>>().iter())
        .await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 300);
    assert!(first.stats().is_empty());
    assert!(second.stats()[0].handled >= 100);
    second.stop().await;
    second.stop().await;
}

/// Lanes move while messages come: what nobody owns for a moment is not settled.
#[postbox_testkit::test]
async fn messages_are_waited_for_while_lanes_move(kit: Kit) {
    let log = Log::default();
    let mut last = kit.consumer(handlers![audit]).state(log.clone()).start().await;
    for n in 0..10 {
        let next = kit.consumer(handlers![audit]).state(log.clone()).start().await;
        kit.publish_all((0..40).map(|m| paid(n * 1_000 + m)).collect::<Vec<_>>().iter())
            .await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, n * 80 + 40);
        kit.publish_all((40..80).map(|m| paid(n * 1_000 + m)).collect::<Vec<_>>().iter())
            .await;
        last.stop().await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, n * 80 + 80);
        last = next;
    }
}

#[postbox_testkit::test]
async fn a_broadcast_comes_to_every_consumer(kit: Kit) {
    #[handler(broadcast)]
    async fn invalidate(order: OrderPaid, State(log): State<Log>) {
        log.note(order.order_id);
    }
    #[handler(broadcast = "durable")]
    async fn remember(order: OrderPaid, State(log): State<Log>) {
        log.note(format!("durable {}", order.order_id));
    }
    let logs = [Log::default(), Log::default()];
    for log in &logs {
        kit.consumer(handlers![invalidate, remember])
            .state(log.clone())
            .start()
            .await;
    }
    for n in 1..=50 {
        kit.publish(&paid(n)).await;
        kit.settled().await;
        for log in &logs {
            assert_eq!(log.lines().len() as i64, 2 * n);
        }
    }
}

/// By the operator's rules a type that nobody handles waits for who does.
#[postbox_testkit::test]
async fn a_type_that_nobody_handles_waits_until_somebody_does(kit: Kit) {
    #[handler(group = "types", topic = "orders", type = "order.refunded")]
    async fn refunded(State(log): State<Log>) {
        log.note("refunded");
    }
    #[handler(group = "types")]
    async fn paid_only(order: OrderPaid, State(log): State<Log>) {
        log.note(format!("paid {}", order.order_id));
    }
    let log = Log::default();
    kit.consumer(handlers![paid_only])
        .state(log.clone())
        .start()
        .await;
    for round in 0..10 {
        kit.publish(postbox::message(&paid(round)).message_type("order.refunded"))
            .await;
        kit.publish(&paid(100)).await;
        kit.settled().await;
        let mut expected = ["paid 100", "refunded"].repeat(round as usize);
        expected.push("paid 100");
        assert_eq!(log.lines(), expected);
        let who_does = kit.consumer(handlers![refunded]).state(log.clone()).start().await;
        kit.settled().await;
        expected.push("refunded");
        assert_eq!(log.lines(), expected);
        who_does.stop().await;
    }
}

#[postbox_testkit::test]
async fn a_type_that_nobody_handles_is_dead_once_all_is_settled_where_the_policy_says_so(kit: Kit) {
    #[handler(group = "types", unknown = "dead_letter")]
    async fn paid_only(_order: OrderPaid) {}
    kit.consumer(handlers![paid_only]).start().await;
    for n in 1..=60 {
        kit.publish(postbox::message(&paid(n)).message_type(format!("order.{n}")))
            .await;
        kit.settled().await;
        assert_eq!(kit.dead_letters().await.len() as i64, n);
    }
}

#[postbox_testkit::test]
async fn groups_do_not_wait_for_each_other(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![ship, mail, audit])
        .state(log.clone())
        .start()
        .await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 2);
}
