//! What the airline tells the world.

use postbox::Message;
use serde::{Deserialize, Serialize};

/// An event of a flight. Its key is the aircraft's tail number, so an aircraft's events are handled in their order, while
/// those of different aircraft run beside each other.
#[derive(Debug, Message)]
#[message(topic = "flights", key = leg.aircraft)]
pub(crate) enum FlightEvent {
    #[message(type = "flight.departed")]
    Departed { leg: Leg, delay_minutes: i32 },
    #[message(type = "flight.arrived")]
    Arrived { leg: Leg, delay_minutes: i32 },
    #[message(type = "flight.cancelled")]
    Cancelled { leg: Leg },
}

/// Which flight, and with which aircraft.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Leg {
    pub(crate) flight: i32,
    pub(crate) carrier: String,
    pub(crate) origin: String,
    pub(crate) destination: String,
    /// Tail number; a flight that was cancelled early may have none, and then its event has no key.
    pub(crate) aircraft: Option<String>,
    /// The how-manieth event of the aircraft this is, from 1.
    pub(crate) nth: Option<i32>,
}

impl FlightEvent {
    pub(crate) fn leg(&self) -> &Leg {
        match self {
            Self::Departed { leg, .. } | Self::Arrived { leg, .. } | Self::Cancelled { leg } => leg,
        }
    }
}
