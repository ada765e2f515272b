//! Adopting: what a lane's new owner makes of messages that failed under the former ones, and what operators decided of them.

use std::time::Instant;

use tracing::warn;

use super::failure::backoff;
use super::{Executor, Job};
use crate::clock::later;
use crate::log::block::Record;
use crate::outcome::{Decision, HandlerError};
use crate::protocol::journal::{Disposition, Entry};
use crate::protocol::redelivery::{Held, HeldState, ParkedKey};

impl Executor {
    /// Takes over what the former owners of lanes left, by offset.
    pub(super) fn adopt(&mut self, held: Vec<Held>, parked: Vec<ParkedKey>) {
        for held in held {
            self.adopt_one(held);
        }
        for ParkedKey { key, parked } in parked {
            let vacant = !self.keys.has(key);
            self.keys.of(key).parked = Some(parked);
            if vacant {
                self.release_key(key);
            }
        }
    }

    /// What operators decided; what is of other lanes is for their owners.
    pub(super) fn decided(&mut self, held: Vec<Held>) {
        for held in held {
            let offset = held.message.offset.get();
            // What was read before the last report was recorded may be a message that has run since.
            let known = self.failing.has(offset)
                || self.queue.has_left(offset)
                || self.reporter.is_unrecorded(offset);
            if !known && self.lanes.has(held.lane) && !self.lanes.is_draining(held.lane) {
                self.adopt_one(held);
            }
        }
    }

    fn adopt_one(&mut self, held: Held) {
        let (offset, lane, state, attempts) =
            (held.message.offset.get(), held.lane, held.state, held.attempts);
        let due = later(Instant::now(), held.due_in);
        // Its key is its own.
        let was_halted = self.failing.decided(offset);
        let Some(mut job) = self.stored_job(held) else {
            if let Some(Some(key)) = was_halted {
                self.release_key(key);
            }
            return;
        };
        match state {
            HeldState::Parked => {}
            HeldState::Released => {
                self.note(&job, Disposition::Done, None, None);
                if let Some(Some(key)) = was_halted {
                    self.release_key(key);
                }
            }
            HeldState::Halted => match job.key.filter(|key| self.keys.has(*key)) {
                Some(key) => {
                    // Until its turn comes it is not looked up again.
                    self.failing.insert(offset, lane);
                    job.halted = true;
                    self.keys.insert(key, job);
                }
                None => self.halt(job),
            },
            HeldState::Redriven | HeldState::Waiting => {
                self.failing.insert(offset, lane);
                if state == HeldState::Redriven {
                    job.attempt = 1;
                }
                // No longer the operator's, nor left to others.
                job.attempt -= 1;
                self.note(&job, Disposition::Retry, None, None);
                job.attempt += 1;
                match job.key {
                    Some(key) if was_halted.is_none() && self.keys.has(key) => {
                        self.keys.insert(key, job);
                        // What has a row comes before what is parked.
                        if self.keys.get(key).is_some_and(|of| of.waits_for.is_some()) {
                            self.release_key(key);
                        }
                    }
                    _ => {
                        if let Some(job) = self.if_its_turn(job) {
                            self.hold_key(&job);
                            self.queue.push(job);
                        }
                    }
                }
            }
            HeldState::Retry => {
                self.failing.insert(offset, lane);
                match self.resolve(&mut job) {
                    Some(failure) => self.failed_in_doubt(job, failure),
                    None => self.resume(job, due),
                }
            }
            HeldState::Trying => {
                self.failing.insert(offset, lane);
                job.suspect = true;
                job.attempt = attempts.max(1);
                if let Some(failure) = self.resolve(&mut job) {
                    self.failed_in_doubt(job, failure);
                } else if !job.unknown && self.lanes.get(lane).is_some_and(|lane| lane.crashes > 0) {
                    job.attempt = attempts;
                    self.failed_unseen(job, "the process died while the handler ran".to_owned());
                } else {
                    // It was cancelled, or never began.
                    self.resume(job, due);
                }
            }
        }
    }

    /// An attempt of which it was not known whether it committed, and it has not: what its handler said of it counts, if it said anything.
    fn failed_in_doubt(&mut self, job: Job, failure: HandlerError) {
        match failure.decision {
            Decision::Retry => self.failed_unseen(job, failure.reason),
            _ => self.decide(job, failure),
        }
    }

    /// An attempt failed without its handler's word: its process died, or the answer to its commit was lost.
    fn failed_unseen(&mut self, mut job: Job, error: String) {
        let failing_for = self.admission.moved.failing_for(&mut job);
        if let Some(why) = job.handler.retry.gives_up(job.attempt, failing_for) {
            // A key that an earlier message holds is not this one's to let go.
            job.key = job.key.filter(|key| !self.keys.has(*key));
            return self.give_up(job, format!("{why}: {error}"), error);
        }
        let due = later(Instant::now(), backoff(&job));
        warn!(
            group = %self.plan.group, topic = %self.plan.topic, handler = job.handler.name, id = %job.record.message().id,
            offset = job.offset, attempt = job.attempt, error, "an attempt failed without its handler's word"
        );
        let job = self.note_failure(job, due, error);
        self.resume(job, due);
    }

    /// As it was: holds its key until it is due, or stands behind the one that does.
    fn resume(&mut self, job: Job, due: Instant) {
        match job.key {
            Some(key) if self.keys.has(key) => self.keys.insert(key, job),
            _ => self.again_at(job, due),
        }
    }

    /// A message that has a row; `None` if nobody handles or wants it, and then it is settled.
    pub(super) fn stored_job(&mut self, held: Held) -> Option<Job> {
        let (offset, lane) = (held.message.offset.get(), held.lane);
        // What is parked was counted when its lane passed it.
        let counts = held.state != HeldState::Parked;
        match self.job(Record::alone(held.message), offset, lane, counts) {
            Some(job) => Some(Job {
                attempt: held.attempts + 1,
                failing_since: held
                    .failing_for
                    .and_then(|span| self.admission.moved.now().checked_sub(span)),
                stored: true,
                limit: 1,
                ..job
            }),
            None => {
                if let Some(epoch) = self.lanes.epoch(lane) {
                    let entry = Entry::new(lane, epoch, Disposition::Done, held.attempts);
                    self.reporter.note(offset, entry);
                }
                None
            }
        }
    }
}
