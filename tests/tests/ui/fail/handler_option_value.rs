use postbox_consumer::{Tx, handler};

#[handler(group = "our search")]
async fn group_alphabet(_tx: Tx) {}

#[handler(group = "search", topic = "")]
async fn topic_alphabet(_tx: Tx) {}

#[handler(group = search)]
async fn group_without_quotes(_tx: Tx) {}

#[handler(group = "search", timeout = "20")]
async fn duration_without_unit(_tx: Tx) {}

#[handler(group = "search", timeout = "1h30m")]
async fn two_units(_tx: Tx) {}

#[handler(group = "search", timeout = "0s")]
async fn no_time(_tx: Tx) {}

#[handler(group = "search", timeout = 20)]
async fn timeout_as_number(_tx: Tx) {}

#[handler(group = "search", retry(backoff = "exponential(1s)"))]
async fn backoff_without_cap(_tx: Tx) {}

#[handler(group = "search", retry(backoff = "fixed(5sec)"))]
async fn backoff_duration(_tx: Tx) {}

#[handler(group = "search", retry(backoff = "linear(2m, 1m)"))]
async fn backoff_cap(_tx: Tx) {}

#[handler(group = "search", retry(max_attempts = 0))]
async fn max_attempts(_tx: Tx) {}

#[handler(group = "search", retry(max_age = "1 day"))]
async fn max_age(_tx: Tx) {}

#[handler(group = "search", retry(exhausted = "stop"))]
async fn exhausted(_tx: Tx) {}

#[handler(group = "search", retry(attempts = 3))]
async fn retry_option(_tx: Tx) {}

#[handler(group = "search", retry)]
async fn retry_alone(_tx: Tx) {}

#[handler(group = "search", order = "keys")]
async fn order(_tx: Tx) {}

#[handler(group = "search", start = "first")]
async fn start(_tx: Tx) {}

#[handler(broadcast = "lasting")]
async fn broadcast(_tx: Tx) {}

#[handler(group = "search", concurrency = 0)]
async fn concurrency(_tx: Tx) {}

#[handler(group = "search", on_dead_letter = "tell")]
async fn on_dead_letter(_tx: Tx) {}

#[handler(broadcast, on_dead_letter = tell)]
async fn dead_letters_of_a_broadcast(_tx: Tx) {}

#[handler(group = "search", lanes = "8")]
async fn lanes(_tx: Tx) {}

#[handler(group = "search", rate = 0)]
async fn rate(_tx: Tx) {}

#[handler(group = "search", instance_rate = "50")]
async fn instance_rate(_tx: Tx) {}

#[handler(group = "search", window = 22)]
async fn window(_tx: Tx) {}

#[handler(broadcast, window = "22:00-06:00")]
async fn window_of_a_broadcast() {}

fn main() {}
