//! `derive(Message)` on structs: names, keys and JSON.

use postbox::Message;
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize, Message)]
#[message(topic = "orders", type = "order.placed", key = order_id)]
struct OrderPlaced {
    order_id: u64,
    total_cents: i64,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders")]
struct OrderHTTPCallMade {
    r#type: String,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "ticks")]
struct Tick;

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "readings", key = 1)]
struct Reading(f64, String);

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders", key = order_id)]
struct Signed(OrderPlaced);

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "optional", key = customer)]
struct Optional {
    customer: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Customer {
    id: Option<u32>,
    name: String,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "nested", key = customer.id)]
struct Nested {
    customer: Customer,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "called", key = customer.name.to_uppercase())]
struct Called {
    customer: Customer,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "formatted", key = format!("{tenant}/{order_id}"))]
struct Formatted {
    tenant: String,
    order_id: u64,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "sharded", key = self.shard())]
struct Sharded {
    order_id: u64,
}

impl Sharded {
    fn shard(&self) -> u64 {
        self.order_id % 16
    }
}

const TENANT: &str = "acme";

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "constant", key = TENANT)]
struct Constant {
    #[allow(dead_code)]
    order_id: u64,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "generic", key = id)]
struct Generic<T> {
    id: u8,
    content: T,
}

fn key(message: &impl Message) -> Option<String> {
    message.key().map(|key| key.into_owned())
}

pub fn main() {
    let placed = OrderPlaced {
        order_id: 42,
        total_cents: 990,
    };
    assert_eq!(OrderPlaced::TOPIC, "orders");
    assert_eq!(OrderPlaced::TYPES, ["order.placed"]);
    assert_eq!(OrderPlaced::CONTENT_TYPE, "application/json");
    assert_eq!(placed.message_type(), "order.placed");
    assert_eq!(key(&placed).as_deref(), Some("42"));
    let payload = placed.encode().unwrap();
    assert_eq!(payload, br#"{"order_id":42,"total_cents":990}"#);
    assert_eq!(OrderPlaced::decode("order.placed", &payload).unwrap(), placed);
    let unknown = OrderPlaced::decode("order.gone", &payload)
        .unwrap_err()
        .to_string();
    assert!(
        unknown.contains("order.gone") && unknown.contains("order.placed"),
        "{unknown}"
    );
    assert!(OrderPlaced::decode("order.placed", b"{}").is_err());

    let call = OrderHTTPCallMade { r#type: "x".into() };
    assert_eq!(call.message_type(), "order_http_call_made");
    assert_eq!(call.encode().unwrap(), br#"{"type":"x"}"#);
    assert_eq!(key(&call), None);

    assert_eq!(Tick.message_type(), "tick");
    assert_eq!(Tick.encode().unwrap(), b"null");
    assert!(Tick::decode("tick", b"null").is_ok());

    assert_eq!(key(&Reading(0.5, "s1".into())).as_deref(), Some("s1"));
    assert_eq!(
        key(&Signed(OrderPlaced {
            order_id: 7,
            total_cents: 0
        }))
        .as_deref(),
        Some("7")
    );
    assert_eq!(
        key(&Optional {
            customer: Some("c".into())
        })
        .as_deref(),
        Some("c")
    );
    assert_eq!(key(&Optional { customer: None }), None);
    let customer = |id| Customer {
        id,
        name: "ann".into(),
    };
    assert_eq!(
        key(&Nested {
            customer: customer(Some(3))
        })
        .as_deref(),
        Some("3")
    );
    assert_eq!(
        key(&Nested {
            customer: customer(None)
        }),
        None
    );
    assert_eq!(
        key(&Called {
            customer: customer(None)
        })
        .as_deref(),
        Some("ANN")
    );
    assert_eq!(
        key(&Formatted {
            tenant: "acme".into(),
            order_id: 4
        })
        .as_deref(),
        Some("acme/4")
    );
    assert_eq!(key(&Sharded { order_id: 17 }).as_deref(), Some("1"));
    assert_eq!(key(&Constant { order_id: 1 }).as_deref(), Some("acme"));

    let generic = Generic {
        id: 1,
        content: vec![1, 2],
    };
    assert_eq!(key(&generic).as_deref(), Some("1"));
    assert_eq!(
        Generic::<Vec<u8>>::decode("generic", &generic.encode().unwrap())
            .unwrap()
            .content,
        [1, 2]
    );
}
