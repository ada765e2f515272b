//! Running: when a message starts, and what its end means.

use std::panic::AssertUnwindSafe;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::task::JoinError;
use tracing::{info, warn};

use super::{Ended, Event, Executor, Job};
use crate::block::Record;
use crate::breaker::Allowed;
use crate::checkout::Checkout;
use crate::extract::Invocation;
use crate::handler::{HandlerError, Order, Outcome};
use crate::journal::Fate;
use crate::progress::{Counters, Intake};
use crate::settlement::{self, Desk, Fence, Verdict};

/// The wait before a transaction that could not begin is tried again.
const INFRASTRUCTURE_WAIT: Duration = Duration::from_millis(200);

impl Executor {
    /// A message that was read: runs it, or queues it behind its key or for want of room.
    pub(super) fn admit(&mut self, record: Record, offset: i64, lane: u16) {
        if let Some(seen) = &mut self.seen
            && !seen.is_new(offset, record.message().seq)
        {
            return;
        }
        let Some(job) = self.job(record, offset, lane) else {
            return;
        };
        if let Some(job) = self.queue_behind_its_key(job) {
            if self.running.len() >= self.plan.concurrency
                || !self.ready.is_empty()
                || self.breaker.is_open()
                || (self.throttle.is_limited() && !self.throttle.allows(Instant::now()))
            {
                self.unsettled.insert(offset, lane);
                self.hold_key(&job);
                self.ready.push_back(job);
            } else {
                self.start(job);
            }
        }
    }

    /// With the handler that takes it; `None` if none does and that is no error.
    pub(super) fn job(&self, record: Record, offset: i64, lane: u16) -> Option<Job> {
        let handler = match self.plan.router.find(record.message().message_type.as_deref()) {
            Some(handler) => handler.clone(),
            None => {
                Counters::add(&self.plan.counters.unknown);
                self.plan.unknown.clone()?
            }
        };
        let key = match self.plan.order {
            Order::Key => record.message().key_hash,
            Order::Topic => Some(0),
            Order::None => None,
        };
        let mut job = Job {
            record,
            handler,
            offset,
            lane,
            key,
            attempt: 1,
            failing_since: None,
            stored: false,
            suspect: false,
            halted: false,
            ready_since: None,
        };
        job.is_ready();
        Some(job)
    }

    /// Starts what is ready or due again; says whether there was anything.
    pub(super) fn start_ready(&mut self) -> bool {
        if !self.open {
            return false;
        }
        let now = Instant::now();
        match self.breaker.allowed(now) {
            Allowed::All => self.start_all(now),
            Allowed::Probe => self.start_probe(now),
            Allowed::Nothing => false,
        }
    }

    fn start_all(&mut self, now: Instant) -> bool {
        while let Some(job) = self.due_retry(now) {
            self.ready.push_back(job);
        }
        let mut budget = super::intake::INTAKE;
        while budget > 0 && self.has_room() && !self.breaker.is_open() && self.throttle.allows(now) {
            let Some(job) = self.next_ready() else { break };
            self.start(job);
            budget -= 1;
        }
        budget < super::intake::INTAKE
    }

    /// When so many fail that no more may, only what failed already runs.
    fn next_ready(&mut self) -> Option<Job> {
        if self.intake() != Intake::Full {
            return self.ready.pop_front();
        }
        let failed = self.ready.iter().position(|job| job.stored)?;
        self.ready.remove(failed)
    }

    /// One message, to see whether the handler works again.
    fn start_probe(&mut self, now: Instant) -> bool {
        if !self.has_room() || !self.throttle.allows(now) {
            return false;
        }
        let Some(job) = self.due_retry(now).or_else(|| self.ready.pop_front()) else {
            return false;
        };
        self.breaker.probes(job.offset);
        self.start(job);
        true
    }

    fn due_retry(&mut self, now: Instant) -> Option<Job> {
        let entry = self.retries.first_entry().filter(|entry| entry.key().0 <= now)?;
        let mut job = entry.remove();
        job.is_ready();
        Some(job)
    }

