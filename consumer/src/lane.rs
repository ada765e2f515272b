//! Lanes: how the keys of a subscription are divided, and what an owner knows of one.

use std::collections::HashSet;
use std::time::Instant;

use crate::ids::{Epoch, Lane};

/// The lane of a message: by the hash of its key, or spread by its offset if it has none.
#[inline]
pub(crate) fn lane_of(offset: i64, key_hash: Option<i32>, lanes: u16) -> Lane {
    Lane::of(key_hash.map_or(offset, i64::from), lanes)
}

/// The lane of a key.
#[inline]
pub(crate) fn lane_of_key(key_hash: i32, lanes: u16) -> Lane {
    lane_of(0, Some(key_hash), lanes)
}

/// A lane that this instance owns, as its executor sees it.
#[derive(Debug)]
pub(crate) struct OwnedLane {
    /// Raised by every claim.
    pub(crate) epoch: Epoch,
    /// Below it, what is not in `pending` was settled before this claim.
    pub(crate) cut: i64,
    /// Not settled and not yet taken in, below `cut`.
    pub(crate) pending: HashSet<i64>,
    /// Settled by transactional handlers after the last checkpoint before this claim.
    pub(crate) done: HashSet<i64>,
    /// How many of its messages are running.
    pub(crate) running: usize,
    /// How many owners in a row died before it got past what they were doing.
    pub(crate) crashes: i32,
    /// Up to where that may have been; the executor's to know.
    pub(crate) suspect_below: i64,
    /// Types of messages that wait in it for an instance which handles them, the first to be served first.
    pub(crate) needs: Vec<String>,
    /// Those of them that this instance handles and that it found no row of any more.
    pub(crate) served: HashSet<String>,
    pub(crate) claimed_at: Instant,
    /// Something of it was done since.
    pub(crate) has_moved: bool,
}

impl OwnedLane {
    /// A lane that begins at `cut`, with nothing behind it.
    pub(crate) fn new(epoch: Epoch, cut: i64) -> Self {
        Self {
            epoch,
            cut,
            pending: HashSet::new(),
            done: HashSet::new(),
            running: 0,
            crashes: 0,
            suspect_below: i64::MIN,
            needs: Vec::new(),
            served: HashSet::new(),
            claimed_at: Instant::now(),
            has_moved: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_decides_its_lane_and_keyless_messages_are_spread() {
        assert_eq!(lane_of(7, Some(5), 4), lane_of(8, Some(5), 4));
        let spread: HashSet<Lane> = (0..8).map(|offset| lane_of(offset, None, 8)).collect();
        assert_eq!(spread.len(), 8);
    }
}
