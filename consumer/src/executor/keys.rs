//! The order of keys: what waits behind the message of a key, in memory or in the log.
//!
//! A message whose key is held goes behind it. While the head of a key fails, and memory is short or it fails for long, its successors are
//! *parked*: forgotten, but for the offset of the first of them. From there on the key's messages are neither settled nor pending, whatever the lane's position: the lane
//! passes them by, until the key has caught up with it (`catch_up.rs`).
//!
//! *What is in memory of a key is before what is parked.* So a new owner, who finds the one pending and the other parked, runs them in order if it
//! takes in all that is pending first.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::catch_up::CatchUp;
use super::unknown::Turn;
use super::{Executor, Job};
use crate::handler::MessageOrder;
use crate::protocol::journal::ParkedFrom;
use crate::protocol::redelivery::Parked;

/// Beyond such a wait of the head, what waits behind it is not kept in memory, and does not hold its slot.
const LONG: Duration = Duration::from_secs(60);

/// Keys of which a message runs or waits for its next attempt, with their successors.
#[derive(Default)]
pub(super) struct Keys {
    held: HashMap<i32, Successors>,
    pub(super) catch_up: CatchUp,
}

impl Keys {
    pub(super) fn has(&self, key: i32) -> bool {
        self.held.contains_key(&key)
    }

    pub(super) fn get(&self, key: i32) -> Option<&Successors> {
        self.held.get(&key)
    }

    pub(super) fn get_mut(&mut self, key: i32) -> Option<&mut Successors> {
        self.held.get_mut(&key)
    }

    /// The successors of a key that is held, or from now on.
    pub(super) fn of(&mut self, key: i32) -> &mut Successors {
        self.held.entry(key).or_default()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (i32, &Successors)> {
        self.held.iter().map(|(key, successors)| (*key, successors))
    }

    pub(super) fn retain(&mut self, keep: impl Fn(i32) -> bool) {
        self.held.retain(|key, _| keep(*key));
    }

    /// Of what waits in memory.
    pub(super) fn retain_queued(&mut self, keep: impl Fn(&Job) -> bool) {
        for successors in self.held.values_mut() {
            successors.queue.retain(&keep);
        }
    }

    /// By its offset among those in memory.
    pub(super) fn insert(&mut self, key: i32, job: Job) {
        let queue = &mut self.of(key).queue;
        let place = queue.partition_point(|other| other.offset < job.offset);
        queue.insert(place, job);
    }

    /// Where the parked messages of a key are.
    fn parked(&self, key: i32) -> Option<Parked> {
        self.get(key)?.parked
    }
}

/// What waits behind the message of a key.
#[derive(Default)]
pub(super) struct Successors {
    /// In memory, in order.
    pub(super) queue: VecDeque<Job>,
    /// Where the rest is, all of it behind those in memory.
    pub(super) parked: Option<Parked>,
    /// The head has a row: it failed and waits for its next attempt, or for an operator.
    pub(super) failing: bool,
    /// It waits so long that its successors are not to hold their slots.
    for_long: bool,
    /// Nothing of the key runs, is ready or waits for an attempt.
    pub(super) headless: bool,
    /// What is parked is being read, now and then.
    pub(super) catching_up: bool,
    /// Numbers and first offsets of what was read and may not run before it is recorded that it is not parked any more.
    pub(super) unrecorded: VecDeque<(u64, i64)>,
    /// The first that is parked was left to an instance that handles its type, this one.
    pub(super) waits_for: Option<String>,
}

impl Successors {
    /// The first that may run now.
    pub(super) fn next(&self) -> Option<&Job> {
        let unrecorded = self.unrecorded.front().map(|(_, first)| *first);
        let next = self.queue.front()?;
        unrecorded.is_none_or(|first| next.offset < first).then_some(next)
    }

    pub(super) fn pop(&mut self) -> Option<Job> {
        self.next()?;
        self.queue.pop_front()
    }
}

impl Executor {
    /// Puts a message behind its key if that is held; gives it back if it is not.
    pub(super) fn queue_behind_its_key(&mut self, job: Job) -> Option<Job> {
        let Some(key) = job.key else { return Some(job) };
        let memory_is_short = self.memory_is_short();
        let Some(successors) = self.keys.get_mut(key) else {
            return Some(job);
        };
        let (failing, for_long) = (successors.failing, successors.for_long);
        match successors.parked {
            Some(parked) if parked.first() <= job.offset => self.park(key, job.offset),
            None if failing && (memory_is_short || for_long) => {
                self.park_queue(key);
                self.park(key, job.offset);
            }
            _ if successors.headless && successors.queue.is_empty() => {
                successors.headless = false;
                return Some(job);
            }
            _ => {
                self.lanes.hold(job.offset, job.lane);
                successors.queue.push_back(job);
            }
        }
        None
    }

