//! The month again, in fast motion.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use anyhow::{Result, anyhow};
use chrono::{DateTime, Utc};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

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

    /// Hands out the changes in the order of time, as fast as they are recorded, and returns when all are committed. An aircraft
    /// always has the same desk, so its changes come one after another.
    pub(crate) async fn run(&self, changes: Vec<Change>, airline: &Airline) -> Result<()> {
        let mut tasks = JoinSet::new();
        let mut desks = Vec::new();
        for _ in 0..DESKS {
            let (desk, queue) = mpsc::channel(QUEUE);
            desks.push(desk);
            tasks.spawn(self.clone().work(queue, airline.clone()));
        }
        for change in changes {
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
            airline
                .record(&change)
                .await
                .map_err(|error| anyhow!("cannot record {change:?}: {error:#}"))?;
            self.published.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn desk_of(flight: &Flight) -> usize {
    let name = flight.aircraft.as_deref().unwrap_or(&flight.destination);
    name.bytes().fold(0, |hash: usize, byte| {
        hash.wrapping_mul(31).wrapping_add(byte.into())
    }) % DESKS
}
