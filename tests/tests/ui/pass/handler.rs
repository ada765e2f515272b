//! `#[handler]` and `handlers![]` as the documentation shows them.

#![deny(warnings)]

use postbox::Message;
use postbox_consumer::{
    Batch, DeadLetter, Delivery, HandlerDefinition, HandlerError, State, Tx, handler, handlers,
};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders", type = "order.placed", key = order_id)]
pub struct OrderPlaced {
    order_id: u64,
}

#[derive(Clone)]
pub struct Stock(u64);

const LANES: u16 = 8;
const RATE: u32 = 200;

/// Documented and public.
#[handler(group = "inventory")]
pub async fn reserve_stock(
    order: OrderPlaced,
    mut _tx: Tx,
    State(stock): State<Stock>,
) -> Result<(), HandlerError> {
    if order.order_id > stock.0 {
        Err(HandlerError::discard("sold out"))
    } else {
        Ok(())
    }
}

#[handler(group = "search", batch = 500, batch_wait = "20ms")]
async fn index(orders: Batch<OrderPlaced>, _tx: Tx, _stock: State<Stock>) -> Result<(), HandlerError> {
    for order in &orders {
        assert!(order.message.order_id > 0 && order.delivery.attempt > 0);
    }
    Ok(())
}

mod mail {
    use super::{Delivery, OrderPlaced, handler};

    #[handler(
        group = "mail",
        topic = "orders",
        types = ["order.placed", "order.paid"],
        concurrency = 64,
        order = "topic",
        start = "latest",
        lanes = super::LANES,
        rate = super::RATE,
        instance_rate = 0.5,
        window = "22:00-06:00 Europe/Berlin",
        timeout = "20s",
        retry(backoff = "exponential(1s, 10m)"),
    )]
    pub(super) async fn send_receipt(_order: OrderPlaced, _delivery: Delivery) -> anyhow::Result<()> {
        Ok(())
    }
}

#[handler(broadcast)]
async fn refresh(_order: OrderPlaced) {}

#[handler(broadcast = "durable")]
async fn rebuild(_order: OrderPlaced) {}

#[handler(group = "ticks", topic = "ticks", type = "tick", retry(backoff = "fixed(5s)"))]
async fn tick() {}

mod support {
    use super::DeadLetter;

    pub async fn tell(letter: DeadLetter) {
        drop(letter);
    }
}

async fn log(letter: DeadLetter) -> std::io::Result<()> {
    std::fs::write("/dev/null", letter.payload)
}

const ATTEMPTS: u32 = 3;

#[handler(
    group = "halting",
    retry(max_attempts = 8, max_age = "1d", backoff = "exponential(1s, 10m)", exhausted = "halt"),
    on_dead_letter = support::tell
)]
async fn halting(_order: OrderPlaced) {}

#[handler(broadcast = "durable", retry(max_attempts = ATTEMPTS, exhausted = "skip"), on_dead_letter = log)]
async fn skipping(_order: OrderPlaced) {}

#[cfg(any())]
#[handler(group = "never")]
async fn conditional_above() {}

#[handler(group = "never")]
#[cfg(any())]
async fn conditional_below() {}

pub fn main() {
    #[handler(group = "local", retry(backoff = "linear(1s, 1m)"))]
    async fn local(_order: OrderPlaced) {}

    let definitions: Vec<HandlerDefinition> = handlers![
        reserve_stock,
        index,
        mail::send_receipt,
        refresh,
        rebuild,
        tick,
        halting,
        skipping,
        local,
    ];
    assert_eq!(definitions.len(), 9);
    assert!(handlers![].is_empty());
    // The function is still one.
    drop(refresh(OrderPlaced { order_id: 1 }));
}
