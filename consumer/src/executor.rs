//! Runs the messages of one subscription: reads, keeps the order of keys, runs handlers, settles.
//!
//! One task owns all the state, so there is no lock on the way of a message. A handler that finishes at its first poll costs no task; one that
//! waits becomes a task of its own. See ARCHITECTURE.md, "The executor".

mod catch_up;
mod failure;
mod inline_cost;
mod intake;
mod keys;
mod ready;
mod report;
mod run;
mod trial;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, Id, JoinSet};
use tracing::warn;

use crate::block::Record;
use crate::breaker::Breaker;
use crate::checkout::Checkout;
use crate::clock::DatabaseClock;
use crate::handler::Order;
use crate::journal::Journal;
use crate::lane::OwnedLane;
use crate::pace::Pace;
use crate::progress::{Counters, Lease, Progress, Snapshot};
use crate::redelivery::{Held, ParkedKey};
use crate::replay::SeenTail;
use crate::router::{Handler, Router};
use crate::settlement::Verdict;
use crate::state::States;
use crate::throttle::Throttle;
use crate::topic_log::{Interest, TopicLog};

use catch_up::CatchUp;
use inline_cost::InlineCost;
use intake::{Reading, Stream};
use keys::Successors;
use ready::{Jobs, Ready};
use report::{Afterwards, REPORT_EVERY, Recording};
pub(crate) use run::{panicked, timed_out};
use trial::Trials;

/// The wait before a broadcast that could not check the log tries again.
const RESYNC_WAIT: Duration = Duration::from_millis(200);

/// What a subscription is, for as long as the process runs.
pub(crate) struct Plan {
    pub(crate) group: Arc<str>,
    pub(crate) topic: Arc<str>,
    pub(crate) order: Order,
    pub(crate) lanes: u16,
    pub(crate) concurrency: usize,
    /// Most messages of one run.
    pub(crate) batch: usize,
    /// Most messages taken in and not settled.
    pub(crate) window: usize,
    pub(crate) router: Router,
    /// Runs for messages of a type that no handler takes; `None`: they are settled and counted.
    pub(crate) unknown: Option<Arc<Handler>>,
    /// So many messages may fail at once, over all instances, before no more are taken in.
    pub(crate) max_failing: usize,
    /// For the messages of which a process may have died: one at a time in this process.
    pub(crate) trial: Arc<Semaphore>,
    /// By which messages expire.
    pub(crate) clock: Arc<DatabaseClock>,
    pub(crate) states: Arc<States>,
    pub(crate) pool: PgPool,
    pub(crate) counters: Counters,
}

/// From the session to an executor.
pub(crate) enum Command {
    /// Lanes that were just claimed.
    Claimed(Claim),
    /// Give these up once nothing of them runs.
    Release(Vec<u16>),
    /// These belong to somebody else: stop at once.
    Revoke(Vec<u16>),
    /// What was reported up to this number is in the database.
    Recorded(u64),
    /// What operators decided of messages, some perhaps in lanes of others.
    Decided(Vec<Held>),
    /// Whether messages may start, and how fast.
    Pace(Pace),
    /// The database's clock was moved on by so much.
    Advance(Duration),
    /// Look whether offsets were given anew (broadcast from memory).
    Resync,
    /// Take nothing in any more, let finish what runs for at most this long, and end.
    Stop(Duration),
}

/// Lanes that were claimed, with what their former owners left behind.
#[derive(Default)]
pub(crate) struct Claim {
    pub(crate) lanes: Vec<(u16, OwnedLane)>,
    pub(crate) held: Vec<Held>,
    pub(crate) parked: Vec<ParkedKey>,
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
    keys: HashMap<i32, Successors>,
    catch_up: CatchUp,
    /// May run as soon as there is room.
    ready: Ready,
    /// Failed, by the time of their next attempt.
    retries: BTreeMap<(Instant, i64), Job>,
    /// Messages with a row of their own that run or will run again, with their lanes.
    failing: HashMap<i64, u16>,
    /// Messages given up whose keys wait for an operator, with their lanes.
    halted: HashMap<i64, (u16, Option<i32>)>,
    trials: Trials,
    breaker: Breaker,
    /// Whether messages may start; a member learns it before its first.
    open: bool,
    throttle: Throttle,
    /// Taken in and not settled, with their lanes; what has a row of its own is not among them.
    unsettled: BTreeMap<i64, u16>,
    tasks: JoinSet<Ended>,
    running: HashMap<Id, Running>,
    /// Connections that the next transactional handlers take over from those before.
    checkouts: Vec<Checkout>,
    reading: Option<Reading>,
    inline_cost: InlineCost,
    seen: Option<SeenTail>,
    /// Offsets may have been given anew, and the log could not be asked: nothing more is taken in until then.
    resync_at: Option<Instant>,
    dirty: bool,
    /// Somebody waits for the next report to be recorded.
    urgent: bool,
    reported: Instant,
    /// What is to be reported.
    journal: Journal,
    /// What is to be done once it is recorded.
    afterwards: Vec<Afterwards>,
    /// Reports that are not yet recorded.
    recording: VecDeque<Recording>,
    /// How many messages their journals have.
    unrecorded: usize,
    stop_by: Option<Instant>,
}

