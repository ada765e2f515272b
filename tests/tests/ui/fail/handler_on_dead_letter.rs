use postbox::Message;
use postbox_consumer::{DeadLetter, handler};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders")]
pub struct OrderPlaced {
    order_id: u64,
}

async fn takes_something_else(_order: u64) {}

async fn returns_something_else(_letter: DeadLetter) -> u64 {
    7
}

#[handler(group = "search", on_dead_letter = takes_something_else)]
async fn wrong_argument(_order: OrderPlaced) {}

#[handler(group = "search", on_dead_letter = returns_something_else)]
async fn wrong_return(_order: OrderPlaced) {}

#[handler(group = "search", on_dead_letter = not_there)]
async fn not_there(_order: OrderPlaced) {}

fn main() {}
