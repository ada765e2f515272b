//! Holds what the consumers made of the events against what the airline's tables say.

use std::collections::BTreeMap;
use std::fmt::{self, Debug, Display};

use anyhow::Result;
use sqlx::PgPool;

use crate::board::Board;
use crate::report::thousands;
use crate::sequence::Sequence;
use crate::statistics::Statistics;

/// Something that was compared, and how it came out.
#[derive(Debug)]
pub(crate) struct Check {
    pub(crate) what: String,
    /// The first difference, if there is any.
    pub(crate) difference: Option<String>,
}

const CHANGES: &str = "SELECT count(departed_at) + count(arrived_at) + count(*) FILTER (WHERE state = 'cancelled') FROM flight";

const STATISTICS: &str = "SELECT * FROM carrier_statistics";

const STATISTICS_OF_FLIGHTS: &str = "SELECT carrier, \
         count(departed_at) AS departures, coalesce(sum(departure_delay), 0) AS departure_delay, \
         max(departure_delay) AS worst_departure_delay, \
         count(arrived_at) AS arrivals, coalesce(sum(arrival_delay), 0) AS arrival_delay, \
         max(arrival_delay) AS worst_arrival_delay, \
         count(*) FILTER (WHERE state = 'cancelled') AS cancellations \
     FROM flight WHERE state <> 'scheduled' GROUP BY carrier";

const EVENTS_OF_AIRCRAFT: &str = "SELECT tail_number, events FROM aircraft WHERE events > 0";

const STATES: &str = "SELECT id, state FROM flight WHERE state <> 'scheduled'";

/// One event for every change in the tables.
pub(crate) async fn events(pool: &PgPool, published: u64) -> Result<Check> {
    let changes: i64 = sqlx::query_scalar(CHANGES).fetch_one(pool).await?;
    let difference = (changes as u64 != published)
        .then(|| format!("{published} events were published for {changes} changes"));
    Ok(Check { what: format!("events: one for each of {} changes of a flight", thousands(published)), difference })
}

/// The statistics are what a query over all flights says: no event was lost, and none counted twice.
pub(crate) async fn statistics(pool: &PgPool) -> Result<Check> {
    let kept: Vec<Statistics> = sqlx::query_as(STATISTICS).fetch_all(pool).await?;
    let expected: Vec<Statistics> = sqlx::query_as(STATISTICS_OF_FLIGHTS).fetch_all(pool).await?;
    let by_carrier = |all: Vec<Statistics>| all.into_iter().map(|one| (one.carrier.clone(), one)).collect();
    let (kept, expected): (BTreeMap<_, _>, BTreeMap<_, _>) = (by_carrier(kept), by_carrier(expected));
    Ok(Check {
        what: format!("statistics: the figures of {} carriers are those of a GROUP BY over all flights", expected.len()),
        difference: difference("carrier", &kept, &expected),
    })
}

/// Every aircraft's events came, one after another.
pub(crate) async fn sequence(pool: &PgPool, sequence: &Sequence) -> Result<Check> {
    let expected: Vec<(String, i32)> = sqlx::query_as(EVENTS_OF_AIRCRAFT).fetch_all(pool).await?;
    let expected: BTreeMap<String, i32> = expected.into_iter().collect();
    let seen = sequence.seen();
    let last = seen.last.iter().map(|(aircraft, nth)| (aircraft.clone(), *nth)).collect();
    let violation = seen.violations.first().map(|first| format!("{} violations; {first}", seen.violations.len()));
    Ok(Check {
        what: format!(
            "sequence: the events of {} aircraft came in strict order, from the first to the last",
            thousands(expected.len() as u64)
        ),
        difference: violation.or_else(|| difference("aircraft", &last, &expected)),
    })
}

/// A node's board shows every flight as the table has it.
pub(crate) async fn board(pool: &PgPool, node: &str, board: &Board) -> Result<Check> {
    let expected: Vec<(i32, String)> = sqlx::query_as(STATES).fetch_all(pool).await?;
    let expected: BTreeMap<i32, String> = expected.into_iter().collect();
    Ok(Check {
        what: format!("board of {node}: all {} flights are as the table has them", thousands(expected.len() as u64)),
        difference: difference("flight", &board.states(), &expected),
    })
}

/// The first difference of what consumers have to what the tables say.
fn difference<K: Ord + Display, V: PartialEq + Debug>(
    what: &str,
    ours: &BTreeMap<K, V>,
    expected: &BTreeMap<K, V>,
) -> Option<String> {
    let names = ours.keys().chain(expected.keys());
    let name = names.filter(|name| ours.get(name) != expected.get(name)).min()?;
    let say = |value: Option<&V>| value.map_or_else(|| String::from("nothing"), |value| format!("{value:?}"));
    Some(format!("{what} {name}: the consumer has {}, the tables say {}", say(ours.get(name)), say(expected.get(name))))
}

impl Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.difference {
            None => write!(f, "  ok      {}", self.what),
            Some(difference) => write!(f, "  FAILED  {}\n          {difference}", self.what),
        }
    }
}
