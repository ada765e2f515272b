//! Messages of certain keys, for who catches up with what they have parked.

use std::collections::HashMap;

use postbox::log::Segment;
use postbox::{Offset, log};
use postbox_core::link::in_time;
use sqlx::PgConnection;

use super::{BLOCK_BYTES, OF_KEYS_SEGMENTS, READ_TIMEOUT, TopicLog};
use crate::log::block::{Entry, MESSAGE_OVERHEAD, Record};

impl TopicLog {
    /// The messages of some keys, of each from an offset on, before `to`: at most `limit`. Only their rows are read.
    pub(crate) async fn of_keys(
        &self,
        keys: &HashMap<i32, i64>,
        to: i64,
        limit: usize,
    ) -> Result<OfKeys, postbox::Error> {
        let mut connection = self.readers.acquire().await?;
        // The connection may be dead.
        let read = self.read_keys(&mut connection, keys, to, limit);
        in_time(READ_TIMEOUT, "reading messages of keys", read).await
    }

    pub(super) async fn read_keys(
        &self,
        connection: &mut PgConnection,
        keys: &HashMap<i32, i64>,
        to: i64,
        limit: usize,
    ) -> Result<OfKeys, postbox::Error> {
        let from = keys.values().copied().min().unwrap_or(to);
        let wanted = |offset: Offset, key: Option<i32>| is_of(keys, offset.get(), key);
        let mut segments =
            log::segments(connection, &self.topic, Offset::new(from), OF_KEYS_SEGMENTS).await?;
        loop {
            let (start, end, expected) = span_of_keys(&segments, keys, from, to, limit);
            let (first, last) = (Offset::new(start), Offset::new(end));
            let found = match expected {
                0 => Vec::new(),
                _ => {
                    let filters = &self.filters;
                    log::messages(connection, &self.topic, &segments, first, last, filters, wanted).await?
                }
            };
            let records: Vec<Record> = found.into_iter().map(Record::alone).collect();
            let gone = expected - records.len();
            if gone > 0 {
                // As in `load`: their addresses may be new.
                let now = log::segments(connection, &self.topic, Offset::new(from), OF_KEYS_SEGMENTS).await?;
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
                    match block.entry(index) {
                        Entry::Message(_) => records.extend(Record::new(block, index)),
                        Entry::Unread(_) => return None,
                        // It was said when the lane passed it.
                        Entry::Gone => {}
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
