//! Taking in: which messages come next, in the order of their offsets.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tracing::{debug, error, warn};

use super::Executor;
use crate::ids::Lane;
use crate::log::block::{Block, Entry, Record};
use crate::log::interest::Interest;
use crate::log::seen::{Resume, SeenTail};
use crate::log::topic_log::TopicLog;
use crate::protocol::progress::{Counters, Intake};

/// Messages taken in before the executor looks at everything else again.
pub(super) const INTAKE: usize = 256;

/// The wait before a broadcast that could not check the log tries again.
const RESYNC_WAIT: Duration = Duration::from_millis(200);

/// Where the lanes are in the log, and what is being read.
pub(super) struct Reader {
    log: Arc<TopicLog>,
    head: watch::Receiver<i64>,
    interest: Arc<Interest>,
    streams: Vec<Stream>,
    reading: Option<Reading>,
    /// Of a broadcast from memory.
    seen: Option<SeenTail>,
    /// Offsets may have been given anew, and the log could not be asked: nothing more is taken in until then.
    resync_at: Option<Instant>,
}

/// Lanes that are read together.
struct Stream {
    /// The next offset to take in.
    next: i64,
    lanes: HashSet<Lane>,
    block: Option<Arc<Block>>,
    /// Nothing is there at `next` as of the last read.
    at_head: bool,
}

type Read = Result<Option<Arc<Block>>, Arc<postbox::Error>>;

/// A read that is under way.
struct Reading {
    from: i64,
    /// The head that was known when it began.
    head: i64,
    result: BoxFuture<'static, Read>,
    /// A failed read waits before the next.
    failures: u32,
}

/// What a reader waits for.
pub(super) enum Arrival {
    Read(Read),
    /// The log may have more.
    Head,
}

impl Reader {
    /// Remembers what it has seen if it is a broadcast from memory.
    pub(super) fn new(log: Arc<TopicLog>, lanes: u16, remembers: bool) -> Self {
        let interest = Arc::new(Interest::new(lanes));
        log.register(&interest);
        Self {
            head: log.head(),
            log,
            interest,
            streams: Vec::new(),
            reading: None,
            seen: remembers.then(SeenTail::default),
            resync_at: None,
        }
    }

    pub(super) fn log(&self) -> &Arc<TopicLog> {
        &self.log
    }

    /// Goes on from what was seen before.
    pub(super) fn remember(&mut self, seen: SeenTail) {
        self.seen = Some(seen);
    }

    pub(super) fn remember_if_any(&mut self, seen: SeenTail) {
        if self.seen.is_some() {
            self.seen = Some(seen);
        }
    }

    pub(super) fn take_seen(&mut self) -> Option<SeenTail> {
        self.seen.take()
    }

    /// Whether a message was not seen before; one that is not remembered counts as new.
    pub(super) fn is_new(&mut self, offset: i64, id: postbox::MessageId) -> bool {
        self.seen.as_mut().is_none_or(|seen| seen.is_new(offset, id))
    }

    /// Reads these lanes, too, each from an offset. Those that begin close to each other are read together, so that what is left comes by its offsets.
    pub(super) fn read_lanes(&mut self, mut starts: Vec<(i64, Lane)>, close: i64) {
        starts.sort_unstable();
        let mut from = None;
        for (next, number) in starts {
            self.interest.set(number, true);
            let start = from.filter(|start| next - start <= close).unwrap_or(next);
            from = Some(start);
            match self.streams.iter_mut().find(|stream| stream.next == start) {
                Some(stream) => {
                    stream.lanes.insert(number);
                }
                None => self.streams.push(Stream {
                    next: start,
                    lanes: HashSet::from([number]),
                    block: None,
                    at_head: false,
                }),
            }
        }
    }

    /// Reads a lane no more; gives the offset up to which it was taken in.
    pub(super) fn forget(&mut self, lane: Lane) -> Option<i64> {
        self.interest.set(lane, false);
        let mut next = None;
        for stream in &mut self.streams {
            if stream.lanes.remove(&lane) {
                next = Some(stream.next);
            }
        }
        self.streams.retain(|stream| !stream.lanes.is_empty());
        next
    }

