//! Lanes: taken over, drained, given back.

use std::collections::{BTreeMap, HashMap};

use tracing::warn;

use super::{Claim, Event, Executor, Job};
use crate::ids::{Epoch, Lane};
use crate::lane::{OwnedLane, lane_of, lane_of_key};
use crate::log::seen::SeenTail;

/// The lanes that this instance owns of the subscription, and what of them is not settled.
pub(super) struct Lanes {
    /// How many the subscription has, which was fixed when it was made.
    count: u16,
    owned: HashMap<Lane, OwnedLane>,
    /// Lanes to be released once nothing of them runs, with the offset up to which they were taken in.
    draining: HashMap<Lane, i64>,
    /// Taken in and not settled, with their lanes; what has a row of its own is not among them.
    unsettled: BTreeMap<i64, Lane>,
}

/// What is to be done about messages of a lane that need not be read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Plain {
    /// Nothing.
    Elsewhere,
    /// All of them are due.
    Due,
    /// Some of them were settled before.
    Perhaps,
}

impl Lanes {
    pub(super) fn new(count: u16) -> Self {
        Self {
            count,
            owned: HashMap::new(),
            draining: HashMap::new(),
            unsettled: BTreeMap::new(),
        }
    }

    pub(super) fn count(&self) -> u16 {
        self.count
    }

    /// The lane of a message.
    pub(super) fn of(&self, offset: i64, key: Option<i32>) -> Lane {
        lane_of(offset, key, self.count)
    }

    /// The lane of a key.
    pub(super) fn of_key(&self, key: i32) -> Lane {
        lane_of_key(key, self.count)
    }

    /// How many this instance owns.
    pub(super) fn owned(&self) -> usize {
        self.owned.len()
    }

    pub(super) fn has(&self, number: Lane) -> bool {
        self.owned.contains_key(&number)
    }

    pub(super) fn get(&self, number: Lane) -> Option<&OwnedLane> {
        self.owned.get(&number)
    }

    pub(super) fn get_mut(&mut self, number: Lane) -> Option<&mut OwnedLane> {
        self.owned.get_mut(&number)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Lane, &OwnedLane)> {
        self.owned.iter().map(|(number, lane)| (*number, lane))
    }

    pub(super) fn epoch(&self, number: Lane) -> Option<Epoch> {
        self.get(number).map(|lane| lane.epoch)
    }

    /// Dead owners are behind one of them.
    pub(super) fn has_crashes(&self) -> bool {
        self.owned.values().any(|lane| lane.crashes > 0)
    }

    fn add(&mut self, number: Lane, lane: OwnedLane) {
        let former = self.owned.insert(number, lane);
        debug_assert!(former.is_none(), "lane {number} was claimed while it is run");
    }

    fn forget(&mut self, number: Lane) {
        self.draining.remove(&number);
        self.owned.remove(&number);
        self.unsettled.retain(|_, of| *of != number);
    }

    /// What is from here on was not settled before they were claimed.
    fn begin_at(&mut self, offset: i64) {
        for lane in self.owned.values_mut() {
            lane.cut = lane.cut.min(offset);
        }
    }

    /// Whether an offset of an owned lane was not settled before the lane was claimed.
    pub(super) fn is_due(&self, number: Lane, offset: i64) -> bool {
        self.get(number).is_some_and(|lane| {
            (offset >= lane.cut || lane.pending.contains(&offset)) && !lane.done.contains(&offset)
        })
    }

    /// For each lane by its number, whether all its messages from an offset on are due, of those that are read.
    pub(super) fn plain_from(&self, offset: i64, is_read: impl Fn(Lane) -> bool) -> Vec<Plain> {
        let mut lanes = vec![Plain::Elsewhere; usize::from(self.count)];
        for (number, lane) in self.iter().filter(|(number, _)| is_read(*number)) {
            let last = lane.done.iter().chain(&lane.pending).max();
            lanes[number.index()] = match offset >= lane.cut && last.is_none_or(|last| offset > *last) {
                true => Plain::Due,
                false => Plain::Perhaps,
            };
        }
        lanes
    }

    pub(super) fn is_draining(&self, number: Lane) -> bool {
        self.draining.contains_key(&number)
    }

    /// Up to where a lane was taken in that is drained.
    pub(super) fn drained_at(&self, number: Lane) -> Option<i64> {
        self.draining.get(&number).copied()
    }

    /// Those that can be released.
    fn drained(&self) -> Vec<Lane> {
        let runs = |number: &Lane| self.get(*number).is_some_and(|lane| lane.running > 0);
        (self.draining.keys().copied())
            .filter(|number| !runs(number))
            .collect()
    }

    pub(super) fn run_begins(&mut self, number: Lane) {
        if let Some(lane) = self.get_mut(number) {
            lane.running += 1;
        }
    }

    pub(super) fn run_ended(&mut self, number: Lane) {
        if let Some(lane) = self.get_mut(number) {
            lane.running -= 1;
        }
    }

    /// A message is taken in and not settled, and has no row.
    pub(super) fn hold(&mut self, offset: i64, number: Lane) {
        self.unsettled.insert(offset, number);
    }

    /// It is settled, or has a row, or is parked.
    pub(super) fn let_go(&mut self, offset: i64) {
        self.unsettled.remove(&offset);
    }

    /// How many are not settled.
    pub(super) fn unsettled(&self) -> usize {
        self.unsettled.len()
    }

