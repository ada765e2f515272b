use postbox::Message;

#[derive(Message)]
#[message(topic = "orders")]
enum Generic<T> {
    Placed(T),
}

#[derive(Message)]
#[message(topic = "orders")]
struct Borrows<'a> {
    customer: &'a str,
}

#[derive(Message)]
#[message(topic = "orders")]
enum Empty {}

#[derive(Message)]
#[message(topic = "orders")]
union Union {
    order_id: u64,
}

#[derive(Message)]
#[message(topic = "orders")]
enum CodecOnVariant {
    #[serde(with = "codec")]
    Placed { order_id: u64 },
}

fn main() {}
