//! Catching up: keys with parked messages read them, apart from their lane, until they are where it is. Many keys share a read.
//!
//! *What was read is pending and no longer parked, by one report.* A transactional handler waits for that report: until then a next owner would
//! look for the message from where the key was parked, and not for its settlement.

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use postbox_core::link::in_time;
use postbox_core::restarts::panic_text;
use tracing::{error, warn};

use super::Executor;
use super::report::Afterwards;
use crate::ids::Lane;
use crate::log::topic_log::{OfKeys, READ_TIMEOUT};
use crate::protocol::progress::{Counters, Intake};
use crate::protocol::redelivery::{self, COPIES, Held, Parked};

/// Keys that are so close to each other are read together.
const TOGETHER: i64 = 16 * 1024;
/// So close to its lane, what a key looks for is probably in memory.
const NEAR: i64 = 4096;
/// Most messages that a key reads ahead.
const AHEAD: usize = 128;
/// The wait before a read that failed is tried again.
const READ_WAIT: Duration = Duration::from_millis(500);

#[derive(Default)]
pub(super) struct CatchUp {
    /// Keys that catch up, by whose turn it is next; some perhaps not any more.
    turns: VecDeque<i32>,
    reading: bool,
    loads: u64,
}

/// What is read next.
enum Turn {
    /// Of these keys, from these offsets on, up to where a lane is.
    Log {
        keys: HashMap<i32, i64>,
        to: i64,
        limit: usize,
    },
    Copies {
        key: i32,
        from: i64,
    },
}

/// What was read.
pub(super) enum Loaded {
    Log {
        keys: HashMap<i32, i64>,
        read: Result<OfKeys, String>,
    },
    Copies {
        key: i32,
        from: i64,
        read: Result<Vec<Held>, String>,
    },
}

impl CatchUp {
    /// A key has parked messages and may read them.
    pub(super) fn wait(&mut self, key: i32) {
        self.turns.push_back(key);
    }

    /// A number for what was read.
    fn next_load(&mut self) -> u64 {
        self.loads += 1;
        self.loads
    }
}

impl Executor {
    /// Reads parked messages: at once what is in memory, else in the background. Says whether there were any.
    pub(super) fn catch_up(&mut self) -> bool {
        if self.keys.catch_up.turns.is_empty() || self.keys.catch_up.reading || !self.may_catch_up() {
            return false;
        }
        match self.next_turn() {
            None => return false,
            Some(Turn::Log { keys, to, limit }) => {
                let near = keys.values().all(|from| to - from <= NEAR);
                if let Some(read) = near
                    .then(|| self.reader.log().cached_of_keys(&keys, to, limit))
                    .flatten()
                {
                    self.take_up(&keys, read);
                    return true;
                }
                let log = self.reader.log().clone();
                self.runs.load(async move {
                    let read = async {
                        log.of_keys(&keys, to, limit)
                            .await
                            .map_err(|error| error.to_string())
                    };
                    let read = or_wait(read).await;
                    Loaded::Log { keys, read }
                });
            }
            Some(Turn::Copies { key, from }) => {
                let Some(membership) = &self.session.membership else {
                    return false;
                };
                let (subscription, log) = (membership.subscription, self.reader.log().clone());
                let filters = self.plan.filters.clone();
                self.runs.load(async move {
                    let read = async {
                        let mut connection = log.connection().await?;
                        let read = redelivery::copies(&mut *connection, subscription, &filters, key, from);
                        in_time(READ_TIMEOUT, "reading what is parked", read).await
                    };
                    // It is large, and seldom.
                    let read = Box::pin(async { read.await.map_err(|error: sqlx::Error| error.to_string()) });
                    let read = or_wait(read).await;
                    Loaded::Copies { key, from, read }
                });
            }
        }
        self.keys.catch_up.reading = true;
        false
    }

    /// Beside a full window, so that the lanes cannot take all the room, which half of it then counts for.
    fn may_catch_up(&self) -> bool {
        let window = self.plan.window;
        let room = self.lanes.unsettled() < window + window / 2;
        self.wants_more() && (room && self.intake() == Intake::Closed || self.lacks_probe())
    }

    fn next_turn(&mut self) -> Option<Turn> {
        let lanes = self.lanes_past_their_cut();
        let waiting = self.keys.catch_up.turns.len();
        let ahead = (self.plan.window / 2 / waiting).clamp(1, AHEAD);
        let ready = |executor: &Self, key: i32| -> Option<(Parked, i64)> {
            let successors = executor.keys.get(key).filter(|of| of.queue.len() < ahead)?;
            let next = lanes.get(&executor.lanes.of_key(key))?;
            Some((successors.parked.filter(|_| successors.catching_up)?, *next))
        };
        for _ in 0..waiting {
            let key = self.keys.catch_up.turns.pop_front()?;
            if !self
                .keys
                .get(key)
                .is_some_and(|successors| successors.catching_up)
            {
                continue;
            }
            self.keys.catch_up.turns.push_back(key);
            let Some((parked, to)) = ready(self, key) else {
                continue;
            };
            if let Some(from) = parked.copies {
                return Some(Turn::Copies { key, from });
            }
            let least = parked.log? - TOGETHER;
            let others = self.keys.catch_up.turns.iter().filter_map(|other| {
                let (parked, next) = ready(self, *other)?;
                let from = parked.log.filter(|_| parked.copies.is_none())?;
                (least <= from && from < to && to <= next).then_some((*other, from))
            });
            let mut keys: HashMap<i32, i64> = others.collect();
            keys.insert(key, parked.log?);
            let limit = ahead * keys.len();
            return Some(Turn::Log { keys, to, limit });
        }
        None
    }

