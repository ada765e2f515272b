//! Reporting: how far everything is settled and what became of the rest, to the session; and what waits for it to be recorded.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::Executor;
use crate::handler::{Hooks, Telling};
use crate::ids::{Epoch, Lane};
use crate::protocol::journal::{Entry, Journal, Needs, ParkedFrom};
use crate::protocol::progress::{Intake, LanePosition, Progress, Snapshot};

/// How often progress is told under load.
const REPORT_EVERY: Duration = Duration::from_millis(50);

/// What is told to the session: what became of messages since the last report, and when the next one is due.
pub(super) struct Reporter {
    /// What the next report says beside how far everything is settled.
    journal: Journal,
    /// What is to be done once it is recorded.
    afterwards: Vec<Afterwards>,
    /// Reports that are not yet recorded.
    recording: VecDeque<Recording>,
    /// The number of the last report, and of the last that is recorded.
    last: u64,
    recorded: u64,
    /// How many messages their journals have.
    unrecorded: usize,
    /// There is something to report.
    dirty: bool,
    /// Somebody waits for the next report to be recorded.
    urgent: bool,
    reported: Instant,
}

/// What is done once a report is recorded.
pub(super) enum Afterwards {
    /// A run may begin.
    Run(oneshot::Sender<()>),
    /// What a key had parked may run.
    TakenUp { key: i32, load: u64 },
    /// A message is among the dead letters.
    Buried {
        lane: Lane,
        epoch: Epoch,
        /// The key that goes on.
        key: Option<i32>,
        telling: Option<Box<Telling>>,
    },
}

/// A report that is not yet recorded.
struct Recording {
    number: u64,
    /// The messages of its journal.
    offsets: Vec<i64>,
    afterwards: Vec<Afterwards>,
}

impl Reporter {
    pub(super) fn new() -> Self {
        Self {
            journal: Journal::default(),
            afterwards: Vec::new(),
            recording: VecDeque::new(),
            last: 0,
            recorded: 0,
            unrecorded: 0,
            dirty: false,
            urgent: false,
            reported: Instant::now(),
        }
    }

    /// There is something new.
    pub(super) fn mark(&mut self) {
        self.dirty = true;
    }

    /// And somebody waits for it to be recorded.
    pub(super) fn hurry(&mut self) {
        self.dirty = true;
        self.urgent = true;
    }

    /// Nobody is told.
    fn is_of_no_use(&mut self) {
        self.dirty = false;
    }

    /// What became of a message.
    pub(super) fn note(&mut self, offset: i64, entry: Entry) {
        self.journal.put(offset, entry);
        self.dirty = true;
    }

    /// From where on a key is parked.
    pub(super) fn parks(&mut self, key: i32, parked: ParkedFrom) {
        self.journal.parked.insert(key, parked);
        self.dirty = true;
    }

    /// What a lane needs.
    pub(super) fn needs(&mut self, lane: Lane, needs: Needs) {
        self.journal.needs.insert(lane, needs);
        self.dirty = true;
    }

    /// A lane got past what its dead owners were doing.
    pub(super) fn is_past(&mut self, lane: Lane) {
        self.journal.cleared.push(lane);
        self.dirty = true;
    }

    /// Lanes that have another owner: nothing is said of them.
    pub(super) fn forget(&mut self, lanes: &[Lane]) {
        self.journal.forget(lanes);
    }

    /// Once the next report is recorded.
    pub(super) fn then(&mut self, what: Afterwards) {
        self.afterwards.push(what);
    }

    /// Somebody waits who is not to wait for long, if anything waits for the next report.
    pub(super) fn hurry_if_awaited(&mut self) {
        self.urgent |= !self.afterwards.is_empty();
    }

    /// Messages that were noted and are not on record yet.
    pub(super) fn unrecorded(&self) -> usize {
        self.unrecorded + self.journal.entries.len()
    }

    /// Whether something was noted of this message that is not recorded yet: what the database says of it is old.
    pub(super) fn is_unrecorded(&self, offset: i64) -> bool {
        let reported = self
            .recording
            .iter()
            .any(|report| report.offsets.contains(&offset));
        reported || self.journal.entries.contains_key(&offset)
    }

    /// Every 50 ms under load, at once when there is nothing more to do or somebody waits.
    fn is_due(&self, is_idle: bool) -> bool {
        self.dirty && (is_idle || self.urgent || self.reported.elapsed() >= REPORT_EVERY)
    }

    /// Something is to be reported, or a report is not recorded yet.
    pub(super) fn is_pending(&self) -> bool {
        self.dirty || self.recorded < self.last
    }

    /// When the next report is due.
    pub(super) fn due_at(&self) -> Option<Instant> {
        self.dirty.then(|| self.reported + REPORT_EVERY)
    }

