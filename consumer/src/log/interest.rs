//! Which lanes of a topic somebody in this process owns.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::ids::Lane;
use crate::lane::lane_of;

/// The lanes of a subscription that this process owns.
pub(crate) struct Interest {
    lanes: u16,
    owned: Vec<AtomicU64>,
}

impl Interest {
    pub(crate) fn new(lanes: u16) -> Self {
        Self {
            lanes,
            owned: (0..lanes.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(crate) fn set(&self, lane: Lane, owned: bool) {
        let (word, bit) = (&self.owned[lane.index() / 64], 1 << (lane.index() % 64));
        if owned {
            word.fetch_or(bit, Ordering::Relaxed);
        } else {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    pub(crate) fn now(&self) -> OwnedLanes {
        let owned = self
            .owned
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect();
        OwnedLanes {
            lanes: self.lanes,
            owned,
        }
    }
}

/// The lanes of a subscription that this process owned at one moment.
pub(crate) struct OwnedLanes {
    lanes: u16,
    owned: Vec<u64>,
}

impl OwnedLanes {
    pub(crate) fn is_all(&self) -> bool {
        let owned: u32 = self.owned.iter().map(|word| word.count_ones()).sum();
        owned == u32::from(self.lanes)
    }

    pub(crate) fn contain(&self, offset: i64, key: Option<i32>) -> bool {
        let lane = lane_of(offset, key, self.lanes);
        self.owned[lane.index() / 64] & (1 << (lane.index() % 64)) != 0
    }
}
