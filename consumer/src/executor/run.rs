//! Running: when a message starts, and what its end means.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::task::Id;
use tracing::{info, warn};

use super::runs::{Ended, Joined, Running};
use super::{Event, Executor, Job, Jobs};
use crate::connections::Checkout;
use crate::executor::settlement::{self, Fence, Source, Verdict};
use crate::extract::Invocation;
use crate::handler::MessageOrder;
use crate::ids::{Epoch, Lane};
use crate::log::block::Record;
use crate::outcome::{HandlerError, Outcome, panicked, timed_out};
use crate::protocol::journal::Disposition;
use crate::protocol::progress::{Counters, Intake};

/// The wait before a transaction that could not begin is tried again.
const INFRASTRUCTURE_WAIT: Duration = Duration::from_millis(200);

impl Executor {
    /// A message that was read: runs it, or queues it behind its key or for want of room.
    pub(super) fn admit(&mut self, record: Record, offset: i64, lane: Lane) {
        if !self.reader.is_new(offset, record.message().id) {
            return;
        }
        let Some(mut job) = self.job(record, offset, lane, true) else {
            return;
        };
        let doubt = self.resolve(&mut job);
        if let Some(job) = self.queue_behind_its_key(job) {
            let job = match doubt {
                Some(_) => job,
                None => match self.if_its_turn(job) {
                    Some(job) => job,
                    None => return,
                },
            };
            if let Some(failure) = doubt {
                self.lanes.hold(offset, lane);
                self.failed(job, failure);
            } else if job.handler.batch > 1
                || !self.has_room()
                || !self.queue.is_empty()
                || self.admission.breaker.is_open()
                || (self.admission.throttle.is_limited() && !self.admission.throttle.allows(Instant::now()))
            {
                self.lanes.hold(offset, lane);
                self.hold_key(&job);
                self.queue.push(job);
            } else {
                self.start(job.into());
            }
        }
    }

    /// With the handler that takes it; `None` if no live instance has one, or its filter does not want it: then it is settled.
    pub(super) fn job(&self, record: Record, offset: i64, lane: Lane, counts: bool) -> Option<Job> {
        let found = match record.message().unreadable {
            None => self.plan.router.find(record.message().message_type.as_deref()),
            // Its type is not known either; any handler has the policy for what is given up.
            Some(_) => self.plan.router.handlers().next(),
        };
        let (handler, unknown) = match found {
            Some(handler) if self.passes(handler, &record, counts) => return None,
            Some(handler) => (handler.clone(), false),
            None if self.settles_unknown(&record) => return None,
            None => (self.plan.unknown.clone(), true),
        };
        let key = match self.plan.order {
            MessageOrder::Key => record.message().key_hash,
            MessageOrder::Topic => Some(0),
            MessageOrder::None => None,
        };
        let limit = match record.message().unreadable {
            None => handler.batch,
            Some(_) => 1,
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
            unknown,
            limit,
            ready_since: None,
        };
        job.is_ready();
        Some(job)
    }

    /// Starts what is ready or due again; says whether there was anything.
    pub(super) fn start_ready(&mut self) -> bool {
        if !self.admission.is_open() {
            return false;
        }
        let now = Instant::now();
        if !self.admission.breaker.is_open() {
            return self.start_all(now);
        }
        let failed = self.start_failed(now);
        self.start_probe(now) || failed
    }

    fn start_all(&mut self, now: Instant) -> bool {
        while let Some(job) = self.due_retry(now) {
            self.queue.push(job);
        }
        let mut budget = super::intake::INTAKE;
        while budget > 0
            && self.has_room()
            && !self.admission.breaker.is_open()
            && self.admission.throttle.allows(now)
        {
            let Some(jobs) = self.next_ready(now) else { break };
            budget = budget.saturating_sub(jobs.len());
            self.start(jobs);
        }
        budget < super::intake::INTAKE
    }

    /// When so many fail that no more may, only what failed already runs.
    fn next_ready(&mut self, now: Instant) -> Option<Jobs> {
        match self.intake() {
            Intake::Full => self.queue.pop_failed().map(Jobs::from),
            _ => self.next_jobs(now),
        }
    }

    /// With the breaker open, what failed before is due as its policy says: so it succeeds or is given up when it would be anyway.
    fn start_failed(&mut self, now: Instant) -> bool {
        while let Some(job) = self.due_retry(now) {
            self.queue.push(job);
        }
        let mut started = 0;
        while started < super::intake::INTAKE
            && self.has_room()
            && self.admission.breaker.is_open()
            && self.admission.throttle.allows(now)
            && let Some(job) = self.queue.pop_failed()
        {
            self.start(job.into());
            started += 1;
        }
        started > 0
    }