    pub(super) fn hold_key(&mut self, job: &Job) {
        if let Some(key) = job.key {
            self.keys.of(key).headless = false;
        }
    }

    /// The message of the key is settled: the next may run.
    pub(super) fn release_key(&mut self, key: i32) {
        let Some(successors) = self.keys.get_mut(key) else {
            return;
        };
        successors.failing = false;
        successors.for_long = false;
        successors.waits_for = None;
        if successors.parked.is_some() && !successors.catching_up {
            successors.catching_up = true;
            self.keys.catch_up.wait(key);
        }
        while let Some(mut next) = self.keys.get_mut(key).and_then(Successors::pop) {
            next.is_ready();
            if next.halted {
                return self.halt(next);
            }
            match self.turn(next) {
                Turn::Run(next) => {
                    self.hold_key(&next);
                    return match self.plan.concurrency {
                        // Who runs one at a time gets them by offset, also where some have keys and some have none.
                        1 => self.queue.push_by_offset(next),
                        _ => self.queue.push(next),
                    };
                }
                Turn::Left => return,
                Turn::Settled => {}
            }
        }
        let Some(successors) = self.keys.get_mut(key) else {
            return;
        };
        if successors.queue.is_empty() && successors.parked.is_none() {
            self.keys.held.remove(&key);
        } else {
            successors.headless = true;
        }
    }

    /// The head of the key has failed and has a row, and waits until it is due, or for an operator.
    pub(super) fn head_fails(&mut self, key: i32, due: Option<Instant>) {
        let memory_is_short = self.memory_is_short();
        let Some(successors) = self
            .keys
            .get_mut(key)
            .filter(|_| self.plan.order == MessageOrder::Key)
        else {
            return;
        };
        successors.failing = true;
        successors.for_long = due.is_none_or(|due| due > Instant::now() + LONG);
        successors.catching_up = false;
        if memory_is_short || successors.for_long {
            self.park_queue(key);
        }
    }

    /// Forgets what waits in memory. What has a row that an operator may change stays.
    pub(super) fn park_queue(&mut self, key: i32) {
        let Some(successors) = self.keys.get_mut(key) else {
            return;
        };
        successors.unrecorded.clear();
        let mut first = None;
        for job in std::mem::take(&mut successors.queue) {
            if self.failing.has(job.offset) {
                successors.queue.push_back(job);
            } else if job.stored {
                // A copy.
                let parked = successors.parked.get_or_insert_default();
                parked.copies = parked.copies.into_iter().chain([job.offset]).min();
            } else {
                self.lanes.let_go(job.offset);
                first.get_or_insert(job.offset);
            }
        }
        if let Some(first) = first {
            self.park_from(key, first);
        }
    }

    /// Half the window is left to the keys that do not fail.
    fn memory_is_short(&self) -> bool {
        self.lanes.unsettled() > self.plan.window / 2
    }

    /// A message that comes is parked.
    fn park(&mut self, key: i32, offset: i64) {
        let Some(successors) = self.keys.get(key) else {
            return;
        };
        // Few keys that fail slowly may be all there are. One that waits for long says nothing of the others.
        let counts = successors.failing && !successors.for_long;
        if successors.parked.is_none_or(|parked| parked.log.is_none()) {
            self.park_from(key, offset);
        }
        if counts && self.admission.breaker.parked(Instant::now()) {
            self.warn_open();
        }
    }

    /// From this offset on the key's messages are parked.
    pub(super) fn park_from(&mut self, key: i32, offset: i64) {
        if let Some(successors) = self.keys.get_mut(key) {
            successors.parked.get_or_insert_default().log = Some(offset);
            self.note_parked(key);
        }
    }

    /// Notes from where on a key is parked, for the next report.
    pub(super) fn note_parked(&mut self, key: i32) {
        let lane = self.lanes.of_key(key);
        let Some(epoch) = self.lanes.epoch(lane) else {
            return;
        };
        let offset = self.keys.parked(key).and_then(|parked| parked.log);
        let waits_for = self.keys.get(key).and_then(|of| of.waits_for.clone());
        let parked = ParkedFrom {
            lane,
            epoch,
            offset,
            waits_for,
        };
        self.reporter.parks(key, parked);
    }
}