    /// Messages of types with these hashes need not be read.
    pub(super) fn pass_types(&self, types: Vec<i32>) {
        self.interest.pass(types);
    }

    fn stream_of(&self, lane: Lane) -> Option<&Stream> {
        self.streams.iter().find(|stream| stream.lanes.contains(&lane))
    }

    /// Whether a stream reads a lane.
    pub(super) fn reads(&self, stream: usize, lane: Lane) -> bool {
        self.streams[stream].lanes.contains(&lane)
    }

    /// The next offset of a lane.
    pub(super) fn next_of(&self, lane: Lane) -> Option<i64> {
        self.stream_of(lane).map(|stream| stream.next)
    }

    /// Where all lanes are.
    pub(super) fn positions(&self) -> impl Iterator<Item = (Lane, i64)> {
        self.streams
            .iter()
            .flat_map(|stream| stream.lanes.iter().map(|lane| (*lane, stream.next)))
    }

    /// Where the first is that is read.
    pub(super) fn first(&self) -> Option<i64> {
        self.streams.iter().map(|stream| stream.next).min()
    }

    /// Whether a lane has nothing more to read.
    pub(super) fn is_lane_at_head(&self, lane: Lane) -> bool {
        self.stream_of(lane).is_some_and(|stream| stream.at_head)
    }

    /// Whether there is nothing more to read.
    pub(super) fn is_at_head(&self) -> bool {
        self.streams.iter().all(|stream| stream.at_head)
    }

    /// When the log is asked again what was given anew; nothing is taken in before.
    pub(super) fn resync_at(&self) -> Option<Instant> {
        self.resync_at
    }

    /// Goes on where the log has what was not seen yet; nothing, if nothing is remembered.
    pub(super) async fn resync(&mut self) -> Option<Result<Resume, Arc<postbox::Error>>> {
        self.resync_at = None;
        let seen = self.seen.as_mut()?;
        let next = self.streams.first().map_or(0, |stream| stream.next);
        let resumed = seen.resync(&self.log, next).await;
        match &resumed {
            Ok(resume) => {
                for stream in &mut self.streams {
                    stream.next = resume.next;
                    stream.block = None;
                    stream.at_head = false;
                }
                self.reading = None;
            }
            Err(_) => self.resync_at = Some(Instant::now() + RESYNC_WAIT),
        }
        Some(resumed)
    }

