//! Doubt: commits of which it is not known whether they were made, until the next claim of their lane shows what became of them.
//!
//! What had committed is settled, and not seen here again. What comes again had not: its run has failed, as far as its policy is concerned. A handler that
//! swallows the loss of its connection, and returns Ok, would otherwise run as fast as lanes can be claimed, for ever.

use std::collections::HashMap;
use std::time::Instant;

use super::ready::PARTS;
use super::{Executor, Job, Jobs};
use crate::ids::{Epoch, Lane};
use crate::outcome::HandlerError;

/// Runs whose commit was not answered, by the offsets of their messages.
#[derive(Default)]
pub(super) struct Doubts(HashMap<i64, Doubt>);

struct Doubt {
    lane: Lane,
    /// Under which it ran. The claim that shows what became of it has the next one.
    epoch: Epoch,
    attempt: u32,
    failing_since: Option<Instant>,
    /// How many ran together.
    messages: usize,
    /// The message has a row, which the claim deletes if it was settled.
    stored: bool,
    failure: HandlerError,
}

impl Executor {
    pub(super) fn doubt(&mut self, jobs: &Jobs, failure: &HandlerError) {
        for job in jobs.iter() {
            let doubt = Doubt {
                lane: job.lane,
                epoch: self.lanes.epoch(job.lane).unwrap_or(Epoch::OF_NOBODY),
                attempt: job.attempt,
                failing_since: job.failing_since,
                messages: jobs.len(),
                stored: job.stored,
                failure: failure.clone(),
            };
            self.failing.doubts.0.insert(job.offset, doubt);
        }
    }

    /// A message that is not settled after all: how it failed, if it ran by itself. Of a batch it is to be found which did.
    pub(super) fn resolve(&mut self, job: &mut Job) -> Option<HandlerError> {
        if self.failing.doubts.0.is_empty() {
            return None;
        }
        let doubt = self.failing.doubts.0.remove(&job.offset)?;
        // Another had the lane since, or a seek moved it: that message is not the one that ran here.
        if self.lanes.epoch(job.lane) != Some(doubt.epoch.next()) {
            return None;
        }
        job.attempt = job.attempt.max(doubt.attempt);
        job.failing_since = job.failing_since.or(doubt.failing_since);
        if doubt.messages > 1 {
            job.limit = (doubt.messages / PARTS).max(1);
            return None;
        }
        Some(doubt.failure)
    }

    /// Of lanes that were claimed just now: what is settled does not come again.
    pub(super) fn forget_doubts(&mut self, claimed: &[Lane]) {
        let mut doubts = std::mem::take(&mut self.failing.doubts.0);
        doubts.retain(|offset, doubt| {
            !claimed.contains(&doubt.lane) || (!doubt.stored && self.lanes.is_due(doubt.lane, *offset))
        });
        self.failing.doubts.0 = doubts;
    }
}
