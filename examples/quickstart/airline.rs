//! The airline's service: it changes its tables, and says so, in one transaction.

use std::sync::Arc;

use anyhow::Result;
use postbox::Publish;
use sqlx::PgPool;

use crate::event::{FlightEvent, Leg};
use crate::flight::{Change, Flight, What};

#[derive(Debug, Clone)]
pub(crate) struct Airline {
    pool: PgPool,
}

/// Counts the event for the aircraft, if the flight has one. The row's lock is held to the commit, so the numbers of an
/// aircraft's events are in the order of their transactions.
const DEPART: &str = "WITH flight AS ( \
         UPDATE flight SET state = 'departed', departed_at = $2, departure_delay = $3 WHERE id = $1 RETURNING aircraft) \
     UPDATE aircraft SET events = events + 1 FROM flight WHERE tail_number = flight.aircraft RETURNING events";

const ARRIVE: &str = "WITH flight AS ( \
         UPDATE flight SET state = 'arrived', arrived_at = $2, arrival_delay = $3 WHERE id = $1 RETURNING aircraft) \
     UPDATE aircraft SET events = events + 1 FROM flight WHERE tail_number = flight.aircraft RETURNING events";

const CANCEL: &str = "WITH flight AS (UPDATE flight SET state = 'cancelled' WHERE id = $1 RETURNING aircraft) \
     UPDATE aircraft SET events = events + 1 FROM flight WHERE tail_number = flight.aircraft RETURNING events";

impl Airline {
    pub(crate) fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    /// Records what happened to a flight, and publishes it: both, or neither.
    pub(crate) async fn record(&self, change: &Change) -> Result<()> {
        let Change { at, flight, what } = change;
        let mut tx = self.pool.begin().await?;

        let update = match *what {
            What::Departed { delay_minutes } => sqlx::query_scalar(DEPART)
                .bind(flight.id)
                .bind(at)
                .bind(delay_minutes),
            What::Arrived { delay_minutes } => sqlx::query_scalar(ARRIVE)
                .bind(flight.id)
                .bind(at)
                .bind(delay_minutes),
            What::Cancelled => sqlx::query_scalar(CANCEL).bind(flight.id),
        };
        let nth = update.fetch_optional(&mut *tx).await?;
        tx.publish(&event(flight, *what, nth)).await?;
        tx.commit().await?;
        Ok(())
    }

    /// Makes the tables and fills in the schedule.
    pub(crate) async fn open(&self, flights: &[Arc<Flight>]) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        sqlx::raw_sql(include_str!("schema.sql"))
            .execute(&mut *tx)
            .await?;
        let aircraft: Vec<Option<&str>> = flights.iter().map(|flight| flight.aircraft.as_deref()).collect();
        sqlx::query("INSERT INTO aircraft SELECT DISTINCT a FROM unnest($1::text[]) a WHERE a IS NOT NULL")
            .bind(&aircraft)
            .execute(&mut *tx)
            .await?;
        sqlx::query(
            "INSERT INTO flight (id, carrier, number, aircraft, origin, destination, scheduled_at) \
             SELECT * FROM unnest($1::int[], $2::text[], $3::int[], $4::text[], $5::text[], $6::text[], $7::timestamptz[])",
        )
        .bind(flights.iter().map(|flight| flight.id).collect::<Vec<_>>())
        .bind(flights.iter().map(|flight| flight.carrier.as_str()).collect::<Vec<_>>())
        .bind(flights.iter().map(|flight| flight.number).collect::<Vec<_>>())
        .bind(aircraft)
        .bind(flights.iter().map(|flight| flight.origin.as_str()).collect::<Vec<_>>())
        .bind(flights.iter().map(|flight| flight.destination.as_str()).collect::<Vec<_>>())
        .bind(flights.iter().map(|flight| flight.scheduled_at).collect::<Vec<_>>())
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(())
    }
}

fn event(flight: &Flight, what: What, nth: Option<i32>) -> FlightEvent {
    let leg = Leg {
        flight: flight.id,
        carrier: flight.carrier.clone(),
        origin: flight.origin.clone(),
        destination: flight.destination.clone(),
        aircraft: flight.aircraft.clone(),
        nth,
    };
    match what {
        What::Departed { delay_minutes } => FlightEvent::Departed { leg, delay_minutes },
        What::Arrived { delay_minutes } => FlightEvent::Arrived { leg, delay_minutes },
        What::Cancelled => FlightEvent::Cancelled { leg },
    }
}
