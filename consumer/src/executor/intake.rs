//! Taking in: which messages come next, in the order of their offsets.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tracing::{debug, error, warn};

use super::Executor;
use crate::block::{Block, Entry, Record};
use crate::lane::lane_of;
use crate::progress::{Counters, Intake};

/// Messages taken in before the executor looks at everything else again.
pub(super) const INTAKE: usize = 256;

/// Lanes that are read together.
pub(super) struct Stream {
    /// The next offset to take in.
    pub(super) next: i64,
    pub(super) lanes: HashSet<u16>,
    pub(super) block: Option<Arc<Block>>,
    /// Nothing is there at `next` as of the last read.
    pub(super) at_head: bool,
}

/// A read that is under way.
pub(super) struct Reading {
    from: i64,
    /// The head that was known when it began.
    head: i64,
    pub(super) result: BoxFuture<'static, Result<Option<Arc<Block>>, Arc<postbox::Error>>>,
    /// A failed read waits before the next.
    failures: u32,
}

impl Executor {
    /// Starts a read for a stream that needs a block.
    pub(super) fn begin_read(&mut self) {
        if self.reading.is_some() || !self.may_run() || !self.may_take_in() {
            return;
        }
        let Some(stream) = self
            .streams
            .iter()
            .find(|stream| stream.block.is_none() && !stream.at_head)
        else {
            return;
        };
        self.read(stream.next, false, 0);
    }

    fn read(&mut self, from: i64, again: bool, failures: u32) {
        let log = self.log.clone();
        let wait = Duration::from_millis(50) * failures.min(40);
        let result = async move {
            // A sleep of nothing takes until the timer's next millisecond.
            if failures > 0 {
                tokio::time::sleep(wait).await;
            }
            if again {
                log.read_again(from).await
            } else {
                log.read(from).await
            }
        };
        let head = *self.head.borrow_and_update();
        self.reading = Some(Reading {
            from,
            head,
            result: result.boxed(),
            failures,
        });
    }

    pub(super) fn read_done(&mut self, result: Result<Option<Arc<Block>>, Arc<postbox::Error>>) {
        let Some(Reading {
            from, head, failures, ..
        }) = self.reading.take()
        else {
            return;
        };
        match result {
            Ok(Some(block)) => {
                let Some(stream) = self
                    .streams
                    .iter_mut()
                    .find(|s| s.next == from && s.block.is_none())
                else {
                    return;
                };
                if block.base > stream.next {
                    warn!(
                        topic = %self.plan.topic, group = %self.plan.group, from = stream.next, to = block.base,
                        "offsets are no longer retained and are skipped"
                    );
                    stream.next = block.base;
                }
                if block.end() < *self.head.borrow() {
                    self.log.prefetch(block.end());
                }
                stream.block = Some(block);
            }
            Ok(None) => {
                // A head that was known before the read and is not there was lost in a crash. One that came meanwhile may be newer than what
                // the read saw, and nobody tells of it again.
                let at_head = *self.head.borrow() == head;
                for stream in self.streams.iter_mut().filter(|stream| stream.next == from) {
                    stream.at_head = at_head;
                    debug!(topic = %self.plan.topic, next = stream.next, "at the head");
                }
                // Lanes with crashes behind them may have got past them.
                self.dirty |= self.lanes.values().any(|lane| lane.crashes > 0);
            }
            Err(error) => {
                warn!(topic = %self.plan.topic, %error, "cannot read; trying again");
                self.read(from, false, failures + 1);
            }
        }
    }

    /// There is room, and what is taken in may be expected to succeed.
    fn may_take_in(&self) -> bool {
        let room = self
            .unsettled
            .len()
            .max(self.unrecorded + self.journal.entries.len())
            < self.plan.window;
        self.wants_more()
            && (room && self.intake() == Intake::Closed
                // Nothing that is in memory can be the probe, so it is the next message.
                || self.wants_probe())
    }

    /// Under a limit there is no use in more than may soon run.
    pub(super) fn wants_more(&self) -> bool {
        self.open
            && !(self.throttle.is_limited() && self.ready.len() > self.plan.concurrency.max(self.plan.batch))
    }

    /// Takes in messages of blocks that were read; says whether there were any.
    pub(super) fn take_in(&mut self) -> bool {
        let mut taken = false;
        for n in 0..self.streams.len() {
            taken |= self.take_in_stream(n);
        }
        if self.streams.len() > 1 {
            self.merge_streams();
        }
        taken
    }

    fn take_in_stream(&mut self, n: usize) -> bool {
        let Some(block) = self.streams[n].block.clone() else {
            return false;
        };
        // A stream that catches up ends where another one is, and goes on with it.
        let next = self.streams[n].next;
        let limit = self
            .streams
            .iter()
            .map(|other| other.next)
            .filter(|other| *other > next)
            .min()
            .unwrap_or(i64::MAX);
        let end = block.end().min(limit);
        let mut taken = 0;
        while taken < INTAKE.max(self.plan.batch) && self.may_take_in() {
            let offset = self.streams[n].next;
            if offset >= end {
                break;
            }
            let index = (offset - block.base) as usize;
            let lane = lane_of(offset, block.key_hash(index), self.lane_count);
            if self.streams[n].lanes.contains(&lane) && self.is_due(lane, offset) {
                if let Entry::Unread(_) = &block.entries[index] {
                    // Read before the lane was claimed.
                    self.streams[n].block = None;
                    self.read(offset, true, 0);
                    return taken > 0;
                }
                if let Some(lane) = self.lanes.get_mut(&lane) {
                    lane.pending.remove(&offset);
                }
                match Record::new(&block, index) {
                    Some(record) => self.admit(record, offset, lane),
                    None => {
                        error!(topic = %self.plan.topic, group = %self.plan.group, offset, "the message's row is gone; it is skipped");
                        Counters::add(&self.plan.counters.gone);
                    }
                }
            }
            self.streams[n].next = offset + 1;
            taken += 1;
        }
        if taken > 0 {
            self.dirty = true;
            self.plan
                .counters
                .position
                .store(self.streams[n].next, Ordering::Relaxed);
        }
        if self.streams[n].next >= block.end() {
            let stream = &mut self.streams[n];
            stream.block = None;
            // A read would find nothing.
            stream.at_head = stream.next == *self.head.borrow();
        }
        taken > 0
    }

    /// Whether an offset of an owned lane was not settled before the lane was claimed.
    fn is_due(&self, lane: u16, offset: i64) -> bool {
        self.lanes.get(&lane).is_some_and(|lane| {
            (offset >= lane.cut || lane.pending.contains(&offset)) && !lane.done.contains(&offset)
        })
    }

    fn merge_streams(&mut self) {
        let mut merged: Vec<Stream> = Vec::with_capacity(self.streams.len());
        for stream in self.streams.drain(..) {
            match merged.iter_mut().find(|other| other.next == stream.next) {
                Some(other) => {
                    other.lanes.extend(stream.lanes);
                    other.block = other.block.take().or(stream.block);
                    other.at_head &= stream.at_head;
                }
                None => merged.push(stream),
            }
        }
        self.streams = merged;
    }
}
