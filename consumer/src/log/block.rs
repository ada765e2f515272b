//! A stretch of a topic in memory, shared by all groups of a process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use postbox::log::StoredMessage;

/// What a message takes in memory beside its payload, roughly.
pub(crate) const MESSAGE_OVERHEAD: usize = 160;

/// Consecutive offsets of a topic.
pub(crate) struct Block {
    /// Offset of the first entry.
    pub(crate) base: i64,
    pub(crate) entries: Vec<Entry>,
    /// What it takes in memory.
    pub(crate) bytes: usize,
    /// What the blocks of its topic take, this one included.
    held: Option<Arc<AtomicUsize>>,
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(held) = &self.held {
            held.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

/// What is known of one offset.
pub(crate) enum Entry {
    Message(StoredMessage),
    /// Nobody in this process wanted it when the block was read.
    Unread(Hashes),
    /// Its row is no longer there.
    Gone(Hashes),
}

/// What a segment says of a message beside its place: the hashes of its key and its type.
#[derive(Clone, Copy, Default)]
pub(crate) struct Hashes {
    pub(crate) key: Option<i32>,
    pub(crate) of_type: Option<i32>,
}

impl Block {
    /// Of the offsets from `base` on.
    pub(crate) fn new(base: i64, entries: Vec<Entry>) -> Self {
        let bytes = entries.iter().map(|entry| match entry {
            Entry::Message(message) => message.payload.len() + MESSAGE_OVERHEAD,
            Entry::Unread(_) | Entry::Gone(_) => size_of::<Entry>(),
        });
        Self {
            base,
            bytes: bytes.sum(),
            entries,
            held: None,
        }
    }

    /// Counted for as long as it is there.
    pub(crate) fn counted(mut self, held: &Arc<AtomicUsize>) -> Self {
        held.fetch_add(self.bytes, Ordering::Relaxed);
        self.held = Some(held.clone());
        self
    }

    /// The hash of the key of the entry at `index`.
    pub(crate) fn key_hash(&self, index: usize) -> Option<i32> {
        match &self.entries[index] {
            Entry::Message(message) => message.key_hash,
            Entry::Unread(hashes) | Entry::Gone(hashes) => hashes.key,
        }
    }

    /// Whether a wanted message's row was not found.
    pub(crate) fn has_gone(&self) -> bool {
        self.entries.iter().any(|entry| matches!(entry, Entry::Gone(_)))
    }

    /// One past the last offset.
    pub(crate) fn end(&self) -> i64 {
        self.base + self.entries.len() as i64
    }
}

/// A message in a block.
#[derive(Clone)]
pub(crate) struct Record {
    block: Arc<Block>,
    index: u32,
}

impl Record {
    /// `None` where the block has no message at that index.
    pub(crate) fn new(block: &Arc<Block>, index: usize) -> Option<Self> {
        matches!(block.entries.get(index)?, Entry::Message(_)).then(|| Self {
            block: block.clone(),
            index: index as u32,
        })
    }

    /// A message by itself.
    pub(crate) fn alone(message: StoredMessage) -> Self {
        Self {
            block: Arc::new(Block {
                base: message.offset.get(),
                bytes: message.payload.len(),
                entries: vec![Entry::Message(message)],
                held: None,
            }),
            index: 0,
        }
    }

    /// The same message without the rest of its block, for one that stays long.
    pub(crate) fn detached(self) -> Self {
        match self.block.entries.len() {
            1 => self,
            _ => Self::alone(self.message().clone()),
        }
    }

    pub(crate) fn message(&self) -> &StoredMessage {
        match &self.block.entries[self.index as usize] {
            Entry::Message(message) => message,
            Entry::Unread(_) | Entry::Gone(_) => unreachable!("a record is only made of a message"),
        }
    }
}
