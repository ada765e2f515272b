use postbox::{Message, Publish};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders")]
struct OrderPlaced {
    order_id: u64,
}

async fn on_a_pool(mut pool: sqlx::PgPool) {
    pool.publish(&OrderPlaced { order_id: 1 }).await.unwrap();
}

fn main() {}
