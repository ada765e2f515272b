//! Running: when a message starts, and what its end means.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::task::{Id, JoinError};
use tracing::{info, warn};

use super::{Ended, Event, Executor, Job, Jobs, Running};
use crate::block::Record;
use crate::breaker::Allowed;
use crate::checkout::Checkout;
use crate::extract::Invocation;
use crate::handler::{HandlerError, Order, Outcome};
use crate::journal::Fate;
use crate::progress::{Counters, Intake};
use crate::settlement::{self, Fence, Source, Verdict};

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
            if job.handler.batch > 1
                || self.running.len() >= self.plan.concurrency
                || !self.ready.is_empty()
                || self.breaker.is_open()
                || (self.throttle.is_limited() && !self.throttle.allows(Instant::now()))
            {
                self.unsettled.insert(offset, lane);
                self.hold_key(&job);
                self.ready.push_back(job);
            } else {
                self.start(job.into());
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
        let limit = handler.batch;
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
            limit,
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
            let Some(jobs) = self.next_ready(now) else { break };
            budget = budget.saturating_sub(jobs.len());
            self.start(jobs);
        }
        budget < super::intake::INTAKE
    }

    /// When so many fail that no more may, only what failed already runs.
    fn next_ready(&mut self, now: Instant) -> Option<Jobs> {
        match self.intake() {
            Intake::Full => self.ready.pop_failed().map(Jobs::from),
            _ => self.next_jobs(now),
        }
    }

    /// One message, to see whether the handler works again.
    fn start_probe(&mut self, now: Instant) -> bool {
        if !self.has_room() || !self.throttle.allows(now) {
            return false;
        }
        let Some(job) = self.due_retry(now).or_else(|| self.ready.pop()) else {
            return false;
        };
        self.breaker.probes(job.offset);
        self.start(job.into());
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
            let ready = throttled.filter(|_| !self.ready.is_empty());
            let ready = ready
                .or_else(|| self.next_filled())
                .filter(|_| self.has_room() && self.intake() != Intake::Full);
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

    pub(super) fn start(&mut self, jobs: Jobs) {
        // No message of a batch had expired when it was put together, and none is a suspect.
        let single = jobs.others.is_empty();
        if single && self.has_expired(&jobs.first) {
            return self.expire(jobs.first);
        }
        self.throttle.spend(jobs.len());
        if single && self.is_suspect(&jobs.first) {
            return self.put_on_trial(jobs.first);
        }
        if jobs.handler().transactional {
            let checkout = self.checkouts.pop().filter(Checkout::may_stay);
            return match self.transaction(&jobs, checkout) {
                Ok(run) => self.spawn(jobs, run),
                Err(verdict) => self.concluded(jobs, verdict),
            };
        }
        let invocation = self.invocation(&jobs);
        let mut run = AssertUnwindSafe(jobs.handler().call(invocation)).catch_unwind();
        if self.inline_cost.allows() {
            let begun = Instant::now();
            let poll = run.poll_unpin(&mut Context::from_waker(Waker::noop()));
            self.inline_cost.spent(begun.elapsed());
            if let Poll::Ready(result) = poll {
                let outcome = result.unwrap_or_else(|panic| Err(panicked(panic)));
                return self.concluded(jobs, Verdict::from(outcome));
            }
        }
        let timeout = jobs.handler().timeout;
        self.spawn(jobs, in_time(timeout, run));
    }

    /// The whole run as a future, for one that must not begin here and now.
    pub(super) fn run_of(
        &self,
        jobs: &Jobs,
    ) -> Result<BoxFuture<'static, (Verdict, Option<Checkout>)>, Verdict> {
        if jobs.handler().transactional {
            // It may wait for long: not with a connection.
            return self.transaction(jobs, None).map(FutureExt::boxed);
        }
        let run = AssertUnwindSafe(jobs.handler().call(self.invocation(jobs))).catch_unwind();
        Ok(in_time(jobs.handler().timeout, run).boxed())
    }

    fn transaction(
        &self,
        jobs: &Jobs,
        checkout: Option<Checkout>,
    ) -> Result<impl Future<Output = (Verdict, Option<Checkout>)> + Send + use<>, Verdict> {
        let Some(membership) = &self.membership else {
            return Err(Verdict::from(Err(HandlerError::retry(
                "a broadcast from memory has no Tx",
            ))));
        };
        let fence = Fence {
            consumer: membership.consumer,
            subscription: membership.subscription,
            lanes: (jobs.lanes().into_iter())
                .map(|lane| (lane, self.epoch(lane).unwrap_or(-1)))
                .collect(),
            messages: jobs.iter().map(|job| (job.lane, job.offset)).collect(),
            stored: jobs.first.stored,
        };
        let source = Source {
            pool: self.plan.pool.clone(),
            ready_since: jobs.iter().filter_map(|job| job.ready_since).max(),
            checkout,
        };
        Ok(settlement::run(
            source,
            fence,
            jobs.handler().clone(),
            self.invocation(jobs),
        ))
    }

    fn invocation(&self, jobs: &Jobs) -> Invocation {
        Invocation {
            topic: self.plan.topic.clone(),
            group: self.plan.group.clone(),
            record: jobs.first.record.clone(),
            others: jobs.others.iter().map(|job| job.record.clone()).collect(),
            attempt: jobs.first.attempt,
            states: self.plan.states.clone(),
            tx: None,
        }
    }

    pub(super) fn spawn(
        &mut self,
        jobs: Jobs,
        run: impl Future<Output = (Verdict, Option<Checkout>)> + Send + 'static,
    ) {
        for job in jobs.iter() {
            if !job.stored {
                self.unsettled.insert(job.offset, job.lane);
            }
            self.hold_key(job);
            if let Some(lane) = self.lanes.get_mut(&job.lane) {
                lane.running += 1;
            }
        }
        let first = jobs.first.offset;
        let lanes = jobs.iter().map(|job| job.lane).collect();
        let abort = self.tasks.spawn(async move {
            let (verdict, checkout) = run.await;
            Ended::Run {
                jobs,
                verdict,
                checkout,
            }
        });
        self.running.insert(abort.id(), Running { abort, first, lanes });
    }

    pub(super) fn ended(&mut self, ended: Result<(Id, Ended), JoinError>) {
        match ended {
            Ok((
                id,
                Ended::Run {
                    jobs,
                    verdict,
                    checkout,
                },
            )) => {
                // Dropped, it is the pool's again.
                self.checkouts.extend(checkout.filter(Checkout::may_stay));
                self.no_longer_runs(id);
                self.concluded(jobs, verdict);
            }
            Ok((_, Ended::Loaded(loaded))) => self.loaded(loaded),
            // Handlers' panics are caught, so this one was aborted with its lane.
            Err(error) => {
                if let Some(first) = self.no_longer_runs(error.id()) {
                    self.breaker.inconclusive(first);
                }
            }
        }
    }

    /// Gives the offset of the run's first message.
    fn no_longer_runs(&mut self, run: Id) -> Option<i64> {
        let Running { first, lanes, .. } = self.running.remove(&run)?;
        for lane in lanes {
            if let Some(lane) = self.lanes.get_mut(&lane) {
                lane.running -= 1;
            }
        }
        self.trial_ended(first);
        Some(first)
    }

    /// A run has ended.
    pub(super) fn concluded(&mut self, jobs: Jobs, verdict: Verdict) {
        let offset = jobs.first.offset;
        match verdict {
            Verdict::Settled => {
                Counters::add_all(&self.plan.counters.handled, jobs.len());
                self.works();
                self.settle_all(jobs);
            }
            Verdict::Failed(failure) => self.run_failed(jobs, failure),
            Verdict::Unavailable(error) => {
                warn!(group = %self.plan.group, topic = %self.plan.topic, error, "cannot run a transactional handler; trying again");
                self.breaker.inconclusive(offset);
                self.all_again(jobs, INFRASTRUCTURE_WAIT);
            }
            // Whether it committed is known only once the lane is claimed again, which shuts out a commit still on its way.
            Verdict::InDoubt(error) => {
                warn!(
                    group = %self.plan.group, topic = %self.plan.topic, offset, error,
                    "lost the connection while committing; claiming the lane again to see what became of it"
                );
                self.breaker.inconclusive(offset);
                jobs.lanes().into_iter().for_each(|lane| self.drain(lane));
            }
            Verdict::Stale => {
                self.breaker.inconclusive(offset);
                // It is not said which of a batch, and the others are to be handled here: by what the next claim finds.
                jobs.lanes().into_iter().for_each(|lane| self.drain(lane));
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
        self.settle_all(job.into());
    }

    fn settle_all(&mut self, jobs: Jobs) {
        match jobs.others.is_empty() {
            true => {
                self.is_settled(&jobs.first);
                jobs.first.key.into_iter().for_each(|key| self.release_key(key));
            }
            false => self.settle_each(jobs.iter(), &HashSet::new()),
        }
    }

    /// A key goes on when all its messages of the run are settled, and not if it is `held` by one that failed.
    pub(super) fn settle_each<'a>(&mut self, jobs: impl Iterator<Item = &'a Job>, held: &HashSet<i32>) {
        let mut keys = HashSet::new();
        for job in jobs {
            self.is_settled(job);
            keys.extend(job.key);
        }
        keys.difference(held).for_each(|key| self.release_key(*key));
    }

    /// Its key is still held.
    fn is_settled(&mut self, job: &Job) {
        self.dirty = true;
        self.unsettled.remove(&job.offset);
        if job.stored {
            self.failing.remove(&job.offset);
            self.note(job, Fate::Done, None, None);
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
