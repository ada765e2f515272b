//! Runs the messages of one subscription: reads, keeps the order of keys, runs handlers, settles.
//!
//! One task owns all the state, so there is no lock on the way of a message. A handler that finishes at its first poll costs no task; one that
//! waits becomes a task of its own. See ARCHITECTURE.md, "The executor".

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture as LocalBoxFuture;
use sqlx::PgPool;
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{debug, error, warn};

use crate::block::{Block, Entry, Record};
use crate::extract::Invocation;
use crate::handler::{Decision, HandlerError, Order, Outcome};
use crate::lane::{OwnedLane, lane_of};
use crate::progress::{Counters, LanePosition, Lease, Progress, Snapshot};
use crate::replay::SeenTail;
use crate::router::{Handler, Router};
use crate::settlement::{self, Fence, Verdict};
use crate::state::States;
use crate::topic_log::{Interest, TopicLog};

/// Messages taken in before the executor looks at everything else again.
const INTAKE: usize = 256;
/// How often progress is told under load.
const REPORT_EVERY: Duration = Duration::from_millis(50);
/// A handler whose first poll is slower than this on average is given a task from the start, so that it can use other cores.
const INLINE_LIMIT: Duration = Duration::from_micros(50);
/// The wait before a transaction that could not begin is tried again.
const INFRASTRUCTURE_WAIT: Duration = Duration::from_millis(200);

/// What a subscription is, for as long as the process runs.
pub(crate) struct Plan {
    pub(crate) group: Arc<str>,
    pub(crate) topic: Arc<str>,
    pub(crate) order: Order,
    pub(crate) lanes: u16,
    pub(crate) concurrency: usize,
    /// Most messages taken in and not settled.
    pub(crate) window: usize,
    pub(crate) router: Router,
    /// Runs for messages of a type that no handler takes; `None`: they are settled and counted.
    pub(crate) unknown: Option<Arc<Handler>>,
    pub(crate) states: Arc<States>,
    pub(crate) pool: PgPool,
    pub(crate) counters: Counters,
}

/// From the session to an executor.
pub(crate) enum Command {
    /// Lanes that were just claimed.
    Claimed(Vec<(u16, OwnedLane)>),
    /// Give these up once nothing of them runs.
    Release(Vec<u16>),
    /// These belong to somebody else: stop at once.
    Revoke(Vec<u16>),
    /// Look whether offsets were given anew (broadcast from memory).
    Resync,
    /// Take nothing in any more, let finish what runs for at most this long, and end.
    Stop(Duration),
}

/// From an executor to the session.
pub(crate) enum Event {
    /// Nothing of these lanes runs here any more; the snapshot is where they stand.
    Released { subscription: i32, snapshot: Snapshot },
    /// A lane turned out to have another owner.
    Stale,
}

/// What ties an executor to the database: its absence makes it a broadcast from memory.
#[derive(Clone)]
pub(crate) struct Membership {
    pub(crate) consumer: i32,
    pub(crate) subscription: i32,
    pub(crate) lease: Arc<Lease>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) events: mpsc::UnboundedSender<Event>,
}

pub(crate) struct Executor {
    plan: Arc<Plan>,
    log: Arc<TopicLog>,
    head: watch::Receiver<i64>,
    membership: Option<Membership>,
    commands: mpsc::UnboundedReceiver<Command>,
    interest: Arc<Interest>,
    lane_count: u16,
    lanes: HashMap<u16, OwnedLane>,
    /// Lanes to be released once nothing of them runs, with the offset up to which they were taken in.
    draining: HashMap<u16, i64>,
    streams: Vec<Stream>,
    /// Keys of which a message runs or waits for its next attempt, with their successors.
    keys: HashMap<i32, VecDeque<Job>>,
    /// May run as soon as there is room.
    ready: VecDeque<Job>,
    /// Failed, by the time of their next attempt.
    retries: BTreeMap<(Instant, i64), Job>,
    /// Taken in and not settled, with their lanes.
    unsettled: BTreeMap<i64, u16>,
    tasks: JoinSet<Finished>,
    running: HashMap<i64, (AbortHandle, u16)>,
    reading: Option<Reading>,
    inline_cost: InlineCost,
    seen: Option<SeenTail>,
    dirty: bool,
    reported: Instant,
    stop_by: Option<Instant>,
}

