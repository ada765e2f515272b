//! A topic's log as this process reads it: one read serves all groups.

mod of_keys;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use postbox::Offset;
use postbox::log::{self, Filters, Segment, StoredMessage};
use postbox_core::link::in_time;
use postbox_core::restarts::panic_text;
use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, Postgres};
use tokio::sync::watch;

pub(crate) use self::of_keys::OfKeys;
use crate::log::block::{Block, Hashes, MESSAGE_OVERHEAD, Slot};
use crate::log::interest::{Interest, Wanted};
use crate::log::readers::Readers;

/// Most messages in a block.
const BLOCK_MESSAGES: i64 = 1024;
/// Most offsets of a block of which most are not wanted.
const BLOCK_OFFSETS: i64 = 4 * BLOCK_MESSAGES;
/// A block is ended when its payloads are expected to be larger.
const BLOCK_BYTES: usize = 2 * 1024 * 1024;
/// Blocks kept for groups that come behind.
const CACHE_BYTES: usize = 8 * 1024 * 1024;
const CACHE_BLOCKS: usize = 64;
/// So much of a topic is in memory at once, and a block for each group beyond.
const MOST_BYTES: usize = 256 * 1024 * 1024;
/// Segments read at once: an index of up to 65,536 messages.
const INDEX_SEGMENTS: i64 = 64;

/// A read that takes longer is on a connection that is dead, though nobody said so.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(15);

/// Segments looked at for messages of some keys.
const OF_KEYS_SEGMENTS: i64 = 16;

type ReadResult = Result<Option<Arc<Block>>, Arc<postbox::Error>>;
type SharedRead = Shared<BoxFuture<'static, ReadResult>>;

pub(crate) struct TopicLog {
    topic: Arc<str>,
    readers: Arc<Readers>,
    /// With which this process's handlers read it.
    filters: Arc<Filters>,
    head: watch::Sender<i64>,
    state: Mutex<State>,
    /// What the blocks take that somebody has, in bytes.
    held: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    blocks: BTreeMap<i64, Arc<Block>>,
    /// Bases of the blocks, oldest first.
    age: VecDeque<i64>,
    bytes: usize,
    /// Consecutive segments.
    index: Vec<Segment>,
    /// More of them are being read.
    reads_index: bool,
    reading: HashMap<i64, SharedRead>,
    interests: Vec<Weak<Interest>>,
    /// Raised when all that was read may be wrong.
    generation: u64,
}

impl TopicLog {
    pub(crate) fn new(topic: Arc<str>, filters: Arc<Filters>, readers: Arc<Readers>) -> Self {
        Self {
            topic,
            readers,
            filters,
            head: watch::Sender::new(0),
            state: Mutex::default(),
            held: Arc::default(),
        }
    }

    /// The topic's next offset, as far as it is known; changes wake who waits.
    pub(crate) fn head(&self) -> watch::Receiver<i64> {
        self.head.subscribe()
    }

    /// Learns the next offset from a look at the database.
    pub(crate) fn set_head(&self, head: i64) {
        self.head
            .send_if_modified(|known| std::mem::replace(known, head) != head);
    }

    /// Learns from the sequencer of a new head, and perhaps of the segment that ends there, and its messages: these need not be read then.
    pub(crate) fn learn(&self, head: i64, segment: Option<Segment>, messages: Option<&[StoredMessage]>) {
        if let Some(segment) = segment {
            let mut state = self.lock();
            // The server compares messages with filters when they are read.
            if let Some(messages) = messages.filter(|_| self.filters.is_empty()) {
                let generation = state.generation;
                let block = Block::of(segment.base().get(), messages.to_vec());
                state.keep(Arc::new(block), generation);
            }
            state.extend_index(segment);
        }
        // What is told is never newer than the next look, and may be older than the last.
        self.head
            .send_if_modified(|known| (*known < head).then(|| *known = head).is_some());
    }

    /// Registers lanes that somebody in this process owns; only messages in such lanes are read.
    pub(crate) fn register(&self, interest: &Arc<Interest>) {
        self.lock().interests.push(Arc::downgrade(interest));
    }

    /// Whether no more should be taken in by who has something to do: payloads of any size are legal, and a window is a number of messages.
    pub(crate) fn is_heavy(&self) -> bool {
        self.held.load(Ordering::Relaxed) > MOST_BYTES
    }

    /// One of the connections for reading.
    pub(crate) async fn connection(&self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        self.readers.acquire().await
    }

