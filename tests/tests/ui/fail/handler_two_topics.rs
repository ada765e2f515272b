use postbox::Message;
use postbox_consumer::handler;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders")]
pub struct OrderPlaced {
    order_id: u64,
}

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "payments")]
pub struct PaymentTaken {
    order_id: u64,
}

#[handler(group = "both")]
async fn both(_order: OrderPlaced, _payment: PaymentTaken) {}

fn main() {}
