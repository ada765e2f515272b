//! Failing: when a message runs again, and when it is given up.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use chrono::Utc;
use postbox_core::text;
use tracing::{debug, error, warn};

use super::doubt::Doubts;
use super::report::Afterwards;
use super::{Executor, Job, Jobs};
use crate::clock::later;
use crate::extract::DeadLetter;
use crate::extract::Invocation;
use crate::handler::Telling;
use crate::handler::{Expired, Undecodable};
use crate::ids::Lane;
use crate::outcome::{Decision, HandlerError};
use crate::protocol::journal::{Disposition, Entry, Failure};
use crate::protocol::progress::Counters;

/// What has failed or was given up, and is remembered for it.
#[derive(Default)]
pub(super) struct Failing {
    /// Messages with a row of their own that run or will run again, with their lanes.
    rows: HashMap<i64, Lane>,
    /// Messages given up whose keys wait for an operator, with their lanes.
    halted: HashMap<i64, (Lane, Option<i32>)>,
    pub(super) doubts: Doubts,
}

impl Failing {
    /// How many have a row and will run again.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn has(&self, offset: i64) -> bool {
        self.rows.contains_key(&offset)
    }

    pub(super) fn insert(&mut self, offset: i64, lane: Lane) {
        self.rows.insert(offset, lane);
    }

    /// Says whether it was among them.
    pub(super) fn remove(&mut self, offset: i64) -> bool {
        self.rows.remove(&offset).is_some()
    }

    /// How many keys wait for an operator.
    pub(super) fn halted(&self) -> usize {
        self.halted.len()
    }

    fn halt(&mut self, job: &Job) {
        self.rows.remove(&job.offset);
        self.halted.insert(job.offset, (job.lane, job.key));
    }

    /// An operator has decided: the key that waited for it, if there is one; `None` if nothing did.
    pub(super) fn decided(&mut self, offset: i64) -> Option<Option<i32>> {
        self.halted.remove(&offset).map(|(_, key)| key)
    }

    /// All of a lane that has another owner.
    pub(super) fn forget(&mut self, lane: Lane) {
        self.rows.retain(|_, of| *of != lane);
        self.halted.retain(|_, (of, _)| *of != lane);
    }
}

