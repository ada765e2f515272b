//! What may run as soon as there is room, and what of it runs together.
//!
//! Messages of a handler that takes batches wait by themselves, so that a batch is its handler's only, whatever comes between. What follows in
//! the order of a key is not here but behind its key (`keys.rs`); a batch takes it along from there.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::{Executor, Job};
use crate::router::Handler;

/// A failed batch runs again in parts of this fraction, down to single messages: one bad message among 500 is found by 25 runs, not by 500, and
/// one that hangs costs three timeouts.
const PARTS: usize = 10;

/// Messages of one handler that run together: one, or a batch by offset.
pub(super) struct Jobs {
    pub(super) first: Job,
    /// Those of a batch.
    pub(super) others: Vec<Job>,
}

impl Jobs {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Job> {
        std::iter::once(&self.first).chain(&self.others)
    }

    pub(super) fn len(&self) -> usize {
        1 + self.others.len()
    }

    pub(super) fn handler(&self) -> &Arc<Handler> {
        &self.first.handler
    }

    /// Their lanes, each once and in order.
    pub(super) fn lanes(&self) -> Vec<u16> {
        let mut lanes: Vec<u16> = self.iter().map(|job| job.lane).collect();
        lanes.sort_unstable();
        lanes.dedup();
        lanes
    }
}

impl From<Job> for Jobs {
    fn from(first: Job) -> Self {
        Self {
            first,
            others: Vec::new(),
        }
    }
}

impl IntoIterator for Jobs {
    type Item = Job;
    type IntoIter = std::iter::Chain<std::iter::Once<Job>, std::vec::IntoIter<Job>>;

    fn into_iter(self) -> Self::IntoIter {
        std::iter::once(self.first).chain(self.others)
    }
}

#[derive(Default)]
pub(super) struct Ready {
    single: VecDeque<Job>,
    /// One queue for each handler that takes batches.
    batched: Vec<(Arc<Handler>, VecDeque<Job>)>,
    /// Which of the queues is next.
    turn: usize,
}

impl Ready {
    pub(super) fn push_back(&mut self, job: Job) {
        self.queue_of(&job.handler).push_back(job);
    }

    pub(super) fn push_front(&mut self, job: Job) {
        self.queue_of(&job.handler).push_front(job);
    }

    fn queue_of(&mut self, handler: &Arc<Handler>) -> &mut VecDeque<Job> {
        if handler.batch == 1 {
            return &mut self.single;
        }
        let known = self
            .batched
            .iter()
            .position(|(other, _)| Arc::ptr_eq(other, handler));
        let n = known.unwrap_or_else(|| {
            self.batched.push((handler.clone(), VecDeque::new()));
            self.batched.len() - 1
        });
        &mut self.batched[n].1
    }

    fn queues(&self) -> impl Iterator<Item = &VecDeque<Job>> {
        std::iter::once(&self.single).chain(self.batched.iter().map(|(_, queue)| queue))
    }

    fn queues_mut(&mut self) -> impl Iterator<Item = &mut VecDeque<Job>> {
        std::iter::once(&mut self.single).chain(self.batched.iter_mut().map(|(_, queue)| queue))
    }

    pub(super) fn len(&self) -> usize {
        self.queues().map(VecDeque::len).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queues().all(VecDeque::is_empty)
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&Job) -> bool) {
        for queue in self.queues_mut() {
            queue.retain(&keep);
        }
    }

    /// One by itself.
    pub(super) fn pop(&mut self) -> Option<Job> {
        self.queues_mut().find_map(VecDeque::pop_front)
    }

    /// One by itself that has failed before.
    pub(super) fn pop_failed(&mut self) -> Option<Job> {
        self.queues_mut().find_map(|queue| {
            let failed = queue.iter().position(|job| job.stored)?;
            queue.remove(failed)
        })
    }
}

