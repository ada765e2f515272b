use postbox::Message;

#[derive(Message)]
#[message(topic = "orders")]
enum Explicit {
    #[message(type = "order.placed")]
    Placed,
    #[message(type = "order.placed")]
    PlacedAgain,
}

#[derive(Message)]
#[message(topic = "orders")]
enum Implied {
    #[message(type = "paid")]
    WasPaid,
    Paid,
}

fn main() {}
