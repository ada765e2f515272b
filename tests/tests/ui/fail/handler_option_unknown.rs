use postbox_consumer::{Tx, handler};

#[handler(grup = "search")]
async fn misspelt(_tx: Tx) {}

#[handler(group = "search", group = "mail")]
async fn twice(_tx: Tx) {}

#[handler(group = "search", retry(attempts = 8))]
async fn misspelt_in_retry(_tx: Tx) {}

#[handler(group = "search", retry)]
async fn empty_retry(_tx: Tx) {}

#[handler(group = "search", type = "a", types = ["b"])]
async fn type_and_types(_tx: Tx) {}

#[handler(group = "search", types = "b")]
async fn types_without_brackets(_tx: Tx) {}

fn main() {}
