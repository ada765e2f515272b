//! Reading the log: a topic's segments, and the messages they point at.
//!
//! For consumers and tools. A topic is a dense sequence of offsets; segments say where the message of each offset is
//! stored. Reading changes nothing and needs no lock.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use futures_util::stream::BoxStream;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::headers::Headers;
use crate::id::{MessageId, Offset};
use crate::instant::{MaybeTimestamptz, Timestamptz};
use crate::json::Json;
use crate::rules;

mod isolation;
mod xid;

pub use self::xid::Xid;

/// Most messages in one segment.
pub const SEGMENT: i64 = 1024;

/// Up to 1,024 consecutive offsets of a topic: where their messages are, and the hashes of their keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    base: i64,
    slot: i16,
    bytes: i64,
    xids: Vec<Xid>,
    seqs: Vec<i64>,
    keys: Option<Vec<Option<i32>>>,
}

impl Segment {
    /// What `postbox.step` writes of a segment that ends at `head`: slot, bytes, xids, seqs and hashes of keys; `None` if it is anything else.
    #[doc(hidden)]
    pub fn parse(head: i64, place: &str) -> Option<Self> {
        fn numbers<T: std::str::FromStr>(list: &str) -> Option<Vec<T>> {
            list.split(',').map(|number| number.parse().ok()).collect()
        }
        let mut parts = place.split(':');
        let (slot, bytes) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let xids: Vec<Xid> = numbers(parts.next()?)?.into_iter().map(Xid).collect();
        let seqs: Vec<i64> = numbers(parts.next()?)?;
        let keys = parts.next()?.split(',').map(|key| match key {
            "-" => Some(None),
            hash => hash.parse().ok().map(Some),
        });
        let keys: Vec<Option<i32>> = keys.collect::<Option<_>>()?;
        let complete = xids.len() == seqs.len() && keys.len() == seqs.len() && parts.next().is_none();
        complete.then(|| Self {
            base: head - seqs.len() as i64,
            slot,
            bytes,
            xids,
            seqs,
            keys: Some(keys),
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

    fn address(&self, offset: i64) -> Address {
        let n = (offset - self.base) as usize;
        Address {
            xid: self.xids[n],
            seq: self.seqs[n],
        }
    }
}

/// A message as it was published, with its place in the topic.
#[derive(Debug, Clone)]
pub struct StoredMessage {
    /// Message id.
    pub id: MessageId,
    /// Its place in the topic.
    pub offset: Offset,
    /// Its insertion number, unique over all topics.
    pub seq: i64,
    /// Message type, if it has one.
    pub message_type: Option<Arc<str>>,
    /// Ordering key, if it has one.
    pub key: Option<Box<str>>,
    /// Hash of the key.
    pub key_hash: Option<i32>,
    /// Headers.
    pub headers: Option<Box<Headers>>,
    /// Media type of the payload; `None`: `application/json`.
    pub content_type: Option<Box<str>>,
    /// The payload.
    pub payload: Box<[u8]>,
    /// When it was inserted.
    pub published_at: DateTime<Utc>,
    /// From then on it is not to be handled; `None`: it does not expire.
    pub expires_at: Option<DateTime<Utc>>,
    /// Why its row cannot be read, or which rule it breaks; then only id, place and times say something, and it must not run.
    pub unreadable: Option<Box<str>>,
}

impl StoredMessage {
    /// One of which nothing is known but where it is.
    fn unread(id: MessageId, offset: Offset, seq: i64, key_hash: Option<i32>, reason: String) -> Self {
        Self {
            id,
            offset,
            seq,
            message_type: None,
            key: None,
            key_hash,
            headers: None,
            content_type: None,
            payload: Box::default(),
            published_at: DateTime::UNIX_EPOCH,
            expires_at: None,
            unreadable: Some(reason.into()),
        }
    }
}

/// From the last segment that begins at or before `from`: under light load segments are small, so `base > from - 1024` would look at many.
const SEGMENTS: &str = "SELECT base, slot, bytes, xids, seqs, keys FROM postbox.segment \
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
                xids: row.try_get_unchecked(3)?,
                seqs: row.try_get(4)?,
                keys: row.try_get(5)?,
            };
            let count = segment.seqs.len();
            let is_whole =
                segment.xids.len() == count && segment.keys.as_ref().is_none_or(|keys| keys.len() == count);
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

/// The offset that the topic's next message gets: the number of messages sequenced so far.
///
/// # Errors
///
/// The database's.
pub async fn next_offset(connection: &mut PgConnection, topic: &str) -> Result<Offset> {
    let next = sqlx::query_scalar("SELECT postbox.next_offset($1)")
        .bind(topic)
        .fetch_one(connection)
        .await?;
    Ok(Offset::new(next))
}

/// The messages of a segment, from rows that have the columns which reading asks for from column `first` on; `None` if some are not there.
#[doc(hidden)]
pub fn messages_of(segment: &Segment, rows: &[PgRow], first: usize) -> Result<Option<Vec<StoredMessage>>> {
    let mut types = Types::default();
    let mut messages = Vec::with_capacity(rows.len());
    for row in rows {
        let Some(seq) = row.try_get_unchecked::<Option<i64>, _>(first)? else {
            break;
        };
        let Ok(n) = segment.seqs.binary_search(&seq) else {
            break;
        };
        let offset = Offset::new(segment.base + n as i64);
        messages.push(decode(
            row,
            first,
            seq,
            offset,
            segment.key_hash(offset),
            &mut types,
        ));
    }
    messages.sort_unstable_by_key(|message| message.offset);
    Ok((messages.len() == segment.seqs.len()).then_some(messages))
}

/// The messages of consecutive offsets from `from` to before `to`, all of which must be in `segments`; an element is `None` where
/// the message is not wanted (`wanted` is asked with the offset and the hash of the key) or its row is gone.
///
/// Where the wanted rows are dense in the index they are read as one range, else by address.
///
/// # Errors
///
/// The database's. A row that breaks a rule, or that the server cannot read, is no error: it comes with [`StoredMessage::unreadable`].
pub async fn messages(
    connection: &mut PgConnection,
    topic: &str,
    segments: &[Segment],
    from: Offset,
    to: Offset,
    wanted: impl Fn(Offset, Option<i32>) -> bool,
) -> Result<Vec<Option<StoredMessage>>> {
    // Consecutive segments of one slot are one request.
    let mut requests: Vec<Request> = Vec::new();
    for segment in segments
        .iter()
        .filter(|segment| segment.end() > from && segment.base() < to)
    {
        if requests.last().is_none_or(|request| request.slot != segment.slot) {
            requests.push(Request::new(segment.slot, segment.base.max(from.get())));
        }
        if let Some(request) = requests.last_mut() {
            request.extend(segment, to, &wanted);
        }
    }
    let mut found = Vec::with_capacity((to.get() - from.get()).max(0) as usize);
    let mut types = Types::default();
    for request in requests {
        let start = found.len();
        found.resize_with(start + request.len(), || None);
        let read = request
            .fetch(connection, topic, &mut types, &mut found[start..])
            .await;
        match read {
            Err(Error::Database(error)) if isolation::is_of_a_row(error.code()) => {
                isolation::one_by_one(connection, topic, &request, &mut types, &mut found[start..]).await?;
            }
            read => read?,
        }
    }
    Ok(found)
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Address {
    xid: Xid,
    seq: i64,
}

/// The rows to read of one slot.
struct Request {
    slot: i16,
    from: i64,
    to: i64,
    entries: Vec<Wanted>,
}

/// Where a message is, its offset and the hash of its key.
type Wanted = (Address, Offset, Option<i32>);

/// The topic is in the condition because a range of addresses holds other topics' rows too. By address it is there so that no index, whatever it
/// says, gives one topic's messages as another's.
const RANGE: &str = "SELECT seq, id, type, key, headers, content_type, payload, published_at, expires_at \
     FROM postbox.outbox WHERE slot = $1 AND xid BETWEEN $2 AND $3 AND seq BETWEEN $4 AND $5 AND topic = $6";

const BY_ADDRESS: &str = "SELECT o.seq, o.id, o.type, o.key, o.headers, o.content_type, o.payload, o.published_at, \
         o.expires_at \
     FROM unnest($2::xid8[], $3::bigint[]) AS a (xid, seq) \
     JOIN postbox.outbox o ON o.xid = a.xid AND o.seq = a.seq WHERE o.slot = $1 AND o.topic = $4";

impl Request {
    fn new(slot: i16, from: i64) -> Self {
        Self {
            slot,
            from,
            to: from,
            entries: Vec::new(),
        }
    }

    fn extend(&mut self, segment: &Segment, to: Offset, wanted: impl Fn(Offset, Option<i32>) -> bool) {
        let from = segment.base.max(self.from);
        self.to = segment.end().get().min(to.get());
        for offset in (from..self.to).map(Offset::new) {
            let key_hash = segment.key_hash(offset);
            if wanted(offset, key_hash) {
                self.entries
                    .push((segment.address(offset.get()), offset, key_hash));
            }
        }
    }

    /// How many offsets it is for, wanted or not.
    fn len(&self) -> usize {
        (self.to - self.from) as usize
    }

    async fn fetch(
        &self,
        connection: &mut PgConnection,
        topic: &str,
        types: &mut Types,
        found: &mut [Option<StoredMessage>],
    ) -> Result<()> {
        match self.dense_range() {
            Some((low, high)) => {
                let query = sqlx::query(RANGE)
                    .bind(self.slot)
                    .bind(low.xid)
                    .bind(high.xid)
                    .bind(low.seq)
                    .bind(high.seq)
                    .bind(topic);
                self.take(query.fetch(connection), types, found).await
            }
            None => {
                self.fetch_some(connection, topic, &self.entries, types, found)
                    .await
            }
        }
    }

    /// By address, some of its entries.
    async fn fetch_some(
        &self,
        connection: &mut PgConnection,
        topic: &str,
        entries: &[Wanted],
        types: &mut Types,
        found: &mut [Option<StoredMessage>],
    ) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let (xids, seqs): (Vec<Xid>, Vec<i64>) = entries.iter().map(|e| (e.0.xid, e.0.seq)).unzip();
        let query = sqlx::query(BY_ADDRESS)
            .bind(self.slot)
            .bind(xids)
            .bind(seqs)
            .bind(topic);
        self.take(query.fetch(connection), types, found).await
    }

    /// Each is decoded and let go of at once, while it is in the processor's cache.
    async fn take(
        &self,
        mut rows: BoxStream<'_, sqlx::Result<PgRow>>,
        types: &mut Types,
        found: &mut [Option<StoredMessage>],
    ) -> Result<()> {
        // seq is unique, so it alone says which entry a row is for.
        let mut places: Vec<(i64, usize)> = self
            .entries
            .iter()
            .enumerate()
            .map(|(n, e)| (e.0.seq, n))
            .collect();
        places.sort_unstable();
        while let Some(row) = rows.try_next().await? {
            let seq: i64 = row.try_get_unchecked(0)?;
            if let Ok(place) = places.binary_search_by_key(&seq, |place| place.0) {
                let (_, offset, key_hash) = self.entries[places[place].1];
                let n = (offset.get() - self.from) as usize;
                found[n] = Some(decode(&row, 0, seq, offset, key_hash, types));
            }
        }
        Ok(())
    }

    /// The smallest box of (xid, seq) around all entries, if it is one, or if at least half of the seqs in it are wanted: then reading the
    /// range is cheaper than looking up each. A transaction that is much older than the others would widen the box to
    /// index entries that are skipped one by one, so there it is by address.
    fn dense_range(&self) -> Option<(Address, Address)> {
        let seqs = || self.entries.iter().map(|e| e.0.seq);
        let xids = || self.entries.iter().map(|e| e.0.xid);
        let low = Address {
            xid: xids().min()?,
            seq: seqs().min()?,
        };
        let high = Address {
            xid: xids().max()?,
            seq: seqs().max()?,
        };
        let wanted = self.entries.len() as i64;
        let dense =
            wanted >= 8 && high.seq - low.seq < 2 * wanted && high.xid.0 - low.xid.0 < 4 * wanted as u64;
        (dense || wanted == 1).then_some((low, high))
    }
}

/// Never an error: a row that cannot be read is that message's failure, not its neighbours'.
fn decode(
    row: &PgRow,
    first: usize,
    seq: i64,
    offset: Offset,
    key_hash: Option<i32>,
    types: &mut Types,
) -> StoredMessage {
    read(row, first, seq, offset, key_hash, types).unwrap_or_else(|error| {
        let id = row.try_get_unchecked::<Uuid, _>(first + 1).unwrap_or_default();
        StoredMessage::unread(MessageId::from(id), offset, seq, key_hash, error.to_string())
    })
}

fn read(
    row: &PgRow,
    first: usize,
    seq: i64,
    offset: Offset,
    key_hash: Option<i32>,
    types: &mut Types,
) -> Result<StoredMessage> {
    let message_type = match row.try_get_unchecked::<Option<&str>, _>(first + 2)? {
        Some(name) => Some(types.intern(name)?),
        None => None,
    };
    let key: Option<&str> = row.try_get_unchecked(first + 3)?;
    let json: Option<Json<'_>> = row.try_get_unchecked(first + 4)?;
    let headers = json.as_ref().map(|json| Box::new(Headers::from_stored(json.0)));
    let content_type: Option<&str> = row.try_get_unchecked(first + 5)?;
    rules::broken_by(key, headers.as_deref().zip(json.map(|json| json.0)), content_type)?;
    Ok(StoredMessage {
        id: MessageId::from(row.try_get_unchecked::<Uuid, _>(first + 1)?),
        offset,
        seq,
        message_type,
        key: key.map(Box::from),
        key_hash,
        headers,
        content_type: content_type.map(Box::from),
        payload: row.try_get_unchecked::<&[u8], _>(first + 6)?.into(),
        published_at: row.try_get_unchecked::<Timestamptz, _>(first + 7)?.0,
        expires_at: row.try_get_unchecked::<MaybeTimestamptz, _>(first + 8)?.0,
        unreadable: None,
    })
}

/// The types seen in a read, so that messages share their names.
#[derive(Default)]
struct Types(Vec<Arc<str>>);

impl Types {
    /// Types are few and come in runs, so the newest is looked at first.
    fn intern(&mut self, name: &str) -> Result<Arc<str>> {
        if let Some(known) = self.0.iter().rev().find(|known| known.as_ref() == name) {
            return Ok(known.clone());
        }
        rules::check_type(name)?;
        let name: Arc<str> = name.into();
        if self.0.len() < 64 {
            self.0.push(name.clone());
        }
        Ok(name)
    }
}
