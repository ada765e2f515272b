//! Failing: when a message runs again, when it is given up, and what a lane's new owner or an operator makes of those that failed.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use chrono::Utc;
use tracing::{debug, error, warn};

use super::report::Afterwards;
use super::{Executor, Job, Jobs};
use crate::block::Record;
use crate::dead_letter::DeadLetter;
use crate::handler::{Decision, Expired, HandlerError};
use crate::journal::{Entry, Failure, Fate};
use crate::progress::Counters;
use crate::redelivery::{Held, HeldState, ParkedKey};

impl Executor {
    /// A run has failed.
    pub(super) fn run_failed(&mut self, jobs: Jobs, failure: HandlerError) {
        let HandlerError { decision, reason } = failure;
        let failure = match decision {
            Decision::OfEach(_) if jobs.handler().transactional => HandlerError::retry(format!(
                "a handler with a Tx cannot fail with some of its messages only, since what it wrote for the others is rolled back: {reason}"
            )),
            Decision::OfEach(mut failures) => {
                let its_own = jobs
                    .iter()
                    .filter(|job| failures.contains_key(&job.offset))
                    .count();
                if its_own < failures.len() {
                    HandlerError::retry(format!(
                        "the handler names messages that are not in its batch: {reason}"
                    ))
                } else if jobs.others.is_empty()
                    && let Some(failure) = failures.remove(&jobs.first.offset)
                {
                    failure
                } else {
                    return self.some_failed(jobs, failures);
                }
            }
            decision => HandlerError { decision, reason },
        };
        match jobs.others.is_empty() {
            true => self.failed(jobs.first, failure),
            false => self.batch_failed(jobs, failure),
        }
    }

    /// These messages of a batch failed. What comes after them in the order of their keys is behind them again.
    fn some_failed(&mut self, jobs: Jobs, mut failures: BTreeMap<i64, HandlerError>) {
        let first = jobs.first.offset;
        let mut waiting = HashSet::new();
        let (mut settled, mut failed) = (Vec::new(), Vec::new());
        for job in jobs {
            let failure = failures.remove(&job.offset);
            match (job.key.filter(|key| waiting.contains(key)), failure) {
                (Some(key), _) => self.insert_successor(key, job),
                (None, Some(failure)) if matches!(failure.decision, Decision::Discard) => {
                    self.discards(&job, &failure.reason);
                    settled.push(job);
                }
                (None, Some(failure)) => {
                    waiting.extend(job.key);
                    failed.push((job, failure));
                }
                (None, None) => {
                    Counters::add(&self.plan.counters.handled);
                    settled.push(job);
                }
            }
        }
        // To the breaker it is one run.
        match settled.is_empty() {
            false => self.works(),
            true => self.counts_as_failure(first, 1),
        }
        self.settle_each(settled.iter(), &waiting);
        for (job, failure) in failed {
            self.decide(job, failure);
        }
    }

    fn failed(&mut self, job: Job, failure: HandlerError) {
        if let Decision::Retry | Decision::RetryIn(_) = failure.decision {
            let is_probe = self.breaker.is_probe(job.offset);
            self.counts_as_failure(job.offset, job.attempt);
            if is_probe {
                // What fails now fails for all, so it is not counted against the message.
                Counters::add(&self.plan.counters.failed);
                debug!(group = %self.plan.group, topic = %self.plan.topic, error = failure.reason, "the probe failed");
                let wait = wait_of(&job, &failure);
                return self.again(job, wait);
            }
        }
        self.decide(job, failure);
    }

    /// To the breaker.
    fn counts_as_failure(&mut self, offset: i64, attempt: u32) {
        if self.breaker.failed(offset, attempt, Instant::now()) {
            self.warn_open();
        }
    }

