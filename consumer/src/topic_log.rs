//! A topic's log as this process reads it: one read serves all groups.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use postbox::Offset;
use postbox::log::{self, Segment, StoredMessage};
use sqlx::pool::PoolConnection;
use sqlx::{PgConnection, PgPool, Postgres};
use tokio::sync::watch;

use crate::block::{Block, Entry, MESSAGE_OVERHEAD, Record};
use crate::lane::lane_of;

/// Most messages in a block.
const BLOCK_MESSAGES: i64 = 1024;
/// A block is ended when its payloads are expected to be larger.
const BLOCK_BYTES: usize = 2 * 1024 * 1024;
/// Blocks kept for groups that come behind.
const CACHE_BYTES: usize = 8 * 1024 * 1024;
const CACHE_BLOCKS: usize = 64;
/// Segments read at once: an index of up to 65,536 messages.
const INDEX_SEGMENTS: i64 = 64;

/// Segments looked at for messages of some keys.
const OF_KEYS_SEGMENTS: i64 = 16;

type ReadResult = Result<Option<Arc<Block>>, Arc<postbox::Error>>;
type SharedRead = Shared<BoxFuture<'static, ReadResult>>;

pub(crate) struct TopicLog {
    topic: Arc<str>,
    readers: PgPool,
    head: watch::Sender<i64>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    blocks: BTreeMap<i64, Arc<Block>>,
    /// Bases of the blocks, oldest first.
    age: VecDeque<i64>,
    bytes: usize,
    /// Consecutive segments.
    index: Vec<Segment>,
    reading: HashMap<i64, SharedRead>,
    interests: Vec<Weak<Interest>>,
    /// Raised when all that was read may be wrong.
    generation: u64,
}

impl TopicLog {
    pub(crate) fn new(topic: Arc<str>, readers: PgPool) -> Self {
        Self {
            topic,
            readers,
            head: watch::Sender::new(0),
            state: Mutex::default(),
        }
    }

    /// The topic's next offset, as far as it is known; changes wake who waits.
    pub(crate) fn head(&self) -> watch::Receiver<i64> {
        self.head.subscribe()
    }

    /// Learns the next offset from a notification or a look at the database.
    pub(crate) fn set_head(&self, head: i64) {
        self.head
            .send_if_modified(|known| std::mem::replace(known, head) != head);
    }

    /// Learns of a new head, and perhaps of the segment that ends there, and its messages: these need not be read then.
    pub(crate) fn learn(&self, head: i64, segment: Option<Segment>, messages: Option<&[StoredMessage]>) {
        if let Some(segment) = segment {
            let mut state = self.lock();
            if let Some(messages) = messages {
                let generation = state.generation;
                let entries = messages.iter().cloned().map(Entry::Message).collect();
                state.keep(Arc::new(Block::new(segment.base().get(), entries)), generation);
            }
            state.extend_index(segment);
        }
        self.set_head(head);
    }

    /// Registers lanes that somebody in this process owns; only messages in such lanes are read.
    pub(crate) fn register(&self, interest: &Arc<Interest>) {
        self.lock().interests.push(Arc::downgrade(interest));
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
                        let result = this.load(from, generation).await.map_err(Arc::new);
                        this.lock().reading.remove(&from);
                        result
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
        let mut segments = self.indexed(from);
        if segments.is_empty() {
            segments = self.read_index(&mut connection, from, generation).await?;
        }
        loop {
            let Some(block) = self.read_block(&mut connection, &segments, from).await? else {
                return Ok(None);
            };
            if block.has_gone() {
                // Rows are where the index says until `postbox.rebase` gives them new addresses; then the index read before is stale.
                let now = self.read_index(&mut connection, from, generation).await?;
                if !now.starts_with(&segments) && !segments.starts_with(&now) {
                    segments = now;
                    continue;
                }
            }
            let block = Arc::new(block);
            self.lock().keep(block.clone(), generation);
            return Ok(Some(block));
        }
    }

