//! Quarantine: messages of which a process may have died run one by one, each attempt recorded before it begins.
//!
//! A handler that aborts its process writes nothing. When the owners of a lane die twice in a row before the lane gets past what they were
//! doing, its messages are suspects up to there. Whichever of them the next process dies of is on record.
//! See docs/internals/failure.md.

use std::collections::VecDeque;

use tokio::sync::{mpsc, oneshot};

use super::keys::Successors;
use super::report::Afterwards;
use super::{Executor, Job, Jobs};
use crate::executor::settlement::Verdict;
use crate::ids::Lane;
use crate::lane::OwnedLane;
use crate::log::block::Record;
use crate::protocol::journal::{Disposition, Entry};

/// From so many dead owners in a row on.
const CRASHES: i32 = 2;

pub(super) struct Quarantine {
    queue: VecDeque<Job>,
    /// Its message that runs.
    running: Option<i64>,
    request: mpsc::UnboundedSender<Request>,
    requests: mpsc::UnboundedReceiver<Request>,
}

/// A run that may begin once its attempt is recorded.
pub(super) struct Request {
    offset: i64,
    lane: Lane,
    attempt: u32,
    /// For the copy, if there is none yet.
    record: Option<Record>,
    recorded: oneshot::Sender<()>,
}

impl Default for Quarantine {
    fn default() -> Self {
        let (request, requests) = mpsc::unbounded_channel();
        Self {
            queue: VecDeque::new(),
            running: None,
            request,
            requests,
        }
    }
}

impl Quarantine {
    pub(super) async fn next_request(&mut self) -> Option<Request> {
        self.requests.recv().await
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&Job) -> bool) {
        self.queue.retain(keep);
    }
}

impl Executor {
    /// Up to where the messages of a lane are suspects. What the dead owners were doing is not far behind their last checkpoint; should it be
    /// further, the next crash is, and this lane gets there.
    pub(super) fn suspect_below(&self, lane: &OwnedLane) -> i64 {
        match lane.crashes {
            0 => i64::MIN,
            _ => lane.cut + self.plan.window as i64,
        }
    }

    pub(super) fn is_suspect(&self, job: &Job) -> bool {
        job.suspect
            || self
                .lanes
                .get(job.lane)
                .is_some_and(|lane| lane.crashes >= CRASHES && job.offset < lane.suspect_below)
    }

    pub(super) fn put_in_quarantine(&mut self, job: Job) {
        if !job.stored {
            self.lanes.hold(job.offset, job.lane);
        }
        self.hold_key(&job);
        self.quarantine.queue.push_back(job);
        self.next_in_quarantine();
    }

    pub(super) fn next_in_quarantine(&mut self) {
        if self.quarantine.running.is_some() || self.admission.is_stopping() || !self.admission.is_open() {
            return;
        }
        let Some(job) = self.quarantine.queue.pop_front() else {
            return;
        };
        let mut jobs = Jobs::from(job);
        let run = match self.run_of(&jobs) {
            Ok(run) => run,
            Err(verdict) => return self.concluded(jobs, verdict),
        };
        let job = &mut jobs.first;
        self.quarantine.running = Some(job.offset);
        let permit = self.plan.quarantine.clone();
        let request = self.quarantine.request.clone();
        let (offset, lane, attempt) = (job.offset, job.lane, job.attempt);
        let record = (!job.stored).then(|| job.record.clone());
        let run = async move {
            // Not before it is this one's turn: whatever is on record when the process dies is blamed. The semaphore is never closed.
            let _turn = permit.acquire_owned().await;
            let (recorded, on_record) = oneshot::channel();
            let _ = request.send(Request {
                offset,
                lane,
                attempt,
                record,
                recorded,
            });
            match on_record.await {
                Ok(()) => run.await,
                Err(_) => (
                    Verdict::Unavailable("the attempt could not be recorded".to_owned()),
                    None,
                ),
            }
        };
        if !job.stored {
            self.lanes.hold(offset, lane);
        }
        job.stored = true;
        self.spawn(jobs, run);
    }

    pub(super) fn record_attempt(&mut self, request: Request) {
        let Some(epoch) = self.lanes.epoch(request.lane) else {
            return;
        };
        self.lanes.let_go(request.offset);
        self.failing.insert(request.offset, request.lane);
        let mut entry = Entry::new(request.lane, epoch, Disposition::Trying, request.attempt);
        entry.record = request.record;
        self.reporter.note(request.offset, entry);
        self.reporter.then(Afterwards::Run(request.recorded));
        self.reporter.hurry();
    }

    pub(super) fn quarantined_ended(&mut self, offset: i64) {
        if self.quarantine.running == Some(offset) {
            self.quarantine.running = None;
            self.next_in_quarantine();
        }
    }

    /// Lanes that got past what their dead owners were doing are like any other again.
    pub(super) fn leave_quarantine(&mut self) {
        if !self.lanes.has_crashes() {
            return;
        }
        // Who handles what a lane needs may be who died of it.
        let past: Vec<Lane> = (self.lanes.iter())
            .filter(|(_, lane)| lane.crashes > 0 && lane.needs.is_empty())
            .filter(|(number, lane)| self.is_past(*number, lane.suspect_below))
            .map(|(number, _)| number)
            .collect();
        for number in past {
            if let Some(lane) = self.lanes.get_mut(number) {
                lane.crashes = 0;
                lane.suspect_below = i64::MIN;
                self.reporter.is_past(number);
            }
        }
    }

    /// Whether all of a lane below an offset was taken in, and is settled or has a row.
    fn is_past(&self, number: Lane, offset: i64) -> bool {
        let Some(next) = self.reader.next_of(number) else {
            return false;
        };
        let is_behind = |successors: &Successors| {
            successors.catching_up && successors.parked.is_some_and(|parked| parked.first() < offset)
        };
        (self.reader.is_lane_at_head(number) || next >= offset)
            && self.lanes.is_settled_below(number, offset)
            && !(self.keys.iter())
                .any(|(key, successors)| is_behind(successors) && self.lanes.of_key(key) == number)
    }
}
