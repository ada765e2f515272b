//! What became of messages that their lane passes without success: from the executor, by way of the session, to `postbox.redelivery` and
//! `postbox.parked_key`.
//!
//! It is written together with the checkpoint that passes them, so each message is in one place. See docs/internals/failure.md.

use std::collections::BTreeMap;
use std::time::Instant;

use chrono::{DateTime, Utc};

use crate::ids::{Epoch, Lane};
use crate::log::block::Record;

/// Changes that are not yet written; of a message the newest counts.
#[derive(Default)]
pub(crate) struct Journal {
    pub(crate) entries: BTreeMap<i64, Entry>,
    /// From where on keys are parked, by their hashes.
    pub(crate) parked: BTreeMap<i32, ParkedFrom>,
    /// What lanes need.
    pub(crate) needs: BTreeMap<Lane, Needs>,
    /// Lanes that got past what their dead owners were doing.
    pub(crate) cleared: Vec<Lane>,
}

/// From where on a key is parked in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParkedFrom {
    pub(crate) lane: Lane,
    /// Under which the lane is owned; a stale one is refused.
    pub(crate) epoch: Epoch,
    /// `None`: it has caught up with its lane.
    pub(crate) offset: Option<i64>,
    /// The type of the first, where this instance does not handle it.
    pub(crate) waits_for: Option<String>,
}

/// Which types of messages wait in a lane for an instance that handles them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Under which the lane is owned; a stale one is refused.
    pub(crate) epoch: Epoch,
    pub(crate) types: Vec<String>,
}

/// What became of one message.
pub(crate) struct Entry {
    pub(crate) lane: Lane,
    /// Under which the lane is owned; a stale one is refused.
    pub(crate) epoch: Epoch,
    pub(crate) disposition: Disposition,
    /// Attempts made.
    pub(crate) attempts: u32,
    /// When it is to run again.
    pub(crate) due: Instant,
    pub(crate) failures: Vec<Failure>,
    /// Why it was given up.
    pub(crate) reason: Option<String>,
    /// For the copy; `None` where the row is there.
    pub(crate) record: Option<Record>,
    /// The database refuses more than the payload of the copy.
    pub(crate) bare: bool,
}

/// So many failures of a message are kept, as `postbox.record` does.
const KEPT: usize = 20;

impl Entry {
    /// Due now, with nothing else to say of it.
    pub(crate) fn new(lane: Lane, epoch: Epoch, disposition: Disposition, attempts: u32) -> Self {
        Self {
            lane,
            epoch,
            disposition,
            attempts,
            due: Instant::now(),
            failures: Vec::new(),
            reason: None,
            record: None,
            bare: false,
        }
    }

    /// Bytes of the copy.
    pub(crate) fn weight(&self) -> usize {
        self.record
            .as_ref()
            .map_or(0, |record| record.message().payload.len())
    }
}

/// States of a row, and how it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disposition {
    /// Runs again when it is due.
    Retry,
    /// Waits for an instance that handles its type.
    Waiting,
    /// Is about to run, perhaps for the last thing that this process does.
    Trying,
    /// Given up, and its key waits for an operator.
    Halted,
    /// Given up.
    Dead,
    /// Settled.
    Done,
}

/// A failed attempt.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) attempt: u32,
    pub(crate) at: DateTime<Utc>,
    pub(crate) error: String,
}

impl Disposition {
    /// As `postbox.record` takes it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Disposition::Retry => "retry",
            Disposition::Waiting => "waiting",
            Disposition::Trying => "trying",
            Disposition::Halted => "halted",
            Disposition::Dead => "dead",
            Disposition::Done => "done",
        }
    }
}

impl Journal {
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.parked.is_empty() && self.needs.is_empty() && self.cleared.is_empty()
    }

    /// Notes what became of a message; what was noted and not yet written before is part of it.
    pub(crate) fn put(&mut self, offset: i64, mut entry: Entry) {
        if let Some(earlier) = self.entries.remove(&offset)
            && entry.disposition != Disposition::Done
        {
            entry.record = entry.record.or(earlier.record);
            let mut failures = earlier.failures;
            failures.append(&mut entry.failures);
            failures.drain(..failures.len().saturating_sub(KEPT));
            entry.failures = failures;
        }
        self.entries.insert(offset, entry);
    }

    /// Adds what was noted later.
    pub(crate) fn absorb(&mut self, later: Journal) {
        for (offset, entry) in later.entries {
            self.put(offset, entry);
        }
        self.parked.extend(later.parked);
        self.needs.extend(later.needs);
        self.cleared.extend(later.cleared);
    }

    /// Forgets what concerns lanes that have another owner.
    pub(crate) fn forget(&mut self, lanes: &[Lane]) {
        self.entries.retain(|_, entry| !lanes.contains(&entry.lane));
        self.parked.retain(|_, parked| !lanes.contains(&parked.lane));
        self.needs.retain(|lane, _| !lanes.contains(lane));
        self.cleared.retain(|lane| !lanes.contains(lane));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(disposition: Disposition, attempts: u32) -> Entry {
        Entry {
            lane: Lane::of(0, 1),
            epoch: Epoch(1),
            disposition,
            attempts,
            due: Instant::now(),
            failures: vec![Failure {
                attempt: attempts,
                at: Utc::now(),
                error: String::new(),
            }],
            reason: None,
            record: None,
            bare: false,
        }
    }

    #[test]
    fn failures_of_one_message_add_up_and_the_newest_fate_counts() {
        let mut journal = Journal::default();
        journal.put(7, entry(Disposition::Retry, 1));
        let mut later = Journal::default();
        later.put(7, entry(Disposition::Dead, 2));
        journal.absorb(later);
        let merged = &journal.entries[&7];
        assert_eq!(merged.disposition, Disposition::Dead);
        assert_eq!(
            merged.failures.iter().map(|f| f.attempt).collect::<Vec<_>>(),
            [1, 2]
        );
    }
}
