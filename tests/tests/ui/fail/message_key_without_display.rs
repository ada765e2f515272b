use postbox::Message;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct OrderId(u64);

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders", key = order_id)]
struct OrderPlaced {
    order_id: OrderId,
}

fn main() {}