    /// Where the lanes are that have taken in all that was pending when they were claimed.
    fn lanes_past_their_cut(&self) -> HashMap<Lane, i64> {
        let is_past =
            |(number, next): &(Lane, i64)| self.lanes.get(*number).is_some_and(|lane| *next >= lane.cut);
        self.reader.positions().filter(is_past).collect()
    }

    pub(super) fn loaded(&mut self, loaded: Loaded) {
        self.keys.catch_up.reading = false;
        if self.admission.is_stopping() {
            return;
        }
        let error = match loaded {
            Loaded::Log { keys, read: Ok(read) } => return self.take_up(&keys, read),
            Loaded::Copies {
                key,
                from,
                read: Ok(read),
            } => return self.take_up_copies(key, from, read),
            Loaded::Log { read: Err(error), .. } | Loaded::Copies { read: Err(error), .. } => error,
        };
        warn!(group = %self.plan.group, topic = %self.plan.topic, error, "cannot read parked messages; trying again");
    }

    /// Behind what is in memory of their keys; each key that nothing has happened to since goes on from there.
    fn take_up(&mut self, keys: &HashMap<i32, i64>, read: OfKeys) {
        let lanes = self.lanes_past_their_cut();
        if read.gone > 0 {
            error!(topic = %self.plan.topic, group = %self.plan.group, messages = read.gone, "the rows of parked messages are gone; they are skipped");
            Counters::add_all(&self.plan.counters.gone, read.gone);
        }
        let mut jobs: HashMap<i32, Vec<_>> = HashMap::new();
        for record in read.records {
            let (offset, key) = (record.message().offset.get(), record.message().key_hash);
            let lane = self.lanes.of(offset, key);
            let done = self
                .lanes
                .get(lane)
                .is_none_or(|lane| lane.done.contains(&offset));
            if let Some(key) = key.filter(|_| !done)
                // What is not wanted was counted when its lane passed it.
                && let Some(job) = self.job(record, offset, lane, false)
            {
                jobs.entry(key).or_default().push(job);
            }
        }
        for (&key, &from) in keys {
            let as_it_was = Some(Parked {
                copies: None,
                log: Some(from),
            });
            let load = self.keys.catch_up.next_load();
            let next = lanes.get(&self.lanes.of_key(key));
            let (Some(next), Some(successors)) = (next, self.keys.get_mut(key)) else {
                continue;
            };
            if successors.parked != as_it_was || !successors.catching_up {
                continue;
            }
            successors.catching_up = read.end < *next;
            successors.parked = successors.catching_up.then_some(Parked {
                copies: None,
                log: Some(read.end.max(from)),
            });
            let jobs = jobs.remove(&key).unwrap_or_default();
            if jobs.iter().any(|job| job.handler.transactional) {
                successors.unrecorded.push_back((load, jobs[0].offset));
                self.reporter.then(Afterwards::TakenUp { key, load });
            }
            for job in jobs {
                self.lanes.hold(job.offset, job.lane);
                successors.queue.push_back(job);
            }
            let headless = successors.headless;
            self.note_parked(key);
            if headless {
                self.reporter.hurry_if_awaited();
                self.release_key(key);
            }
        }
    }

    /// It is recorded that these are not parked any more, unless they were parked again.
    pub(super) fn taken_up(&mut self, key: i32, load: u64) {
        let Some(successors) = self.keys.get_mut(key) else {
            return;
        };
        successors.unrecorded.retain(|(number, _)| *number != load);
        if successors.headless {
            self.release_key(key);
        }
    }

    fn take_up_copies(&mut self, key: i32, from: i64, read: Vec<Held>) {
        let is_past_its_cut = self.lanes_past_their_cut().contains_key(&self.lanes.of_key(key));
        let Some(successors) = self.keys.get_mut(key).filter(|of| of.catching_up) else {
            return;
        };
        let Some(parked) = successors
            .parked
            .as_mut()
            .filter(|parked| parked.copies == Some(from))
        else {
            return;
        };
        if !is_past_its_cut {
            return;
        }
        let last = read.last().map(|held| held.message.offset.get());
        parked.copies = last.filter(|_| read.len() as i64 == COPIES).map(|last| last + 1);
        if parked.copies.is_none() && parked.log.is_none() {
            successors.parked = None;
            successors.catching_up = false;
        }
        for held in read {
            if let Some(job) = self.stored_job(held) {
                self.keys.insert(key, job);
            }
        }
        if self.keys.get(key).is_some_and(|successors| successors.headless) {
            self.release_key(key);
        }
    }
}

/// A read that failed, or panicked, is not tried again at once.
async fn or_wait<T>(read: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let read = AssertUnwindSafe(read).catch_unwind().await;
    let read = read.unwrap_or_else(|panic| Err(panic_text(panic.as_ref())));
    if read.is_err() {
        tokio::time::sleep(READ_WAIT).await;
    }
    read
}