    /// One message that has not run yet, to see whether the handler works again.
    fn start_probe(&mut self, now: Instant) -> bool {
        if !self.admission.breaker.wants_probe(now)
            || self.failing.len() >= self.most_failing()
            || !self.has_room()
            || !self.admission.throttle.allows(now)
        {
            return false;
        }
        let Some(job) = self.queue.pop() else {
            return false;
        };
        info!(
            group = %self.plan.group, topic = %self.plan.topic, id = %job.record.message().id, offset = job.offset,
            "the breaker is open: trying this message"
        );
        self.admission.breaker.probes(job.offset);
        self.start(job.into());
        true
    }

    fn due_retry(&mut self, now: Instant) -> Option<Job> {
        loop {
            let mut job = self.queue.due(now)?;
            job.is_ready();
            if let Some(job) = self.if_its_turn(job) {
                return Some(job);
            }
        }
    }

    /// A probe is due, and nothing that is in memory can be it.
    pub(super) fn lacks_probe(&self) -> bool {
        self.admission.breaker.wants_probe(Instant::now())
            && self.failing.len() < self.most_failing()
            && self.queue.is_empty()
    }

    /// When something is to be started that waits only for the time.
    pub(super) fn next_start(&self, now: Instant) -> Option<Instant> {
        if !self.admission.is_open() {
            return None;
        }
        let throttled = self.admission.throttle.ready_at();
        let ready = throttled.filter(|_| !self.queue.is_empty());
        let is_open = self.admission.breaker.is_open();
        let ready = match is_open {
            true => ready.filter(|_| self.has_room()),
            false => ready
                .or_else(|| self.next_filled())
                .filter(|_| self.has_room() && self.intake() != Intake::Full),
        };
        let retry = self.queue.next_retry();
        let retry = retry.map(|due| throttled.map_or(due, |at| due.max(at)));
        // One that is due already waits for something else.
        let probe = self.admission.breaker.wakes_at().filter(|at| *at > now);
        [ready, retry, probe].into_iter().flatten().min()
    }

    fn has_room(&self) -> bool {
        self.runs.len() < self.plan.concurrency
    }