    /// Waits for what was asked for, or for more in the log; for ever, if there is neither.
    pub(super) async fn arrival(&mut self) -> Arrival {
        let reading = async {
            match &mut self.reading {
                Some(reading) => (&mut reading.result).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            read = reading => Arrival::Read(read),
            changed = self.head.changed() => match changed {
                Ok(()) => Arrival::Head,
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// The log may have more.
    fn see_head(&mut self) {
        let head = *self.head.borrow_and_update();
        for stream in &mut self.streams {
            stream.at_head &= stream.next >= head;
        }
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

    /// Starts a read for a stream that needs a block.
    fn begin_read(&mut self) {
        let needs = |stream: &&Stream| stream.block.is_none() && !stream.at_head;
        if let Some(stream) = self.streams.iter().find(needs) {
            self.read(stream.next, false, 0);
        }
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

impl Executor {
    pub(super) fn begin_read(&mut self) {
        if self.reader.reading.is_none() && self.may_run() && self.may_take_in() {
            self.reader.begin_read();
        }
    }

    pub(super) fn learn(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Read(read) => self.read_done(read),
            Arrival::Head => self.reader.see_head(),
        }
    }

    fn read_done(&mut self, result: Read) {
        let Some(Reading {
            from, head, failures, ..
        }) = self.reader.reading.take()
        else {
            return;
        };
        match result {
            Ok(Some(block)) => {
                let Some(stream) = self
                    .reader
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
                if block.end() < *self.reader.head.borrow() {
                    self.reader.log.prefetch(block.end());
                }
                stream.block = Some(block);
            }
            Ok(None) => {
                // A head that was known before the read and is not there was lost in a crash. One that came meanwhile may be newer than what
                // the read saw, and nobody tells of it again.
                let at_head = *self.reader.head.borrow() == head;
                for stream in self
                    .reader
                    .streams
                    .iter_mut()
                    .filter(|stream| stream.next == from)
                {
                    stream.at_head = at_head;
                    debug!(topic = %self.plan.topic, next = stream.next, "at the head");
                }
                // Lanes with crashes behind them may have got past them.
                if self.lanes.has_crashes() {
                    self.reporter.mark();
                }
            }
            Err(error) => {
                warn!(topic = %self.plan.topic, %error, "cannot read; trying again");
                self.reader.read(from, false, failures + 1);
            }
        }
    }

    /// There is room, and what is taken in may be expected to succeed.
    fn may_take_in(&self) -> bool {
        let room = self.lanes.unsettled().max(self.reporter.unrecorded()) < self.plan.window;
        // Who has nothing to do may always take something.
        let room = room && (self.lanes.is_settled() || !self.reader.log.is_heavy());
        self.wants_more()
            && (room && self.intake() == Intake::Closed
                // Nothing that is in memory can be the probe, so it is the next message.
                || self.lacks_probe())
    }

    /// Under a limit there is no use in more than may soon run.
    pub(super) fn wants_more(&self) -> bool {
        self.admission.is_open()
            && !(self.admission.throttle.is_limited()
                && self.queue.ready() > self.plan.concurrency.max(self.plan.batch))
    }

    /// Takes in messages of blocks that were read; says whether there were any.
    pub(super) fn take_in(&mut self) -> bool {
        let mut taken = false;
        for n in 0..self.reader.streams.len() {
            taken |= self.take_in_stream(n);
        }
        if taken {
            self.count_unread();
        }
        if self.reader.streams.len() > 1 {
            self.reader.merge_streams();
        }
        taken
    }

    fn take_in_stream(&mut self, n: usize) -> bool {
        let Some(block) = self.reader.streams[n].block.clone() else {
            return false;
        };
        // A stream that catches up ends where another one is, and goes on with it.
        let next = self.reader.streams[n].next;
        let limit = self
            .reader
            .streams
            .iter()
            .map(|other| other.next)
            .filter(|other| *other > next)
            .min()
            .unwrap_or(i64::MAX);
        let end = block.end().min(limit);
        let mut taken = 0;
        while taken < INTAKE.max(self.plan.batch) && self.may_take_in() {
            let from = self.reader.streams[n].next;
            let offset = self.settle_unread(n, &block, from, end);
            taken += usize::from(offset > from);
            self.reader.streams[n].next = offset;
            if offset >= end {
                break;
            }
            let index = (offset - block.base) as usize;
            let lane = self.lanes.of(offset, block.key_hash(index));
            if self.reader.streams[n].lanes.contains(&lane) && self.lanes.is_due(lane, offset) {
                if let Entry::Unread(hashes) = block.entry(index)
                    && !self.settles_unread(hashes.of_type)
                {
                    // Read before the lane was claimed, or before its type was wanted.
                    self.reader.streams[n].block = None;
                    self.reader.read(offset, true, 0);
                    return taken > 0;
                }
                if let Some(lane) = self.lanes.get_mut(lane) {
                    lane.pending.remove(&offset);
                }
                match Record::new(&block, index) {
                    Some(record) => self.admit(record, offset, lane),
                    None if matches!(block.entry(index), Entry::Unread(_)) => {}
                    None => {
                        error!(topic = %self.plan.topic, group = %self.plan.group, offset, "the message's row is gone; it is skipped");
                        Counters::add(&self.plan.counters.gone);
                    }
                }
            }
            self.reader.streams[n].next = offset + 1;
            taken += 1;
        }
        if taken > 0 {
            self.reporter.mark();
            self.plan
                .counters
                .position
                .store(self.reader.streams[n].next, Ordering::Relaxed);
        }
        if self.reader.streams[n].next >= block.end() {
            let stream = &mut self.reader.streams[n];
            stream.block = None;
            // A read would find nothing.
            stream.at_head = stream.next == *self.reader.head.borrow();
        }
        taken > 0
    }
}
