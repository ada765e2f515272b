//! The order of keys: what waits behind the message of a key, in memory or in the database.
//!
//! A message whose key is held goes behind it. While the head of a key fails and memory is short, its successors are *parked*: copied to
//! `postbox.redelivery`, from where they are read in order when the head is settled. While a key has parked messages, whatever comes for
//! it is parked behind them.
//!
//! *What is before a parked message of its key is settled or has a row too*, so that a new owner, who finds the rows at once and the rest by and
//! by in the log, cannot run one before it: so only behind a head that has a row, and all that wait or none.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tracing::warn;

use super::report::Afterwards;
use super::{Ended, Executor, Job};
use crate::handler::Order;
use crate::journal::Fate;
use crate::lane::lane_of;
use crate::redelivery::{self, Held, LOAD};

/// The wait before parked messages that could not be read are read again.
const LOAD_WAIT: Duration = Duration::from_millis(500);

/// What waits behind the message of a key.
#[derive(Default)]
pub(super) struct Successors {
    /// In memory, in order.
    pub(super) queue: VecDeque<Job>,
    /// How many are in the database, all behind those in memory.
    pub(super) parked: usize,
    /// The head has a row: it failed and waits for its next attempt, or for an operator.
    pub(super) failing: bool,
    /// Parked ones are being read: there is no head.
    loading: bool,
}

/// Parked messages of a key that were read.
pub(super) struct Loaded {
    key: i32,
    lane: u16,
    epoch: i32,
    /// How many were parked as of the report after which it was read.
    parked: usize,
    rows: Result<Vec<Held>, String>,
}

impl Executor {
    /// Puts a message behind its key if that is held; gives it back if it is not.
    pub(super) fn queue_behind_its_key(&mut self, job: Job) -> Option<Job> {
        let Some(key) = job.key else { return Some(job) };
        let may_park = self.may_park();
        let Some(successors) = self.keys.get_mut(&key) else {
            return Some(job);
        };
        if successors.parked > 0 {
            self.park(key, job);
        } else if successors.failing && may_park {
            self.park_queue(key);
            self.park(key, job);
        } else {
            self.unsettled.insert(job.offset, job.lane);
            successors.queue.push_back(job);
        }
        None
    }

    pub(super) fn hold_key(&mut self, job: &Job) {
        if let Some(key) = job.key {
            self.keys.entry(key).or_default();
        }
    }

    /// The message of the key is settled: the next may run.
    pub(super) fn release_key(&mut self, key: i32) {
        let Some(successors) = self.keys.get_mut(&key) else {
            return;
        };
        successors.failing = false;
        if let Some(mut next) = successors.queue.pop_front() {
            next.is_ready();
            match next.halted {
                true => self.halt(next),
                false => self.ready.push_back(next),
            }
        } else if successors.parked == 0 {
            self.keys.remove(&key);
        } else if !successors.loading {
            successors.loading = true;
            // Once all that was parked so far is in the database, and all that was settled is not.
            self.afterwards.push(Afterwards::Load { key, parked: 0 });
            self.report_soon();
        }
    }

    /// The head of the key has failed and has a row: when memory is short, what waits behind it is parked.
    pub(super) fn head_fails(&mut self, key: i32) {
        let Some(successors) = self.keys.get_mut(&key) else {
            return;
        };
        successors.failing = true;
        if self.may_park() {
            self.park_queue(key);
        }
    }

    fn park_queue(&mut self, key: i32) {
        let queue = self
            .keys
            .get_mut(&key)
            .map(|successors| std::mem::take(&mut successors.queue));
        for job in queue.into_iter().flatten() {
            self.park(key, job);
        }
    }

    /// Half the window is left to the keys that do not fail. Where a failure holds up everything, the cursor waits instead.
    fn may_park(&self) -> bool {
        self.plan.order == Order::Key
            && self.membership.is_some()
            && self.unsettled.len() > self.plan.window / 2
    }

    fn park(&mut self, key: i32, job: Job) {
        self.unsettled.remove(&job.offset);
        self.failing.remove(&job.offset);
        self.note(&job, Fate::Parked, None, None);
        self.keys.entry(key).or_default().parked += 1;
        if self.breaker.parked(Instant::now()) {
            self.warn_open();
        }
    }

    /// How many messages of a key are parked.
    pub(super) fn parked(&self, key: i32) -> usize {
        self.keys.get(&key).map_or(0, |successors| successors.parked)
    }

    /// Reads the next parked messages of a key, of which so many are recorded.
    pub(super) fn load(&mut self, key: i32, parked: usize) {
        let lane = lane_of(0, Some(key), self.lane_count);
        let (Some(epoch), Some(membership)) = (self.epoch(lane), &self.membership) else {
            return;
        };
        let (subscription, log) = (membership.subscription, self.log.clone());
        self.tasks.spawn(async move {
            let rows = async {
                let mut connection = log.connection().await?;
                redelivery::of_key(&mut *connection, subscription, key).await
            };
            let rows = rows.await.map_err(|error: sqlx::Error| error.to_string());
            if rows.is_err() {
                tokio::time::sleep(LOAD_WAIT).await;
            }
            Ended::Loaded(Loaded {
                key,
                lane,
                epoch,
                parked,
                rows,
            })
        });
    }

    pub(super) fn loaded(&mut self, loaded: Loaded) {
        let Loaded { key, lane, epoch, .. } = loaded;
        if self.epoch(lane) != Some(epoch) || self.draining.contains_key(&lane) || self.stop_by.is_some() {
            return;
        }
        let rows = match loaded.rows {
            Ok(rows) => rows,
            Err(error) => {
                warn!(group = %self.plan.group, topic = %self.plan.topic, error, "cannot read parked messages; trying again");
                return self.load(key, loaded.parked);
            }
        };
        let read = rows.len();
        let mut jobs = Vec::with_capacity(read);
        for held in rows {
            jobs.extend(self.stored_job(held));
        }
        let Some(successors) = self.keys.get_mut(&key) else {
            return;
        };
        successors.loading = false;
        // Fewer than it asks for are all that are recorded, whatever the count says.
        let gone = if (read as i64) < LOAD {
            read.max(loaded.parked)
        } else {
            read
        };
        successors.parked = successors.parked.saturating_sub(gone);
        for job in jobs {
            self.insert_successor(key, job);
        }
        self.release_key(key);
    }

    /// By its offset among those in memory.
    pub(super) fn insert_successor(&mut self, key: i32, job: Job) {
        let queue = &mut self.keys.entry(key).or_default().queue;
        let place = queue.partition_point(|other| other.offset < job.offset);
        queue.insert(place, job);
    }
}
