//! How far a subscription is settled, as its executor tells it to the session.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::ids::{Epoch, Lane};
use crate::protocol::journal::Journal;

/// How far the lanes of a subscription are settled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(crate) lanes: Vec<LanePosition>,
    /// Offsets below their lane's position that are not settled, with their lanes.
    pub(crate) pending: Vec<(i64, Lane)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LanePosition {
    pub(crate) lane: Lane,
    pub(crate) epoch: Epoch,
    pub(crate) position: i64,
}

/// What is not yet written, from the executor to the session.
pub(crate) struct Progress {
    unwritten: Mutex<Unwritten>,
    dirty: Arc<Dirty>,
}

/// Tells the session that there is something to write.
#[derive(Default)]
pub(crate) struct Dirty {
    /// When it is time.
    pub(crate) soon: Notify,
    /// Somebody waits for it.
    pub(crate) at_once: Notify,
}

/// The newest snapshot, and everything that belongs to it.
#[derive(Default)]
pub(crate) struct Unwritten {
    /// How many reports there were: the executor is told the number of the last one that was written.
    pub(crate) number: u64,
    pub(crate) snapshot: Option<Snapshot>,
    pub(crate) journal: Journal,
}

impl Progress {
    pub(crate) fn new(dirty: Arc<Dirty>) -> Self {
        Self {
            unwritten: Mutex::default(),
            dirty,
        }
    }

    /// A report; returns its number.
    pub(crate) fn put(&self, snapshot: Snapshot, journal: Journal, urgent: bool) -> u64 {
        let number = {
            let mut unwritten = self.unwritten.lock().unwrap_or_else(PoisonError::into_inner);
            unwritten.number += 1;
            unwritten.snapshot = Some(snapshot);
            unwritten.journal.absorb(journal);
            unwritten.number
        };
        match urgent {
            true => self.dirty.at_once.notify_one(),
            false => self.dirty.soon.notify_one(),
        }
        number
    }

    /// What was reported since the last time, if anything.
    pub(crate) fn take(&self) -> Option<Unwritten> {
        let mut unwritten = self.unwritten.lock().unwrap_or_else(PoisonError::into_inner);
        let snapshot = unwritten.snapshot.take()?;
        Some(Unwritten {
            number: unwritten.number,
            snapshot: Some(snapshot),
            journal: std::mem::take(&mut unwritten.journal),
        })
    }
}

/// Types that are counted and told of by name.
const MOST_TYPES: usize = 64;

/// What a subscription did in this process since it started.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) handled: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) discarded: AtomicU64,
    pub(crate) unknown: AtomicU64,
    /// Types of which messages were settled without being handled, the first of them.
    unknown_types: Mutex<BTreeMap<String, u64>>,
    pub(crate) gone: AtomicU64,
    /// Offset after the last message taken in.
    pub(crate) position: AtomicI64,
    /// Messages that failed and wait for their next attempt.
    pub(crate) retrying: AtomicU64,
    /// Messages that expired before they were handled.
    pub(crate) expired: AtomicU64,
    /// Messages that their handler's filter does not want.
    pub(crate) filtered: AtomicU64,
    /// Of these, what its filter cannot be evaluated of.
    pub(crate) filter_errors: AtomicU64,
    /// Messages given up.
    pub(crate) dead: AtomicU64,
    /// Messages given up whose keys wait for an operator.
    pub(crate) halted: AtomicU64,
    /// [`Intake`] as a number.
    pub(crate) intake: AtomicU8,
}

/// Whether messages are taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Intake {
    /// The breaker is closed.
    Closed,
    /// The breaker is open: everything fails.
    Open,
    /// So many messages fail that no more are taken in.
    Full,
}

impl Intake {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Intake::Closed => "closed",
            Intake::Open => "open",
            Intake::Full => "full",
        }
    }
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_all(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// Counts them by their type; whether they are the first.
    pub(crate) fn first_unknown(&self, message_type: &str, messages: u64) -> bool {
        let mut types = self.unknown_types.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = types.get_mut(message_type) {
            *count += messages;
            return false;
        }
        let is_told = types.len() < MOST_TYPES;
        if is_told {
            types.insert(message_type.to_owned(), messages);
        }
        is_told
    }

    /// As it was a moment ago.
    pub(crate) fn retrying(&self) -> u64 {
        self.retrying.load(Ordering::Relaxed)
    }

    /// How many messages of which types were settled without being handled.
    pub(crate) fn unknown_types(&self) -> BTreeMap<String, u64> {
        let types = self.unknown_types.lock().unwrap_or_else(PoisonError::into_inner);
        types.clone()
    }

    pub(crate) fn set_intake(&self, intake: Intake) {
        self.intake.store(intake as u8, Ordering::Relaxed);
    }

    pub(crate) fn intake(&self) -> Intake {
        match self.intake.load(Ordering::Relaxed) {
            1 => Intake::Open,
            2 => Intake::Full,
            _ => Intake::Closed,
        }
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
        !self.left().is_zero()
    }

    /// For how long it is valid.
    pub(crate) fn left(&self) -> Duration {
        Duration::from_millis(self.valid_ms.load(Ordering::Acquire)).saturating_sub(self.origin.elapsed())
    }
}
