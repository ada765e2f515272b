//! The group `statistics`: how late each airline is to each destination, exactly once.

use postbox_consumer::{Delivery, HandlerError, State, Tx, handler};
use sqlx::FromRow;

use crate::event::FlightEvent;
use crate::latency::Latencies;

/// A row of the table; its figures for one event, too.
#[derive(Debug, Default, PartialEq, FromRow)]
pub(crate) struct Statistics {
    pub(crate) carrier: String,
    pub(crate) destination: String,
    pub(crate) departures: i64,
    /// Of all departures together, in minutes.
    pub(crate) departure_delay: i64,
    pub(crate) worst_departure_delay: Option<i32>,
    pub(crate) arrivals: i64,
    pub(crate) arrival_delay: i64,
    pub(crate) worst_arrival_delay: Option<i32>,
    pub(crate) cancellations: i64,
}

const ADD: &str = "INSERT INTO delay_statistics AS s VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) \
     ON CONFLICT (carrier, destination) DO UPDATE SET \
         departures = s.departures + excluded.departures, \
         departure_delay = s.departure_delay + excluded.departure_delay, \
         worst_departure_delay = greatest(s.worst_departure_delay, excluded.worst_departure_delay), \
         arrivals = s.arrivals + excluded.arrivals, \
         arrival_delay = s.arrival_delay + excluded.arrival_delay, \
         worst_arrival_delay = greatest(s.worst_arrival_delay, excluded.worst_arrival_delay), \
         cancellations = s.cancellations + excluded.cancellations";

/// What is written with the `Tx` commits together with the acknowledgement, so no event counts twice, whatever fails.
#[handler(group = "statistics", concurrency = 8)]
pub(crate) async fn count_delays(
    event: FlightEvent,
    delivery: Delivery,
    mut tx: Tx,
    State(latencies): State<Latencies>,
) -> Result<(), HandlerError> {
    let one = Statistics::of(event);
    sqlx::query(ADD)
        .bind(one.carrier)
        .bind(one.destination)
        .bind(one.departures)
        .bind(one.departure_delay)
        .bind(one.worst_departure_delay)
        .bind(one.arrivals)
        .bind(one.arrival_delay)
        .bind(one.worst_arrival_delay)
        .bind(one.cancellations)
        .execute(&mut *tx)
        .await?;
    latencies.note(&delivery);
    Ok(())
}

impl Statistics {
    fn of(event: FlightEvent) -> Self {
        match event {
            FlightEvent::Departed { leg, delay_minutes } => Self {
                carrier: leg.carrier,
                destination: leg.destination,
                departures: 1,
                departure_delay: delay_minutes.into(),
                worst_departure_delay: Some(delay_minutes),
                ..Self::default()
            },
            FlightEvent::Arrived { leg, delay_minutes } => Self {
                carrier: leg.carrier,
                destination: leg.destination,
                arrivals: 1,
                arrival_delay: delay_minutes.into(),
                worst_arrival_delay: Some(delay_minutes),
                ..Self::default()
            },
            FlightEvent::Cancelled { leg } => Self {
                carrier: leg.carrier,
                destination: leg.destination,
                cancellations: 1,
                ..Self::default()
            },
        }
    }
}