    /// Forgets all that was read: the server may have restarted and lost offsets that it had not flushed.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        state.generation += 1;
        state.blocks.clear();
        state.age.clear();
        state.bytes = 0;
        state.index.clear();
        state.reading.clear();
    }

    /// A block that contains `from`, or begins after it if older offsets are no longer retained; `None` at the head.
    pub(crate) async fn read(self: &Arc<Self>, from: i64) -> ReadResult {
        let read = {
            let mut state = self.lock();
            if let Some((_, block)) = state
                .blocks
                .range(..=from)
                .next_back()
                .filter(|(_, b)| from < b.end())
            {
                return Ok(Some(block.clone()));
            }
            match state.reading.get(&from) {
                Some(read) => read.clone(),
                None => {
                    let generation = state.generation;
                    let this = self.clone();
                    // A task of its own, so that a reader which loses interest does not leave a connection held.
                    let task = tokio::spawn(async move {
                        let read = AssertUnwindSafe(this.load(from, generation)).catch_unwind().await;
                        // However it ended: who comes next reads anew.
                        this.lock().reading.remove(&from);
                        if let Ok(Ok(Some(block))) = &read {
                            this.extend_index_ahead_of(block.end());
                        }
                        read.unwrap_or_else(|panic| Err(panicked(panic.as_ref())))
                            .map_err(Arc::new)
                    });
                    let read = task.map(|result| result.unwrap_or_else(|error| Err(Arc::new(ended(&error)))));
                    let read = read.boxed().shared();
                    state.reading.insert(from, read.clone());
                    read
                }
            }
        };
        read.await
    }

    /// As [`read`](Self::read), for a block in which a wanted message was not read.
    pub(crate) async fn read_again(self: &Arc<Self>, from: i64) -> ReadResult {
        {
            let mut state = self.lock();
            if let Some((&base, _)) = state
                .blocks
                .range(..=from)
                .next_back()
                .filter(|(_, b)| from < b.end())
            {
                state.evict(base);
            }
            state.reading.remove(&from);
        }
        self.read(from).await
    }

    /// Reads ahead in the background, for the next [`read`](Self::read) from there.
    pub(crate) fn prefetch(self: &Arc<Self>, from: i64) {
        let this = self.clone();
        tokio::spawn(async move {
            // Whoever needs the block sees the error.
            let _ = this.read(from).await;
        });
    }

    async fn load(&self, from: i64, generation: u64) -> Result<Option<Arc<Block>>, postbox::Error> {
        let mut connection = self.readers.acquire().await?;
        // The connection may be dead.
        let load = self.load_on(&mut connection, from, generation);
        in_time(READ_TIMEOUT, "reading messages", load).await
    }

    async fn load_on(
        &self,
        connection: &mut PgConnection,
        from: i64,
        generation: u64,
    ) -> Result<Option<Arc<Block>>, postbox::Error> {
        let mut segments = self.indexed(from);
        if segments.is_empty() {
            segments = self.read_index(connection, from, generation).await?;
        }
        loop {
            let Some(block) = self.read_block(connection, &segments, from).await? else {
                return Ok(None);
            };
            if block.has_gone() {
                // Rows are where the index says until `postbox.rebase` gives them new addresses; then the index read before is stale. And that a row
                // is gone is for the table to say, not for what was heard.
                let now = self.read_index(connection, from, generation).await?;
                if !says_the_same(&now, &segments, &block) {
                    segments = now;
                    continue;
                }
            }
            let block = Arc::new(block.counted(&self.held));
            self.lock().keep(block.clone(), generation);
            return Ok(Some(block));
        }
    }

    async fn read_index(
        &self,
        connection: &mut PgConnection,
        from: i64,
        generation: u64,
    ) -> Result<Vec<Segment>, postbox::Error> {
        let index = log::segments(connection, &self.topic, Offset::new(from), INDEX_SEGMENTS).await?;
        let mut state = self.lock();
        if state.generation == generation {
            state.index = index.clone();
        }
        Ok(index)
    }

    /// Reads more of the index in the background where it ends soon: where little is wanted, that is most of what is read.
    fn extend_index_ahead_of(self: &Arc<Self>, from: i64) {
        let mut state = self.lock();
        let end = state.index.last().map_or(from, |last| last.end().get());
        let is_near = end - from < BLOCK_OFFSETS * 4 && end < *self.head.borrow();
        if state.reads_index || !is_near {
            return;
        }
        state.reads_index = true;
        let (generation, this) = (state.generation, self.clone());
        drop(state);
        tokio::spawn(async move {
            let read = async {
                let mut connection = this.readers.acquire().await?;
                let segments = log::segments(&mut connection, &this.topic, Offset::new(end), INDEX_SEGMENTS);
                in_time(READ_TIMEOUT, "reading the index", segments).await
            };
            let read: std::thread::Result<Result<Vec<Segment>, postbox::Error>> =
                AssertUnwindSafe(read).catch_unwind().await;
            let mut state = this.lock();
            state.reads_index = false;
            // Whoever needs them sees the error.
            if let (Ok(Ok(segments)), true) = (read, state.generation == generation) {
                segments
                    .into_iter()
                    .for_each(|segment| state.extend_index(segment));
            }
        });
    }

    /// `None` if there are no segments.
    async fn read_block(
        &self,
        connection: &mut PgConnection,
        segments: &[Segment],
        from: i64,
    ) -> Result<Option<Block>, postbox::Error> {
        let Some(first) = segments.first() else {
            return Ok(None);
        };
        let from = from.max(first.base().get());
        let slots = slots(segments, from, self.wants());
        let to = from + slots.len() as i64;
        let wanted = |offset: Offset, _| slots[(offset.get() - from) as usize].is_wanted();
        let (first, last) = (Offset::new(from), Offset::new(to));
        let found = log::messages(
            connection,
            &self.topic,
            segments,
            first,
            last,
            &self.filters,
            wanted,
        );
        let found = found.await?;
        Ok(Some(Block::new(from, slots, found)))
    }

    /// The known segments from the one that contains `from`.
    fn indexed(&self, from: i64) -> Vec<Segment> {
        let state = self.lock();
        let first = state.index.partition_point(|segment| segment.end().get() <= from);
        match state.index.get(first) {
            Some(segment) if segment.base().get() <= from => {
                let last = state.index[first..]
                    .iter()
                    .scan(0, |messages, segment| {
                        let before = *messages;
                        *messages += segment.end().get() - segment.base().get();
                        Some(before)
                    })
                    .take_while(|before| *before < BLOCK_OFFSETS + BLOCK_MESSAGES)
                    .count();
                state.index[first..first + last].to_vec()
            }
            _ => Vec::new(),
        }
    }

    /// Which messages anybody in this process wants at this moment. The answer does not change while it is used: a lane that is claimed
    /// during a read must not make its messages, which were not read, look as if they were gone.
    fn wants(&self) -> impl Fn(i64, Hashes) -> bool + use<> {
        let mut wanted: Vec<Wanted> = Vec::new();
        self.lock().interests.retain(|weak| match weak.upgrade() {
            Some(interest) => {
                wanted.push(interest.now());
                true
            }
            None => false,
        });
        let all = wanted.iter().any(Wanted::is_all);
        move |offset, hashes| all || wanted.iter().any(|one| one.contain(offset, hashes))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn extend_index(&mut self, segment: Segment) {
        match self.index.last() {
            Some(last) if last.end() != segment.base() => return,
            Some(_) if self.index.len() >= 2 * INDEX_SEGMENTS as usize => {
                self.index.drain(..INDEX_SEGMENTS as usize);
            }
            _ => {}
        }
        self.index.push(segment);
    }

    fn keep(&mut self, block: Arc<Block>, generation: u64) {
        if generation != self.generation {
            return;
        }
        self.evict(block.base);
        self.bytes += block.bytes;
        self.age.push_back(block.base);
        self.blocks.insert(block.base, block);
        while self.blocks.len() > 1 && (self.bytes > CACHE_BYTES || self.blocks.len() > CACHE_BLOCKS) {
            let Some(&oldest) = self.age.front() else { return };
            self.evict(oldest);
        }
    }

    fn evict(&mut self, base: i64) {
        if let Some(block) = self.blocks.remove(&base) {
            self.bytes -= block.bytes;
            self.age.retain(|known| *known != base);
        }
    }
}

