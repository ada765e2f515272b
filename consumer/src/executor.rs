//! Runs the messages of one subscription: reads, keeps the order of keys, runs handlers, settles.
//!
//! One task owns all the state, so there is no lock on the way of a message. A handler that finishes at its first poll costs no task; one that
//! waits becomes a task of its own. See docs/internals/executor.md.

mod admission;
mod adopt;
pub(crate) mod breaker;
mod catch_up;
mod command;
mod doubt;
mod failure;
mod inline_cost;
mod intake;
mod keys;
mod lanes;
mod moved;
mod plan;
mod quarantine;
mod ready;
mod report;
mod run;
mod runs;
pub(crate) mod settlement;
mod standing;
pub(crate) mod throttle;
mod unknown;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use postbox_core::restarts::panic_text;
use tokio::sync::mpsc;
use tracing::warn;

use crate::handler::router::Handler;
use crate::ids::Lane;
use crate::log::block::Record;
use crate::log::seen::SeenTail;
use crate::log::topic_log::TopicLog;
use crate::protocol::standing::Standing;

pub(crate) use self::command::{Broken, Claim, Command, Event, Membership, Pace};
pub(crate) use self::plan::{Plan, Transactions};
use admission::Admission;
use failure::Failing;
use intake::Reader;
use keys::Keys;
use lanes::Lanes;
use quarantine::Quarantine;
use ready::{Jobs, Queue};
use report::Reporter;
use runs::Runs;
use unknown::Types;

/// A part of its own for each thing that it minds; what a part has, others reach by what it offers.
pub(crate) struct Executor {
    plan: Arc<Plan>,
    session: Link,
    lanes: Lanes,
    reader: Reader,
    keys: Keys,
    queue: Queue,
    admission: Admission,
    runs: Runs,
    failing: Failing,
    quarantine: Quarantine,
    types: Types,
    reporter: Reporter,
}

/// To the session that this executor works for.
struct Link {
    /// `None`: a broadcast from memory.
    membership: Option<Membership>,
    commands: mpsc::UnboundedReceiver<Command>,
    /// Who wants to know how things stand.
    asked: Vec<mpsc::UnboundedSender<Standing>>,
}

#[derive(Clone)]
struct Job {
    record: Record,
    handler: Arc<Handler>,
    offset: i64,
    lane: Lane,
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
    /// No handler takes its type: when its turn comes, it is left to another instance, or the policy decides.
    unknown: bool,
    /// Most messages that run with it, itself included.
    limit: usize,
    /// Whatever it waited for had ended then. Only where somebody asks for it.
    ready_since: Option<Instant>,
}

impl Job {
    /// It had an attempt, or an operator wants it run again.
    fn has_failed(&self) -> bool {
        self.stored || self.attempt > 1
    }

    /// Nothing that it waited for is left.
    fn is_ready(&mut self) {
        let asked = self.handler.transactional || !self.handler.batch_wait.is_zero();
        self.ready_since = asked.then(Instant::now);
    }
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
        let is_member = membership.is_some();
        Self {
            session: Link {
                membership,
                commands,
                asked: Vec::new(),
            },
            lanes: Lanes::new(lanes),
            reader: Reader::new(log, lanes, !is_member),
            keys: Keys::default(),
            queue: Queue::default(),
            admission: Admission::new(plan.breaker, !is_member),
            runs: Runs::default(),
            failing: Failing::default(),
            quarantine: Quarantine::default(),
            types: Types::default(),
            reporter: Reporter::new(),
            plan,
        }
    }

    /// Runs until it is told to stop; what it owned is in the last report. If it panics its handlers are cancelled, and have ended when it returns.
    pub(crate) async fn run(mut self) -> Result<(), Broken> {
        match AssertUnwindSafe(self.serve()).catch_unwind().await {
            Ok(()) => {
                self.end().await;
                Ok(())
            }
            Err(panic) => {
                self.runs.shutdown().await;
                let resume_at = self
                    .reader
                    .first()
                    .into_iter()
                    .chain(self.lanes.first_unsettled());
                Err(Broken {
                    why: panic_text(panic.as_ref()),
                    resume_at: resume_at.min().unwrap_or_default(),
                    seen: self.reader.take_seen(),
                    commands: self.session.commands,
                })
            }
        }
    }

    /// Until it is told to stop.
    async fn serve(&mut self) {
        loop {
            if self.reader.resync_at().is_some_and(|at| at <= Instant::now()) {
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
            self.see_needs();
            self.report();
            if let Some(by) = self.admission.stop_by()
                && (self.runs.is_idle() || Instant::now() >= by)
            {
                return;
            }
            self.runs.hand_back(progressed);
            if progressed {
                while let Ok(command) = self.session.commands.try_recv() {
                    self.obey(command).await;
                }
                while let Some(ended) = self.runs.one_ended() {
                    self.ended(ended);
                }
                self.begin_read();
                tokio::task::yield_now().await;
                continue;
            }
            self.begin_read();
            self.tell_how_things_stand();
            self.wait().await;
        }
    }

    /// Waits until something can have changed.
    async fn wait(&mut self) {
        let wake = self.next_wake();
        tokio::select! {
            biased;
            command = self.session.commands.recv() => match command {
                Some(command) => self.obey(command).await,
                // The session is gone without a word.
                None => self.admission.stop(Duration::ZERO),
            },
            Some(request) = self.quarantine.next_request() => self.record_attempt(request),
            Some(ended) = self.runs.next_ended(), if !self.runs.is_idle() => self.ended(ended),
            arrival = self.reader.arrival() => self.learn(arrival),
            () = sleep_until(wake) => {}
        }
    }

    fn next_wake(&self) -> Option<Instant> {
        let now = Instant::now();
        let report = self.reporter.due_at();
        // Without a valid lease nothing is due; the session extends it or ends this executor.
        let lease = (!self.lease_is_valid()).then(|| now + Duration::from_millis(20));
        let start = self.next_start(now).filter(|_| lease.is_none());
        let resync = self.reader.resync_at();
        let start = start.filter(|_| resync.is_none());
        let (needs, stop) = (self.types.look_at(), self.admission.stop_by());
        [start, report, lease, needs, resync, stop]
            .into_iter()
            .flatten()
            .min()
    }

    fn lease_is_valid(&self) -> bool {
        self.session
            .membership
            .as_ref()
            .is_none_or(|membership| membership.lease.is_valid())
    }

    fn may_run(&self) -> bool {
        !self.admission.is_stopping() && self.reader.resync_at().is_none() && self.lease_is_valid()
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
                self.admission.set(pace);
                self.next_in_quarantine();
                self.types.look_again();
            }
            Command::Orphans { types, unread } => {
                self.orphaned(types, unread);
                self.tell_orphaned();
            }
            Command::Served { lanes, types } => self.served(&lanes, &types),
            Command::Advance(span) => self.advance(span),
            Command::Tell(asker) => self.is_asked(asker),
            Command::Resync => self.resync().await,
            Command::Stop(grace) => {
                self.admission.stop(grace);
                self.forget_queued(|_| true);
            }
        }
    }

    /// Goes on from what another executor has seen.
    pub(crate) fn remember(&mut self, seen: SeenTail) {
        self.reader.remember(seen);
    }

    /// Ends: what still runs is cancelled, and the session gets the last report.
    async fn end(mut self) {
        if self.runs.len() > 0 {
            warn!(
                group = %self.plan.group, topic = %self.plan.topic, running = self.runs.len(),
                "handlers did not finish within the shutdown grace and are cancelled; their messages are delivered again"
            );
        }
        self.runs.shutdown().await;
        self.put_report();
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
