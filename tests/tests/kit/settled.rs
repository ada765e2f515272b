//! `settled`: nothing runs and nothing is about to, however often one looks.

use std::time::Duration;

use postbox::Publish;
use postbox_consumer::{Delivery, HandlerError, State, Tx, handler, handlers};
use postbox_testkit::Kit;

use crate::messages::{Log, OrderPaid, OrderShipped, audit, mail, paid, ship, shipped};

#[postbox_testkit::test]
async fn a_chain_of_handlers_is_waited_for_to_its_end(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![ship]).start().await;
    kit.consumer(handlers![mail]).state(log.clone()).start().await;
    kit.publish_all([&paid(1), &paid(2)]).await;
    kit.settled().await;
    let mut lines = log.lines();
    lines.sort();
    assert_eq!(lines, ["shipped 1", "shipped 2"]);
}

/// Between the commit and the sequencer, between a handler and what it publishes, between a message and its consumer: there is no moment that looks settled.
#[postbox_testkit::test]
async fn a_thousand_times_nothing_is_called_settled_that_is_not(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![ship]).start().await;
    kit.consumer(handlers![mail]).state(log.clone()).start().await;
    for n in 0..1_000 {
        kit.publish(&paid(n)).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, n + 1, "after order {n}");
    }
}

/// The same where a handler publishes before it is settled, in a transaction of its own, and sleeps in between.
#[postbox_testkit::test]
async fn a_message_of_a_handler_that_is_not_settled_yet_is_waited_for(kit: Kit) {
    #[handler(group = "slow")]
    async fn hop(order: OrderPaid, State(kit): State<Kit>) {
        tokio::time::sleep(Duration::from_millis(order.order_id as u64 % 4)).await;
        kit.publish(&shipped(order.order_id)).await;
        tokio::time::sleep(Duration::from_millis(order.order_id as u64 % 3)).await;
    }
    let log = Log::default();
    let consumer = kit.consumer(handlers![hop, mail]);
    consumer.state(kit.clone()).state(log.clone()).start().await;
    for n in 0..200 {
        kit.publish(&paid(n)).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, n + 1, "after order {n}");
    }
    // The state holds the kit, and the consumer the state: the test ends all the same.
}

#[postbox_testkit::test]
async fn a_burst_is_waited_for_while_others_still_publish(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![audit]).state(log.clone()).start().await;
    let publishers: Vec<_> = (0..8)
        .map(|n| {
            let kit = kit.clone();
            tokio::spawn(async move {
                for m in 0..50 {
                    kit.publish(&paid(n * 1_000 + m)).await;
                }
            })
        })
        .collect();
    kit.settled().await;
    for publisher in publishers {
        publisher.await.unwrap();
    }
    kit.settled().await;
    assert_eq!(log.lines().len(), 400);
}

#[postbox_testkit::test]
async fn what_was_published_before_a_consumer_started_is_waited_for(kit: Kit) {
    let log = Log::default();
    kit.publish_all((0..2_000).map(paid).collect::<Vec<_>>().iter())
        .await;
    kit.consumer(handlers![audit]).state(log.clone()).start().await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 2_000);
}

#[postbox_testkit::test]
async fn without_a_consumer_all_is_settled_once_it_has_its_place(kit: Kit) {
    kit.publish(&paid(1)).await;
    kit.settled().await;
    let sequenced: i64 = sqlx::query_scalar("SELECT postbox.next_offset('orders')")
        .fetch_one(kit.pool())
        .await
        .unwrap();
    assert_eq!(sequenced, 1);
}

/// Nobody is there who would run them; and the next one who is does.
#[postbox_testkit::test]
async fn a_consumer_that_was_stopped_is_not_waited_for(kit: Kit) {
    let log = Log::default();
    let first = kit.consumer(handlers![audit]).state(log.clone()).start().await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    first.stop().await;
    kit.publish(&paid(2)).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 1);
    kit.consumer(handlers![audit]).state(log.clone()).start().await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 2);
}

/// Another process's, as far as the kit knows.
#[postbox_testkit::test]
async fn a_consumer_that_the_kit_did_not_start_is_waited_for_too(kit: Kit) {
    let log = Log::default();
    let consumer = postbox_consumer::Consumer::new(kit.pool().clone())
        .handlers(handlers![audit])
        .state(log.clone());
    let consumer = consumer.start().await.unwrap();
    for n in 0..50 {
        kit.publish(&paid(n)).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, n + 1);
    }
    consumer.shutdown().await.unwrap();
}

