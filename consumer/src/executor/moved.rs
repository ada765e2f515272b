//! The database's clock, moved on: what goes by it comes sooner.

use std::time::{Duration, Instant};

use super::{Executor, Job};

/// By how much the database's clock was moved on.
#[derive(Default)]
pub(super) struct Moved(Duration);

impl Moved {
    pub(super) fn advance(&mut self, span: Duration) {
        self.0 = self.0.saturating_add(span);
    }

    /// By which it is told for how long a message fails: ahead by what the clock was moved on.
    pub(super) fn now(&self) -> Instant {
        let now = Instant::now();
        now.checked_add(self.0).unwrap_or(now)
    }

    /// For how long it fails, from now on if it did not before.
    pub(super) fn failing_for(&self, job: &mut Job) -> Duration {
        let now = self.now();
        now.saturating_duration_since(*job.failing_since.get_or_insert(now))
    }
}

impl Executor {
    /// What was due by the clock is due sooner.
    pub(super) fn advance(&mut self, span: Duration) {
        self.queue.advance(span);
        self.admission.advance(span);
    }
}
