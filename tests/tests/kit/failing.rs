//! `fail_once`, and what becomes of messages that fail.

use postbox_consumer::{
    Batch, BatchItem, DeadLetter, Delivery, HandlerError, Settlement, State, Tx, handler, handlers,
};
use postbox_testkit::{Kit, Span};

use crate::messages::{Log, OrderPaid, OrderShipped, audit, broken, mail, paid, ship, shipped};

#[postbox_testkit::test]
async fn a_handler_fails_once_before_it_is_called(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![audit]).state(log.clone()).start().await;
    kit.fail_once(audit);
    kit.publish(&paid(1)).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 0);
    kit.advance(1.hours()).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["order 1 attempt 2"]);
}

/// Its transaction has begun, and is rolled back.
#[postbox_testkit::test]
async fn a_handler_with_a_transaction_commits_once_although_it_fails_at_first(kit: Kit) {
    kit.consumer(handlers![ship]).start().await;
    kit.fail_times(ship, 2);
    kit.publish(&paid(1)).await;
    for _ in 0..2 {
        kit.settled().await;
        assert_eq!(kit.published::<OrderShipped>().await, []);
        kit.advance(1.hours()).await;
    }
    kit.settled().await;
    assert_eq!(kit.published::<OrderShipped>().await, [shipped(1)]);
}

#[postbox_testkit::test]
async fn only_the_named_handler_fails(kit: Kit) {
    let log = Log::default();
    kit.consumer(handlers![ship, mail, audit])
        .state(log.clone())
        .start()
        .await;
    kit.fail_once("mail");
    kit.publish(&paid(1)).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["order 1 attempt 1"]);
    kit.advance(1.hours()).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["order 1 attempt 1", "shipped 1"]);
}

#[postbox_testkit::test]
async fn a_failed_batch_runs_again_in_parts(kit: Kit) {
    #[handler(group = "batches", batch = 10)]
    async fn batch(orders: Batch<OrderPaid>, State(log): State<Log>) {
        orders.iter().for_each(|order| log.note(order.message.order_id));
    }
    let log = Log::default();
    let consumer = kit.consumer(handlers![batch]).state(log.clone());
    kit.publish_all([&paid(1), &paid(2), &paid(3)]).await;
    kit.settled().await;
    kit.fail_once(batch);
    consumer.start().await;
    kit.settled().await;
    kit.advance(1.hours()).await;
    kit.settled().await;
    let mut lines = log.lines();
    lines.sort();
    assert_eq!(lines, ["1", "2", "3"]);
}

#[postbox_testkit::test]
async fn it_fails_within_the_layers_of_the_service(kit: Kit) {
    let log = Log::default();
    let layer = tower::util::MapErrLayer::new({
        let log = log.clone();
        move |error: postbox_consumer::HandlerFailure| {
            log.note("the layer saw it");
            error
        }
    });
    let consumer = kit.consumer(handlers![audit]).state(log.clone());
    consumer.configure(|consumer| consumer.layer(layer)).start().await;
    kit.fail_once(audit);
    kit.publish(&paid(1)).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["the layer saw it"]);
}

#[postbox_testkit::test]
#[should_panic(expected = "no handler of this kit is called \"kit::messages::mail\"")]
async fn a_handler_that_is_not_there_cannot_fail(kit: Kit) {
    kit.consumer(handlers![ship]).start().await;
    kit.fail_once(mail);
}

#[postbox_testkit::test]
#[should_panic(expected = "there are: kit::messages::ship")]
async fn who_names_a_wrong_handler_is_told_which_there_are(kit: Kit) {
    let _consumer = kit.consumer(handlers![ship]);
    kit.fail_once("shp");
}

