//! Two hundred tests as a service has them, to see how long they take together. By hand, since they show nothing else:
//!
//! ```sh
//! time cargo nextest run --workspace --test kit_speed --run-ignored all
//! time cargo test --workspace --test kit_speed -- --ignored
//! ```
#![allow(unreachable_pub, clippy::unwrap_used)]

#[path = "kit/messages.rs"]
#[allow(dead_code)]
mod messages;

use postbox_consumer::handlers;
use postbox_testkit::{Kit, Span};

use messages::{OrderShipped, ship, shipped};

/// A handler in a transaction that fails once, a retry that is due when the clock has moved, and what it published.
async fn a_paid_order_is_shipped_once(kit: Kit) {
    kit.consumer(handlers![ship]).start().await;
    kit.fail_once(ship);
    kit.publish(&messages::paid(42)).await;
    kit.settled().await;
    assert_eq!(kit.published::<OrderShipped>().await, []);
    kit.advance(1.hours()).await;
    kit.settled().await;
    assert_eq!(kit.published::<OrderShipped>().await, [shipped(42)]);
}

macro_rules! tests {
    ($($name:ident)*) => {
        $(
            #[postbox_testkit::test]
            #[ignore = "for its time"]
            async fn $name(kit: Kit) {
                super::a_paid_order_is_shipped_once(kit).await;
            }
        )*
    };
}

macro_rules! suites {
    ($($suite:ident)*) => {
        $(
            mod $suite {
                use super::Kit;

                tests!(t0 t1 t2 t3 t4 t5 t6 t7 t8 t9);
            }
        )*
    };
}

suites!(s00 s01 s02 s03 s04 s05 s06 s07 s08 s09 s10 s11 s12 s13 s14 s15 s16 s17 s18 s19);