/// Lanes that are read together.
struct Stream {
    /// The next offset to take in.
    next: i64,
    lanes: HashSet<u16>,
    block: Option<Arc<Block>>,
    /// Nothing is there at `next` as of the last read.
    at_head: bool,
}

struct Reading {
    from: i64,
    /// The head that was known when it began.
    head: i64,
    result: LocalBoxFuture<'static, Result<Option<Arc<Block>>, Arc<postbox::Error>>>,
    /// A failed read waits before the next.
    failures: u32,
}

#[derive(Clone)]
struct Job {
    record: Record,
    handler: Arc<Handler>,
    offset: i64,
    lane: u16,
    key: Option<i32>,
    attempt: u32,
}

struct Finished {
    job: Job,
    verdict: Verdict,
}

impl Executor {
    /// `lanes` is how many the subscription has, which was fixed when it was made.
    pub(crate) fn new(
        plan: Arc<Plan>,
        lanes: u16,
        log: Arc<TopicLog>,
        membership: Option<Membership>,
        commands: mpsc::UnboundedReceiver<Command>,
    ) -> Self {
        let interest = Arc::new(Interest::new(lanes));
        log.register(&interest);
        Self {
            head: log.head(),
            seen: membership.is_none().then(SeenTail::default),
            plan,
            log,
            membership,
            commands,
            interest,
            lane_count: lanes,
            lanes: HashMap::new(),
            draining: HashMap::new(),
            streams: Vec::new(),
            keys: HashMap::new(),
            ready: VecDeque::new(),
            retries: BTreeMap::new(),
            unsettled: BTreeMap::new(),
            tasks: JoinSet::new(),
            running: HashMap::new(),
            reading: None,
            inline_cost: InlineCost::default(),
            dirty: false,
            reported: Instant::now(),
            stop_by: None,
        }
    }

    /// Runs until it is told to stop; what it owned is in the last snapshot.
    pub(crate) async fn run(mut self) {
        loop {
            let progressed = if self.may_run() {
                let started = self.start_ready();
                self.take_in() || started
            } else {
                false
            };
            self.release_drained();
            self.report();
            if let Some(by) = self.stop_by
                && (self.tasks.is_empty() || Instant::now() >= by)
            {
                return self.end().await;
            }
            if progressed {
                while let Ok(command) = self.commands.try_recv() {
                    self.obey(command).await;
                }
                while let Some(finished) = self.tasks.try_join_next() {
                    self.finished(finished);
                }
                self.begin_read();
                tokio::task::yield_now().await;
                continue;
            }
            self.begin_read();
            self.wait().await;
        }
    }