    /// The messages of some keys, of each from an offset on, before `to`: at most `limit`. Only their rows are read.
    pub(crate) async fn of_keys(
        &self,
        keys: &HashMap<i32, i64>,
        to: i64,
        limit: usize,
    ) -> Result<OfKeys, postbox::Error> {
        let from = keys.values().copied().min().unwrap_or(to);
        let wanted = |offset: Offset, key: Option<i32>| is_of(keys, offset.get(), key);
        let mut connection = self.readers.acquire().await?;
        let mut segments =
            log::segments(&mut connection, &self.topic, Offset::new(from), OF_KEYS_SEGMENTS).await?;
        loop {
            let (start, end, expected) = span_of_keys(&segments, keys, from, to, limit);
            let (first, last) = (Offset::new(start), Offset::new(end));
            let found = match expected {
                0 => Vec::new(),
                _ => log::messages(&mut connection, &self.topic, &segments, first, last, wanted).await?,
            };
            let records: Vec<Record> = found.into_iter().flatten().map(Record::alone).collect();
            let gone = expected - records.len();
            if gone > 0 {
                // As in `load`: their addresses may be new.
                let now =
                    log::segments(&mut connection, &self.topic, Offset::new(from), OF_KEYS_SEGMENTS).await?;
                if !now.starts_with(&segments) {
                    segments = now;
                    continue;
                }
            }
            return Ok(OfKeys { records, end, gone });
        }
    }

