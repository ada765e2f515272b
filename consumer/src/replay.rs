//! What a broadcast from memory remembers to see every message once, even if offsets are given anew.
//!
//! The sequencer commits asynchronously. If PostgreSQL crashes, its last steps may be lost and the same messages get other offsets
//! (ARCHITECTURE.md, "After a crash of PostgreSQL"). Groups go back to their checkpoints, which were lost with them; a cursor in memory
//! has to find out what changed under it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use crate::block::Entry;
use crate::topic_log::TopicLog;

/// How many messages back a crash can reach: the server flushes within a second, so this is 65,536 messages a second.
const REMEMBERED: usize = 65_536;

/// The last messages seen: offset and seq.
#[derive(Default)]
pub(crate) struct SeenTail {
    tail: VecDeque<(i64, i64)>,
    /// seqs that were seen at an offset which is now another message's.
    already: HashSet<i64>,
}

impl SeenTail {
    /// Notes a message; `false` if it was seen before under another offset.
    pub(crate) fn is_new(&mut self, offset: i64, seq: i64) -> bool {
        if self.tail.len() == REMEMBERED {
            self.tail.pop_front();
        }
        self.tail.push_back((offset, seq));
        self.already.is_empty() || !self.already.remove(&seq)
    }

    /// Compares what was seen with what the log says now; returns where to go on.
    pub(crate) async fn resync(
        &mut self,
        log: &Arc<TopicLog>,
        next: i64,
    ) -> Result<i64, Arc<postbox::Error>> {
        let Some(&(first, _)) = self.tail.front() else {
            return Ok(next);
        };
        let mut same = 0;
        let mut at = first;
        'log: while let Some(block) = log.read(at).await? {
            for (offset, entry) in (block.base..)
                .zip(&block.entries)
                .skip((at - block.base).max(0) as usize)
            {
                let Some(seen) = self.tail.get(same) else {
                    break 'log;
                };
                match entry {
                    Entry::Message(message) if (offset, message.seq) == *seen => same += 1,
                    // Offsets are dense, so the first that differs is where the numbering was lost.
                    Entry::Message(_) => break 'log,
                    Entry::Unread(_) | Entry::Gone(_) => {}
                }
            }
            at = block.end();
        }
        let lost = self.tail.split_off(same);
        let Some(&(resume, _)) = lost.front() else {
            return Ok(next);
        };
        self.already.extend(lost.into_iter().map(|(_, seq)| seq));
        Ok(resume)
    }
}