#[derive(Clone)]
struct Job {
    record: Record,
    handler: Arc<Handler>,
    offset: i64,
    lane: u16,
    key: Option<i32>,
    /// Number of the attempt that it waits for or makes, from 1.
    attempt: u32,
    /// Since when it fails.
    failing_since: Option<Instant>,
    /// It has a row of its own in `postbox.redelivery`, or will have with the next report.
    stored: bool,
    /// A process may have died of it.
    suspect: bool,
    /// It was given up: when its turn comes, its key waits for an operator.
    halted: bool,
    /// Most messages that run with it, itself included.
    limit: usize,
    /// Whatever it waited for had ended then. Only where somebody asks for it.
    ready_since: Option<Instant>,
}

impl Job {
    /// Nothing that it waited for is left.
    fn is_ready(&mut self) {
        let asked = self.handler.transactional || !self.handler.batch_wait.is_zero();
        self.ready_since = asked.then(Instant::now);
    }
}

/// A run that is a task of its own.
struct Running {
    abort: AbortHandle,
    /// Offset of its first message.
    first: i64,
    /// The lane of each of its messages.
    lanes: Vec<u16>,
}

/// What a task of the executor did.
enum Ended {
    Run {
        jobs: Jobs,
        verdict: Verdict,
        checkout: Option<Checkout>,
    },
    Loaded(catch_up::Loaded),
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
        let open = membership.is_none();
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
            catch_up: CatchUp::default(),
            ready: Ready::default(),
            retries: BTreeMap::new(),
            failing: HashMap::new(),
            halted: HashMap::new(),
            trials: Trials::default(),
            breaker: Breaker::default(),
            open,
            throttle: Throttle::new(Instant::now()),
            unsettled: BTreeMap::new(),
            tasks: JoinSet::new(),
            running: HashMap::new(),
            checkouts: Vec::new(),
            reading: None,
            inline_cost: InlineCost::default(),
            resync_at: None,
            dirty: false,
            urgent: false,
            reported: Instant::now(),
            journal: Journal::default(),
            afterwards: Vec::new(),
            recording: VecDeque::new(),
            unrecorded: 0,
            stop_by: None,
        }
    }

    /// Runs until it is told to stop; what it owned is in the last report.
    pub(crate) async fn run(mut self) {
        loop {
            if self.resync_at.is_some_and(|at| at <= Instant::now()) {
                self.resync().await;
            }
            let progressed = if self.may_run() {
                let caught_up = self.catch_up();
                // So that a batch finds what can be had.
                let taken = self.take_in();
                self.start_ready() || taken || caught_up
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
            self.hand_back(progressed);
            if progressed {
                while let Ok(command) = self.commands.try_recv() {
                    self.obey(command).await;
                }
                while let Some(ended) = self.tasks.try_join_next_with_id() {
                    self.ended(ended);
                }
                self.begin_read();
                tokio::task::yield_now().await;
                continue;
            }
            self.begin_read();
            self.wait().await;
        }
    }

    /// Nothing is kept from the pool that nothing is ready for.
    fn hand_back(&mut self, progressed: bool) {
        self.checkouts
            .retain(|checkout| progressed && checkout.may_stay());
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
            Some(request) = self.trials.next_request() => self.record_trial(request),
            Some(ended) = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => self.ended(ended),
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
        let now = Instant::now();
        let report = self.dirty.then(|| self.reported + REPORT_EVERY);
        // Without a valid lease nothing is due; the session extends it or ends this executor.
        let lease = (!self.lease_is_valid()).then(|| now + Duration::from_millis(20));
        let start = self.next_start(now).filter(|_| lease.is_none());
        let start = start.filter(|_| self.resync_at.is_none());
        [start, report, lease, self.resync_at, self.stop_by]
            .into_iter()
            .flatten()
            .min()
    }

    fn lease_is_valid(&self) -> bool {
        self.membership
            .as_ref()
            .is_none_or(|membership| membership.lease.is_valid())
    }

    fn may_run(&self) -> bool {
        self.stop_by.is_none() && self.resync_at.is_none() && self.lease_is_valid()
    }

    // ------------------------------------------------------------------------------------------------------------ commands

    async fn obey(&mut self, command: Command) {
        match command {
            Command::Claimed(claim) => self.claimed(claim),
            Command::Release(lanes) => {
                for lane in lanes {
                    self.drain(lane);
                }
            }
            Command::Revoke(lanes) => self.revoke(&lanes).await,
            Command::Recorded(number) => self.recorded(number),
            Command::Decided(held) => self.decided(held),
            Command::Pace(pace) => {
                self.open = pace.open;
                self.throttle.set(pace.rate, Instant::now());
                self.next_trial();
            }
            Command::Advance(span) => self.advance(span),
            Command::Resync => self.resync().await,
            Command::Stop(grace) => {
                self.stop_by = Some(Instant::now() + grace);
                self.forget_queued(|_| true);
            }
        }
    }

    fn claimed(&mut self, claim: Claim) {
        let mut starts = Vec::with_capacity(claim.lanes.len());
        for (number, mut lane) in claim.lanes {
            let next = lane
                .pending
                .iter()
                .copied()
                .min()
                .map_or(lane.cut, |least| least.min(lane.cut));
            starts.push((next, number));
            self.interest.set(number, true);
            lane.suspect_below = self.suspect_below(&lane);
            let former = self.lanes.insert(number, lane);
            debug_assert!(former.is_none(), "lane {number} was claimed while it is run");
        }
        // Those that begin close to each other are read together, so that what is left comes by its offsets.
        starts.sort_unstable();
        let mut from = None;
        for (next, number) in starts {
            let start = from
                .filter(|start| next - start <= self.plan.window as i64)
                .unwrap_or(next);
            from = Some(start);
            match self.streams.iter_mut().find(|stream| stream.next == start) {
                Some(stream) => {
                    stream.lanes.insert(number);
                }
                None => self.streams.push(Stream {
                    next: start,
                    lanes: HashSet::from([number]),
                    block: None,
                    at_head: false,
                }),
            }
        }
        // Before anything of these lanes is read, so that what comes finds its key held.
        self.adopt(claim.held, claim.parked);
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

    /// Forgets jobs that wait; they stay unsettled, or have a row.
    fn forget_queued(&mut self, forget: impl Fn(&Job) -> bool) {
        self.ready.retain(|job| !forget(job));
        self.retries.retain(|_, job| !forget(job));
        self.trials.retain(|job| !forget(job));
        for successors in self.keys.values_mut() {
            successors.queue.retain(|job| !forget(job));
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
        // What became of their messages is recorded before they are released.
        self.put_report();
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
        self.journal.forget(lanes);
        let is_revoked = |run: &Running| run.lanes.iter().any(|lane| lanes.contains(lane));
        let mut aborted = HashSet::new();
        for run in self.running.values().filter(|run| is_revoked(run)) {
            run.abort.abort();
            aborted.extend(run.lanes.iter().copied());
        }
        // Until the aborted are gone: a lane may come back, and no key may then run twice.
        while self.running.values().any(is_revoked) {
            match self.tasks.join_next_with_id().await {
                Some(ended) => self.ended(ended),
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
        // Lanes whose messages were in a batch with theirs go on from where they stand in the database.
        for lane in aborted.difference(&lanes.iter().copied().collect()) {
            self.drain(*lane);
        }
    }

    fn forget_lane(&mut self, lane: u16) {
        self.forget_queued(|job| job.lane == lane);
        self.draining.remove(&lane);
        self.lanes.remove(&lane);
        self.interest.set(lane, false);
        self.unsettled.retain(|_, of| *of != lane);
        self.failing.retain(|_, of| *of != lane);
        self.halted.retain(|_, (of, _)| *of != lane);
        // Nothing of its keys runs or waits here any more.
        let lanes = self.lane_count;
        self.keys
            .retain(|key, _| crate::lane::lane_of_key(*key, lanes) != lane);
    }

    async fn resync(&mut self) {
        self.resync_at = None;
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
                warn!(topic = %self.plan.topic, %error, "cannot check the log after a reconnect; trying again");
                self.resync_at = Some(Instant::now() + RESYNC_WAIT);
            }
        }
    }

    /// Ends: what still runs is cancelled, and the session gets the last report.
    async fn end(mut self) {
        if !self.running.is_empty() {
            warn!(
                group = %self.plan.group, topic = %self.plan.topic, running = self.running.len(),
                "handlers did not finish within the shutdown grace and are cancelled; their messages are delivered again"
            );
        }
        self.tasks.shutdown().await;
        self.put_report();
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
