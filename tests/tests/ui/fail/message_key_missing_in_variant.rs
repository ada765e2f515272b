use postbox::Message;

#[derive(Message)]
#[message(topic = "orders", key = order_id)]
enum LacksTheField {
    Placed { order_id: u64 },
    Paid { invoice: u64 },
}

#[derive(Message)]
#[message(topic = "orders", key = order_id)]
enum HasNoFields {
    Placed { order_id: u64 },
    DayClosed,
}

#[derive(Message)]
#[message(topic = "orders", key = order_id)]
enum IsATuple {
    Placed { order_id: u64 },
    Moved(u64, String),
}

fn main() {}