    pub(super) fn is_settled(&self) -> bool {
        self.unsettled.is_empty()
    }

    pub(super) fn all_unsettled(&self) -> impl Iterator<Item = (i64, Lane)> {
        self.unsettled.iter().map(|(offset, number)| (*offset, *number))
    }

    pub(super) fn first_unsettled(&self) -> Option<i64> {
        self.unsettled.keys().next().copied()
    }

    /// Whether nothing of a lane below an offset is unsettled.
    pub(super) fn is_settled_below(&self, number: Lane, offset: i64) -> bool {
        !(self.unsettled.range(..offset)).any(|(_, of)| *of == number)
    }
}

impl Executor {
    pub(crate) fn claimed(&mut self, claim: Claim) {
        self.reader.remember_if_any(SeenTail::after(claim.anchor));
        let claimed: Vec<Lane> = claim.lanes.iter().map(|(number, _)| *number).collect();
        let mut starts = Vec::with_capacity(claim.lanes.len());
        for (number, mut lane) in claim.lanes {
            let next = lane
                .pending
                .iter()
                .copied()
                .min()
                .map_or(lane.cut, |least| least.min(lane.cut));
            starts.push((next, number));
            lane.suspect_below = self.suspect_below(&lane);
            if !lane.needs.is_empty() {
                self.types.look_now();
            }
            self.lanes.add(number, lane);
        }
        self.reader.read_lanes(starts, self.plan.window as i64);
        // Before anything of these lanes is read, so that what comes finds its key held.
        self.adopt(claim.held, claim.parked);
        self.forget_doubts(&claimed);
        self.reporter.mark();
    }

    /// Stops taking in a lane's messages and forgets those that do not run yet.
    pub(super) fn drain(&mut self, number: Lane) {
        if let Some(next) = self.reader.forget(number) {
            self.lanes.draining.insert(number, next);
        }
        self.forget_queued(|job| job.lane == number);
    }

    /// Forgets jobs that wait; they stay unsettled, or have a row.
    pub(super) fn forget_queued(&mut self, forget: impl Fn(&Job) -> bool) {
        self.queue.retain(|job| !forget(job));
        self.quarantine.retain(|job| !forget(job));
        self.keys.retain_queued(|job| !forget(job));
    }

    pub(super) fn release_drained(&mut self) {
        if self.lanes.draining.is_empty() {
            return;
        }
        let Some(membership) = self.session.membership.clone() else {
            return;
        };
        let done = self.lanes.drained();
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
    pub(super) async fn revoke(&mut self, lanes: &[Lane]) {
        self.forget_queued(|job| lanes.contains(&job.lane));
        self.reporter.forget(lanes);
        let aborted = self.runs.abort(lanes);
        // Until the aborted are gone: a lane may come back, and no key may then run twice.
        while self.runs.any_of(lanes) {
            match self.runs.next_ended().await {
                Some(ended) => self.ended(ended),
                None => break,
            }
        }
        for lane in lanes {
            self.forget_lane(*lane);
        }
        // Lanes whose messages were in a batch with theirs go on from where they stand in the database.
        for lane in aborted.difference(&lanes.iter().copied().collect()) {
            self.drain(*lane);
        }
    }

    fn forget_lane(&mut self, number: Lane) {
        self.forget_queued(|job| job.lane == number);
        self.reader.forget(number);
        self.lanes.forget(number);
        self.failing.forget(number);
        // Nothing of its keys runs or waits here any more.
        let lanes = &self.lanes;
        self.keys.retain(|key| lanes.of_key(key) != number);
    }

    /// Broadcast from memory: from where to go on, if the database went back to an earlier state.
    pub(super) async fn resync(&mut self) {
        let Some(resumed) = self.reader.resync().await else {
            return;
        };
        match resumed {
            Ok(resume) => {
                if resume.displaced > 0 || resume.is_guess {
                    warn!(
                        topic = %self.plan.topic, group = %self.plan.group, from = resume.next, displaced = resume.displaced,
                        from_the_last_known = resume.is_guess,
                        "the database went back to an earlier state (a crash, a failover, a recovery); messages that were given offsets anew are seen from here on"
                    );
                }
                // What is there now was not settled before it began.
                self.lanes.begin_at(resume.next);
            }
            Err(error) => {
                warn!(topic = %self.plan.topic, %error, "cannot check the log after a reconnect; trying again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_lane_that_is_given_up_nothing_is_left() {
        let mut lanes = Lanes::new(2);
        let (kept, gone) = (lanes.of(0, None), lanes.of(1, None));
        for lane in [kept, gone] {
            lanes.add(lane, OwnedLane::new(Epoch(1), 0));
            lanes.run_begins(lane);
        }
        lanes.hold(0, kept);
        lanes.hold(1, gone);
        lanes.hold(3, gone);
        lanes.draining.insert(gone, 4);
        assert!(lanes.drained().is_empty(), "something of it runs");
        lanes.run_ended(gone);
        assert_eq!(lanes.drained(), [gone]);
        lanes.forget(gone);
        assert_eq!(lanes.all_unsettled().collect::<Vec<_>>(), [(0, kept)]);
        assert!(!lanes.has(gone) && lanes.epoch(gone).is_none() && lanes.drained_at(gone).is_none());
        assert!(lanes.is_settled_below(kept, 0) && !lanes.is_settled_below(kept, 1));
    }
}