    fn put(&mut self, progress: &Progress, snapshot: Snapshot) {
        let journal = std::mem::take(&mut self.journal);
        let offsets: Vec<i64> = journal.entries.keys().copied().collect();
        let number = progress.put(snapshot, journal, self.urgent);
        self.last = number;
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

    /// The first report up to this number is in the database; what waited for it.
    fn recorded(&mut self, number: u64) -> Option<Vec<Afterwards>> {
        self.recorded = self.recorded.max(number);
        let report = self.recording.pop_front_if(|report| report.number <= number)?;
        self.unrecorded -= report.offsets.len();
        Some(report.afterwards)
    }
}

impl Executor {
    pub(super) fn report(&mut self) {
        self.gauge();
        if self.session.membership.is_none() {
            self.reporter.is_of_no_use();
            return;
        }
        let is_idle = self.lanes.is_settled() && self.reader.is_at_head();
        if self.reporter.is_due(is_idle) {
            self.leave_quarantine();
            self.put_report();
        }
    }

    pub(super) fn put_report(&mut self) {
        if let Some(membership) = &self.session.membership {
            let progress = membership.progress.clone();
            self.reporter.put(&progress, self.snapshot(|_| true));
        }
    }

    /// Reports up to this number are in the database.
    pub(super) fn recorded(&mut self, number: u64) {
        while let Some(afterwards) = self.reporter.recorded(number) {
            for afterwards in afterwards {
                self.carry_on(afterwards);
            }
        }
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
                telling,
            } => {
                if let Some(telling) = telling {
                    let turn = Hooks::begin(&self.plan.hooks);
                    tokio::spawn(telling.tell(turn));
                }
                if let Some(key) = key
                    && self.lanes.epoch(lane) == Some(epoch)
                {
                    self.release_key(key);
                }
            }
        }
    }

    pub(super) fn intake(&self) -> Intake {
        if self.admission.breaker.is_open() {
            Intake::Open
        } else if self.failing.len() >= self.most_failing() {
            Intake::Full
        } else {
            Intake::Closed
        }
    }

    /// This instance's share of what may fail at once.
    pub(super) fn most_failing(&self) -> usize {
        let (owned, all) = (self.lanes.owned(), usize::from(self.lanes.count()));
        (self.plan.max_failing * owned / all.max(1)).max(1)
    }

    fn gauge(&self) {
        let counters = &self.plan.counters;
        let retrying = if self.session.membership.is_some() {
            self.failing.len()
        } else {
            self.queue.retries()
        };
        counters.retrying.store(retrying as u64, Ordering::Relaxed);
        let halted = self.failing.halted() as u64;
        counters.halted.store(halted, Ordering::Relaxed);
        counters.set_intake(self.intake());
    }

    pub(super) fn snapshot(&self, include: impl Fn(Lane) -> bool) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (number, lane) in self.lanes.iter().filter(|(number, _)| include(*number)) {
            let next = self.reader.next_of(number);
            let next = next.or_else(|| self.lanes.drained_at(number)).unwrap_or(lane.cut);
            // Before a lane is read up to where it was claimed, what was settled then is still settled.
            let unread = lane.pending.iter().filter(|offset| **offset >= next);
            snapshot.pending.extend(unread.map(|offset| (*offset, number)));
            snapshot.lanes.push(LanePosition {
                lane: number,
                epoch: lane.epoch,
                position: next.max(lane.cut),
            });
        }
        let unsettled = self.lanes.all_unsettled();
        snapshot
            .pending
            .extend(unsettled.filter(|(_, lane)| include(*lane)));
        snapshot.pending.sort_unstable();
        snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Epoch;
    use crate::protocol::journal::Disposition;

    fn noted(reporter: &mut Reporter, offset: i64) {
        let entry = Entry::new(Lane::of(0, 1), Epoch(1), Disposition::Retry, 1);
        reporter.note(offset, entry);
        reporter.then(Afterwards::TakenUp {
            key: offset as i32,
            load: 0,
        });
    }

    #[test]
    fn what_waits_for_a_report_goes_on_once_that_one_is_recorded() {
        let (progress, mut reporter) = (Progress::new(Default::default()), Reporter::new());
        let put = |reporter: &mut Reporter| reporter.put(&progress, Snapshot::default());
        noted(&mut reporter, 7);
        assert!(reporter.is_unrecorded(7) && reporter.is_due(true));
        put(&mut reporter);
        assert!(!reporter.is_due(true), "it was reported");
        assert!(reporter.is_pending(), "and is not recorded yet");
        // One for which nothing waits, and one for which something does.
        reporter.mark();
        put(&mut reporter);
        noted(&mut reporter, 8);
        put(&mut reporter);
        assert_eq!(reporter.unrecorded(), 2);
        assert!(reporter.recorded(0).is_none());
        let first = reporter.recorded(2).unwrap();
        assert!(matches!(first[..], [Afterwards::TakenUp { key: 7, .. }]));
        assert!(reporter.recorded(2).is_none());
        assert!(!reporter.is_unrecorded(7) && reporter.is_unrecorded(8));
        assert!(reporter.recorded(3).is_some());
        assert_eq!(reporter.unrecorded(), 0);
        assert!(!reporter.is_pending());
        // One that has nothing but how far everything is settled.
        reporter.mark();
        put(&mut reporter);
        assert!(reporter.is_pending());
        assert!(reporter.recorded(4).is_none() && !reporter.is_pending());
    }
}
