use postbox::Message;

#[derive(Message)]
#[message(topik = "orders")]
struct Misspelt;

#[derive(Message)]
#[message(topic = "orders", topic = "orders")]
struct Twice;

#[derive(Message)]
#[message(topic = "orders")]
#[message(type = "order.placed")]
struct TwoAttributes;

#[derive(Message)]
#[message(topic = "orders", type = "order.placed")]
enum TypeOnEnum {
    Placed,
}

#[derive(Message)]
#[message(topic = "orders")]
enum TopicOnVariant {
    #[message(topic = "parcels")]
    Placed,
}

#[derive(Message)]
#[message(topic = "orders")]
struct OnField {
    #[message(key)]
    order_id: u64,
}

#[derive(Message)]
#[message(topic = orders)]
struct NoString;

#[derive(Message)]
#[message(topic)]
struct NoValue;

fn main() {}