    /// What is to be done with a message that failed.
    fn decide(&mut self, mut job: Job, failure: HandlerError) {
        let wait = wait_of(&job, &failure);
        match failure.decision {
            Decision::Postpone(_) => {
                debug!(
                    group = %self.plan.group, topic = %self.plan.topic, handler = job.handler.name, id = %job.record.message().id,
                    offset = job.offset, reason = failure.reason, ?wait, "the handler postpones the message"
                );
                self.breaker.inconclusive(job.offset);
                return self.again(job, wait);
            }
            Decision::Discard => {
                self.works();
                self.discards(&job, &failure.reason);
                return self.settle(job);
            }
            Decision::DeadLetter => {
                self.works();
                Counters::add(&self.plan.counters.failed);
                let reason = format!("the handler gave it up: {}", failure.reason);
                return self.give_up(job, reason, failure.reason);
            }
            Decision::Retry | Decision::RetryIn(_) | Decision::OfEach(_) => {}
        }
        Counters::add(&self.plan.counters.failed);
        let since = *job.failing_since.get_or_insert_with(Instant::now);
        if self.membership.is_some()
            && let Some(why) = job.handler.retry.gives_up(job.attempt, since.elapsed())
        {
            return self.give_up(job, format!("{why}: {}", failure.reason), failure.reason);
        }
        warn!(
            group = %self.plan.group, topic = %self.plan.topic, handler = job.handler.name, id = %job.record.message().id,
            offset = job.offset, attempt = job.attempt, error = failure.reason, retry_in = ?wait, "the handler failed"
        );
        self.retry(job, wait, failure.reason);
    }

    fn discards(&self, job: &Job, reason: &str) {
        Counters::add(&self.plan.counters.failed);
        Counters::add(&self.plan.counters.discarded);
        warn!(
            group = %self.plan.group, topic = %self.plan.topic, handler = job.handler.name, id = %job.record.message().id,
            offset = job.offset, reason, "the handler discards the message"
        );
    }

    /// Which of its messages is to blame is found by runs of fewer. What the handler says of a whole batch, but that it postpones it, is
    /// no decision on any one of them.
    fn batch_failed(&mut self, jobs: Jobs, failure: HandlerError) {
        let offset = jobs.first.offset;
        if let Decision::Postpone(wait) = failure.decision {
            debug!(
                group = %self.plan.group, topic = %self.plan.topic, handler = jobs.handler().name, messages = jobs.len(),
                offset, reason = failure.reason, ?wait, "the handler postpones a batch"
            );
            self.breaker.inconclusive(offset);
            return self.all_again(jobs, wait);
        }
        Counters::add(&self.plan.counters.failed);
        warn!(
            group = %self.plan.group, topic = %self.plan.topic, handler = jobs.handler().name, messages = jobs.len(),
            offset, error = failure.reason, "the handler failed with a batch, which runs again in parts"
        );
        self.counts_as_failure(offset, 1);
        self.run_in_parts(jobs);
    }

    pub(super) fn warn_open(&self) {
        warn!(
            group = %self.plan.group, topic = %self.plan.topic,
            "everything fails: the breaker is open, and no more is taken in until a probe succeeds"
        );
    }

    /// Holds its key until the next attempt.
    fn retry(&mut self, job: Job, wait: Duration, error: String) {
        let due = Instant::now() + wait;
        let job = self.note_failure(job, due, error);
        self.again_at(job, due);
    }

    /// After a failure it gets a row of its own, which the lane passes.
    fn note_failure(&mut self, mut job: Job, due: Instant, error: String) -> Job {
        if self.membership.is_some() {
            self.unsettled.remove(&job.offset);
            self.failing.insert(job.offset, job.lane);
            self.note(&job, Fate::Retry, Some(due), Some(error));
            job.stored = true;
            // It may stay long.
            job.record = job.record.detached();
        }
        job.attempt += 1;
        job.limit = 1;
        job
    }

    /// The database's clock was moved on: what was due by it is due sooner.
    pub(super) fn advance(&mut self, span: Duration) {
        let retries = std::mem::take(&mut self.retries).into_iter();
        self.retries = retries
            .map(|((due, offset), job)| ((due.checked_sub(span).unwrap_or(due), offset), job))
            .collect();
    }

    /// Runs once more as if it had not run.
    pub(super) fn again(&mut self, job: Job, wait: Duration) {
        self.again_at(job, Instant::now() + wait);
    }

    pub(super) fn all_again(&mut self, jobs: Jobs, wait: Duration) {
        for job in self.take_apart(jobs) {
            self.again(job, wait);
        }
    }

    fn again_at(&mut self, job: Job, due: Instant) {
        if !job.stored {
            self.unsettled.insert(job.offset, job.lane);
        }
        if self.draining.contains_key(&job.lane) || self.stop_by.is_some() {
            return;
        }
        self.hold_key(&job);
        let failing_key = job.key.filter(|_| job.stored);
        self.retries.insert((due, job.offset), job);
        if let Some(key) = failing_key {
            self.head_fails(key, Some(due));
        }
    }

    pub(super) fn has_expired(&self, job: &Job) -> bool {
        let expires_at = job.record.message().expires_at;
        expires_at.is_some_and(|at| at <= self.plan.clock.now())
    }

