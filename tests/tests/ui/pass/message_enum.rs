//! `derive(Message)` on enums: a type a variant, the payload its content alone.

#![deny(warnings)]

use postbox::Message;
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Content {
    order_id: u32,
}

#[derive(Debug, PartialEq, Message)]
#[message(topic = "orders", key = order_id)]
#[serde(rename_all_fields = "camelCase", deny_unknown_fields)]
enum Order {
    #[message(type = "order.placed")]
    Placed(Content),
    #[message(type = "order.shipped")]
    Shipped {
        order_id: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        shipped_by: Option<String>,
        #[serde(with = "cents")]
        total: f64,
    },
    #[serde(rename_all = "SCREAMING_SNAKE_CASE")]
    Refunded { order_id: Option<u32> },
    #[message(key = 0)]
    Moved(u32, String),
    #[message(key = format!("{day}-{month}"))]
    MonthClosed { day: u8, month: u8 },
    #[message(key = None)]
    AllClosed,
}

mod cents {
    use super::{Deserialize, Serialize};

    pub fn serialize<S: serde::Serializer>(total: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        ((total * 100.0) as i64).serialize(serializer)
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        i64::deserialize(deserializer).map(|cents| cents as f64 / 100.0)
    }
}

#[derive(Debug, PartialEq, Message)]
#[message(topic = "lamps")]
enum Lamp {
    On,
    Off,
}

// An enum may be JSON in its own way as well; its payload as a message stays the content.
#[derive(Debug, PartialEq, Serialize, Deserialize, Message)]
#[message(topic = "parcels", key = parcel)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum Parcel {
    #[serde(rename = "sent")]
    WasSent { parcel: String },
}

fn round_trip(order: Order, message_type: &str, key: Option<&str>, payload: &str) {
    assert_eq!(order.message_type(), message_type);
    assert_eq!(order.key().as_deref(), key);
    assert_eq!(String::from_utf8(order.encode().unwrap()).unwrap(), payload);
    assert_eq!(Order::decode(message_type, payload.as_bytes()).unwrap(), order);
}

pub fn main() {
    assert_eq!(Order::TOPIC, "orders");
    assert_eq!(
        Order::TYPES,
        [
            "order.placed",
            "order.shipped",
            "refunded",
            "moved",
            "month_closed",
            "all_closed"
        ]
    );
    round_trip(
        Order::Placed(Content { order_id: 1 }),
        "order.placed",
        Some("1"),
        r#"{"order_id":1}"#,
    );
    round_trip(
        Order::Shipped {
            order_id: 2,
            shipped_by: None,
            total: 1.5,
        },
        "order.shipped",
        Some("2"),
        r#"{"orderId":2,"total":150}"#,
    );
    round_trip(
        Order::Shipped {
            order_id: 2,
            shipped_by: Some("us".into()),
            total: 1.5,
        },
        "order.shipped",
        Some("2"),
        r#"{"orderId":2,"shippedBy":"us","total":150}"#,
    );
    round_trip(
        Order::Refunded { order_id: Some(3) },
        "refunded",
        Some("3"),
        r#"{"ORDER_ID":3}"#,
    );
    round_trip(
        Order::Refunded { order_id: None },
        "refunded",
        None,
        r#"{"ORDER_ID":null}"#,
    );
    round_trip(Order::Moved(4, "x".into()), "moved", Some("4"), r#"[4,"x"]"#);
    round_trip(
        Order::MonthClosed { day: 1, month: 2 },
        "month_closed",
        Some("1-2"),
        r#"{"day":1,"month":2}"#,
    );
    round_trip(Order::AllClosed, "all_closed", None, "null");
    assert_eq!(
        Order::decode("all_closed", b"{\"by\":\"ann\"}").unwrap(),
        Order::AllClosed
    );
    assert!(Order::decode("order.shipped", br#"{"orderId":2,"total":1,"extra":0}"#).is_err());
    assert!(Order::decode("order.lost", b"null").is_err());

    assert_eq!(Lamp::TYPES, ["on", "off"]);
    assert_eq!(Lamp::On.encode().unwrap(), b"null");
    assert_eq!(Lamp::decode("off", b"").unwrap(), Lamp::Off);
    assert_eq!(Lamp::On.key(), None);

    let sent = Parcel::WasSent { parcel: "p".into() };
    assert_eq!(sent.message_type(), "was_sent");
    assert_eq!(sent.key().as_deref(), Some("p"));
    assert_eq!(sent.encode().unwrap(), br#"{"parcel":"p"}"#);
}
