use postbox_consumer::{Tx, handler};

#[handler]
async fn no_options(_tx: Tx) {}

#[handler(concurrency = 8)]
async fn no_group(_tx: Tx) {}

#[handler(group = "search", broadcast)]
async fn both(_tx: Tx) {}

fn main() {}