    /// A probe is due, and nothing that is in memory can be it.
    pub(super) fn wants_probe(&self) -> bool {
        let now = Instant::now();
        self.breaker.allowed(now) == Allowed::Probe
            && self.ready.is_empty()
            && self.retries.keys().next().is_none_or(|(due, _)| *due > now)
    }

    /// When something is to be started that waits only for the time.
    pub(super) fn next_start(&self, now: Instant) -> Option<Instant> {
        if !self.open {
            return None;
        }
        let throttled = self.throttle.ready_at();
        let next = || {
            let ready = throttled.filter(|_| !self.ready.is_empty() && self.has_room());
            let retry = self.retries.keys().next().map(|(due, _)| *due);
            let retry = retry.map(|due| throttled.map_or(due, |at| due.max(at)));
            [ready, retry].into_iter().flatten().min()
        };
        match self.breaker.allowed(now) {
            Allowed::All => next(),
            Allowed::Probe if self.has_room() => next(),
            Allowed::Probe => None,
            Allowed::Nothing => self.breaker.wakes_at(),
        }
    }

    fn has_room(&self) -> bool {
        self.running.len() < self.plan.concurrency
    }

    pub(super) fn start(&mut self, job: Job) {
        if self.has_expired(&job) {
            return self.expire(job);
        }
        self.throttle.spend();
        if self.is_suspect(&job) {
            return self.put_on_trial(job);
        }
        if job.handler.transactional {
            return match self.transaction(&job) {
                Ok(run) => self.spawn(job, run),
                Err(verdict) => self.concluded(job, verdict),
            };
        }
        let invocation = self.invocation(&job);
        let mut run = AssertUnwindSafe(job.handler.call(invocation)).catch_unwind();
        if self.inline_cost.allows() {
            let begun = Instant::now();
            let poll = run.poll_unpin(&mut Context::from_waker(Waker::noop()));
            self.inline_cost.spent(begun.elapsed());
            if let Poll::Ready(result) = poll {
                let outcome = result.unwrap_or_else(|panic| Err(panicked(panic)));
                return self.concluded(job, Verdict::from(outcome));
            }
        }
        let timeout = job.handler.timeout;
        self.spawn(job, in_time(timeout, run));
    }

