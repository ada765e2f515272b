use postbox_consumer::handler;

#[handler(group = "search")]
fn not_async() {}

#[handler(group = "search")]
async fn generic<T: Send>(_message: T) {}

#[handler(group = "search")]
async fn lifetime<'a>() {}

#[handler(group = "search")]
async fn reference(_order: &String) {}

#[handler(group = "search")]
async fn unnamed(_order: impl Send) {}

#[handler(group = "search")]
async unsafe fn not_safe() {}

#[handler(group = "search")]
struct NoFunction;

struct Index;

impl Index {
    #[handler(group = "search")]
    async fn method(&self) {}
}

fn main() {}
