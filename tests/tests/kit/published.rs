//! `published` and `scheduled`: what the service wrote, and nothing else.

use std::time::Duration;

use postbox::{Message, Outgoing, Publish, message};
use postbox_consumer::{HandlerError, Tx, handler, handlers};
use postbox_testkit::{Kit, Span};
use serde::{Deserialize, Serialize};

use crate::messages::{OrderPaid, OrderShipped, Reminder, paid, ship, shipped};

#[postbox_testkit::test]
async fn what_the_service_published_is_there_in_its_order_and_what_the_test_published_is_not(kit: Kit) {
    kit.publish(&shipped(9)).await;
    let mut tx = kit.pool().begin().await.unwrap();
    tx.publish(&shipped(2)).await.unwrap();
    tx.publish(&paid(1)).await.unwrap();
    tx.publish(&shipped(1)).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(kit.published::<OrderShipped>().await, [shipped(2), shipped(1)]);
    assert_eq!(kit.published::<OrderPaid>().await, [paid(1)]);
    assert_eq!(kit.published::<Reminder>().await, []);
}

#[postbox_testkit::test]
async fn what_was_rolled_back_or_is_not_committed_was_not_published(kit: Kit) {
    #[handler(group = "rolling-back")]
    async fn roll_back(order: OrderPaid, mut tx: Tx) -> Result<(), HandlerError> {
        tx.publish(&shipped(order.order_id)).await?;
        Err(HandlerError::dead_letter("after all"))
    }
    kit.consumer(handlers![roll_back]).start().await;
    kit.publish(&paid(1)).await;
    kit.settled().await;
    assert_eq!(kit.published::<OrderShipped>().await, []);
    let mut open = kit.pool().begin().await.unwrap();
    open.publish(&shipped(2)).await.unwrap();
    kit.settled().await;
    assert_eq!(kit.published::<OrderShipped>().await, []);
    open.commit().await.unwrap();
    assert_eq!(kit.published::<OrderShipped>().await, [shipped(2)]);
}

#[postbox_testkit::test]
async fn what_is_for_later_is_scheduled_until_it_is_due_and_published_then(kit: Kit) {
    let reminder = |order_id| Reminder { order_id };
    let mut tx = kit.pool().begin().await.unwrap();
    tx.publish(message(&reminder(2)).delay(2.hours())).await.unwrap();
    tx.publish(message(&reminder(1)).delay(1.hours())).await.unwrap();
    tx.commit().await.unwrap();
    kit.publish(message(&reminder(9)).delay(1.hours())).await;
    assert_eq!(kit.scheduled::<Reminder>().await, [reminder(1), reminder(2)]);
    assert_eq!(kit.published::<Reminder>().await, []);
    kit.advance(1.hours()).await;
    kit.settled().await;
    assert_eq!(kit.scheduled::<Reminder>().await, [reminder(2)]);
    assert_eq!(kit.published::<Reminder>().await, [reminder(1)]);
    let left = kit.scheduled_in("reminders").await;
    assert!(left.len() == 1 && left[0].key.as_deref() == Some("2"));
}

#[derive(Debug, PartialEq, Message)]
#[message(topic = "parcels", key = parcel)]
enum Parcel {
    #[message(type = "parcel.sent")]
    Sent { parcel: String },
    #[message(type = "parcel.lost")]
    Lost { parcel: String },
}

#[derive(Debug, PartialEq, Serialize, Deserialize, Message)]
#[message(topic = "parcels", type = "parcel.lost")]
struct Lost {
    parcel: String,
}

#[postbox_testkit::test]
async fn messages_of_an_enum_are_those_of_its_types(kit: Kit) {
    let (sent, lost) = (
        Parcel::Sent {
            parcel: "a".to_owned(),
        },
        Parcel::Lost {
            parcel: "b".to_owned(),
        },
    );
    let mut tx = kit.pool().begin().await.unwrap();
    tx.publish(&sent).await.unwrap();
    tx.publish(&lost).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(kit.published::<Parcel>().await, [sent, lost]);
    assert_eq!(
        kit.published::<Lost>().await,
        [Lost {
            parcel: "b".to_owned()
        }]
    );
}

#[postbox_testkit::test]
async fn everything_of_a_topic_is_there_with_key_and_headers(kit: Kit) {
    let mut tx = kit.pool().begin().await.unwrap();
    let image = Outgoing::bytes("images", "image/png", vec![0x89, 0x50])
        .key("k")
        .header("tenant", "acme")
        .expires_in(Duration::from_secs(60));
    let id = tx.publish(image).await.unwrap();
    tx.commit().await.unwrap();
    let all = kit.published_in("images").await;
    assert_eq!(all.len(), 1);
    let image = &all[0];
    assert_eq!(
        (image.id, &*image.topic, image.key.as_deref()),
        (id, "images", Some("k"))
    );
    assert_eq!(
        (&*image.content_type, &image.payload[..]),
        ("image/png", &[0x89, 0x50][..])
    );
    assert_eq!(image.headers.get("tenant"), Some("acme"));
    assert!(image.message_type.is_none() && image.expires_at.is_some());
}

/// The id that a publish with a known key gives is the first one's, which is the service's.
#[postbox_testkit::test]
async fn a_duplicate_of_the_services_message_stays_the_services(kit: Kit) {
    let mut tx = kit.pool().begin().await.unwrap();
    let id = tx.publish(message(&shipped(1)).dedup_key("once")).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(kit.publish(message(&shipped(1)).dedup_key("once")).await, id);
    assert_eq!(kit.published::<OrderShipped>().await, [shipped(1)]);
}

#[postbox_testkit::test]
#[should_panic(expected = "the message is not published: the key")]
async fn a_message_that_is_refused_says_why(kit: Kit) {
    kit.publish(message(&paid(1)).key("x".repeat(2_000))).await;
}

#[postbox_testkit::test]
#[should_panic(expected = "cannot be decoded")]
async fn a_message_of_another_form_says_so(kit: Kit) {
    let mut tx = kit.pool().begin().await.unwrap();
    tx.publish(Outgoing::json("shipments", "text").message_type("order.shipped"))
        .await
        .unwrap();
    tx.commit().await.unwrap();
    kit.published::<OrderShipped>().await;
}

/// Also while somebody else holds a transaction open.
#[postbox_testkit::test]
async fn settled_does_not_wait_for_a_transaction_that_is_open(kit: Kit) {
    kit.consumer(handlers![ship]).start().await;
    let mut open = kit.pool().begin().await.unwrap();
    open.publish(&paid(1)).await.unwrap();
    kit.publish(&paid(2)).await;
    kit.settled().await;
    assert_eq!(kit.published::<OrderShipped>().await, [shipped(2)]);
    open.commit().await.unwrap();
    kit.settled().await;
    assert_eq!(kit.published::<OrderShipped>().await, [shipped(2), shipped(1)]);
}
