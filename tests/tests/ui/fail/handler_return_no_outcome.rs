use postbox_consumer::handler;

#[handler(group = "search", topic = "orders")]
async fn index() -> u64 {
    0
}

fn main() {}
