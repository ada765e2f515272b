//! `cargo bench -p postbox`: what publishing costs before the database is asked.

use postbox::{MessageId, Outgoing};
use serde::Serialize;

fn main() {
    divan::main();
}

#[derive(Serialize)]
struct Order<'a> {
    order_id: i64,
    customer: &'a str,
    total_cents: i64,
}

const ORDER: Order<'_> = Order {
    order_id: 42,
    customer: "0190163d-8694-739b-aea5-966c26f8ad91",
    total_cents: 1999,
};

#[divan::bench]
fn json_message() -> Outgoing {
    Outgoing::json("orders", divan::black_box(&ORDER)).key("42")
}

#[divan::bench]
fn message_with_headers() -> Outgoing {
    Outgoing::json("orders", divan::black_box(&ORDER))
        .key("42")
        .header("tenant", "acme")
        .header(
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        )
}

#[divan::bench]
fn message_id() -> MessageId {
    MessageId::new()
}