    /// Waits until something can have changed.
    async fn wait(&mut self) {
        let wake = self.next_wake();
        let reading = async {
            match &mut self.reading {
                Some(reading) => (&mut reading.result).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            command = self.commands.recv() => match command {
                Some(command) => self.obey(command).await,
                // The session is gone without a word.
                None => self.stop_by = Some(Instant::now()),
            },
            Some(finished) = self.tasks.join_next(), if !self.tasks.is_empty() => self.finished(finished),
            result = reading => self.read_done(result),
            changed = self.head.changed() => {
                if changed.is_ok() {
                    let head = *self.head.borrow_and_update();
                    for stream in &mut self.streams {
                        stream.at_head &= stream.next >= head;
                    }
                }
            }
            () = sleep_until(wake) => {}
        }
    }

    fn next_wake(&self) -> Option<Instant> {
        let retry = self.retries.keys().next().map(|(at, _)| *at);
        let report = self.dirty.then(|| self.reported + REPORT_EVERY);
        // Without a valid lease nothing is due; the session extends it or ends this executor.
        let lease = (!self.lease_is_valid()).then(|| Instant::now() + Duration::from_millis(20));
        let retry = retry.filter(|_| lease.is_none());
        [retry, report, lease, self.stop_by].into_iter().flatten().min()
    }

    fn lease_is_valid(&self) -> bool {
        self.membership
            .as_ref()
            .is_none_or(|membership| membership.lease.is_valid())
    }

    fn may_run(&self) -> bool {
        self.stop_by.is_none() && self.lease_is_valid()
    }

    // ------------------------------------------------------------------------------------------------------------ commands

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Claimed(lanes) => self.claimed(lanes),
            Command::Release(lanes) => {
                for lane in lanes {
                    self.drain(lane);
                }
            }
            Command::Revoke(lanes) => self.revoke(&lanes).await,
            Command::Resync => self.resync().await,
            Command::Stop(grace) => {
                self.stop_by = Some(Instant::now() + grace);
                self.forget_queued(|_| true);
            }
        }
    }

    fn claimed(&mut self, lanes: Vec<(u16, OwnedLane)>) {
        for (number, lane) in lanes {
            let next = lane
                .pending
                .iter()
                .copied()
                .min()
                .map_or(lane.cut, |least| least.min(lane.cut));
            self.interest.set(number, true);
            self.lanes.insert(number, lane);
            match self.streams.iter_mut().find(|stream| stream.next == next) {
                Some(stream) => {
                    stream.lanes.insert(number);
                }
                None => self.streams.push(Stream {
                    next,
                    lanes: HashSet::from([number]),
                    block: None,
                    at_head: false,
                }),
            }
        }
        self.dirty = true;
    }

    /// Stops taking in a lane's messages and forgets those that do not run yet.
    fn drain(&mut self, lane: u16) {
        for stream in &mut self.streams {
            if stream.lanes.remove(&lane) {
                self.draining.insert(lane, stream.next);
            }
        }
        self.streams.retain(|stream| !stream.lanes.is_empty());
        self.interest.set(lane, false);
        self.forget_queued(|job| job.lane == lane);
    }

    /// Forgets jobs that wait; they stay unsettled.
    fn forget_queued(&mut self, forget: impl Fn(&Job) -> bool) {
        self.ready.retain(|job| !forget(job));
        self.retries.retain(|_, job| !forget(job));
        self.plan
            .counters
            .retrying
            .store(self.retries.len() as u64, Ordering::Relaxed);
        for successors in self.keys.values_mut() {
            successors.retain(|job| !forget(job));
        }
    }

    fn release_drained(&mut self) {
        if self.draining.is_empty() {
            return;
        }
        let Some(membership) = self.membership.clone() else {
            return;
        };
        let done: Vec<u16> = self
            .draining
            .keys()
            .copied()
            .filter(|lane| self.lanes.get(lane).is_none_or(|lane| lane.running == 0))
            .collect();
        if done.is_empty() {
            return;
        }
        let snapshot = self.snapshot(|lane| done.contains(&lane));
        for lane in done {
            self.forget_lane(lane);
        }
        // The session outlives its executors.
        let _ = membership.events.send(Event::Released {
            subscription: membership.subscription,
            snapshot,
        });
    }

    /// Stops everything of lanes that have another owner.
    async fn revoke(&mut self, lanes: &[u16]) {
        self.forget_queued(|job| lanes.contains(&job.lane));
        for (abort, lane) in self.running.values() {
            if lanes.contains(lane) {
                abort.abort();
            }
        }
        // Until the aborted are gone: a lane may come back, and no key may then run twice.
        while self.running.values().any(|(_, lane)| lanes.contains(lane)) {
            match self.tasks.join_next().await {
                Some(finished) => self.finished(finished),
                None => break,
            }
        }
        for stream in &mut self.streams {
            stream.lanes.retain(|lane| !lanes.contains(lane));
        }
        self.streams.retain(|stream| !stream.lanes.is_empty());
        for lane in lanes {
            self.forget_lane(*lane);
        }
    }

    fn forget_lane(&mut self, lane: u16) {
        self.draining.remove(&lane);
        self.lanes.remove(&lane);
        self.interest.set(lane, false);
        self.unsettled.retain(|_, of| *of != lane);
        // Nothing of its keys runs or waits here any more.
        let lanes = self.lane_count;
        self.keys.retain(|key, _| lane_of(0, Some(*key), lanes) != lane);
    }

    async fn resync(&mut self) {
        let Some(seen) = &mut self.seen else { return };
        let next = self.streams.first().map_or(0, |stream| stream.next);
        match seen.resync(&self.log, next).await {
            Ok(resume) => {
                for stream in &mut self.streams {
                    stream.next = resume;
                    stream.block = None;
                    stream.at_head = false;
                }
                self.reading = None;
            }
            Err(error) => {
                warn!(topic = %self.plan.topic, %error, "cannot check the log after a reconnect; trusting it")
            }
        }
    }

    /// Ends: what still runs is cancelled, and the session gets the last snapshot.
    async fn end(mut self) {
        if !self.tasks.is_empty() {
            warn!(
                group = %self.plan.group, topic = %self.plan.topic, running = self.tasks.len(),
                "handlers did not finish within the shutdown grace and are cancelled; their messages are delivered again"
            );
        }
        self.tasks.shutdown().await;
        if let Some(membership) = self.membership.take() {
            membership.progress.put(self.snapshot(|_| true));
        }
    }

    // -------------------------------------------------------------------------------------------------------------- reading

    /// Starts a read for a stream that needs a block.
    fn begin_read(&mut self) {
        if self.reading.is_some() || !self.may_run() || self.room() == 0 {
            return;
        }
        let Some(stream) = self
            .streams
            .iter()
            .find(|stream| stream.block.is_none() && !stream.at_head)
        else {
            return;
        };
        self.read(stream.next, false, 0);
    }

    fn read(&mut self, from: i64, again: bool, failures: u32) {
        let log = self.log.clone();
        let wait = Duration::from_millis(50) * failures.min(40);
        let result = async move {
            tokio::time::sleep(wait).await;
            if again {
                log.read_again(from).await
            } else {
                log.read(from).await
            }
        };
        let head = *self.head.borrow_and_update();
        self.reading = Some(Reading {
            from,
            head,
            result: result.boxed(),
            failures,
        });
    }

    fn read_done(&mut self, result: Result<Option<Arc<Block>>, Arc<postbox::Error>>) {
        let Some(Reading {
            from, head, failures, ..
        }) = self.reading.take()
        else {
            return;
        };
        match result {
            Ok(Some(block)) => {
                let Some(stream) = self
                    .streams
                    .iter_mut()
                    .find(|s| s.next == from && s.block.is_none())
                else {
                    return;
                };
                if block.base > stream.next {
                    warn!(
                        topic = %self.plan.topic, group = %self.plan.group, from = stream.next, to = block.base,
                        "offsets are no longer retained and are skipped"
                    );
                    stream.next = block.base;
                }
                if block.end() < *self.head.borrow() {
                    self.log.prefetch(block.end());
                }
                stream.block = Some(block);
            }
            Ok(None) => {
                for stream in self.streams.iter_mut().filter(|stream| stream.next == from) {
                    // A head that was known before the read and is not there was lost in a crash; a newer one wakes.
                    stream.at_head = true;
                    debug!(topic = %self.plan.topic, next = stream.next, head, "at the head");
                }
            }
            Err(error) => {
                warn!(topic = %self.plan.topic, %error, "cannot read; trying again");
                self.read(from, false, failures + 1);
            }
        }
    }

    fn room(&self) -> usize {
        self.plan.window.saturating_sub(self.unsettled.len())
    }

    /// Takes in messages of blocks that were read; says whether there were any.
    fn take_in(&mut self) -> bool {
        let mut taken = false;
        for n in 0..self.streams.len() {
            taken |= self.take_in_stream(n);
        }
        if self.streams.len() > 1 {
            self.merge_streams();
        }
        taken
    }

    fn take_in_stream(&mut self, n: usize) -> bool {
        let Some(block) = self.streams[n].block.clone() else {
            return false;
        };
        // A stream that catches up ends where another one is, and goes on with it.
        let next = self.streams[n].next;
        let limit = self
            .streams
            .iter()
            .map(|other| other.next)
            .filter(|other| *other > next)
            .min()
            .unwrap_or(i64::MAX);
        let end = block.end().min(limit);
        let mut taken = 0;
        while taken < INTAKE && self.room() > 0 {
            let offset = self.streams[n].next;
            if offset >= end {
                break;
            }
            let index = (offset - block.base) as usize;
            let lane = lane_of(offset, block.key_hash(index), self.lane_count);
            if self.streams[n].lanes.contains(&lane) && self.is_due(lane, offset) {
                if let Entry::Unread(_) = &block.entries[index] {
                    // Read before the lane was claimed.
                    self.streams[n].block = None;
                    self.read(offset, true, 0);
                    return taken > 0;
                }
                if let Some(lane) = self.lanes.get_mut(&lane) {
                    lane.pending.remove(&offset);
                }
                match Record::new(&block, index) {
                    Some(record) => self.admit(record, offset, lane),
                    None => {
                        error!(topic = %self.plan.topic, group = %self.plan.group, offset, "the message's row is gone; it is skipped");
                        Counters::add(&self.plan.counters.gone);
                    }
                }
            }
            self.streams[n].next = offset + 1;
            taken += 1;
        }
        if taken > 0 {
            self.dirty = true;
            self.plan
                .counters
                .position
                .store(self.streams[n].next, Ordering::Relaxed);
        }
        if self.streams[n].next >= block.end() {
            self.streams[n].block = None;
        }
        taken > 0
    }

    /// Whether an offset of an owned lane was not settled before the lane was claimed.
    fn is_due(&self, lane: u16, offset: i64) -> bool {
        self.lanes.get(&lane).is_some_and(|lane| {
            (offset >= lane.cut || lane.pending.contains(&offset)) && !lane.done.contains(&offset)
        })
    }

    fn merge_streams(&mut self) {
        let mut merged: Vec<Stream> = Vec::with_capacity(self.streams.len());
        for stream in self.streams.drain(..) {
            match merged.iter_mut().find(|other| other.next == stream.next) {
                Some(other) => {
                    other.lanes.extend(stream.lanes);
                    other.block = other.block.take().or(stream.block);
                    other.at_head &= stream.at_head;
                }
                None => merged.push(stream),
            }
        }
        self.streams = merged;
    }

    // ------------------------------------------------------------------------------------------------------------ executing

    /// A message that was read: runs it, or queues it behind its key or for want of room.
    fn admit(&mut self, record: Record, offset: i64, lane: u16) {
        if let Some(seen) = &mut self.seen
            && !seen.is_new(offset, record.message().seq)
        {
            return;
        }
        let handler = match self.plan.router.find(record.message().message_type.as_deref()) {
            Some(handler) => handler.clone(),
            None => {
                Counters::add(&self.plan.counters.unknown);
                match &self.plan.unknown {
                    Some(handler) => handler.clone(),
                    None => return,
                }
            }
        };
        let key = match self.plan.order {
            Order::Key => record.message().key_hash,
            Order::Topic => Some(0),
            Order::None => None,
        };
        let job = Job {
            record,
            handler,
            offset,
            lane,
            key,
            attempt: 1,
        };
        if let Some(successors) = key.and_then(|key| self.keys.get_mut(&key)) {
            self.unsettled.insert(offset, lane);
            successors.push_back(job);
        } else if self.running.len() >= self.plan.concurrency || !self.ready.is_empty() {
            self.unsettled.insert(offset, lane);
            self.enqueue(job);
        } else {
            self.start(job);
        }
    }

    /// Queues a job whose key is free or held by itself.
    fn enqueue(&mut self, job: Job) {
        if let Some(key) = job.key {
            self.keys.entry(key).or_default();
        }
        self.ready.push_back(job);
    }

    /// Starts what is ready or due again; says whether there was anything.
    fn start_ready(&mut self) -> bool {
        if !self.retries.is_empty() {
            let now = Instant::now();
            while let Some(entry) = self.retries.first_entry() {
                if entry.key().0 > now {
                    break;
                }
                self.ready.push_back(entry.remove());
            }
            self.plan
                .counters
                .retrying
                .store(self.retries.len() as u64, Ordering::Relaxed);
        }
        let mut budget = INTAKE;
        while budget > 0 && self.running.len() < self.plan.concurrency {
            let Some(job) = self.ready.pop_front() else { break };
            self.start(job);
            budget -= 1;
        }
        budget < INTAKE
    }

    fn start(&mut self, job: Job) {
        if job.handler.transactional {
            return self.start_transaction(job);
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
        self.spawn(job, async move {
            match tokio::time::timeout(timeout, run).await {
                Ok(result) => Verdict::from(result.unwrap_or_else(|panic| Err(panicked(panic)))),
                Err(_) => Verdict::from(Err(timed_out(timeout))),
            }
        });
    }

    fn start_transaction(&mut self, job: Job) {
        let Some(membership) = &self.membership else {
            return self.concluded(
                job,
                Verdict::from(Err(HandlerError::retry("a broadcast from memory has no Tx"))),
            );
        };
        let epoch = self.lanes.get(&job.lane).map_or(-1, |lane| lane.epoch);
        let fence = Fence {
            consumer: membership.consumer,
            subscription: membership.subscription,
            lane: job.lane,
            epoch,
            offset: job.offset,
        };
        let pool = self.plan.pool.clone();
        let invocation = self.invocation(&job);
        let handler = job.handler.clone();
        self.spawn(job, async move {
            settlement::run(pool, fence, handler, invocation).await
        });
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

    fn spawn(&mut self, job: Job, run: impl Future<Output = Verdict> + Send + 'static) {
        self.unsettled.insert(job.offset, job.lane);
        if let Some(key) = job.key {
            self.keys.entry(key).or_default();
        }
        if let Some(lane) = self.lanes.get_mut(&job.lane) {
            lane.running += 1;
        }
        let (offset, lane) = (job.offset, job.lane);
        let abort = self.tasks.spawn(async move {
            Finished {
                job,
                verdict: run.await,
            }
        });
        self.running.insert(offset, (abort, lane));
    }

    fn finished(&mut self, finished: Result<Finished, tokio::task::JoinError>) {
        match finished {
            Ok(Finished { job, verdict }) => {
                self.no_longer_runs(job.offset);
                self.concluded(job, verdict);
            }
            // Handlers' panics are caught, so this one was aborted with its lane.
            Err(error) => {
                let id = error.id();
                let offset = self
                    .running
                    .iter()
                    .find(|(_, (abort, _))| abort.id() == id)
                    .map(|(offset, _)| *offset);
                if let Some(offset) = offset {
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
    }

    /// A run has ended.
    fn concluded(&mut self, job: Job, verdict: Verdict) {
        match verdict {
            Verdict::Settled => {
                Counters::add(&self.plan.counters.handled);
                self.settle(job);
            }
            Verdict::Failed(failure) => self.failed(job, failure),
            Verdict::Unavailable(error) => {
                warn!(group = %self.plan.group, topic = %self.plan.topic, error, "cannot run a transactional handler; trying again");
                self.retry(job, INFRASTRUCTURE_WAIT);
            }
            // Whether it committed is known only once the lane is claimed again, which shuts out a commit still on its way.
            Verdict::InDoubt(error) => {
                warn!(
                    group = %self.plan.group, topic = %self.plan.topic, offset = job.offset, error,
                    "lost the connection while committing; claiming the lane again to see what became of it"
                );
                self.drain(job.lane);
            }
            Verdict::Stale => {
                if let Some(membership) = &self.membership {
                    let _ = membership.events.send(Event::Stale);
                }
            }
        }
    }

    fn failed(&mut self, job: Job, failure: HandlerError) {
        let message = job.record.message();
        let wait = match failure.decision {
            Decision::Postpone(wait) => {
                debug!(
                    group = %self.plan.group, topic = %self.plan.topic, handler = job.handler.name, id = %message.id,
                    offset = job.offset, reason = failure.reason, ?wait, "the handler postpones the message"
                );
                return self.retry(job, wait);
            }
            Decision::Discard => {
                Counters::add(&self.plan.counters.failed);
                Counters::add(&self.plan.counters.discarded);
                warn!(
                    group = %self.plan.group, topic = %self.plan.topic, handler = job.handler.name, id = %message.id,
                    offset = job.offset, reason = failure.reason, "the handler discards the message"
                );
                return self.settle(job);
            }
            Decision::RetryIn(wait) => wait,
            Decision::Retry => job
                .handler
                .retry
                .wait(job.attempt, chance(message.seq, job.attempt)),
        };
        Counters::add(&self.plan.counters.failed);
        warn!(
            group = %self.plan.group, topic = %self.plan.topic, handler = job.handler.name, id = %message.id,
            offset = job.offset, attempt = job.attempt, error = failure.reason, retry_in = ?wait, "the handler failed"
        );
        let job = Job {
            attempt: job.attempt + 1,
            ..job
        };
        self.retry(job, wait);
    }

    /// Holds the key until the next attempt.
    fn retry(&mut self, job: Job, wait: Duration) {
        self.unsettled.insert(job.offset, job.lane);
        if self.draining.contains_key(&job.lane) || self.stop_by.is_some() {
            return;
        }
        if let Some(key) = job.key {
            self.keys.entry(key).or_default();
        }
        self.retries.insert((Instant::now() + wait, job.offset), job);
        self.plan
            .counters
            .retrying
            .store(self.retries.len() as u64, Ordering::Relaxed);
    }

    fn settle(&mut self, job: Job) {
        self.unsettled.remove(&job.offset);
        self.dirty = true;
        let Some(key) = job.key else { return };
        if let Some(successors) = self.keys.get_mut(&key) {
            match successors.pop_front() {
                Some(next) => self.ready.push_back(next),
                None => {
                    self.keys.remove(&key);
                }
            }
        }
    }

    // ------------------------------------------------------------------------------------------------------------- settling

    /// Tells the session how far everything is settled: every 50 ms under load, at once when there is nothing more to do.
    fn report(&mut self) {
        let Some(membership) = &self.membership else {
            self.dirty = false;
            return;
        };
        let idle = self.unsettled.is_empty() && self.streams.iter().all(|stream| stream.at_head);
        if !self.dirty || !(idle || self.reported.elapsed() >= REPORT_EVERY) {
            return;
        }
        let progress = membership.progress.clone();
        progress.put(self.snapshot(|_| true));
        self.dirty = false;
        self.reported = Instant::now();
    }

    fn snapshot(&self, include: impl Fn(u16) -> bool) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (number, lane) in self.lanes.iter().filter(|(number, _)| include(**number)) {
            let next = self
                .streams
                .iter()
                .find(|s| s.lanes.contains(number))
                .map(|s| s.next);
            let next = next
                .or_else(|| self.draining.get(number).copied())
                .unwrap_or(lane.cut);
            // Before a lane is read up to where it was claimed, what was settled then is still settled. Below `next` all that is
            // left are offsets of other lanes, which may be settled by now.
            snapshot
                .pending
                .extend(lane.pending.iter().filter(|offset| **offset >= next));
            snapshot.lanes.push(LanePosition {
                lane: *number,
                epoch: lane.epoch,
                position: next.max(lane.cut),
            });
        }
        snapshot.pending.extend(
            self.unsettled
                .iter()
                .filter(|(_, lane)| include(**lane))
                .map(|(offset, _)| *offset),
        );
        // Lanes that were claimed together all have the same.
        snapshot.pending.sort_unstable();
        snapshot.pending.dedup();
        snapshot
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
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

/// Between 0 and 1, different for every message and attempt.
fn chance(seq: i64, attempt: u32) -> f64 {
    let mixed = (seq as u64)
        .wrapping_add(u64::from(attempt) << 40)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 11) as f64 / (1_u64 << 53) as f64
}

/// How long first polls take, to decide whether they may run on the executor's own task.
#[derive(Default)]
struct InlineCost {
    mean_ns: u64,
    skipped: u32,
}

impl InlineCost {
    fn allows(&mut self) -> bool {
        if self.mean_ns < INLINE_LIMIT.as_nanos() as u64 {
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

    fn spent(&mut self, span: Duration) {
        self.mean_ns = (self.mean_ns * 7 + span.as_nanos() as u64) / 8;
    }
}