    /// It is too late for this message, which has not run or not succeeded.
    pub(super) fn expire(&mut self, mut job: Job) {
        Counters::add(&self.plan.counters.expired);
        self.breaker.inconclusive(job.offset);
        debug!(
            group = %self.plan.group, topic = %self.plan.topic, id = %job.record.message().id, offset = job.offset,
            "the message has expired"
        );
        match job.handler.expired {
            Expired::Settle => self.settle(job),
            Expired::DeadLetter => {
                job.attempt -= 1;
                self.bury(job, "it expired before it was handled".to_owned(), None, false);
            }
        }
    }

    /// To the dead letters. Its key goes on, or waits, as the handler's policy says.
    fn give_up(&mut self, job: Job, reason: String, last_error: String) {
        let halts = job.handler.retry.halts() && job.key.is_some();
        self.bury(job, reason, Some(last_error), halts);
    }

    /// To the dead letters. Its key goes on, or waits, once it is there.
    fn bury(&mut self, job: Job, reason: String, last_error: Option<String>, halts: bool) {
        error!(
            group = %self.plan.group, topic = %self.plan.topic, handler = job.handler.name, id = %job.record.message().id,
            offset = job.offset, attempts = job.attempt, reason, halts, "a message is given up"
        );
        Counters::add(&self.plan.counters.dead);
        let Some(epoch) = self.epoch(job.lane).filter(|_| self.membership.is_some()) else {
            // A broadcast from memory has nowhere to put it.
            return self.settle(job);
        };
        let fate = if halts { Fate::Halted } else { Fate::Dead };
        self.unsettled.remove(&job.offset);
        self.failing.remove(&job.offset);
        self.write(&job, fate, None, last_error, Some(reason.clone()));
        let hook = job.handler.on_dead_letter.clone().map(|hook| {
            let letter = DeadLetter::new(
                self.plan.group.clone(),
                self.plan.topic.clone(),
                self.plan.states.clone(),
                &job.record,
                job.attempt,
                reason,
                halts,
            );
            (hook, Box::new(letter))
        });
        self.hold_key(&job);
        self.afterwards.push(Afterwards::Buried {
            lane: job.lane,
            epoch,
            key: job.key.filter(|_| !halts),
            hook,
        });
        self.report_soon();
        if halts {
            self.halt(job);
        }
    }

    /// The key waits for an operator.
    pub(super) fn halt(&mut self, job: Job) {
        self.hold_key(&job);
        self.failing.remove(&job.offset);
        self.halted.insert(job.offset, (job.lane, job.key));
        if let Some(key) = job.key {
            self.head_fails(key, None);
        }
    }

    // -------------------------------------------------------------------------------------------------------------- journal

    pub(super) fn epoch(&self, lane: u16) -> Option<i32> {
        self.lanes.get(&lane).map(|lane| lane.epoch)
    }

    /// Notes what became of a message, for the next report.
    pub(super) fn note(&mut self, job: &Job, fate: Fate, due: Option<Instant>, error: Option<String>) {
        self.write(job, fate, due, error, None);
    }

    fn write(
        &mut self,
        job: &Job,
        fate: Fate,
        due: Option<Instant>,
        error: Option<String>,
        reason: Option<String>,
    ) {
        let Some(epoch) = self.epoch(job.lane).filter(|_| self.membership.is_some()) else {
            return;
        };
        self.journal.put(
            job.offset,
            Entry {
                lane: job.lane,
                epoch,
                fate,
                attempts: job.attempt,
                due: due.unwrap_or_else(Instant::now),
                failures: error
                    .map(|error| Failure {
                        attempt: job.attempt,
                        at: Utc::now(),
                        error,
                    })
                    .into_iter()
                    .collect(),
                reason,
                record: (!job.stored).then(|| job.record.clone()),
            },
        );
        self.dirty = true;
    }

    // ------------------------------------------------------------------------------------------------------------ adopting

    /// Takes over what the former owners of lanes left, by offset.
    pub(super) fn adopt(&mut self, held: Vec<Held>, parked: Vec<ParkedKey>) {
        for held in held {
            self.adopt_one(held);
        }
        for ParkedKey { key, parked } in parked {
            let vacant = !self.keys.contains_key(&key);
            self.keys.entry(key).or_default().parked = Some(parked);
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
            let known = self.failing.contains_key(&offset) || self.is_unrecorded(offset);
            if !known && self.lanes.contains_key(&held.lane) && !self.draining.contains_key(&held.lane) {
                self.adopt_one(held);
            }
        }
    }

