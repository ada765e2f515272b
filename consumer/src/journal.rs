//! What became of messages that their lane passes without success: from the executor, by way of the session, to `postbox.redelivery` and
//! `postbox.parked_key`.
//!
//! It is written together with the checkpoint that passes them, so each message is in one place. See ARCHITECTURE.md, "Failure".

use std::collections::BTreeMap;
use std::time::Instant;

use chrono::{DateTime, Utc};

use crate::block::Record;

/// Changes that are not yet written; of a message the newest counts.
#[derive(Default)]
pub(crate) struct Journal {
    pub(crate) entries: BTreeMap<i64, Entry>,
    /// From where on keys are parked, by their hashes.
    pub(crate) parked: BTreeMap<i32, ParkedFrom>,
    /// Lanes that got past what their dead owners were doing.
    pub(crate) calm: Vec<u16>,
}

/// From where on a key is parked in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ParkedFrom {
    pub(crate) lane: u16,
    /// Under which the lane is owned; a stale one is refused.
    pub(crate) epoch: i32,
    /// `None`: it has caught up with its lane.
    pub(crate) offset: Option<i64>,
}

/// What became of one message.
pub(crate) struct Entry {
    pub(crate) lane: u16,
    /// Under which the lane is owned; a stale one is refused.
    pub(crate) epoch: i32,
    pub(crate) fate: Fate,
    /// Attempts made.
    pub(crate) attempts: u32,
    /// When it is to run again.
    pub(crate) due: Instant,
    pub(crate) failures: Vec<Failure>,
    /// Why it was given up.
    pub(crate) reason: Option<String>,
    /// For the copy; `None` where the row is there.
    pub(crate) record: Option<Record>,
}

/// States of a row, and how it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Runs again when it is due.
    Retry,
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

impl Fate {
    /// As `postbox.record` takes it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Fate::Retry => "retry",
            Fate::Trying => "trying",
            Fate::Halted => "halted",
            Fate::Dead => "dead",
            Fate::Done => "done",
        }
    }
}

impl Journal {
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.parked.is_empty() && self.calm.is_empty()
    }

    /// Notes what became of a message; what was noted and not yet written before is part of it.
    pub(crate) fn put(&mut self, offset: i64, mut entry: Entry) {
        if let Some(earlier) = self.entries.remove(&offset)
            && entry.fate != Fate::Done
        {
            entry.record = entry.record.or(earlier.record);
            let mut failures = earlier.failures;
            failures.append(&mut entry.failures);
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
        self.calm.extend(later.calm);
    }

    /// Forgets what concerns lanes that have another owner.
    pub(crate) fn forget(&mut self, lanes: &[u16]) {
        self.entries.retain(|_, entry| !lanes.contains(&entry.lane));
        self.parked.retain(|_, parked| !lanes.contains(&parked.lane));
        self.calm.retain(|lane| !lanes.contains(lane));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(fate: Fate, attempts: u32) -> Entry {
        Entry {
            lane: 0,
            epoch: 1,
            fate,
            attempts,
            due: Instant::now(),
            failures: vec![Failure {
                attempt: attempts,
                at: Utc::now(),
                error: String::new(),
            }],
            reason: None,
            record: None,
        }
    }

    #[test]
    fn failures_of_one_message_add_up_and_the_newest_fate_counts() {
        let mut journal = Journal::default();
        journal.put(7, entry(Fate::Retry, 1));
        let mut later = Journal::default();
        later.put(7, entry(Fate::Dead, 2));
        journal.absorb(later);
        let merged = &journal.entries[&7];
        assert_eq!(merged.fate, Fate::Dead);
        assert_eq!(
            merged.failures.iter().map(|f| f.attempt).collect::<Vec<_>>(),
            [1, 2]
        );
    }
}