    pub(super) fn start(&mut self, jobs: Jobs) {
        // No message of a batch had expired when it was put together, and none is a suspect.
        let single = jobs.others.is_empty();
        if single && jobs.first.record.message().unreadable.is_some() {
            return self.bury_unread(jobs.first);
        }
        if single && self.has_expired(&jobs.first) {
            return self.expire(jobs.first);
        }
        self.admission.throttle.spend(jobs.len());
        if single && self.is_suspect(&jobs.first) {
            return self.put_in_quarantine(jobs.first);
        }
        if jobs.handler().transactional {
            let checkout = self.runs.checkout();
            return match self.transaction(&jobs, checkout) {
                Ok(run) => self.spawn(jobs, run),
                Err(verdict) => self.concluded(jobs, verdict),
            };
        }
        if jobs.handler().settles {
            return match self.settling(&jobs) {
                Ok(run) => self.spawn(jobs, run),
                Err(verdict) => self.concluded(jobs, verdict),
            };
        }
        let invocation = self.invocation(&jobs);
        let mut run = AssertUnwindSafe(jobs.handler().call(invocation)).catch_unwind();
        if self.admission.inline_cost.allows() {
            let begun = Instant::now();
            let poll = run.poll_unpin(&mut Context::from_waker(Waker::noop()));
            self.admission.inline_cost.spent(begun.elapsed());
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
        if jobs.handler().settles {
            return self.settling(jobs).map(FutureExt::boxed);
        }
        let run = AssertUnwindSafe(jobs.handler().call(self.invocation(jobs))).catch_unwind();
        Ok(in_time(jobs.handler().timeout, run).boxed())
    }

    fn transaction(
        &self,
        jobs: &Jobs,
        checkout: Option<Checkout>,
    ) -> Result<impl Future<Output = (Verdict, Option<Checkout>)> + Send + use<>, Verdict> {
        let (Some(fence), Some(transactions)) = (self.fence(jobs), &self.plan.transactions) else {
            return Err(Verdict::from(Err(HandlerError::retry(
                "a broadcast from memory has no Tx",
            ))));
        };
        let source = Source {
            share: transactions.share.clone(),
            statements: transactions.statements.clone(),
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

    /// In a transaction of the handler's own.
    fn settling(
        &self,
        jobs: &Jobs,
    ) -> Result<impl Future<Output = (Verdict, Option<Checkout>)> + Send + use<>, Verdict> {
        let Some(fence) = self.fence(jobs) else {
            return Err(Verdict::from(Err(HandlerError::retry(
                "a broadcast from memory has no Settlement",
            ))));
        };
        let run = settlement::run_own(
            self.plan.pool.clone(),
            fence,
            jobs.handler().clone(),
            self.invocation(jobs),
        );
        Ok(run.map(|verdict| (verdict, None)))
    }

    /// `None` for a broadcast from memory.
    fn fence(&self, jobs: &Jobs) -> Option<Fence> {
        let membership = self.session.membership.as_ref()?;
        Some(Fence {
            consumer: membership.consumer,
            subscription: membership.subscription,
            lanes: (jobs.lanes().into_iter())
                .map(|lane| (lane, self.lanes.epoch(lane).unwrap_or(Epoch::OF_NOBODY)))
                .collect(),
            messages: jobs.iter().map(|job| (job.lane, job.offset)).collect(),
            stored: jobs.iter().any(|job| job.stored),
        })
    }

    pub(super) fn invocation(&self, jobs: &Jobs) -> Invocation {
        Invocation {
            topic: self.plan.topic.clone(),
            group: self.plan.group.clone(),
            record: jobs.first.record.clone(),
            others: jobs.others.iter().map(|job| job.record.clone()).collect(),
            attempt: jobs.first.attempt,
            states: self.plan.states.clone(),
            tx: None,
            settlement: None,
            letter: None,
        }
    }

    pub(super) fn spawn(
        &mut self,
        jobs: Jobs,
        run: impl Future<Output = (Verdict, Option<Checkout>)> + Send + 'static,
    ) {
        for job in jobs.iter() {
            if !job.stored {
                self.lanes.hold(job.offset, job.lane);
            }
            self.hold_key(job);
            self.lanes.run_begins(job.lane);
        }
        self.runs.start(jobs, run);
    }

    pub(super) fn ended(&mut self, ended: Joined) {
        match ended {
            Ok((
                id,
                Ended::Run {
                    jobs,
                    verdict,
                    checkout,
                },
            )) => {
                self.runs.keep(checkout);
                self.no_longer_runs(id);
                self.concluded(jobs, verdict);
            }
            Ok((_, Ended::Loaded(loaded))) => self.loaded(loaded),
            // Handlers' panics are caught, so this one was aborted with its lane.
            Err(error) => {
                if let Some(first) = self.no_longer_runs(error.id()) {
                    self.admission.breaker.inconclusive(first);
                }
            }
        }
    }

    /// Gives the offset of the run's first message.
    fn no_longer_runs(&mut self, run: Id) -> Option<i64> {
        let Running { first, lanes, .. } = self.runs.take(run)?;
        for lane in lanes {
            self.lanes.run_ended(lane);
        }
        self.quarantined_ended(first);
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
                self.admission.breaker.inconclusive(offset);
                self.all_again(jobs, INFRASTRUCTURE_WAIT);
            }
            // Whether it committed is known only once the lane is claimed again, which shuts out a commit still on its way.
            Verdict::InDoubt(error) => {
                warn!(
                    group = %self.plan.group, topic = %self.plan.topic, offset, %error,
                    "it is not known whether the handler's transaction committed; its lane is claimed again to see, once what else runs of it has ended"
                );
                self.admission.breaker.inconclusive(offset);
                self.doubt(&jobs, &error);
                jobs.lanes().into_iter().for_each(|lane| self.drain(lane));
            }
            Verdict::Stale => {
                self.admission.breaker.inconclusive(offset);
                // It is not said which of a batch, and the others are to be handled here: by what the next claim finds.
                jobs.lanes().into_iter().for_each(|lane| self.drain(lane));
                if let Some(membership) = &self.session.membership {
                    let _ = membership.events.send(Event::Stale);
                }
            }
        }
    }

    /// The handler does its work.
    pub(super) fn works(&mut self) {
        if self.admission.breaker.succeeded() {
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
    pub(super) fn is_settled(&mut self, job: &Job) {
        self.reporter.mark();
        self.has_moved(job.lane);
        self.lanes.let_go(job.offset);
        if job.stored {
            self.failing.remove(job.offset);
            self.note(job, Disposition::Done, None, None);
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

impl From<Outcome> for Verdict {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Ok(()) => Verdict::Settled,
            Err(failure) => Verdict::Failed(failure),
        }
    }
}
