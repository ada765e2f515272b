//! Holds what the consumers made of the events against what the airline's tables say.

use std::collections::BTreeMap;
use std::fmt::{self, Debug, Display};

use anyhow::Result;
use sqlx::PgPool;

use crate::board::Board;
use crate::outcome::Outcome;
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

const CHANGES: &str =
    "SELECT count(departed_at) + count(arrived_at) + count(*) FILTER (WHERE state = 'cancelled') FROM flight";

const STATISTICS: &str = "SELECT * FROM delay_statistics";

const STATISTICS_OF_FLIGHTS: &str = "SELECT carrier, destination, \
         count(departed_at) AS departures, coalesce(sum(departure_delay), 0) AS departure_delay, \
         max(departure_delay) AS worst_departure_delay, \
         count(arrived_at) AS arrivals, coalesce(sum(arrival_delay), 0) AS arrival_delay, \
         max(arrival_delay) AS worst_arrival_delay, \
         count(*) FILTER (WHERE state = 'cancelled') AS cancellations \
     FROM flight WHERE state <> 'scheduled' GROUP BY carrier, destination";

const EVENTS_OF_AIRCRAFT: &str = "SELECT tail_number, events FROM aircraft WHERE events > 0";

const STATES: &str = "SELECT id, state FROM flight WHERE state <> 'scheduled'";

/// Everything there is to verify.
pub(crate) async fn verify(pool: &PgPool, outcome: &Outcome) -> Result<Vec<Check>> {
    let mut checks = vec![
        events(pool, outcome.published).await?,
        statistics(pool).await?,
        sequence(pool, &outcome.sequence).await?,
    ];
    for (node, on_node) in &outcome.boards {
        checks.push(board(pool, node, on_node).await?);
    }
    Ok(checks)
}

/// One event for every change in the tables.
async fn events(pool: &PgPool, published: u64) -> Result<Check> {
    let changes: i64 = sqlx::query_scalar(CHANGES).fetch_one(pool).await?;
    let difference = (changes as u64 != published)
        .then(|| format!("{published} events were published for {changes} changes"));
    Ok(Check {
        what: format!(
            "events: one for each of {} changes of a flight",
            thousands(published)
        ),
        difference,
    })
}

/// The statistics are what a query over all flights says: no event was lost, and none counted twice.
async fn statistics(pool: &PgPool) -> Result<Check> {
    let kept: Vec<Statistics> = sqlx::query_as(STATISTICS).fetch_all(pool).await?;
    let expected: Vec<Statistics> = sqlx::query_as(STATISTICS_OF_FLIGHTS).fetch_all(pool).await?;
    let by_route = |all: Vec<Statistics>| -> BTreeMap<String, Statistics> {
        all.into_iter()
            .map(|one| (format!("{} to {}", one.carrier, one.destination), one))
            .collect()
    };
    let (kept, expected) = (by_route(kept), by_route(expected));
    Ok(Check {
        what: format!(
            "statistics: {} figures, by carrier and destination, are those of a GROUP BY over all flights",
            expected.len()
        ),
        difference: difference("carrier", &kept, &expected),
    })
}

/// Every aircraft's events came, one after another.
async fn sequence(pool: &PgPool, sequence: &Sequence) -> Result<Check> {
    let expected: Vec<(String, i32)> = sqlx::query_as(EVENTS_OF_AIRCRAFT).fetch_all(pool).await?;
    let expected: BTreeMap<String, i32> = expected.into_iter().collect();
    let seen = sequence.seen();
    let last = seen
        .last
        .iter()
        .map(|(aircraft, nth)| (aircraft.clone(), *nth))
        .collect();
    let violation = seen
        .violations
        .first()
        .map(|first| format!("{} violations; {first}", seen.violations.len()));
    Ok(Check {
        what: format!(
            "sequence: the events of {} aircraft came in strict order, from the first to the last",
            thousands(expected.len() as u64)
        ),
        difference: violation.or_else(|| difference("aircraft", &last, &expected)),
    })
}

/// A node's board shows every flight as the table has it.
async fn board(pool: &PgPool, node: &str, board: &Board) -> Result<Check> {
    let expected: Vec<(i32, String)> = sqlx::query_as(STATES).fetch_all(pool).await?;
    let expected: BTreeMap<i32, String> = expected.into_iter().collect();
    Ok(Check {
        what: format!(
            "board of {node}: all {} flights are as the table has them",
            thousands(expected.len() as u64)
        ),
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
    Some(format!(
        "{what} {name}: the consumer has {}, the tables say {}",
        say(ours.get(name)),
        say(expected.get(name))
    ))
}

impl Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.difference {
            None => write!(f, "  ok      {}", self.what),
            Some(difference) => write!(f, "  FAILED  {}\n          {difference}", self.what),
        }
    }
}

#[cfg(test)]
mod tests {
    use postbox_testkit::TestDatabase;

    use super::*;
    use crate::flight::History;

    async fn failures(database: &TestDatabase, outcome: &Outcome) -> Vec<String> {
        let checks = verify(database.pool(), outcome).await.unwrap();
        checks
            .iter()
            .filter(|check| check.difference.is_some())
            .map(Check::to_string)
            .collect()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_replay_is_verified_and_whatever_is_tampered_with_is_found() {
        let database = TestDatabase::empty().await.unwrap();
        let mut outcome = crate::play(History::of_first(400).unwrap(), &database)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(failures(&database, &outcome).await, Vec::<String>::new());

        sqlx::query("UPDATE delay_statistics SET departures = departures + 1 WHERE carrier = 'B6' AND destination = 'BOS'")
            .execute(database.pool())
            .await
            .unwrap();
        let failed = failures(&database, &outcome).await;
        assert!(
            failed.len() == 1 && failed[0].contains("statistics") && failed[0].contains("B6 to BOS"),
            "{failed:?}"
        );

        let tail_number = outcome.sequence.seen().last.keys().next().unwrap().clone();
        *outcome.sequence.seen().last.get_mut(&tail_number).unwrap() += 1;
        outcome.boards[1].1.states().insert(7, String::from("lost"));
        outcome.published += 1;
        let failed = failures(&database, &outcome).await.join("\n");
        assert_eq!(failed.matches("FAILED").count(), 4, "{failed}");
        for part in [
            "events were published",
            &tail_number,
            "board of node-2",
            "flight 7: the consumer has \"lost\"",
        ] {
            assert!(failed.contains(part), "{part} is not in {failed}");
        }

        outcome
            .sequence
            .seen()
            .violations
            .push(String::from("aircraft N1: event 3 came where 2 was due"));
        let failed = failures(&database, &outcome).await.join("\n");
        assert!(failed.contains("1 violations; aircraft N1"), "{failed}");
    }
}
