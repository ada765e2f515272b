use postbox::Message;

#[derive(Message)]
#[message(topic = "orders")]
struct OrderPlaced {
    order_id: u64,
}

fn main() {}
