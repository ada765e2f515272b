//! What may run as soon as there is room, and what of it runs together.
//!
//! Messages of a handler that takes batches wait by themselves, so that a batch is its handler's only, whatever comes between. What follows in
//! the order of a key is not here but behind its key (`keys.rs`); a batch takes it along from there.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::keys::Successors;
use super::{Executor, Job};
use crate::clock::later;
use crate::handler::router::Handler;
use crate::ids::Lane;

/// A failed batch runs again in parts of this fraction, down to single messages: one bad message among 500 is found by 25 runs, not by 500, and
/// one that hangs costs three timeouts.
pub(super) const PARTS: usize = 10;

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
    pub(super) fn lanes(&self) -> Vec<Lane> {
        let mut lanes: Vec<Lane> = self.iter().map(|job| job.lane).collect();
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

/// What waits to run: for room, for its time, or for another instance.
#[derive(Default)]
pub(super) struct Queue {
    /// May run as soon as there is room.
    ready: Ready,
    /// Failed, by the time of their next attempt.
    retries: BTreeMap<(Instant, i64), Job>,
    /// At the head of their keys and left to an instance that handles them; those that are not parked.
    left: BTreeMap<i64, Job>,
}

impl Queue {
    pub(super) fn push(&mut self, job: Job) {
        self.ready.queue_of(&job.handler).push_back(job);
    }

    /// Before those of greater offsets.
    pub(super) fn push_by_offset(&mut self, job: Job) {
        let queue = self.ready.queue_of(&job.handler);
        let at = queue.partition_point(|other| other.offset < job.offset);
        queue.insert(at, job);
    }

    fn push_front(&mut self, job: Job) {
        self.ready.queue_of(&job.handler).push_front(job);
    }

    /// How many are ready.
    pub(super) fn ready(&self) -> usize {
        self.ready.queues().map(VecDeque::len).sum()
    }

    /// Whether none is ready.
    pub(super) fn is_empty(&self) -> bool {
        self.ready.queues().all(VecDeque::is_empty)
    }

    /// Whether such a one is ready.
    pub(super) fn any(&self, is: impl Fn(&Job) -> bool) -> bool {
        self.ready.queues().flatten().any(is)
    }

    /// One that is ready, by itself.
    pub(super) fn pop(&mut self) -> Option<Job> {
        self.ready.queues_mut().find_map(VecDeque::pop_front)
    }

    /// One that is ready and has failed before, by itself.
    pub(super) fn pop_failed(&mut self) -> Option<Job> {
        self.ready.queues_mut().find_map(|queue| {
            let failed = queue.iter().position(Job::has_failed)?;
            queue.remove(failed)
        })
    }

    /// Again when it is due.
    pub(super) fn retry(&mut self, due: Instant, job: Job) {
        self.retries.insert((due, job.offset), job);
    }

    /// How many wait for their next attempt.
    pub(super) fn retries(&self) -> usize {
        self.retries.len()
    }

    pub(super) fn next_retry(&self) -> Option<Instant> {
        self.retries.keys().next().map(|(due, _)| *due)
    }

    /// One whose next attempt is due.
    pub(super) fn due(&mut self, now: Instant) -> Option<Job> {
        let entry = self.retries.first_entry().filter(|entry| entry.key().0 <= now)?;
        Some(entry.remove())
    }

    /// What waits is due sooner.
    pub(super) fn advance(&mut self, span: Duration) {
        let retries = std::mem::take(&mut self.retries).into_iter();
        self.retries = retries
            .map(|((due, offset), job)| ((due.checked_sub(span).unwrap_or(due), offset), job))
            .collect();
    }

    /// To another instance.
    pub(super) fn leave(&mut self, job: Job) {
        self.left.insert(job.offset, job);
    }

    pub(super) fn has_left(&self, offset: i64) -> bool {
        self.left.contains_key(&offset)
    }

    /// Those that were left to others and are such, no longer.
    pub(super) fn take_left(&mut self, is: impl Fn(&Job) -> bool) -> Vec<Job> {
        self.left
            .extract_if(.., |_, job| is(job))
            .map(|(_, job)| job)
            .collect()
    }

    /// Whatever they wait for.
    pub(super) fn retain(&mut self, keep: impl Fn(&Job) -> bool) {
        self.ready.queues_mut().for_each(|queue| queue.retain(&keep));
        self.retries.retain(|_, job| keep(job));
        self.left.retain(|_, job| keep(job));
    }
}

#[derive(Default)]
struct Ready {
    single: VecDeque<Job>,
    /// One queue for each handler that takes batches.
    batched: Vec<(Arc<Handler>, VecDeque<Job>)>,
    /// Which of the queues is next.
    turn: usize,
}

impl Ready {
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
}

impl Executor {
    /// What is to run next: of each handler in turn.
    pub(super) fn next_jobs(&mut self, now: Instant) -> Option<Jobs> {
        if self.queue.ready.batched.is_empty() {
            return self.queue.ready.single.pop_front().map(Jobs::from);
        }
        let queues = self.queue.ready.batched.len() + 1;
        for _ in 0..queues {
            self.queue.ready.turn = (self.queue.ready.turn + 1) % queues;
            let jobs = match self.queue.ready.turn.checked_sub(1) {
                None => self.queue.ready.single.pop_front().map(Jobs::from),
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
        let (handler, queue) = &self.queue.ready.batched[n];
        let first = queue.front()?;
        if handler.batch_wait.is_zero() || first.limit == 1 {
            return None;
        }
        let mut there = 0;
        for job in queue {
            let behind = job.key.and_then(|key| self.keys.get(key));
            there += 1 + behind.map_or(0, |successors| successors.queue.len());
            if there >= first.limit {
                return None;
            }
        }
        first.ready_since.map(|since| later(since, handler.batch_wait))
    }

    /// When the next batch that waits for more waits no longer.
    pub(super) fn next_filled(&self) -> Option<Instant> {
        (0..self.queue.ready.batched.len())
            .filter_map(|n| self.fills_at(n))
            .min()
    }

    /// The messages at the head of a queue that may run together.
    fn batch(&mut self, n: usize, now: Instant) -> Option<Jobs> {
        let first = self.queue.ready.batched[n].1.pop_front()?;
        let most = first.limit.min(self.admission.throttle.available(now));
        if most <= 1 || self.runs_alone(&first) {
            return Some(first.into());
        }
        let mut batch = vec![first];
        self.take_successors(&mut batch, most);
        while let Some(next) = self.queue.ready.batched[n].1.front()
            && self.may_join(next, &batch, most)
            && let Some(next) = self.queue.ready.batched[n].1.pop_front()
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
        while let Some(next) = self.keys.get(key).and_then(Successors::next)
            && self.may_join(next, batch, most)
            && let Some(next) = self.keys.get_mut(key).and_then(Successors::pop)
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
                Some(key) if !keys.insert(key) => self.keys.insert(key, job),
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
        let heads = self.take_apart(jobs);
        self.run_again(heads);
    }

    /// The first of their keys, or without one: they are ready as before.
    pub(super) fn run_again(&mut self, mut heads: Vec<Job>) {
        heads.retain(|job| !self.lanes.is_draining(job.lane) && !self.admission.is_stopping());
        for mut job in heads.into_iter().rev() {
            job.is_ready();
            self.queue.push_front(job);
        }
    }
}
