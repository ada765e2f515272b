//! Trials: messages of which a process may have died run one by one, each attempt recorded before it begins.
//!
//! A handler that aborts its process writes nothing. When the owners of a lane die twice in a row before the lane gets past what they were
//! doing, its messages are suspects up to there. Whichever of them the next process dies of is on record.
//! See ARCHITECTURE.md, "Poison".

use std::collections::VecDeque;

use tokio::sync::{mpsc, oneshot};

use super::report::Afterwards;
use super::{Executor, Job, Jobs};
use crate::block::Record;
use crate::journal::{Entry, Fate};
use crate::lane::{OwnedLane, lane_of_key};
use crate::settlement::Verdict;

/// From so many dead owners in a row on.
const CRASHES: i32 = 2;

pub(super) struct Trials {
    queue: VecDeque<Job>,
    /// The message that is on trial.
    running: Option<i64>,
    request: mpsc::UnboundedSender<Request>,
    requests: mpsc::UnboundedReceiver<Request>,
}

/// A run that may begin once its attempt is recorded.
pub(super) struct Request {
    offset: i64,
    lane: u16,
    attempt: u32,
    /// For the copy, if there is none yet.
    record: Option<Record>,
    recorded: oneshot::Sender<()>,
}

impl Default for Trials {
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

impl Trials {
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
                .get(&job.lane)
                .is_some_and(|lane| lane.crashes >= CRASHES && job.offset < lane.suspect_below)
    }

    pub(super) fn put_on_trial(&mut self, job: Job) {
        if !job.stored {
            self.unsettled.insert(job.offset, job.lane);
        }
        self.hold_key(&job);
        self.trials.queue.push_back(job);
        self.next_trial();
    }

    pub(super) fn next_trial(&mut self) {
        if self.trials.running.is_some() || self.stop_by.is_some() || !self.open {
            return;
        }
        let Some(job) = self.trials.queue.pop_front() else {
            return;
        };
        let mut jobs = Jobs::from(job);
        let run = match self.run_of(&jobs) {
            Ok(run) => run,
            Err(verdict) => return self.concluded(jobs, verdict),
        };
        let job = &mut jobs.first;
        self.trials.running = Some(job.offset);
        let permit = self.plan.trial.clone();
        let request = self.trials.request.clone();
        let (offset, lane, attempt) = (job.offset, job.lane, job.attempt);
        let record = (!job.stored).then(|| job.record.clone());
        let trial = async move {
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
            self.unsettled.insert(offset, lane);
        }
        job.stored = true;
        self.spawn(jobs, trial);
    }

    pub(super) fn record_trial(&mut self, request: Request) {
        let Some(epoch) = self.epoch(request.lane) else {
            return;
        };
        self.unsettled.remove(&request.offset);
        self.failing.insert(request.offset, request.lane);
        self.journal.put(
            request.offset,
            Entry {
                lane: request.lane,
                epoch,
                fate: Fate::Trying,
                attempts: request.attempt,
                due: std::time::Instant::now(),
                failures: Vec::new(),
                reason: None,
                record: request.record,
            },
        );
        self.afterwards.push(Afterwards::Run(request.recorded));
        self.report_soon();
    }

    pub(super) fn trial_ended(&mut self, offset: i64) {
        if self.trials.running == Some(offset) {
            self.trials.running = None;
            self.next_trial();
        }
    }

    /// Lanes that got past what their dead owners were doing are like any other again.
    pub(super) fn calm(&mut self) {
        if self.lanes.values().all(|lane| lane.crashes == 0) {
            return;
        }
        for (number, lane) in &mut self.lanes {
            if lane.crashes == 0 {
                continue;
            }
            let Some(stream) = self.streams.iter().find(|stream| stream.lanes.contains(number)) else {
                continue;
            };
            let passed = stream.at_head || stream.next >= lane.suspect_below;
            let open = self
                .unsettled
                .iter()
                .any(|(offset, of)| of == number && *offset < lane.suspect_below);
            let lanes = self.lane_count;
            let behind = self.keys.iter().any(|(key, successors)| {
                successors.catching_up
                    && lane_of_key(*key, lanes) == *number
                    && successors
                        .parked
                        .is_some_and(|parked| parked.first() < lane.suspect_below)
            });
            if passed && !open && !behind {
                lane.crashes = 0;
                lane.suspect_below = i64::MIN;
                self.journal.calm.push(*number);
                self.dirty = true;
            }
        }
    }
}
