//! Messages of all kinds, and texts that have a meaning somewhere on their way.

use std::time::Duration;

use chrono::{DateTime, Utc};
use postbox::{DEFAULT_PAYLOAD_LIMIT, Outgoing};

pub(crate) const HOSTILE: [&str; 30] = [
    "",
    "NULL",
    "null",
    "\"",
    "\\",
    "\\\"",
    "\\\\",
    "\"NULL\"",
    "{}",
    "{a,b}",
    "}",
    ",",
    "a,b",
    "'",
    "'); DROP TABLE postbox.outbox; --",
    "$1",
    "?",
    "??",
    ":name",
    "%s",
    "🦀",
    "\n",
    "a\r\n\tb",
    " spaces around ",
    "\u{1}",
    "\u{feff}\u{2028}",
    "{\"a\": null}",
    "[null]",
    "\\u0000",
    "\\x00",
];

pub(crate) fn hostile(n: usize) -> &'static str {
    HOSTILE[n % HOSTILE.len()]
}

/// About the year.
pub(crate) fn at(year: i64) -> DateTime<Utc> {
    DateTime::from_timestamp((year - 1970) * 31_556_952, 123_456_789).expect("an instant")
}

/// What is said of it, and the same message each time.
pub(crate) type Named = (&'static str, fn() -> Outgoing);

pub(crate) const KINDS: [Named; 13] = [
    ("plain", || {
        Outgoing::json("orders", &serde_json::json!({"a": "🦀 '\"\\"}))
    }),
    ("everything plain", || {
        Outgoing::json("orders", &1)
            .key("it's; DROP TABLE \u{e9}")
            .message_type("order.placed")
            .header("tenant", "acme \"and\" \\ sons")
    }),
    ("an empty key", || Outgoing::json("orders", &1).key("")),
    ("bytes", || {
        Outgoing::bytes("thumbnails", "image/png", vec![0, 1, 0xff, b'\\'])
    }),
    ("nothing", || {
        Outgoing::bytes("thumbnails", "image/png", Vec::new())
    }),
    ("ordered", || Outgoing::json("orders", &1).key("k").ordered()),
    ("deduplicated", || {
        // Each is the first.
        Outgoing::json("orders", &1).dedup_key(postbox::MessageId::new().to_string())
    }),
    ("later", || {
        Outgoing::json("orders", &1).delay(Duration::from_secs(3600))
    }),
    ("at an instant", || {
        Outgoing::json("orders", &1).deliver_at(at(2100)).key("k")
    }),
    ("in the past", || {
        Outgoing::json("orders", &1).deliver_at(at(1900))
    }),
    ("far away", || Outgoing::json("orders", &1).deliver_at(at(12_000))),
    ("with an end", || {
        Outgoing::json("orders", &1).expires_at(at(2100))
    }),
    ("later, with an end", || {
        Outgoing::json("orders", &1)
            .delay(Duration::from_secs(60))
            .expires_in(Duration::from_micros(1_500_001))
    }),
];

/// All kinds of plain ones.
pub(crate) fn mixed(n: usize) -> Outgoing {
    let payload = format!("{n}\0\\{}", hostile(n)).into_bytes();
    let mut message = match n % 3 {
        0 => Outgoing::json("carts", &serde_json::json!({"n": n, "text": hostile(n)})),
        1 => Outgoing::bytes("orders", "text/plain; a=\"b,{c}\\\"", payload),
        _ => Outgoing::bytes("thumbnails", "NULL", payload),
    };
    if !n.is_multiple_of(4) {
        message = message.key(hostile(n));
    }
    if n.is_multiple_of(5) {
        message = message
            .header("tenant", hostile(n))
            .header("NULL", hostile(n / 5));
    }
    if n.is_multiple_of(7) {
        message = message.message_type("null");
    }
    message
}

/// The same with special ones among them; a dedup key is of this run.
pub(crate) fn mixed_and_special(n: usize, run: &str) -> Outgoing {
    let message = mixed(n);
    match n % 9 {
        0 => message.delay(Duration::from_secs(3600)),
        1 => message.dedup_key(format!("{run} {n} {}", hostile(n))),
        2 => message.expires_in(Duration::from_micros(3_600_000_001)),
        3 => message.deliver_at(at(2100)).expires_at(at(2101)),
        4 => message
            .dedup_key(format!("{run} {n}"))
            .dedup_window(Duration::from_millis(1_500)),
        5 => message.key(hostile(n)).ordered(),
        _ => message,
    }
}

/// What is refused, and what the error says.
pub(crate) fn refused() -> Vec<(Outgoing, &'static str)> {
    let ok = || Outgoing::json("t", &1);
    vec![
        (ok().topic(""), "topic \"\""),
        (ok().topic("t".repeat(256)), "topic"),
        (ok().topic("a b"), "topic \"a b\""),
        (ok().topic("ä"), "topic"),
        (ok().message_type(""), "type \"\""),
        (ok().message_type("a,b"), "type \"a,b\""),
        (ok().key("k".repeat(1_025)), "1025 bytes"),
        (ok().key("a\0b"), "the key contains"),
        (ok().header("a b", ""), "header name \"a b\""),
        (ok().header("", ""), "header name \"\""),
        (ok().header("postbox-x", ""), "reserved"),
        (ok().header("a", "\0"), "the headers contains"),
        (ok().header("a", "v".repeat(postbox::MAX_HEADERS)), "16,384"),
        (Outgoing::bytes("t", "", vec![]), "content type"),
        (Outgoing::bytes("t", "a\nb", vec![]), "content type"),
        (
            Outgoing::bytes("t", "a/b", vec![0; DEFAULT_PAYLOAD_LIMIT + 1]),
            "1048577 bytes",
        ),
        (ok().dedup_key(""), "deduplication key has 0 bytes"),
        (ok().dedup_key("a\0"), "deduplication key contains"),
        (ok().dedup_key("a").dedup_window(Duration::ZERO), "window"),
        (ok().dedup_window(Duration::from_secs(1)), "dedup"),
        (ok().delay(Duration::MAX), "10,000 years"),
        (ok().expires_in(Duration::ZERO), "more than zero"),
        (ok().expires_in(Duration::MAX), "10,000 years"),
    ]
}
