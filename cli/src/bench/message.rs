//! The messages that benches publish.

use postbox::{JSON, Outgoing};

/// About what an order's event is.
pub(crate) const PAYLOAD: &[u8] =
    br#"{"order_id":"0190163d-8694-739b-aea5-966c26f8ad91","total_cents":1999,"currency":"EUR"}"#;

pub(crate) const KEYS: u64 = 1000;

pub(crate) fn key(n: u64) -> String {
    (n % KEYS).to_string()
}

pub(crate) fn message(topic: &str, n: u64) -> Outgoing {
    keyed(topic, key(n))
}

pub(crate) fn keyed(topic: &str, key: String) -> Outgoing {
    Outgoing::bytes(topic.to_owned(), JSON, PAYLOAD).key(key)
}

/// Without a key, with its number as its payload.
pub(crate) fn numbered(topic: &str, n: u64) -> Outgoing {
    Outgoing::json(topic.to_owned(), &n)
}

pub(crate) fn number(payload: &[u8]) -> Option<usize> {
    std::str::from_utf8(payload).ok()?.parse().ok()
}
