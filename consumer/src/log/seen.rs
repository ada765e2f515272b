//! What a broadcast from memory remembers to see every message once, even if the database goes back to an earlier state.
//!
//! The sequencer commits asynchronously, so a crash of PostgreSQL can take back its last steps, and the same messages get other offsets. A standby
//! that is promoted, or a recovery to a point in time, takes back messages as well: others get their offsets then, and their numbers (`seq`), which
//! come from a sequence. Only ids are never given again. Groups go back to their checkpoints, which were lost with all that; a cursor in memory has
//! to find out what changed under it (docs/internals/restore.md).

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use postbox::MessageId;

use crate::log::block::Entry;
use crate::log::topic_log::TopicLog;

/// How many messages back a crash can reach: the server flushes within a second, so this is 65,536 messages a second.
const REMEMBERED: usize = 65_536;
/// One of so many is remembered for longer.
const THINNED: i64 = 256;
/// So many of those, then every other.
const TRAIL: usize = 4_096;

/// The last messages seen, with their offsets, and some of those before them.
#[derive(Default)]
pub(crate) struct SeenTail {
    tail: VecDeque<(i64, MessageId)>,
    /// Older ones, ever fewer: where the database went back further than the tail, they say about how far.
    trail: Vec<(i64, MessageId)>,
    /// Seen at an offset which is now another message's.
    already: HashSet<MessageId>,
}

/// Where to go on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Resume {
    pub(crate) next: i64,
    /// Messages that were seen and are not where they were.
    pub(crate) displaced: usize,
    /// Some of those that come may have been seen: it is not known exactly from where on they are others.
    pub(crate) is_guess: bool,
}

impl SeenTail {
    /// With the last message before the first that is to be seen.
    pub(crate) fn after(anchor: Option<(i64, MessageId)>) -> Self {
        Self {
            trail: anchor.into_iter().collect(),
            ..Self::default()
        }
    }

    /// Notes a message; `false` if it was seen before under another offset.
    pub(crate) fn is_new(&mut self, offset: i64, id: MessageId) -> bool {
        if self.tail.len() == REMEMBERED
            && let Some(oldest) = self.tail.pop_front()
        {
            self.thin(oldest);
        }
        self.tail.push_back((offset, id));
        self.already.is_empty() || !self.already.remove(&id)
    }

    fn thin(&mut self, oldest: (i64, MessageId)) {
        if self.trail.last().is_none_or(|last| oldest.0 - last.0 >= THINNED) {
            self.trail.push(oldest);
        }
        if self.trail.len() > TRAIL {
            let mut n = 0;
            self.trail.retain(|_| {
                n += 1;
                n % 2 == 1
            });
        }
    }

    /// Compares what was seen with what the log says now; returns where to go on.
    pub(crate) async fn resync(
        &mut self,
        log: &Arc<TopicLog>,
        next: i64,
    ) -> Result<Resume, Arc<postbox::Error>> {
        let same = self.same(log).await?;
        if same == self.tail.len() && same > 0 {
            return Ok(Resume {
                next,
                displaced: 0,
                is_guess: false,
            });
        }
        let mut resume = self.tail.get(same).map_or(next, |(offset, _)| *offset);
        let mut is_guess = false;
        if same == 0 {
            // It went back to before all that the tail has, or there is no tail.
            let known = self.same_of_trail(log).await?;
            let whole = known == self.trail.len() && self.is_there(log, resume).await?;
            if !whole {
                resume = known.checked_sub(1).map_or(0, |last| self.trail[last].0 + 1);
                is_guess = true;
                self.trail.truncate(known);
            }
        }
        let lost = self.tail.split_off(same);
        self.already.extend(lost.iter().map(|(_, id)| *id));
        Ok(Resume {
            next: resume,
            displaced: lost.len(),
            is_guess,
        })
    }

    /// How many of the tail are where they were. Offsets are dense, so the first that differs is where the numbering was lost.
    async fn same(&self, log: &Arc<TopicLog>) -> Result<usize, Arc<postbox::Error>> {
        let Some(&(first, _)) = self.tail.front() else {
            return Ok(0);
        };
        let mut same = 0;
        let mut at = first;
        while let Some(block) = log.read(at).await? {
            for (offset, entry) in (block.base..)
                .zip(block.entries())
                .skip((at - block.base).max(0) as usize)
            {
                let Some(seen) = self.tail.get(same) else {
                    return Ok(same);
                };
                match entry {
                    Entry::Message(message) if (offset, message.id) == *seen => same += 1,
                    Entry::Message(_) => return Ok(same),
                    Entry::Unread(_) | Entry::Gone => {}
                }
            }
            at = block.end();
        }
        Ok(same)
    }

    /// How many of the trail are where they were, or too old to tell.
    async fn same_of_trail(&self, log: &Arc<TopicLog>) -> Result<usize, Arc<postbox::Error>> {
        let (mut known, mut unknown) = (0, self.trail.len());
        while known < unknown {
            let middle = (known + unknown) / 2;
            let (offset, id) = self.trail[middle];
            let is_same = match log.read(offset).await? {
                Some(block) if offset < block.base => true,
                Some(block) => match block.entry((offset - block.base) as usize) {
                    Entry::Message(message) => message.id == id,
                    Entry::Unread(_) | Entry::Gone => true,
                },
                None => false,
            };
            match is_same {
                true => known = middle + 1,
                false => unknown = middle,
            }
        }
        Ok(known)
    }

    /// Whether the log reaches to there.
    async fn is_there(&self, log: &Arc<TopicLog>, next: i64) -> Result<bool, Arc<postbox::Error>> {
        Ok(match next {
            0 => true,
            next => log.read(next - 1).await?.is_some(),
        })
    }
}
