//! Messages and handlers that the tests share, and what the handlers did.

use std::sync::{Arc, Mutex};

use postbox::{Message, Publish};
use postbox_consumer::{Delivery, HandlerError, State, Tx, handler};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Message)]
#[message(topic = "orders", type = "order.paid", key = order_id)]
pub struct OrderPaid {
    pub order_id: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Message)]
#[message(topic = "shipments", type = "order.shipped", key = order_id)]
pub struct OrderShipped {
    pub order_id: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Message)]
#[message(topic = "reminders", type = "reminder", key = order_id)]
pub struct Reminder {
    pub order_id: i64,
}

pub fn paid(order_id: i64) -> OrderPaid {
    OrderPaid { order_id }
}

pub fn shipped(order_id: i64) -> OrderShipped {
    OrderShipped { order_id }
}

/// What handlers did, in its order.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub fn note(&self, what: impl ToString) {
        self.0.lock().unwrap().push(what.to_string());
    }

    pub fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

/// Publishes in the transaction in which it settles.
#[handler(group = "shipping")]
pub async fn ship(order: OrderPaid, mut tx: Tx) -> Result<(), HandlerError> {
    tx.publish(&shipped(order.order_id)).await?;
    Ok(())
}

/// Notes what it got.
#[handler(group = "mail")]
pub async fn mail(order: OrderShipped, State(log): State<Log>) {
    log.note(format!("shipped {}", order.order_id));
}

/// Notes each attempt.
#[handler(group = "audit")]
pub async fn audit(order: OrderPaid, delivery: Delivery, State(log): State<Log>) {
    log.note(format!("order {} attempt {}", order.order_id, delivery.attempt));
}

/// Never succeeds.
#[handler(group = "broken")]
pub async fn broken(order: OrderPaid) -> Result<(), HandlerError> {
    Err(HandlerError::retry(format!("no stock for {}", order.order_id)))
}