/// Whether both have the same segments for all of a block.
fn says_the_same(now: &[Segment], before: &[Segment], block: &Block) -> bool {
    let of_block = |segments: &[Segment]| -> Vec<Segment> {
        let touches =
            |segment: &&Segment| segment.end().get() > block.base && segment.base().get() < block.end();
        segments.iter().filter(touches).cloned().collect()
    };
    of_block(now) == of_block(before)
}

fn ended(error: &tokio::task::JoinError) -> postbox::Error {
    failed(format!("the read ended early: {error}"))
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> postbox::Error {
    failed(format!("the read panicked: {}", panic_text(panic)))
}

fn failed(why: String) -> postbox::Error {
    sqlx::Error::Io(std::io::Error::other(why)).into()
}

/// Of a block that begins at `from`, which ends after so many messages that are wanted.
fn slots(segments: &[Segment], from: i64, wants: impl Fn(i64, Hashes) -> bool) -> Vec<Slot> {
    let most = from + BLOCK_OFFSETS;
    let mut slots = Vec::with_capacity(BLOCK_MESSAGES as usize);
    let (mut messages, mut bytes) = (0, 0);
    for segment in segments {
        let size = segment.mean_bytes() + MESSAGE_OVERHEAD;
        for offset in segment.base().get().max(from)..segment.end().get().min(most) {
            let hashes = Hashes {
                key: segment.key_hash(Offset::new(offset)),
                of_type: segment.type_hash(Offset::new(offset)),
            };
            let wanted = wants(offset, hashes);
            // One message is more than nothing, whatever its size.
            if wanted && !slots.is_empty() && (messages == BLOCK_MESSAGES || bytes + size > BLOCK_BYTES) {
                return slots;
            }
            messages += i64::from(wanted);
            bytes += usize::from(wanted) * size;
            slots.push(Slot::new(hashes, wanted));
        }
    }
    slots
}
