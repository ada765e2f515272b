use postbox_consumer::{HandlerError, handler};

struct Settings;

#[handler(group = "search", topic = "orders")]
async fn index(_settings: Settings) -> Result<(), HandlerError> {
    Ok(())
}

fn main() {}