    /// As [`of_keys`](Self::of_keys), without a read; `None` if not all of it is cached.
    pub(crate) fn cached_of_keys(&self, keys: &HashMap<i32, i64>, to: i64, limit: usize) -> Option<OfKeys> {
        let mut end = keys.values().copied().min()?;
        let mut records = Vec::new();
        let state = self.lock();
        while end < to {
            let (_, block) = state.blocks.range(..=end).next_back()?;
            if end >= block.end() {
                return None;
            }
            let start = end;
            for offset in start..block.end().min(to) {
                let index = (offset - block.base) as usize;
                if is_of(keys, offset, block.key_hash(index)) {
                    if records.len() == limit {
                        return Some(OfKeys {
                            records,
                            end,
                            gone: 0,
                        });
                    }
                    match &block.entries[index] {
                        Entry::Message(_) => records.extend(Record::new(block, index)),
                        Entry::Unread(_) => return None,
                        // It was said when the lane passed it.
                        Entry::Gone(_) => {}
                    }
                }
                end = offset + 1;
            }
        }
        Some(OfKeys {
            records,
            end,
            gone: 0,
        })
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
        let to = block_end(segments, from);
        let wants = self.wants();
        let wanted = |offset: Offset, key: Option<i32>| wants(offset.get(), key);
        let found = log::messages(
            connection,
            &self.topic,
            segments,
            Offset::new(from),
            Offset::new(to),
            wanted,
        )
        .await?;

        let mut entries = Vec::with_capacity(found.len());
        let mut segments = segments.iter().peekable();
        for (offset, message) in (from..).zip(found) {
            while segments
                .next_if(|segment| segment.end().get() <= offset)
                .is_some()
            {}
            let key = segments
                .peek()
                .and_then(|segment| segment.key_hash(Offset::new(offset)));
            entries.push(match message {
                Some(message) => Entry::Message(message),
                None if wants(offset, key) => Entry::Gone(key),
                None => Entry::Unread(key),
            });
        }
        Ok(Some(Block::new(from, entries)))
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
                    .take_while(|before| *before < BLOCK_MESSAGES * 2)
                    .count();
                state.index[first..first + last].to_vec()
            }
            _ => Vec::new(),
        }
    }

    /// Which messages anybody in this process wants at this moment. The answer does not change while it is used: a lane that is claimed
    /// during a read must not make its messages, which were not read, look as if they were gone.
    fn wants(&self) -> impl Fn(i64, Option<i32>) -> bool + use<> {
        let mut owned: Vec<OwnedLanes> = Vec::new();
        self.lock().interests.retain(|weak| match weak.upgrade() {
            Some(interest) => {
                owned.push(interest.now());
                true
            }
            None => false,
        });
        let all = owned.iter().any(OwnedLanes::is_all);
        move |offset, key| all || owned.iter().any(|lanes| lanes.contain(offset, key))
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

/// Messages of some keys.
pub(crate) struct OfKeys {
    /// By offset.
    pub(crate) records: Vec<Record>,
    /// The offset before which these are all.
    pub(crate) end: i64,
    /// How many rows are not there any more.
    pub(crate) gone: usize,
}

fn is_of(keys: &HashMap<i32, i64>, offset: i64, key: Option<i32>) -> bool {
    key.and_then(|key| keys.get(&key))
        .is_some_and(|from| offset >= *from)
}

/// From where to where to read for `limit` messages of these keys, if their size allows it, and how many there are.
fn span_of_keys(
    segments: &[Segment],
    keys: &HashMap<i32, i64>,
    from: i64,
    to: i64,
    limit: usize,
) -> (i64, i64, usize) {
    let first = segments.first().map_or(to, |segment| segment.base().get());
    let start = from.max(first).min(to);
    // Nothing is between the segments that there are and the lanes.
    let mut end = if segments.len() < OF_KEYS_SEGMENTS as usize {
        to
    } else {
        start
    };
    let (mut found, mut bytes) = (0, 0);
    for segment in segments {
        for offset in segment.base().get().max(start)..segment.end().get().min(to) {
            if is_of(keys, offset, segment.key_hash(Offset::new(offset))) {
                if found == limit || bytes >= BLOCK_BYTES {
                    return (start, offset, found);
                }
                found += 1;
                bytes += segment.mean_bytes() + MESSAGE_OVERHEAD;
            }
        }
        end = end.max(segment.end().get().min(to));
    }
    (start, end, found)
}

fn ended(error: &tokio::task::JoinError) -> postbox::Error {
    postbox::Error::Database(sqlx::Error::Io(std::io::Error::other(format!(
        "the read ended early: {error}"
    ))))
}

/// Where a block that begins at `from` ends.
fn block_end(segments: &[Segment], from: i64) -> i64 {
    let mut end = from;
    let mut bytes = 0;
    for segment in segments {
        let size = segment.mean_bytes() + MESSAGE_OVERHEAD;
        let room = (BLOCK_BYTES.saturating_sub(bytes) / size) as i64;
        let take = (segment.end().get() - end).min(BLOCK_MESSAGES - (end - from));
        let taken = take.min(room);
        end += taken;
        bytes += taken as usize * size;
        if taken < take || end - from == BLOCK_MESSAGES {
            break;
        }
    }
    // One message is more than nothing, whatever its size.
    end.max(from + 1)
}

/// The lanes of a subscription that this process owns.
pub(crate) struct Interest {
    lanes: u16,
    owned: Vec<AtomicU64>,
}

impl Interest {
    pub(crate) fn new(lanes: u16) -> Self {
        Self {
            lanes,
            owned: (0..lanes.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(crate) fn set(&self, lane: u16, owned: bool) {
        let (word, bit) = (&self.owned[usize::from(lane / 64)], 1 << (lane % 64));
        if owned {
            word.fetch_or(bit, Ordering::Relaxed);
        } else {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    fn now(&self) -> OwnedLanes {
        let owned = self
            .owned
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect();
        OwnedLanes {
            lanes: self.lanes,
            owned,
        }
    }
}

/// The lanes of a subscription that this process owned at one moment.
struct OwnedLanes {
    lanes: u16,
    owned: Vec<u64>,
}

impl OwnedLanes {
    fn is_all(&self) -> bool {
        let owned: u32 = self.owned.iter().map(|word| word.count_ones()).sum();
        owned == u32::from(self.lanes)
    }

    fn contain(&self, offset: i64, key: Option<i32>) -> bool {
        let lane = lane_of(offset, key, self.lanes);
        self.owned[usize::from(lane / 64)] & (1 << (lane % 64)) != 0
    }
}