impl Executor {
    /// A run has failed.
    pub(super) fn run_failed(&mut self, jobs: Jobs, failure: HandlerError) {
        let HandlerError { decision, reason } = failure;
        let failure = match decision {
            Decision::Unfit(unfit) => return self.run_without(jobs, unfit),
            Decision::OfEach(_) if jobs.handler().transactional || jobs.handler().settles => {
                HandlerError::retry(format!(
                    "a handler with a Tx or a Settlement cannot fail with some of its messages only, since what it wrote for the others is rolled back: {reason}"
                ))
            }
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
                (Some(key), _) => self.keys.insert(key, job),
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

    /// The handler cannot take these messages of a batch, which has not run: it runs without them.
    fn run_without(&mut self, jobs: Jobs, mut unfit: BTreeMap<i64, HandlerError>) {
        let mut keys = HashSet::new();
        let (mut fit, mut failed) = (Vec::new(), Vec::new());
        for mut job in jobs {
            let failure = unfit.remove(&job.offset);
            if failure.is_some() {
                // So that it does not come with the next batch either.
                job.limit = 1;
            }
            match (job.key.filter(|key| !keys.insert(*key)), failure) {
                (Some(key), _) => self.keys.insert(key, job),
                (None, Some(failure)) => failed.push((job, failure)),
                (None, None) => fit.push(job),
            }
        }
        self.run_again(fit);
        for (job, failure) in failed {
            self.failed(job, failure);
        }
    }

    pub(super) fn failed(&mut self, job: Job, failure: HandlerError) {
        let failure = by_policy(&job, failure);
        if let Decision::Retry | Decision::RetryIn(_) = failure.decision {
            // A type that nobody handles says nothing of the handlers.
            match job.unknown {
                true => self.admission.breaker.inconclusive(job.offset),
                false => self.counts_as_failure(job.offset, job.attempt),
            }
        }
        self.decide(job, failure);
    }

    /// To the breaker.
    fn counts_as_failure(&mut self, offset: i64, attempt: u32) {
        if self.admission.breaker.failed(offset, attempt, Instant::now()) {
            self.warn_open();
        }
    }

    /// What is to be done with a message that failed.
    pub(super) fn decide(&mut self, mut job: Job, failure: HandlerError) {
        let failure = by_policy(&job, failure);
        let wait = wait_of(&job, &failure);
        match failure.decision {
            Decision::Postpone(_) => {
                debug!(
                    group = %self.plan.group, topic = %self.plan.topic, handler = job.handler.name, id = %job.record.message().id,
                    offset = job.offset, reason = failure.reason, ?wait, "the handler postpones the message"
                );
                self.admission.breaker.inconclusive(job.offset);
                return self.again(job, wait);
            }
            Decision::Discard => {
                self.works();
                self.discards(&job, &failure.reason);
                return self.settle(job);
            }
            Decision::DeadLetter => {
                match job.unknown {
                    true => self.admission.breaker.inconclusive(job.offset),
                    false => self.works(),
                }
                Counters::add(&self.plan.counters.failed);
                let reason = format!("the handler gave it up: {}", failure.reason);
                return self.give_up(job, reason, failure.reason);
            }
            // It says nothing of the handler, which did not run.
            Decision::Undecodable => {
                self.admission.breaker.inconclusive(job.offset);
                Counters::add(&self.plan.counters.failed);
                let reason = format!("undecodable, so no further attempt can help: {}", failure.reason);
                return self.give_up(job, reason, failure.reason);
            }
            Decision::Retry | Decision::RetryIn(_) | Decision::OfEach(_) | Decision::Unfit(_) => {}
        }
        Counters::add(&self.plan.counters.failed);
        let failing_for = self.admission.moved.failing_for(&mut job);
        if self.session.membership.is_some()
            && let Some(why) = job.handler.retry.gives_up(job.attempt, failing_for)
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
            self.admission.breaker.inconclusive(offset);
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
            "everything fails: the breaker is open; what failed has its further attempts, and of the rest one message runs now and then, until one succeeds"
        );
    }

    /// Holds its key until the next attempt.
    fn retry(&mut self, job: Job, wait: Duration, error: String) {
        let due = later(Instant::now(), wait);
        let job = self.note_failure(job, due, error);
        self.again_at(job, due);
    }

    /// After a failure it gets a row of its own, which the lane passes.
    pub(super) fn note_failure(&mut self, mut job: Job, due: Instant, error: String) -> Job {
        if self.session.membership.is_some() {
            self.lanes.let_go(job.offset);
            self.failing.insert(job.offset, job.lane);
            self.note(&job, Disposition::Retry, Some(due), Some(error));
            job.stored = true;
            // It may stay long.
            job.record = job.record.detached();
        }
        job.attempt += 1;
        job.limit = 1;
        job
    }

    /// Runs once more as if it had not run.
    pub(super) fn again(&mut self, job: Job, wait: Duration) {
        self.again_at(job, later(Instant::now(), wait));
    }

    pub(super) fn all_again(&mut self, jobs: Jobs, wait: Duration) {
        for job in self.take_apart(jobs) {
            self.again(job, wait);
        }
    }

    pub(super) fn again_at(&mut self, job: Job, due: Instant) {
        if !job.stored {
            self.lanes.hold(job.offset, job.lane);
        }
        if self.lanes.is_draining(job.lane) || self.admission.is_stopping() {
            return;
        }
        self.hold_key(&job);
        let failing_key = job.key.filter(|_| job.stored);
        self.queue.retry(due, job);
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
        self.admission.breaker.inconclusive(job.offset);
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

    /// What cannot be read cannot be read later either, so there is no other attempt.
    pub(super) fn bury_unread(&mut self, mut job: Job) {
        let why = job.record.message().unreadable.clone().unwrap_or_default();
        Counters::add(&self.plan.counters.failed);
        self.admission.breaker.inconclusive(job.offset);
        job.attempt -= 1;
        let halts = job.handler.retry.halts() && job.key.is_some();
        self.bury(
            job,
            text::clean(format_args!("it cannot be handled: {why}")),
            None,
            halts,
        );
    }

    /// To the dead letters. Its key goes on, or waits, as the handler's policy says.
    pub(super) fn give_up(&mut self, job: Job, reason: String, last_error: String) {
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
        let Some(epoch) = self
            .lanes
            .epoch(job.lane)
            .filter(|_| self.session.membership.is_some())
        else {
            // A broadcast from memory has nowhere to put it.
            return self.settle(job);
        };
        let disposition = if halts {
            Disposition::Halted
        } else {
            Disposition::Dead
        };
        self.lanes.let_go(job.offset);
        self.failing.remove(job.offset);
        self.write(&job, disposition, None, last_error, Some(reason.clone()));
        let telling = job.handler.on_dead_letter.clone().map(|hook| {
            let letter = DeadLetter::new(
                self.plan.group.clone(),
                self.plan.topic.clone(),
                self.plan.states.clone(),
                &job.record,
                job.attempt,
                reason,
                halts,
            );
            Box::new(Telling {
                hook,
                invocation: Invocation {
                    letter: Some(Box::new(letter)),
                    ..self.invocation(&job.clone().into())
                },
                timeout: job.handler.timeout,
            })
        });
        self.hold_key(&job);
        self.reporter.then(Afterwards::Buried {
            lane: job.lane,
            epoch,
            key: job.key.filter(|_| !halts),
            telling,
        });
        self.reporter.hurry();
        if halts {
            self.halt(job);
        }
    }

    /// The key waits for an operator.
    pub(super) fn halt(&mut self, job: Job) {
        self.hold_key(&job);
        self.failing.halt(&job);
        if let Some(key) = job.key {
            self.head_fails(key, None);
        }
    }

    /// Notes what became of a message, for the next report.
    pub(super) fn note(
        &mut self,
        job: &Job,
        disposition: Disposition,
        due: Option<Instant>,
        error: Option<String>,
    ) {
        self.write(job, disposition, due, error, None);
    }

    fn write(
        &mut self,
        job: &Job,
        disposition: Disposition,
        due: Option<Instant>,
        error: Option<String>,
        reason: Option<String>,
    ) {
        let Some(epoch) = self
            .lanes
            .epoch(job.lane)
            .filter(|_| self.session.membership.is_some())
        else {
            return;
        };
        let failure = error.map(|error| Failure {
            attempt: job.attempt,
            at: Utc::now(),
            error,
        });
        let mut entry = Entry::new(job.lane, epoch, disposition, job.attempt);
        entry.due = due.unwrap_or(entry.due);
        entry.failures.extend(failure);
        entry.reason = reason;
        entry.record = (!job.stored).then(|| job.record.clone());
        self.reporter.note(job.offset, entry);
    }
}

/// What the handler's options say of a payload that it cannot understand.
fn by_policy(job: &Job, mut failure: HandlerError) -> HandlerError {
    if matches!(failure.decision, Decision::Undecodable) && job.handler.undecodable == Undecodable::Retry {
        failure.decision = Decision::Retry;
    }
    failure
}

/// Before the next attempt of a message that failed.
fn wait_of(job: &Job, failure: &HandlerError) -> Duration {
    match failure.decision {
        Decision::RetryIn(wait) | Decision::Postpone(wait) => wait,
        _ => backoff(job),
    }
}

pub(super) fn backoff(job: &Job) -> Duration {
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