#[postbox_testkit::test]
async fn the_messages_of_a_batch_are_waited_for_until_it_is_full_enough(kit: Kit) {
    #[handler(group = "batches", batch = 100, batch_wait = "200ms")]
    async fn count(orders: postbox_consumer::Batch<OrderPaid>, State(log): State<Log>) {
        orders.iter().for_each(|order| log.note(order.message.order_id));
    }
    let log = Log::default();
    kit.consumer(handlers![count]).state(log.clone()).start().await;
    kit.publish_all([&paid(1), &paid(2), &paid(3)]).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 3);
}

#[postbox_testkit::test]
async fn a_rate_limit_is_waited_for(kit: Kit) {
    #[handler(group = "limited", rate = 20)]
    async fn limited(order: OrderPaid, State(log): State<Log>) {
        log.note(order.order_id);
    }
    let log = Log::default();
    kit.consumer(handlers![limited]).state(log.clone()).start().await;
    kit.publish_all((0..10).map(paid).collect::<Vec<_>>().iter())
        .await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 10);
}

#[postbox_testkit::test]
async fn a_paused_group_is_not_waited_for_and_goes_on_when_it_is_resumed(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![audit]).state(log.clone()).start().await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    for round in 1..=5 {
        let set = |paused: bool| {
            let pool = kit.pool().clone();
            async move {
                let change = postbox_dispatcher::subscriptions::Change::Paused(paused);
                postbox_dispatcher::subscriptions::change(&pool, "audit", Some("orders"), &change)
                    .await
                    .unwrap()
            }
        };
        set(true).await;
        kit.settled().await;
        kit.publish(&paid(round + 1)).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, round, "it is paused");
        set(false).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, round + 1, "it goes on");
    }
}

/// Its function is told after the dead letter is in the database, beside everything else.
#[postbox_testkit::test]
async fn who_is_told_of_dead_letters_is_waited_for(kit: Kit) {
    async fn tell(letter: postbox_consumer::DeadLetter) {
        tokio::time::sleep(Duration::from_millis(50)).await;
        letter.state::<Log>().unwrap().note(letter.reason);
    }
    #[handler(group = "refusing", on_dead_letter = tell)]
    async fn refuse(_order: OrderPaid) -> Result<(), HandlerError> {
        Err(HandlerError::dead_letter("never"))
    }
    let log = Log::default();
    kit.consumer(handlers![refuse]).state(log.clone()).start().await;
    for n in 0..20 {
        kit.publish(&paid(n)).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, n + 1);
    }
}

/// Its cursor is in memory, so the database knows nothing of it.
#[postbox_testkit::test]
async fn a_broadcast_from_memory_is_waited_for_with_its_retries(kit: Kit) {
    #[handler(broadcast, retry(backoff = "fixed(1h)"))]
    async fn invalidate(
        order: OrderPaid,
        delivery: Delivery,
        State(log): State<Log>,
    ) -> Result<(), HandlerError> {
        log.note(order.order_id);
        match delivery.attempt {
            1 => Err(HandlerError::retry("not yet")),
            _ => Ok(()),
        }
    }
    let log = Log::default();
    kit.consumer(handlers![invalidate])
        .state(log.clone())
        .start()
        .await;
    for n in 1..=20 {
        kit.publish(&paid(n)).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, 2 * n - 1, "its retry is not due");
        kit.advance(Duration::from_secs(2 * 3600)).await;
        kit.settled().await;
        assert_eq!(log.lines().len() as i64, 2 * n, "its retry was due");
    }
}

#[postbox_testkit::test]
async fn what_fails_holds_its_key_and_others_go_on(kit: Kit) {
    #[handler(group = "steps", retry(backoff = "fixed(1h)"))]
    async fn steps(
        order: OrderShipped,
        delivery: Delivery,
        mut tx: Tx,
        State(log): State<Log>,
    ) -> Result<(), HandlerError> {
        if delivery.offset.get() == 0 && delivery.attempt == 1 {
            return Err(HandlerError::retry("the first of its key"));
        }
        log.note(order.order_id);
        tx.publish(&paid(order.order_id)).await?;
        Ok(())
    }
    let log = Log::default();
    kit.consumer(handlers![steps]).state(log.clone()).start().await;
    kit.publish_all([&shipped(1), &shipped(1), &shipped(2)]).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["2"]);
    kit.advance(Duration::from_secs(2 * 3600)).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["2", "1", "1"]);
    assert_eq!(kit.published::<OrderPaid>().await, [paid(2), paid(1), paid(1)]);
}
