//! The month again, in fast motion.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use chrono::{DateTime, Utc};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::airline::Airline;
use crate::flight::{Change, Flight};

/// How many changes are recorded at a time.
pub(crate) const DESKS: usize = 8;

/// How many changes may wait at a desk.
const QUEUE: usize = 16;

/// Where the replay is. Clones show the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Replay {
    published: Arc<AtomicU64>,
    clock: Arc<AtomicI64>,
}

impl Replay {
    /// How many events are committed.
    pub(crate) fn published(&self) -> u64 {
        self.published.load(Ordering::Relaxed)
    }

    /// What time it is in the replay.
    pub(crate) fn clock(&self) -> DateTime<Utc> {
        DateTime::from_timestamp(self.clock.load(Ordering::Relaxed), 0).unwrap_or_default()
    }

    /// Hands out the changes in the order of time, all within `duration` if the database keeps up, and returns when they are
    /// committed. An aircraft always has the same desk, so its changes come one after another.
    pub(crate) async fn run(&self, changes: Vec<Change>, airline: &Airline, duration: Duration) -> Result<()> {
        let mut tasks = JoinSet::new();
        let mut desks = Vec::new();
        for _ in 0..DESKS {
            let (desk, queue) = mpsc::channel(QUEUE);
            desks.push(desk);
            tasks.spawn(self.clone().work(queue, airline.clone()));
        }
        let pace = Pace::new(&changes, duration);
        for change in changes {
            tokio::time::sleep_until(pace.when(change.at)).await;
            self.clock.store(change.at.timestamp(), Ordering::Relaxed);
            let desk = &desks[desk_of(&change.flight)];
            if desk.send(change).await.is_err() {
                // The desk has failed, and says below why.
                break;
            }
        }
        drop(desks);
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok(())
    }

    async fn work(self, mut queue: mpsc::Receiver<Change>, airline: Airline) -> Result<()> {
        while let Some(change) = queue.recv().await {
            airline.record(&change).await.map_err(|error| anyhow!("cannot record {change:?}: {error:#}"))?;
            self.published.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn desk_of(flight: &Flight) -> usize {
    let name = flight.aircraft.as_deref().unwrap_or(&flight.destination);
    name.bytes().fold(0, |hash: usize, byte| hash.wrapping_mul(31).wrapping_add(byte.into())) % DESKS
}

/// From the time of the history to the time of the replay.
struct Pace {
    begun: Instant,
    first: DateTime<Utc>,
    seconds_per_second: f64,
}

impl Pace {
    fn new(changes: &[Change], duration: Duration) -> Self {
        let first = changes.first().map(|change| change.at).unwrap_or_default();
        let last = changes.last().map(|change| change.at).unwrap_or_default();
        let span = (last - first).as_seconds_f64().max(1.0);
        Self { begun: Instant::now(), first, seconds_per_second: duration.as_secs_f64() / span }
    }

    fn when(&self, at: DateTime<Utc>) -> Instant {
        let seconds = (at - self.first).as_seconds_f64() * self.seconds_per_second;
        self.begun + Duration::from_secs_f64(seconds.max(0.0))
    }
}