    fn adopt_one(&mut self, held: Held) {
        let (offset, lane, state, attempts) =
            (held.message.offset.get(), held.lane, held.state, held.attempts);
        let due = Instant::now() + held.due_in;
        // Its key is its own.
        let was_halted = self.halted.remove(&offset);
        let Some(mut job) = self.stored_job(held) else {
            if let Some((_, Some(key))) = was_halted {
                self.release_key(key);
            }
            return;
        };
        match state {
            HeldState::Parked => {}
            HeldState::Released => {
                self.note(&job, Fate::Done, None, None);
                if let Some((_, Some(key))) = was_halted {
                    self.release_key(key);
                }
            }
            HeldState::Halted => match job.key.filter(|key| self.keys.contains_key(key)) {
                Some(key) => {
                    // Until its turn comes it is not looked up again.
                    self.failing.insert(offset, lane);
                    job.halted = true;
                    self.insert_successor(key, job);
                }
                None => self.halt(job),
            },
            HeldState::Redriven => {
                self.failing.insert(offset, lane);
                // No longer the operator's, and not tried yet.
                job.attempt = 0;
                self.note(&job, Fate::Retry, None, None);
                job.attempt = 1;
                match job.key {
                    Some(key) if was_halted.is_none() && self.keys.contains_key(&key) => {
                        self.insert_successor(key, job)
                    }
                    _ => {
                        self.hold_key(&job);
                        self.ready.push_back(job);
                    }
                }
            }
            HeldState::Retry => {
                self.failing.insert(offset, lane);
                self.resume(job, due);
            }
            HeldState::Trying => {
                self.failing.insert(offset, lane);
                job.suspect = true;
                if self.lanes.get(&lane).is_some_and(|lane| lane.crashes > 0) {
                    job.attempt = attempts;
                    self.died(job);
                } else {
                    // It was cancelled, or never began.
                    job.attempt = attempts.max(1);
                    self.resume(job, due);
                }
            }
        }
    }

    /// A process died while this attempt ran.
    fn died(&mut self, mut job: Job) {
        const ERROR: &str = "the process died while the handler ran";
        let since = *job.failing_since.get_or_insert_with(Instant::now);
        if let Some(why) = job.handler.retry.gives_up(job.attempt, since.elapsed()) {
            // A key that an earlier message holds is not this one's to let go.
            job.key = job.key.filter(|key| !self.keys.contains_key(key));
            return self.give_up(job, format!("{why}: {ERROR}"), ERROR.to_owned());
        }
        let due = Instant::now() + backoff(&job);
        let job = self.note_failure(job, due, ERROR.to_owned());
        self.resume(job, due);
    }

    /// As it was: holds its key until it is due, or stands behind the one that does.
    fn resume(&mut self, job: Job, due: Instant) {
        match job.key {
            Some(key) if self.keys.contains_key(&key) => self.insert_successor(key, job),
            _ => self.again_at(job, due),
        }
    }

    /// A message that has a row; `None` if no handler takes it, and then it is settled.
    pub(super) fn stored_job(&mut self, held: Held) -> Option<Job> {
        let (offset, lane) = (held.message.offset.get(), held.lane);
        match self.job(Record::alone(held.message), offset, lane) {
            Some(job) => Some(Job {
                attempt: held.attempts + 1,
                failing_since: held.failing_for.and_then(|span| Instant::now().checked_sub(span)),
                stored: true,
                limit: 1,
                ..job
            }),
            None => {
                if let Some(epoch) = self.epoch(lane) {
                    self.journal.put(
                        offset,
                        Entry {
                            lane,
                            epoch,
                            fate: Fate::Done,
                            attempts: held.attempts,
                            due: Instant::now(),
                            failures: Vec::new(),
                            reason: None,
                            record: None,
                        },
                    );
                    self.dirty = true;
                }
                None
            }
        }
    }
}

/// Before the next attempt of a message that failed.
fn wait_of(job: &Job, failure: &HandlerError) -> Duration {
    match failure.decision {
        Decision::RetryIn(wait) | Decision::Postpone(wait) => wait,
        _ => backoff(job),
    }
}

fn backoff(job: &Job) -> Duration {
    let chance = chance(job.record.message().seq, job.attempt);
    job.handler.retry.wait(job.attempt, chance)
}

/// Between 0 and 1, different for every message and attempt.
fn chance(seq: i64, attempt: u32) -> f64 {
    let mixed = (seq as u64)
        .wrapping_add(u64::from(attempt) << 40)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}
