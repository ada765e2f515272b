//! The group `sequence`: every aircraft's events come in their order.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use postbox_consumer::{Delivery, State, handler};

use crate::event::FlightEvent;
use crate::latency::Latencies;

/// Which event of each aircraft came last. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sequence {
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// By tail number.
    pub(crate) last: HashMap<String, i32>,
    /// Events that were not the next one of their aircraft.
    pub(crate) violations: Vec<String>,
}

impl Sequence {
    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[handler(group = "sequence")]
pub(crate) async fn check_order(
    event: FlightEvent,
    delivery: Delivery,
    State(sequence): State<Sequence>,
    State(latencies): State<Latencies>,
) {
    latencies.note(&delivery);
    let leg = event.leg();
    // Without an aircraft there is no key, and no order.
    let (Some(aircraft), Some(nth)) = (&leg.aircraft, leg.nth) else {
        return;
    };
    let mut seen = sequence.seen();
    let last = seen.last.entry(aircraft.clone()).or_default();
    let next = *last + 1;
    *last = nth;
    if nth != next {
        seen.violations.push(format!(
            "aircraft {aircraft}: event {nth} came where {next} was due"
        ));
    }
}
