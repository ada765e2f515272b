//! Reporting: how far everything is settled and what became of the rest, to the session; and what waits for it to be recorded.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::oneshot;
use tracing::warn;

use super::Executor;
use crate::dead_letter::DeadLetter;
use crate::handler::DeadLetterHook;
use crate::progress::{Intake, LanePosition, Snapshot};

/// How often progress is told under load.
pub(super) const REPORT_EVERY: Duration = Duration::from_millis(50);

/// What is done once a report is recorded.
pub(super) enum Afterwards {
    /// A run may begin.
    Run(oneshot::Sender<()>),
    /// What a key had parked may run.
    TakenUp { key: i32, load: u64 },
    /// A message is among the dead letters.
    Buried {
        lane: u16,
        epoch: i32,
        /// The key that goes on.
        key: Option<i32>,
        hook: Option<(DeadLetterHook, Box<DeadLetter>)>,
    },
}

/// A report that is not yet recorded.
pub(super) struct Recording {
    number: u64,
    /// The messages of its journal.
    offsets: Vec<i64>,
    afterwards: Vec<Afterwards>,
}

impl Executor {
    /// Every 50 ms under load, at once when there is nothing more to do or somebody waits.
    pub(super) fn report(&mut self) {
        self.gauge();
        if self.membership.is_none() {
            self.dirty = false;
            return;
        }
        let idle = self.unsettled.is_empty() && self.streams.iter().all(|stream| stream.at_head);
        if self.dirty && (idle || self.urgent || self.reported.elapsed() >= REPORT_EVERY) {
            self.calm();
            self.put_report();
        }
    }

    pub(super) fn report_soon(&mut self) {
        self.dirty = true;
        self.urgent = true;
    }

    pub(super) fn put_report(&mut self) {
        let Some(membership) = &self.membership else {
            return;
        };
        let progress = membership.progress.clone();
        let journal = std::mem::take(&mut self.journal);
        let offsets: Vec<i64> = journal.entries.keys().copied().collect();
        let number = progress.put(self.snapshot(|_| true), journal, self.urgent);
        if !offsets.is_empty() || !self.afterwards.is_empty() {
            self.unrecorded += offsets.len();
            self.recording.push_back(Recording {
                number,
                offsets,
                afterwards: std::mem::take(&mut self.afterwards),
            });
        }
        self.dirty = false;
        self.urgent = false;
        self.reported = Instant::now();
    }

    /// Reports up to this number are in the database.
    pub(super) fn recorded(&mut self, number: u64) {
        while self
            .recording
            .front()
            .is_some_and(|report| report.number <= number)
        {
            let Some(report) = self.recording.pop_front() else {
                return;
            };
            self.unrecorded -= report.offsets.len();
            for afterwards in report.afterwards {
                self.carry_on(afterwards);
            }
        }
    }

    /// Whether something was noted of this message that is not recorded yet: what the database says of it is old.
    pub(super) fn is_unrecorded(&self, offset: i64) -> bool {
        let reported = self
            .recording
            .iter()
            .any(|report| report.offsets.contains(&offset));
        reported || self.journal.entries.contains_key(&offset)
    }

    fn carry_on(&mut self, afterwards: Afterwards) {
        match afterwards {
            // The run may have been cancelled.
            Afterwards::Run(recorded) => {
                let _ = recorded.send(());
            }
            Afterwards::TakenUp { key, load } => self.taken_up(key, load),
            Afterwards::Buried {
                lane,
                epoch,
                key,
                hook,
            } => {
                if let Some((hook, letter)) = hook {
                    tokio::spawn(tell(hook, *letter));
                }
                if let Some(key) = key
                    && self.epoch(lane) == Some(epoch)
                {
                    self.release_key(key);
                }
            }
        }
    }

    pub(super) fn intake(&self) -> Intake {
        if self.breaker.is_open() {
            Intake::Open
        } else if self.failing.len() >= self.most_failing() {
            Intake::Full
        } else {
            Intake::Closed
        }
    }

    /// This instance's share of what may fail at once.
    fn most_failing(&self) -> usize {
        (self.plan.max_failing * self.lanes.len() / usize::from(self.lane_count).max(1)).max(1)
    }

    fn gauge(&self) {
        let counters = &self.plan.counters;
        let retrying = if self.membership.is_some() {
            self.failing.len()
        } else {
            self.retries.len()
        };
        counters.retrying.store(retrying as u64, Ordering::Relaxed);
        counters.halted.store(self.halted.len() as u64, Ordering::Relaxed);
        counters.set_intake(self.intake());
    }

    pub(super) fn snapshot(&self, include: impl Fn(u16) -> bool) -> Snapshot {
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
            // Before a lane is read up to where it was claimed, what was settled then is still settled.
            let unread = lane.pending.iter().filter(|offset| **offset >= next);
            snapshot.pending.extend(unread.map(|offset| (*offset, *number)));
            snapshot.lanes.push(LanePosition {
                lane: *number,
                epoch: lane.epoch,
                position: next.max(lane.cut),
            });
        }
        let unsettled = self.unsettled.iter().map(|(offset, lane)| (*offset, *lane));
        snapshot
            .pending
            .extend(unsettled.filter(|(_, lane)| include(*lane)));
        snapshot.pending.sort_unstable();
        snapshot
    }
}

async fn tell(hook: DeadLetterHook, letter: DeadLetter) {
    let (group, id) = (letter.group.clone(), letter.id);
    let error = match AssertUnwindSafe(hook(letter)).catch_unwind().await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(panic) => super::panicked(panic),
    };
    warn!(%group, %id, %error, "the hook for dead letters failed");
}
