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

mod array;
mod filters;
mod isolation;
mod segment;
mod xid;

pub use self::filters::Filters;
pub use self::segment::{SEGMENT, Segment, segments};
pub use self::xid::Xid;

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
    /// Which of the [`Filters`] that it was read with it does not satisfy; negative: one that cannot be evaluated of it.
    pub refused_by: Box<[i16]>,
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
            refused_by: Box::default(),
            unreadable: Some(reason.into()),
        }
    }
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
        let key_hash = segment.key_hash(offset);
        messages.push(decode(row, first, seq, offset, key_hash, &mut types, false));
    }
    messages.sort_unstable_by_key(|message| message.offset);
    Ok((messages.len() == segment.seqs.len()).then_some(messages))
}

/// The messages of consecutive offsets from `from` to before `to`, all of which must be in `segments`, in their order; without those that are not
/// wanted (`wanted` is asked with the offset and the hash of the key) and those whose rows are gone. Each says which of `filters` it does not satisfy.
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
    filters: &Filters,
    wanted: impl Fn(Offset, Option<i32>) -> bool,
) -> Result<Vec<StoredMessage>> {
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
    let wanted = requests.iter().map(|request| request.entries.len()).sum();
    let mut found = Vec::with_capacity(wanted);
    let mut types = Types::default();
    for request in requests {
        let start = found.len();
        let read = request
            .fetch(connection, topic, filters, &mut types, &mut found)
            .await;
        match read {
            Err(Error::Database(error)) if isolation::is_of_a_row(error.code()) => {
                found.truncate(start);
                isolation::one_by_one(connection, topic, filters, &request, &mut types, &mut found).await?;
            }
            read => read?,
        }
    }
    // They come as they are stored, which is nearly so.
    found.sort_by_key(|message| message.offset);
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
    entries: Vec<Wanted>,
}

/// Where a message is, its offset and the hash of its key.
type Wanted = (Address, Offset, Option<i32>);

/// What is read of a message, and of the filters that stand in `$n` and `$m` if there are any: which refuse it.
macro_rules! columns {
    () => {
        "SELECT o.seq, o.id, o.type, o.key, o.headers, o.content_type, o.payload, o.published_at, o.expires_at "
    };
    ($filters:literal, $payload:literal) => {
        concat!(
            "SELECT o.seq, o.id, o.type, o.key, o.headers, o.content_type, o.payload, o.published_at, o.expires_at, \
                 postbox.refused_by((SELECT ",
            $filters,
            "::text[]::jsonpath[]), o.type, o.key, o.headers, o.content_type, CASE WHEN ",
            $payload,
            " THEN o.payload END) "
        )
    };
}

/// The topic is in the condition because a range of addresses holds other topics' rows too. By address it is there so that no index, whatever it
/// says, gives one topic's messages as another's.
macro_rules! range {
    ($columns:expr) => {
        concat!(
            $columns,
            "FROM postbox.outbox o WHERE o.slot = $1 AND o.xid BETWEEN $2 AND $3 AND o.seq BETWEEN $4 AND $5 AND o.topic = $6"
        )
    };
}

macro_rules! by_address {
    ($columns:expr) => {
        concat!(
            $columns,
            "FROM unnest($2::xid8[], $3::bigint[]) AS a (xid, seq) \
             JOIN postbox.outbox o ON o.xid = a.xid AND o.seq = a.seq WHERE o.slot = $1 AND o.topic = $4"
        )
    };
}

const RANGE: &str = range!(columns!());
const RANGE_FILTERED: &str = range!(columns!("$7", "$8"));
const BY_ADDRESS: &str = by_address!(columns!());
const BY_ADDRESS_FILTERED: &str = by_address!(columns!("$5", "$6"));

impl Request {
    fn new(slot: i16, from: i64) -> Self {
        Self {
            slot,
            from,
            entries: Vec::new(),
        }
    }

    fn extend(&mut self, segment: &Segment, to: Offset, wanted: impl Fn(Offset, Option<i32>) -> bool) {
        let from = segment.base.max(self.from);
        for offset in (from..segment.end().get().min(to.get())).map(Offset::new) {
            let key_hash = segment.key_hash(offset);
            if wanted(offset, key_hash) {
                self.entries
                    .push((segment.address(offset.get()), offset, key_hash));
            }
        }
    }

    async fn fetch(
        &self,
        connection: &mut PgConnection,
        topic: &str,
        filters: &Filters,
        types: &mut Types,
        found: &mut Vec<StoredMessage>,
    ) -> Result<()> {
        match self.dense_range() {
            Some((low, high)) => {
                let query = sqlx::query(filters.choose(RANGE, RANGE_FILTERED))
                    .bind(self.slot)
                    .bind(low.xid)
                    .bind(high.xid)
                    .bind(low.seq)
                    .bind(high.seq)
                    .bind(topic);
                let rows = filters.bind(query).fetch(connection);
                self.take(rows, types, found, !filters.is_empty()).await
            }
            None => {
                self.fetch_some(connection, topic, filters, &self.entries, types, found)
                    .await
            }
        }
    }

    /// By address, some of its entries.
    async fn fetch_some(
        &self,
        connection: &mut PgConnection,
        topic: &str,
        filters: &Filters,
        entries: &[Wanted],
        types: &mut Types,
        found: &mut Vec<StoredMessage>,
    ) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let (xids, seqs): (Vec<Xid>, Vec<i64>) = entries.iter().map(|e| (e.0.xid, e.0.seq)).unzip();
        let query = sqlx::query(filters.choose(BY_ADDRESS, BY_ADDRESS_FILTERED))
            .bind(self.slot)
            .bind(xids)
            .bind(seqs)
            .bind(topic);
        let rows = filters.bind(query).fetch(connection);
        self.take(rows, types, found, !filters.is_empty()).await
    }

    /// Each is decoded and let go of at once, while it is in the processor's cache.
    async fn take(
        &self,
        mut rows: BoxStream<'_, sqlx::Result<PgRow>>,
        types: &mut Types,
        found: &mut Vec<StoredMessage>,
        filtered: bool,
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
                found.push(decode(&row, 0, seq, offset, key_hash, types, filtered));
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
    filtered: bool,
) -> StoredMessage {
    read(row, first, seq, offset, key_hash, types, filtered).unwrap_or_else(|error| {
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
    filtered: bool,
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
        refused_by: match filtered {
            true => row.try_get_unchecked::<Vec<i16>, _>(first + 9)?.into(),
            false => Box::default(),
        },
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
