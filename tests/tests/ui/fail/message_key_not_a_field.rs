use postbox::Message;

#[derive(Message)]
#[message(topic = "orders", key = order)]
struct Struct {
    order_id: u64,
    total_cents: i64,
}

#[derive(Message)]
#[message(topic = "orders", key = customer.id)]
struct Path {
    order_id: u64,
}

#[derive(Message)]
#[message(topic = "orders", key = 2)]
struct Tuple(u64, u64);

#[derive(Message)]
#[message(topic = "orders", key = order_id)]
struct Unit;

#[derive(Message)]
#[message(topic = "orders", key = "order_id")]
struct Quoted {
    order_id: u64,
}

#[derive(Message)]
#[message(topic = "orders", key)]
struct NoValue {
    order_id: u64,
}

fn main() {}
