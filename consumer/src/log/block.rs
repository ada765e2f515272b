//! A stretch of a topic in memory, shared by all groups of a process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use postbox::log::StoredMessage;

/// What a message takes in memory beside its payload, roughly.
pub(crate) const MESSAGE_OVERHEAD: usize = 160;

/// Consecutive offsets of a topic.
pub(crate) struct Block {
    /// Offset of the first.
    pub(crate) base: i64,
    slots: Vec<Slot>,
    /// Those that were read, by offset.
    messages: Vec<StoredMessage>,
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

/// What is known of one offset. Small, since where little is wanted there are many for a message.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    hashes: Hashes,
    what: What,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// The message of this number.
    Message(u32),
    Unread,
    Gone,
}

/// What is known of one offset.
pub(crate) enum Entry<'a> {
    Message(&'a StoredMessage),
    /// Nobody in this process wanted it when the block was read.
    Unread(Hashes),
    /// Its row is no longer there.
    Gone,
}

/// What a segment says of a message beside its place: the hashes of its key and its type.
#[derive(Clone, Copy, Default)]
pub(crate) struct Hashes {
    pub(crate) key: Option<i32>,
    pub(crate) of_type: Option<i32>,
}

impl Slot {
    /// Of a message that is not read yet.
    pub(crate) fn new(hashes: Hashes, wanted: bool) -> Self {
        Self {
            hashes,
            what: if wanted { What::Gone } else { What::Unread },
        }
    }

    /// Whether its message is to be read.
    pub(crate) fn is_wanted(&self) -> bool {
        self.what != What::Unread
    }
}

impl Block {
    /// Of the offsets from `base` on, with what was found of what is wanted of them, by offset. What was not is gone.
    pub(crate) fn new(base: i64, mut slots: Vec<Slot>, messages: Vec<StoredMessage>) -> Self {
        for (n, message) in messages.iter().enumerate() {
            if let Some(slot) = slots.get_mut((message.offset.get() - base) as usize) {
                slot.what = What::Message(n as u32);
            }
        }
        let payloads = messages
            .iter()
            .map(|message| message.payload.len() + MESSAGE_OVERHEAD);
        Self {
            base,
            bytes: payloads.sum::<usize>() + slots.len() * size_of::<Slot>(),
            slots,
            messages,
            held: None,
        }
    }

    /// Consecutive messages.
    pub(crate) fn of(base: i64, messages: Vec<StoredMessage>) -> Self {
        let slot = |message: &StoredMessage| {
            let hashes = Hashes {
                key: message.key_hash,
                of_type: None,
            };
            Slot::new(hashes, true)
        };
        Self::new(base, messages.iter().map(slot).collect(), messages)
    }

    /// Counted for as long as it is there.
    pub(crate) fn counted(mut self, held: &Arc<AtomicUsize>) -> Self {
        held.fetch_add(self.bytes, Ordering::Relaxed);
        self.held = Some(held.clone());
        self
    }

    /// What is known at `index`.
    pub(crate) fn entry(&self, index: usize) -> Entry<'_> {
        let slot = self.slots[index];
        match slot.what {
            What::Message(n) => Entry::Message(&self.messages[n as usize]),
            What::Unread => Entry::Unread(slot.hashes),
            What::Gone => Entry::Gone,
        }
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        (0..self.slots.len()).map(|index| self.entry(index))
    }

    /// The hash of the key of the message at `index`.
    pub(crate) fn key_hash(&self, index: usize) -> Option<i32> {
        self.slots[index].hashes.key
    }

    /// Whether a wanted message's row was not found.
    pub(crate) fn has_gone(&self) -> bool {
        self.slots.iter().any(|slot| slot.what == What::Gone)
    }

    /// One past the last offset.
    pub(crate) fn end(&self) -> i64 {
        self.base + self.slots.len() as i64
    }
}

/// A message in a block.
#[derive(Clone)]
pub(crate) struct Record {
    block: Arc<Block>,
    /// Among the block's messages.
    number: u32,
}

impl Record {
    /// `None` where the block has no message at that index.
    pub(crate) fn new(block: &Arc<Block>, index: usize) -> Option<Self> {
        match block.slots.get(index)?.what {
            What::Message(number) => Some(Self {
                block: block.clone(),
                number,
            }),
            What::Unread | What::Gone => None,
        }
    }

    /// A message by itself.
    pub(crate) fn alone(message: StoredMessage) -> Self {
        Self {
            block: Arc::new(Block::of(message.offset.get(), vec![message])),
            number: 0,
        }
    }

    /// The same message without the rest of its block, for one that stays long.
    pub(crate) fn detached(self) -> Self {
        match self.block.slots.len() {
            1 => self,
            _ => Self::alone(self.message().clone()),
        }
    }

    pub(crate) fn message(&self) -> &StoredMessage {
        &self.block.messages[self.number as usize]
    }
}
