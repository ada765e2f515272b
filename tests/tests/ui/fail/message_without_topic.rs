use postbox::Message;

#[derive(Message)]
struct WithoutAttribute {
    order_id: u64,
}

#[derive(Message)]
#[message(type = "order.placed")]
struct WithoutTopic {
    order_id: u64,
}

#[derive(Message)]
#[message(key = order_id)]
enum EnumWithoutTopic {
    Placed { order_id: u64 },
}

fn main() {}
