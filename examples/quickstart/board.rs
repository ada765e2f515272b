//! The departure board: a broadcast, so every node has its own and all show the same.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use postbox_consumer::{Delivery, State, handler};

use crate::event::FlightEvent;
use crate::latency::Latencies;

/// The last known state of each flight. Clones are the same board.
#[derive(Debug, Clone, Default)]
pub(crate) struct Board {
    states: Arc<Mutex<BTreeMap<i32, String>>>,
}

impl Board {
    pub(crate) fn states(&self) -> MutexGuard<'_, BTreeMap<i32, String>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[handler(broadcast)]
pub(crate) async fn refresh_board(
    event: FlightEvent,
    delivery: Delivery,
    State(board): State<Board>,
    State(latencies): State<Latencies>,
) {
    latencies.note(&delivery);
    let state = match event {
        FlightEvent::Departed { .. } => "departed",
        FlightEvent::Arrived { .. } => "arrived",
        FlightEvent::Cancelled { .. } => "cancelled",
    };
    board.states().insert(event.leg().flight, state.to_owned());
}