#[postbox_testkit::test]
async fn dead_letters_come_with_their_errors(kit: Kit) {
    #[handler(group = "refusing")]
    async fn refuse(order: OrderPaid) -> Result<(), HandlerError> {
        Err(HandlerError::dead_letter(format!(
            "no such customer in {}",
            order.order_id
        )))
    }
    kit.consumer(handlers![refuse, broken]).start().await;
    let id = kit.publish(&paid(7)).await;
    kit.settled().await;
    let letters = kit.dead_letters().await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    let letter = &letters[0];
    assert_eq!((&*letter.group_name, &*letter.topic), ("refusing", "orders"));
    assert_eq!(letter.message_id.to_string(), id.to_string());
    assert_eq!(letter.attempts, 1);
    assert!(
        letter.reason.contains("no such customer in 7"),
        "{}",
        letter.reason
    );
    assert_eq!(letter.payload.as_deref(), Some(&br#"{"order_id":7}"#[..]));
    // The other group gives up after its last attempt.
    for _ in 0..20 {
        kit.advance(1.days()).await;
        kit.settled().await;
    }
    assert_eq!(kit.dead_letters().await.len(), 2);
    let broken = kit.dead_letters_of("broken").await;
    assert_eq!(broken.len(), 1);
    assert!(
        broken[0].reason.contains("no stock for 7"),
        "{}",
        broken[0].reason
    );
}

#[postbox_testkit::test]
async fn a_message_that_is_redriven_is_waited_for(kit: Kit) {
    #[handler(group = "mended")]
    async fn mended(order: OrderPaid, State(log): State<Log>) -> Result<(), HandlerError> {
        log.note(order.order_id);
        match log.lines().len() % 2 {
            1 => Err(HandlerError::dead_letter("broken")),
            _ => Ok(()),
        }
    }
    let log = Log::default();
    kit.consumer(handlers![mended]).state(log.clone()).start().await;
    for n in 1..=20 {
        kit.publish(&paid(n)).await;
        kit.settled().await;
        let letters: Vec<i64> = kit.dead_letters().await.iter().map(|letter| letter.id).collect();
        assert_eq!(letters.len(), 1);
        postbox_dispatcher::dead_letters::redrive(kit.pool(), &letters, None)
            .await
            .unwrap();
        kit.settled().await;
        assert_eq!(kit.dead_letters().await.len(), 0);
        assert_eq!(log.lines().len() as i64, 2 * n);
    }
}

#[postbox_testkit::test]
async fn a_handler_that_panics_has_failed(kit: Kit) {
    #[handler(group = "panicking")]
    async fn panics(order: OrderPaid, delivery: Delivery, State(log): State<Log>) {
        assert!(delivery.attempt > 1, "order {} is bad", order.order_id);
        log.note(order.order_id);
    }
    let log = Log::default();
    kit.consumer(handlers![panics]).state(log.clone()).start().await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    assert_eq!(log.lines().len(), 0);
    kit.advance(1.hours()).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["1"]);
}

/// A halted key waits for an operator, and so does nobody else.
#[postbox_testkit::test]
async fn a_key_that_waits_for_an_operator_is_not_waited_for(kit: Kit) {
    #[handler(group = "halting", retry(max_attempts = 1, exhausted = "halt"))]
    async fn halt(order: OrderPaid, State(log): State<Log>) -> Result<(), HandlerError> {
        match order.order_id {
            1 => Err(HandlerError::retry("no")),
            _ => {
                log.note(order.order_id);
                Ok(())
            }
        }
    }
    let log = Log::default();
    kit.consumer(handlers![halt]).state(log.clone()).start().await;
    kit.publish_all([&paid(1), &paid(1), &paid(2)]).await;
    kit.settled().await;
    assert_eq!(log.lines(), ["2"]);
    let letters = kit.dead_letters().await;
    assert!(letters.len() == 1 && letters[0].halted);
    postbox_dispatcher::dead_letters::release(kit.pool(), &[letters[0].id])
        .await
        .unwrap();
    kit.settled().await;
    assert_eq!(
        kit.dead_letters().await.len(),
        2,
        "the next of its key has failed, too"
    );
}

/// A handler is a function: with what is made up for it, no database is needed.
#[test]
fn handlers_are_called_alone() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let log = Log::default();
        let mut delivery = Delivery::for_test("orders");
        delivery.attempt = 3;
        audit(paid(1), delivery.clone(), State(log.clone())).await;
        assert_eq!(log.lines(), ["order 1 attempt 3"]);
        let error = broken(paid(2)).await.unwrap_err();
        assert_eq!(error.to_string(), "no stock for 2");
        let batch: Batch<OrderPaid> = [BatchItem::new(paid(1), delivery.clone())].into_iter().collect();
        assert_eq!(batch.len(), 1);
        let mut letter = DeadLetter::for_test(delivery, "it was given up").with_state(log.clone());
        letter.payload = b"{}".to_vec();
        assert_eq!((&*letter.reason, letter.attempts), ("it was given up", 3));
        assert!(letter.state::<Log>().is_some() && letter.state::<Kit>().is_none());
        Settlement::for_test().without_effect();
    });
}

#[postbox_testkit::test]
async fn a_handler_with_a_transaction_is_called_alone(kit: Kit) {
    let (tx, transaction) = Tx::for_test(kit.pool()).await.unwrap();
    ship(paid(1), tx).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(kit.published::<OrderShipped>().await, [shipped(1)]);
}
