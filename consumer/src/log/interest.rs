//! What somebody in this process wants of a topic: the lanes that it owns, without types that it settles unread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::ids::Lane;
use crate::lane::lane_of;
use crate::log::block::Hashes;

/// What a subscription wants of its topic.
pub(crate) struct Interest {
    lanes: u16,
    owned: Vec<AtomicU64>,
    /// Hashes of types, in order.
    passes: Mutex<Arc<Vec<i32>>>,
}

impl Interest {
    pub(crate) fn new(lanes: u16) -> Self {
        Self {
            lanes,
            owned: (0..lanes.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            passes: Mutex::default(),
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

    /// Messages of types with these hashes are settled without being looked at.
    pub(crate) fn pass(&self, mut types: Vec<i32>) {
        types.sort_unstable();
        *self.passes.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(types);
    }

    pub(crate) fn now(&self) -> Wanted {
        let words = self.owned.iter().map(|word| word.load(Ordering::Relaxed));
        let owned: Vec<u64> = words.collect();
        let lanes: u32 = owned.iter().map(|word| word.count_ones()).sum();
        Wanted {
            lanes: self.lanes,
            all_lanes: lanes == u32::from(self.lanes),
            owned,
            passes: (self.passes.lock().unwrap_or_else(PoisonError::into_inner)).clone(),
        }
    }
}

/// What a subscription wanted of its topic at one moment.
pub(crate) struct Wanted {
    lanes: u16,
    all_lanes: bool,
    owned: Vec<u64>,
    passes: Arc<Vec<i32>>,
}

impl Wanted {
    pub(crate) fn is_all(&self) -> bool {
        self.all_lanes && self.passes.is_empty()
    }

    pub(crate) fn contain(&self, offset: i64, hashes: Hashes) -> bool {
        let owns = || {
            let lane = lane_of(offset, hashes.key, self.lanes);
            self.owned[lane.index() / 64] & (1 << (lane.index() % 64)) != 0
        };
        let passes = |name: i32| self.passes.binary_search(&name).is_ok();
        (self.all_lanes || owns()) && !hashes.of_type.is_some_and(passes)
    }
}
