//! The order of keys: what waits behind the message of a key, in memory or in the log.
//!
//! A message whose key is held goes behind it. While the head of a key fails, and memory is short or it fails for long, its successors are
//! *parked*: forgotten, but for the offset of the first of them. From there on the key's messages are neither settled nor pending, whatever the lane's position: the lane
//! passes them by, until the key has caught up with it (`catch_up.rs`).
//!
//! *What is in memory of a key is before what is parked.* So a new owner, who finds the one pending and the other parked, runs them in order if it
//! takes in all that is pending first.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Executor, Job};
use crate::handler::Order;
use crate::journal::ParkedFrom;
use crate::lane::lane_of_key;
use crate::redelivery::Parked;

/// Beyond such a wait of the head, what waits behind it is not kept in memory, and does not hold its slot.
const LONG: Duration = Duration::from_secs(60);

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
        let Some(successors) = self.keys.get_mut(&key) else {
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
                self.unsettled.insert(job.offset, job.lane);
                successors.queue.push_back(job);
            }
        }
        None
    }

    pub(super) fn hold_key(&mut self, job: &Job) {
        if let Some(key) = job.key {
            self.keys.entry(key).or_default().headless = false;
        }
    }

    /// The message of the key is settled: the next may run.
    pub(super) fn release_key(&mut self, key: i32) {
        let Some(successors) = self.keys.get_mut(&key) else {
            return;
        };
        successors.failing = false;
        successors.for_long = false;
        if successors.parked.is_some() && !successors.catching_up {
            successors.catching_up = true;
            self.catch_up.wait(key);
        }
        if let Some(mut next) = successors.pop() {
            successors.headless = false;
            next.is_ready();
            match next.halted {
                true => self.halt(next),
                false => self.ready.push_back(next),
            }
        } else if successors.queue.is_empty() && successors.parked.is_none() {
            self.keys.remove(&key);
        } else {
            successors.headless = true;
        }
    }

    /// The head of the key has failed and has a row, and waits until it is due, or for an operator.
    pub(super) fn head_fails(&mut self, key: i32, due: Option<Instant>) {
        let memory_is_short = self.memory_is_short();
        let Some(successors) = self.keys.get_mut(&key).filter(|_| self.plan.order == Order::Key) else {
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
    fn park_queue(&mut self, key: i32) {
        let Some(successors) = self.keys.get_mut(&key) else {
            return;
        };
        successors.unrecorded.clear();
        let mut first = None;
        for job in std::mem::take(&mut successors.queue) {
            if self.failing.contains_key(&job.offset) {
                successors.queue.push_back(job);
            } else if job.stored {
                // A copy.
                let parked = successors.parked.get_or_insert_default();
                parked.copies = parked.copies.into_iter().chain([job.offset]).min();
            } else {
                self.unsettled.remove(&job.offset);
                first.get_or_insert(job.offset);
            }
        }
        if let Some(first) = first {
            self.park_from(key, first);
        }
    }

    /// Half the window is left to the keys that do not fail.
    fn memory_is_short(&self) -> bool {
        self.unsettled.len() > self.plan.window / 2
    }

    /// A message that comes is parked.
    fn park(&mut self, key: i32, offset: i64) {
        let Some(successors) = self.keys.get(&key) else {
            return;
        };
        // Few keys that fail slowly may be all there are. One that waits for long says nothing of the others.
        let counts = successors.failing && !successors.for_long;
        if successors.parked.is_none_or(|parked| parked.log.is_none()) {
            self.park_from(key, offset);
        }
        if counts && self.breaker.parked(Instant::now()) {
            self.warn_open();
        }
    }

    /// From this offset on the key's messages are parked.
    fn park_from(&mut self, key: i32, offset: i64) {
        if let Some(successors) = self.keys.get_mut(&key) {
            successors.parked.get_or_insert_default().log = Some(offset);
            self.note_parked(key);
        }
    }

    /// Notes from where on a key is parked, for the next report.
    pub(super) fn note_parked(&mut self, key: i32) {
        let lane = lane_of_key(key, self.lane_count);
        let Some(epoch) = self.epoch(lane) else { return };
        let offset = self.parked(key).and_then(|parked| parked.log);
        self.journal
            .parked
            .insert(key, ParkedFrom { lane, epoch, offset });
        self.dirty = true;
    }

    /// Where the parked messages of a key are.
    pub(super) fn parked(&self, key: i32) -> Option<Parked> {
        self.keys.get(&key)?.parked
    }

    /// By its offset among those in memory.
    pub(super) fn insert_successor(&mut self, key: i32, job: Job) {
        let queue = &mut self.keys.entry(key).or_default().queue;
        let place = queue.partition_point(|other| other.offset < job.offset);
        queue.insert(place, job);
    }
}