    /// The whole run as a future, for one that must not begin here and now.
    pub(super) fn run_of(&mut self, job: &Job) -> Result<BoxFuture<'static, (Verdict, Option<Checkout>)>, Verdict> {
        if job.handler.transactional {
            return self.transaction(job).map(FutureExt::boxed);
        }
        let run = AssertUnwindSafe(job.handler.call(self.invocation(job))).catch_unwind();
        Ok(in_time(job.handler.timeout, run).boxed())
    }

    fn transaction(
        &mut self,
        job: &Job,
    ) -> Result<impl Future<Output = (Verdict, Option<Checkout>)> + Send + use<>, Verdict> {
        let Some(membership) = &self.membership else {
            return Err(Verdict::from(Err(HandlerError::retry(
                "a broadcast from memory has no Tx",
            ))));
        };
        let fence = Fence {
            consumer: membership.consumer,
            subscription: membership.subscription,
            lane: job.lane,
            epoch: self.epoch(job.lane).unwrap_or(-1),
            offset: job.offset,
            stored: job.stored,
        };
        let desk = Desk {
            pool: self.plan.pool.clone(),
            ready_since: job.ready_since,
            checkout: self.checkouts.pop(),
        };
        Ok(settlement::run(
            desk,
            fence,
            job.handler.clone(),
            self.invocation(job),
        ))
    }

    fn invocation(&self, job: &Job) -> Invocation {
        Invocation {
            topic: self.plan.topic.clone(),
            group: self.plan.group.clone(),
            record: job.record.clone(),
            attempt: job.attempt,
            states: self.plan.states.clone(),
            tx: None,
        }
    }

    pub(super) fn spawn(
        &mut self,
        job: Job,
        run: impl Future<Output = (Verdict, Option<Checkout>)> + Send + 'static,
    ) {
        if !job.stored {
            self.unsettled.insert(job.offset, job.lane);
        }
        self.hold_key(&job);
        if let Some(lane) = self.lanes.get_mut(&job.lane) {
            lane.running += 1;
        }
        let (offset, lane) = (job.offset, job.lane);
        let abort = self.tasks.spawn(async move {
            let (verdict, checkout) = run.await;
            Ended::Run {
                job,
                verdict,
                checkout,
            }
        });
        self.running.insert(offset, (abort, lane));
    }

    pub(super) fn ended(&mut self, ended: Result<Ended, JoinError>) {
        match ended {
            Ok(Ended::Run {
                job,
                verdict,
                checkout,
            }) => {
                // Dropped, it is the pool's again.
                self.checkouts.extend(checkout.filter(Checkout::may_stay));
                self.no_longer_runs(job.offset);
                self.concluded(job, verdict);
            }
            Ok(Ended::Loaded(loaded)) => self.loaded(loaded),
            // Handlers' panics are caught, so this one was aborted with its lane.
            Err(error) => {
                let id = error.id();
                let offset = self
                    .running
                    .iter()
                    .find(|(_, (abort, _))| abort.id() == id)
                    .map(|(offset, _)| *offset);
                if let Some(offset) = offset {
                    self.breaker.inconclusive(offset);
                    self.no_longer_runs(offset);
                }
            }
        }
    }

    fn no_longer_runs(&mut self, offset: i64) {
        if let Some((_, lane)) = self.running.remove(&offset)
            && let Some(lane) = self.lanes.get_mut(&lane)
        {
            lane.running -= 1;
        }
        self.trial_ended(offset);
    }

    /// A run has ended.
    pub(super) fn concluded(&mut self, job: Job, verdict: Verdict) {
        match verdict {
            Verdict::Settled => {
                Counters::add(&self.plan.counters.handled);
                self.works();
                self.settle(job);
            }
            Verdict::Failed(failure) => self.failed(job, failure),
            Verdict::Unavailable(error) => {
                warn!(group = %self.plan.group, topic = %self.plan.topic, error, "cannot run a transactional handler; trying again");
                self.breaker.inconclusive(job.offset);
                self.again(job, INFRASTRUCTURE_WAIT);
            }
            // Whether it committed is known only once the lane is claimed again, which shuts out a commit still on its way.
            Verdict::InDoubt(error) => {
                warn!(
                    group = %self.plan.group, topic = %self.plan.topic, offset = job.offset, error,
                    "lost the connection while committing; claiming the lane again to see what became of it"
                );
                self.breaker.inconclusive(job.offset);
                self.drain(job.lane);
            }
            Verdict::Stale => {
                self.breaker.inconclusive(job.offset);
                if let Some(membership) = &self.membership {
                    let _ = membership.events.send(Event::Stale);
                }
            }
        }
    }

    /// The handler does its work.
    pub(super) fn works(&mut self) {
        if self.breaker.succeeded() {
            info!(group = %self.plan.group, topic = %self.plan.topic, "the handler works again: the breaker is closed");
        }
    }

    pub(super) fn settle(&mut self, job: Job) {
        self.unsettled.remove(&job.offset);
        self.dirty = true;
        if job.stored {
            self.failing.remove(&job.offset);
            self.note(&job, Fate::Done, None, None);
        }
        if let Some(key) = job.key {
            self.release_key(key);
        }
    }
}

async fn in_time(
    timeout: Duration,
    run: impl Future<Output = Result<Outcome, Box<dyn std::any::Any + Send>>> + Send,
) -> (Verdict, Option<Checkout>) {
    let outcome = match tokio::time::timeout(timeout, run).await {
        Ok(result) => result.unwrap_or_else(|panic| Err(panicked(panic))),
        Err(_) => Err(timed_out(timeout)),
    };
    (Verdict::from(outcome), None)
}

pub(crate) fn panicked(panic: Box<dyn std::any::Any + Send>) -> HandlerError {
    let what = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    HandlerError::retry(format!("the handler panicked: {what}"))
}

pub(crate) fn timed_out(timeout: Duration) -> HandlerError {
    HandlerError::retry(format!(
        "the handler took longer than its timeout of {timeout:?} and was cancelled"
    ))
}

impl From<Outcome> for Verdict {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Ok(()) => Verdict::Settled,
            Err(failure) => Verdict::Failed(failure),
        }
    }
}
