//! The flights that were to leave New York in January 2013, and what became of each; see data/README.md.

use std::sync::Arc;

use anyhow::{Context, Result};
use chrono::{DateTime, TimeDelta, Utc};
use flate2::read::GzDecoder;
use serde::{Deserialize, Deserializer};

const RECORDS: &[u8] = include_bytes!("data/flights-2013-01.csv.gz");

/// A flight of the schedule.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) id: i32,
    pub(crate) carrier: String,
    pub(crate) number: i32,
    pub(crate) origin: String,
    pub(crate) destination: String,
    /// Tail number. Some flights were cancelled before they had an aircraft.
    pub(crate) aircraft: Option<String>,
    pub(crate) scheduled_at: DateTime<Utc>,
}

/// Something that happened to a flight.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) at: DateTime<Utc>,
    pub(crate) flight: Arc<Flight>,
    pub(crate) what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Departed { delay_minutes: i32 },
    Arrived { delay_minutes: i32 },
    Cancelled,
}

/// A month of flights, with everything that happened to them in the order of time.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) flights: Vec<Arc<Flight>>,
    pub(crate) changes: Vec<Change>,
}

impl History {
    /// The month that comes with this example.
    pub(crate) fn january() -> Result<Self> {
        Self::of_first(usize::MAX)
    }

    /// Its first flights only.
    pub(crate) fn of_first(flights: usize) -> Result<Self> {
        let mut history = Self::default();
        let records = csv::Reader::from_reader(GzDecoder::new(RECORDS)).into_deserialize();
        for (n, record) in records.take(flights).enumerate() {
            let record: Record = record.context("read the flights")?;
            let changes = record.changes();
            let flight = Arc::new(record.into_flight(n as i32));
            history.changes.extend(changes.map(|(at, what)| Change {
                at,
                flight: flight.clone(),
                what,
            }));
            history.flights.push(flight);
        }
        // A stable sort: a flight's changes keep their order.
        history.changes.sort_by_key(|change| change.at);
        Ok(history)
    }
}

/// A line of the file. The other columns follow from these.
#[derive(Debug, Deserialize)]
struct Record {
    carrier: String,
    flight: i32,
    #[serde(deserialize_with = "known")]
    tailnum: Option<String>,
    origin: String,
    dest: String,
    /// Date and hour of the scheduled departure.
    time_hour: DateTime<Utc>,
    minute: u32,
    #[serde(deserialize_with = "known")]
    dep_time: Option<Clock>,
    #[serde(deserialize_with = "known")]
    dep_delay: Option<i32>,
    #[serde(deserialize_with = "known")]
    arr_time: Option<Clock>,
    #[serde(deserialize_with = "known")]
    arr_delay: Option<i32>,
    #[serde(deserialize_with = "known")]
    air_time: Option<i32>,
}

impl Record {
    fn scheduled_at(&self) -> DateTime<Utc> {
        self.time_hour + TimeDelta::minutes(self.minute.into())
    }

    /// What happened, with its time.
    fn changes(&self) -> impl Iterator<Item = (DateTime<Utc>, What)> + use<> {
        let Some(departed) = self.departure() else {
            return [Some((self.scheduled_at(), What::Cancelled)), None]
                .into_iter()
                .flatten();
        };
        [Some(departed), self.arrival(departed.0)].into_iter().flatten()
    }

    /// The delay says on which day it was: some depart after midnight, one a day late.
    fn departure(&self) -> Option<(DateTime<Utc>, What)> {
        let delay_minutes = self.dep_delay?;
        let at = self.scheduled_at() + TimeDelta::minutes(delay_minutes.into());
        Some((at, What::Departed { delay_minutes }))
    }

    /// A flight that was diverted has no delay and no time in the air: it departs and does not arrive.
    fn arrival(&self, departed_at: DateTime<Utc>) -> Option<(DateTime<Utc>, What)> {
        let delay_minutes = self.arr_delay?;
        let journey = journey(self.dep_time?, self.arr_time?, self.air_time?);
        Some((departed_at + journey, What::Arrived { delay_minutes }))
    }

    fn into_flight(self, id: i32) -> Flight {
        Flight {
            id,
            scheduled_at: self.scheduled_at(),
            carrier: self.carrier,
            number: self.flight,
            origin: self.origin,
            destination: self.dest,
            aircraft: self.tailnum,
        }
    }
}

/// How long it took from gate to gate. The arrival is on the destination's clock and has no date; but clocks differ by whole
/// hours, so the minutes are right, and taxiing, which is what a journey has beside its time in the air, takes less than an hour.
fn journey(departure: Clock, arrival: Clock, air_minutes: i32) -> TimeDelta {
    let taxiing = (arrival.minutes() - departure.minutes() - air_minutes).rem_euclid(60);
    TimeDelta::minutes((air_minutes + taxiing).into())
}

/// A time of day as the file writes it: 517 is 5:17, 2400 is midnight.
#[derive(Debug, Clone, Copy)]
struct Clock(i32);

impl Clock {
    fn minutes(self) -> i32 {
        self.0 / 100 * 60 + self.0 % 100
    }
}

/// `NA`, or nothing, is a value that nobody knows.
fn known<'de, D, T>(field: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: std::str::FromStr<Err: std::fmt::Display>,
{
    match <&str>::deserialize(field)? {
        "" | "NA" => Ok(None),
        text => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

impl std::str::FromStr for Clock {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minutes(departure: i32, arrival: i32, air: i32) -> i64 {
        journey(Clock(departure), Clock(arrival), air).num_minutes()
    }

    #[test]
    fn a_journey_is_its_time_in_the_air_and_less_than_an_hour_of_taxiing() {
        assert_eq!(minutes(517, 700, 80), 103, "in the same zone");
        assert_eq!(
            minutes(900, 1220, 350),
            380,
            "three hours west, by local clocks 3:20"
        );
        assert_eq!(minutes(1000, 1540, 230), 280, "one hour east");
    }

    #[test]
    fn a_journey_over_midnight_ends_on_the_next_day() {
        assert_eq!(minutes(2330, 105, 70), 95);
        assert_eq!(minutes(2359, 440, 190), 221);
        assert_eq!(minutes(2300, 2400, 40), 60, "arrives at 24:00");
        assert_eq!(minutes(2400, 100, 45), 60, "departs at 24:00");
    }

    #[test]
    fn the_month_has_every_change_in_the_order_of_time() {
        let history = History::january().unwrap();
        assert_eq!(history.flights.len(), 27_004);
        let count = |wanted: fn(&What) -> bool| {
            history
                .changes
                .iter()
                .filter(|change| wanted(&change.what))
                .count()
        };
        assert_eq!(count(|what| *what == What::Cancelled), 521);
        assert_eq!(count(|what| matches!(what, What::Departed { .. })), 26_483);
        assert_eq!(
            count(|what| matches!(what, What::Arrived { .. })),
            26_398,
            "85 were diverted"
        );
        assert!(history.changes.is_sorted_by_key(|change| change.at));
    }
}
