//! Telling how things stand, to a test that wants to know whether all is settled.
//!
//! It is told when nothing can be done but wait: so what is ready then waits for something else than its turn, and what is due by now was started.

use std::time::Instant;

use tokio::sync::mpsc;

use super::{Executor, Job};
use crate::handler::UnknownType;
use crate::protocol::progress::Intake;
use crate::protocol::standing::Standing;

impl Executor {
    /// Answers who asked, now that nothing can be done but wait.
    pub(super) fn tell_how_things_stand(&mut self) {
        if self.session.asked.is_empty() {
            return;
        }
        let standing = self.standing();
        for asker in std::mem::take(&mut self.session.asked) {
            // It may have given up.
            let _ = asker.send(standing.clone());
        }
    }

    pub(super) fn is_asked(&mut self, asker: mpsc::UnboundedSender<Standing>) {
        self.session.asked.push(asker);
    }

    fn standing(&self) -> Standing {
        let now = Instant::now();
        let telling = self.plan.hooks.telling();
        let owned = self.lanes.iter().map(|(number, _)| number);
        let probe = self.admission.breaker.wakes_at().filter(|at| *at > now);
        let until = |at: Instant| at.saturating_duration_since(now);
        Standing {
            group: self.plan.group.clone(),
            topic: self.plan.topic.clone(),
            subscription: self
                .session
                .membership
                .as_ref()
                .map(|membership| membership.subscription.0),
            clock: self.plan.clock.now(),
            lanes: owned.filter(|number| !self.lanes.is_draining(*number)).count(),
            all_lanes: usize::from(self.lanes.count()),
            unknown_waits: self.plan.unknown_types == UnknownType::Wait,
            next: self.reader.first().unwrap_or(i64::MAX),
            held_up: self.is_held_up(),
            open: self.admission.is_open(),
            busy: telling > 0 || self.is_busy(),
            running: self.runs.len(),
            ready: self.queue.ready(),
            retrying: self.queue.retries(),
            retry_in: self.queue.next_retry().map(until),
            probe_in: probe.map(until),
            telling,
        }
    }

    fn is_held_up(&self) -> bool {
        let waiting = self.lanes.unsettled().max(self.reporter.unrecorded());
        !self.admission.is_open() || self.intake() != Intake::Closed || waiting >= self.plan.window
    }

    fn is_busy(&self) -> bool {
        // What is ready waits for the rate, or for its batch to fill.
        let waits = match self.intake() {
            Intake::Closed => !self.queue.is_empty(),
            Intake::Open | Intake::Full => self.queue.any(Job::has_failed),
        };
        !self.may_run()
            || !self.runs.is_idle()
            || self.reporter.is_pending()
            || (self.admission.is_open() && waits)
            || (self.lacks_probe() && !self.reader.is_at_head())
    }
}
