//! How far a subscription is settled, as its executor tells it to the session.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// How far the lanes of a subscription are settled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) lanes: Vec<LanePosition>,
    /// Offsets below their lane's position that are not settled.
    pub(crate) pending: Vec<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LanePosition {
    pub(crate) lane: u16,
    pub(crate) epoch: i32,
    pub(crate) position: i64,
}

/// The newest snapshot that is not yet written, from the executor to the session.
pub(crate) struct Progress {
    snapshot: Mutex<Option<Snapshot>>,
    dirty: Arc<Notify>,
}

impl Progress {
    pub(crate) fn new(dirty: Arc<Notify>) -> Self {
        Self {
            snapshot: Mutex::new(None),
            dirty,
        }
    }

    pub(crate) fn put(&self, snapshot: Snapshot) {
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = Some(snapshot);
        self.dirty.notify_one();
    }

    pub(crate) fn take(&self) -> Option<Snapshot> {
        self.snapshot
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// What a subscription did in this process since it started.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) handled: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) discarded: AtomicU64,
    pub(crate) unknown: AtomicU64,
    pub(crate) gone: AtomicU64,
    /// Offset after the last message taken in.
    pub(crate) position: AtomicI64,
    /// Messages that failed and wait for their next attempt.
    pub(crate) retrying: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Until when this instance may start handlers: beyond, others may have taken its lanes.
pub(crate) struct Lease {
    origin: Instant,
    valid_ms: AtomicU64,
}

impl Lease {
    pub(crate) fn until(end: Instant) -> Self {
        let lease = Self {
            origin: Instant::now(),
            valid_ms: AtomicU64::new(0),
        };
        lease.extend(end);
        lease
    }

    pub(crate) fn extend(&self, end: Instant) {
        let span = end.saturating_duration_since(self.origin);
        self.valid_ms.store(span.as_millis() as u64, Ordering::Release);
    }

    pub(crate) fn is_valid(&self) -> bool {
        self.origin.elapsed() < Duration::from_millis(self.valid_ms.load(Ordering::Acquire))
    }
}
