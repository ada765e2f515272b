//! How long first polls of handlers take, to decide whether they may run on the executor's own task.

use std::time::Duration;

/// A handler whose first poll is slower than this on average is given a task from the start, so that it can use other cores.
const LIMIT: Duration = Duration::from_micros(50);

#[derive(Default)]
pub(super) struct InlineCost {
    mean_ns: u64,
    skipped: u32,
}

impl InlineCost {
    pub(super) fn allows(&mut self) -> bool {
        if self.mean_ns < LIMIT.as_nanos() as u64 {
            return true;
        }
        // Look again now and then: it may have been a cold start.
        self.skipped += 1;
        if self.skipped >= 64 {
            self.skipped = 0;
            self.mean_ns /= 2;
        }
        false
    }

    pub(super) fn spent(&mut self, span: Duration) {
        self.mean_ns = (self.mean_ns * 7 + span.as_nanos() as u64) / 8;
    }
}
