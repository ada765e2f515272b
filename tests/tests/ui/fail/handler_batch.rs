use postbox_consumer::{Batch, BatchResult, Delivery, Failures, Raw, Settlement, Tx, handler};

#[handler(group = "search", topic = "orders")]
async fn without_a_size(_orders: Batch<Raw>) {}

#[handler(group = "search", topic = "orders", batch = 500)]
async fn without_a_batch(_order: Raw) {}

#[handler(group = "search", topic = "orders", batch_wait = "20ms")]
async fn wait_without_a_batch(_order: Raw) {}

#[handler(group = "search", topic = "orders", batch = 500)]
async fn two_batches(_orders: Batch<Raw>, _more: Batch<Raw>) {}

#[handler(group = "search", topic = "orders", batch = 500)]
async fn with_a_delivery(_orders: Batch<Raw>, _delivery: Delivery, _tx: Tx) {}

#[handler(group = "search", topic = "orders", batch = 0)]
async fn none_at_once(_orders: Batch<Raw>) {}

#[handler(group = "search", topic = "orders", batch = 500)]
async fn partly_in_a_transaction(_orders: Batch<Raw>, _tx: Tx) -> BatchResult {
    Ok(Failures::none())
}

#[handler(group = "search", topic = "orders", batch = 500)]
async fn partly_settled(_orders: Batch<Raw>, _settlement: Settlement) -> BatchResult {
    Ok(Failures::none())
}

#[handler(group = "search", topic = "orders")]
async fn settled_twice(_order: Raw, _tx: Tx, _settlement: Settlement) {}

#[handler(group = "search", topic = "orders")]
async fn partly_of_one(_order: Raw) -> BatchResult {
    Ok(Failures::none())
}

fn main() {}