impl Executor {
    /// What is to run next: of each handler in turn.
    pub(super) fn next_jobs(&mut self, now: Instant) -> Option<Jobs> {
        if self.ready.batched.is_empty() {
            return self.ready.single.pop_front().map(Jobs::from);
        }
        let queues = self.ready.batched.len() + 1;
        for _ in 0..queues {
            self.ready.turn = (self.ready.turn + 1) % queues;
            let jobs = match self.ready.turn.checked_sub(1) {
                None => self.ready.single.pop_front().map(Jobs::from),
                Some(n) if self.fills_at(n).is_none_or(|at| at <= now) => self.batch(n, now),
                Some(_) => None,
            };
            if jobs.is_some() {
                return jobs;
            }
        }
        None
    }

    /// Until when the batch of a queue waits for more.
    fn fills_at(&self, n: usize) -> Option<Instant> {
        let (handler, queue) = &self.ready.batched[n];
        let first = queue.front()?;
        if handler.batch_wait.is_zero() || first.limit == 1 {
            return None;
        }
        let mut there = 0;
        for job in queue {
            let behind = job.key.and_then(|key| self.keys.get(&key));
            there += 1 + behind.map_or(0, |successors| successors.queue.len());
            if there >= first.limit {
                return None;
            }
        }
        first.ready_since.map(|since| since + handler.batch_wait)
    }

    /// When the next batch that waits for more waits no longer.
    pub(super) fn next_filled(&self) -> Option<Instant> {
        (0..self.ready.batched.len())
            .filter_map(|n| self.fills_at(n))
            .min()
    }

    /// The messages at the head of a queue that may run together.
    fn batch(&mut self, n: usize, now: Instant) -> Option<Jobs> {
        let first = self.ready.batched[n].1.pop_front()?;
        let most = first.limit.min(self.throttle.available(now));
        if most <= 1 || self.runs_alone(&first) {
            return Some(first.into());
        }
        let mut batch = vec![first];
        self.take_successors(&mut batch, most);
        while let Some(next) = self.ready.batched[n].1.front()
            && self.may_join(next, &batch, most)
            && let Some(next) = self.ready.batched[n].1.pop_front()
        {
            batch.push(next);
            self.take_successors(&mut batch, most);
        }
        batch.sort_unstable_by_key(|job| job.offset);
        let others = batch.split_off(1);
        batch.pop().map(|first| Jobs { first, others })
    }

    /// What follows the last message of a batch in the order of its key joins it, up to the first that may not.
    fn take_successors(&mut self, batch: &mut Vec<Job>, most: usize) {
        let Some(key) = batch.last().and_then(|job| job.key) else {
            return;
        };
        while let Some(next) = self
            .keys
            .get(&key)
            .and_then(|successors| successors.queue.front())
            && self.may_join(next, batch, most)
            && let Some(next) = self
                .keys
                .get_mut(&key)
                .and_then(|successors| successors.queue.pop_front())
        {
            batch.push(next);
        }
    }

    fn may_join(&self, job: &Job, batch: &[Job], most: usize) -> bool {
        batch.len() < most.min(job.limit)
            && Arc::ptr_eq(&job.handler, &batch[0].handler)
            && !self.runs_alone(job)
    }

    /// What has a row of its own settles by itself, what has expired does not run, and who may kill the process is to be found.
    fn runs_alone(&self, job: &Job) -> bool {
        job.stored || job.halted || self.is_suspect(job) || self.has_expired(job)
    }

    /// Takes a batch apart: gives back the first message of each key and those without one; the others are behind their keys again.
    pub(super) fn take_apart(&mut self, jobs: Jobs) -> Vec<Job> {
        let mut keys = HashSet::new();
        let mut heads = Vec::new();
        for job in jobs {
            match job.key {
                Some(key) if !keys.insert(key) => self.insert_successor(key, job),
                _ => heads.push(job),
            }
        }
        heads
    }

    /// A batch failed, and which of its messages is to blame is to be found.
    pub(super) fn run_in_parts(&mut self, mut jobs: Jobs) {
        let part = (jobs.len() / PARTS).max(1);
        jobs.first.limit = part;
        jobs.others.iter_mut().for_each(|job| job.limit = part);
        let mut heads = self.take_apart(jobs);
        heads.retain(|job| !self.draining.contains_key(&job.lane) && self.stop_by.is_none());
        for mut job in heads.into_iter().rev() {
            job.is_ready();
            self.ready.push_front(job);
        }
    }
}
