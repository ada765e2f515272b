use postbox::Message;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Paid {
    invoice: u64,
}

#[derive(Message)]
#[message(topic = "orders", key = order_id)]
enum Order {
    Placed { order_id: u64 },
    Paid(Paid),
}

fn main() {}
