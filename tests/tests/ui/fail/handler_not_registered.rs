#![deny(dead_code)]

use postbox_consumer::{Tx, handler};

#[handler(group = "search")]
async fn index(_tx: Tx) {}

fn main() {}
