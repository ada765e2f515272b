//! How long an event is on its way: from its insertion into the outbox until its handler is done with it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::Utc;
use postbox_consumer::Delivery;
use tokio::time::Instant;

/// What was measured, by group. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Latencies {
    groups: Arc<Mutex<BTreeMap<Arc<str>, Latency>>>,
}

/// Of one group.
#[derive(Debug, Clone)]
pub(crate) struct Latency {
    micros: Vec<u32>,
    pub(crate) last: Instant,
}

impl Latencies {
    pub(crate) fn note(&self, delivery: &Delivery) {
        // Where the database has another machine's clock, it may be ahead of ours.
        let micros = (Utc::now() - delivery.published_at)
            .num_microseconds()
            .unwrap_or(i64::MAX)
            .max(0);
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let group = groups.entry(delivery.group.clone()).or_insert_with(|| Latency {
            micros: Vec::new(),
            last: now,
        });
        group.micros.push(u32::try_from(micros).unwrap_or(u32::MAX));
        group.last = now;
    }

    /// Each group with what was measured.
    pub(crate) fn groups(&self) -> Vec<(Arc<str>, Latency)> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups
            .iter()
            .map(|(group, latency)| (group.clone(), latency.clone()))
            .collect()
    }
}

impl Latency {
    pub(crate) fn deliveries(&self) -> usize {
        self.micros.len()
    }

    /// What this share of the deliveries did not exceed.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let mut sorted = self.micros.clone();
        sorted.sort_unstable();
        let n = (sorted.len() as f64 * share).ceil() as usize;
        let micros = sorted.get(n.saturating_sub(1)).copied().unwrap_or_default();
        Duration::from_micros(micros.into())
    }
}
