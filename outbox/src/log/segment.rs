//! Segments: where the messages of consecutive offsets are stored.

use sqlx::{PgConnection, Row};

use super::array::elements;
use super::{Address, Xid};
use crate::error::{Error, Result};
use crate::id::Offset;

/// Most messages in one segment.
pub const SEGMENT: i64 = 1024;

/// Up to 1,024 consecutive offsets of a topic: where their messages are, and the hashes of their keys and types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub(super) base: i64,
    pub(super) slot: i16,
    bytes: i64,
    xids: Vec<Xid>,
    pub(super) seqs: Vec<i64>,
    keys: Option<Vec<Option<i32>>>,
    /// One, if all are the same.
    types: Option<Vec<Option<i32>>>,
}

impl Segment {
    /// What `postbox.step` writes of a segment that ends at `head`: slot, bytes, xids, seqs, hashes of keys and of types; `None` if it is anything else.
    #[doc(hidden)]
    pub fn parse(head: i64, place: &str) -> Option<Self> {
        fn numbers<T: std::str::FromStr>(list: &str) -> Option<Vec<T>> {
            list.split(',').map(|number| number.parse().ok()).collect()
        }
        let mut parts = place.split(':');
        let (slot, bytes) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let xids: Vec<Xid> = numbers(parts.next()?)?.into_iter().map(Xid).collect();
        let seqs: Vec<i64> = numbers(parts.next()?)?;
        let hashes = |list: &str| -> Option<Vec<Option<i32>>> {
            let hashes = list.split(',').map(|hash| match hash {
                "-" => Some(None),
                hash => hash.parse().ok().map(Some),
            });
            hashes.collect()
        };
        let keys = hashes(parts.next()?)?;
        let mut types = hashes(parts.next()?)?;
        let of_each = [xids.len(), keys.len(), types.len()];
        let complete = of_each.iter().all(|count| *count == seqs.len()) && parts.next().is_none();
        // As it is stored.
        if types.iter().all(|of| *of == types[0]) {
            types.truncate(1);
        }
        complete.then(|| Self {
            base: head - seqs.len() as i64,
            slot,
            bytes,
            xids,
            seqs,
            keys: Some(keys),
            types: Some(types).filter(|types| types != &[None]),
        })
    }

    /// Offset of its first message.
    pub fn base(&self) -> Offset {
        Offset::new(self.base)
    }

    /// One past its last offset.
    pub fn end(&self) -> Offset {
        Offset::new(self.base + self.seqs.len() as i64)
    }

    /// Mean payload length, in bytes.
    pub fn mean_bytes(&self) -> usize {
        usize::try_from(self.bytes).unwrap_or(usize::MAX) / self.seqs.len().max(1)
    }

    /// The hash of the key of the message at `offset`, which must be in the segment; `None`: no key.
    pub fn key_hash(&self, offset: Offset) -> Option<i32> {
        self.keys
            .as_ref()
            .and_then(|keys| keys[(offset.get() - self.base) as usize])
    }

    /// The hash of the type of the message at `offset`, which must be in the segment; `None`: no type.
    pub fn type_hash(&self, offset: Offset) -> Option<i32> {
        let types = self.types.as_ref()?;
        types[(offset.get() - self.base) as usize % types.len()]
    }

    pub(super) fn address(&self, offset: i64) -> Address {
        let n = (offset - self.base) as usize;
        Address {
            xid: self.xids[n],
            seq: self.seqs[n],
        }
    }
}

/// From the last segment that begins at or before `from`: under light load segments are small, so `base > from - 1024` would look at many.
const SEGMENTS: &str = "SELECT base, slot, bytes, xids, seqs, keys, types FROM postbox.segment \
     WHERE topic = $1 AND base + count > $2 AND base >= coalesce( \
         (SELECT s.base FROM postbox.segment s WHERE s.topic = $1 AND s.base <= $2 ORDER BY s.base DESC LIMIT 1), 0) \
     ORDER BY base LIMIT $3";

/// The segments of a topic from the one that contains `from`, at most `limit`, in order.
///
/// # Errors
///
/// The database's.
pub async fn segments(
    connection: &mut PgConnection,
    topic: &str,
    from: Offset,
    limit: i64,
) -> Result<Vec<Segment>> {
    let rows = sqlx::query(SEGMENTS)
        .bind(topic)
        .bind(from.get())
        .bind(limit)
        .fetch_all(connection)
        .await?;
    rows.iter()
        .map(|row| {
            let segment = Segment {
                base: row.try_get(0)?,
                slot: row.try_get(1)?,
                bytes: row.try_get(2)?,
                xids: elements(row, 3, |xid| Some(Xid(u64::from_be_bytes(xid?))))?.unwrap_or_default(),
                seqs: elements(row, 4, |seq| Some(i64::from_be_bytes(seq?)))?.unwrap_or_default(),
                keys: elements(row, 5, |key| Some(key.map(i32::from_be_bytes)))?,
                types: elements(row, 6, |name| Some(name.map(i32::from_be_bytes)))?,
            };
            let count = segment.seqs.len();
            let is_whole = segment.xids.len() == count
                && segment.keys.as_ref().is_none_or(|keys| keys.len() == count)
                && (segment.types.as_ref()).is_none_or(|types| types.len() == count || types.len() == 1);
            match is_whole {
                true => Ok(segment),
                false => Err(Error::DamagedSegment {
                    topic: topic.to_owned(),
                    base: segment.base,
                }),
            }
        })
        .collect()
}
