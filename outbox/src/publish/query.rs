//! What is sent to publish, for clients that know of texts and bytes only: whatever else a column is, the statement casts.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, Datelike, TimeDelta, Timelike, Utc};

#[cfg(feature = "cron")]
use crate::cron::register::instant_of;
use crate::error::{DatabaseError, Error, Result};
use crate::id::MessageId;
use crate::outgoing::{DEFAULT_DEDUP_WINDOW, Valid, When};

/// What is bound to a parameter, all of which any client can.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bind {
    /// A `text`, or null.
    Text(Option<String>),
    /// A `bytea`.
    Bytes(Vec<u8>),
    /// A `text[]`, of texts and nulls.
    Texts(Vec<Option<String>>),
    /// A `bytea[]`.
    Blobs(Vec<Vec<u8>>),
}

impl Bind {
    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self::Text(Some(text.into()))
    }

    pub(crate) fn maybe(text: Option<&str>) -> Self {
        Self::Text(text.map(str::to_owned))
    }
}

/// A statement with its parameters. Its text is one of few, so clients that keep prepared statements by their text prepare each once.
#[derive(Debug, Clone)]
pub struct Query {
    /// SQL.
    pub sql: &'static str,
    /// `$1`, `$2`, …
    pub parameters: Vec<Bind>,
}

impl Query {
    /// Of a text that is always the same.
    pub fn new(sql: &'static str, parameters: Vec<Bind>) -> Self {
        Self { sql, parameters }
    }
}

/// The rows' only column.
#[derive(Debug)]
pub struct Answer(pub Vec<Option<String>>);

impl Answer {
    /// Its one value.
    pub(crate) fn one(&self) -> Result<Option<&str>> {
        match self.0.as_slice() {
            [value] => Ok(value.as_deref()),
            rows => Err(unexpected(format!("{} rows where one was to come", rows.len()))),
        }
    }

    #[cfg(feature = "cron")]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn yes_or_no(&self) -> Result<bool> {
        match self.one()? {
            Some("true" | "t") => Ok(true),
            Some("false" | "f") => Ok(false),
            other => Err(unexpected(format!("{other:?} where true or false was to come"))),
        }
    }

    pub(crate) fn id_or(&self, id: MessageId) -> Result<MessageId> {
        match self.0.is_empty() {
            true => Ok(id),
            false => id_of(self.one()?),
        }
    }

    /// In microseconds since 1970.
    #[cfg(feature = "cron")]
    pub(crate) fn instant(&self) -> Result<Option<DateTime<Utc>>> {
        self.one()?.map(|micros| instant_of(Some(micros))).transpose()
    }
}

fn id_of(text: Option<&str>) -> Result<MessageId> {
    (text.and_then(|text| text.parse().ok()))
        .ok_or_else(|| unexpected(format!("{text:?} where an id was to come")))
}

fn unexpected(what: String) -> Error {
    Error::Database(DatabaseError::answer(&what))
}

const CANCEL: &str = "SELECT postbox.cancel($1::pg_catalog.text::pg_catalog.uuid)::pg_catalog.text AS answer";
const RESCHEDULE: &str = "SELECT postbox.reschedule($1::pg_catalog.text::pg_catalog.uuid, $2::pg_catalog.text::pg_catalog.timestamptz)::pg_catalog.text AS answer";

pub(super) fn cancel(id: MessageId) -> Query {
    Query::new(CANCEL, vec![Bind::text(id.to_string())])
}

pub(super) fn reschedule(id: MessageId, at: DateTime<Utc>) -> Query {
    let parameters = vec![Bind::text(id.to_string()), Bind::text(instant(at))];
    Query::new(RESCHEDULE, parameters)
}

/// In the order of the locks, so that two batches cannot deadlock on them. (Not of the keys: different ones may share a lock.)
const LOCK_KEYS: &str = "SELECT postbox.order_lock(k.topic, k.key, k.keys OPERATOR(pg_catalog.>) 64)::pg_catalog.text AS answer \
     FROM (SELECT u.topic, u.key, pg_catalog.count(*) OVER () AS keys FROM unnest($1::pg_catalog.text[], $2::pg_catalog.text[]) AS u (topic, key) \
         ORDER BY postbox.order_hash(u.topic, u.key) OPERATOR(pg_catalog.&) 127, postbox.order_hash(u.topic, u.key)) k";

/// Rows take their seq in the order of the arrays, so a batch keeps its order. A shorter array goes on as nulls.
const INSERT_BATCH: &str = "INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload) \
     SELECT pg_catalog.unnest($1::pg_catalog.text[]::pg_catalog.uuid[]), pg_catalog.unnest($2::pg_catalog.text[]), \
         pg_catalog.unnest($3::pg_catalog.text[]), pg_catalog.unnest($4::pg_catalog.text[]), \
         pg_catalog.unnest($5::pg_catalog.text[]::pg_catalog.jsonb[]), pg_catalog.unnest($6::pg_catalog.text[]), \
         pg_catalog.unnest($7::pg_catalog.bytea[])";

/// The same where all have one topic and type, as most batches do: these are sent and taken apart once, not for each row.
const INSERT_BATCH_OF_ONE_TYPE: &str = "INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload) \
     SELECT pg_catalog.unnest($1::pg_catalog.text[]::pg_catalog.uuid[]), $2::pg_catalog.text, $3::pg_catalog.text, \
         pg_catalog.unnest($4::pg_catalog.text[]), pg_catalog.unnest($5::pg_catalog.text[]::pg_catalog.jsonb[]), \
         pg_catalog.unnest($6::pg_catalog.text[]), pg_catalog.unnest($7::pg_catalog.bytea[])";

/// Deduplication, scheduling and expiry live in SQL, so that every client has the same.
const PUBLISH_EACH: &str = "SELECT postbox.publish_bytes(id => m.id::pg_catalog.uuid, topic => m.topic, type => m.type, key => m.key, \
         headers => m.headers::pg_catalog.jsonb, content_type => coalesce(m.content_type, 'application/json'), payload => m.payload, \
         dedup_key => m.dedup_key, dedup_window => m.dedup_window::interval, deliver_at => m.deliver_at::pg_catalog.timestamptz, \
         delay => m.delay::interval, expires_at => m.expires_at::pg_catalog.timestamptz, expires_in => m.expires_in::interval \
         )::pg_catalog.text AS answer \
     FROM unnest($1::pg_catalog.text[], $2::pg_catalog.text[], $3::pg_catalog.text[], $4::pg_catalog.text[], \
         $5::pg_catalog.text[], $6::pg_catalog.text[], $7::pg_catalog.text[], $8::pg_catalog.text[], $9::pg_catalog.text[], \
         $10::pg_catalog.text[], $11::pg_catalog.text[], $12::pg_catalog.text[], $13::pg_catalog.bytea[]) WITH ORDINALITY \
         AS m (id, topic, type, key, headers, content_type, dedup_key, dedup_window, deliver_at, delay, expires_at, expires_in, \
         payload, n) \
     ORDER BY m.n";

const BATCH_ROWS: usize = 10_000;
const BATCH_BYTES: usize = 32 * 1024 * 1024;

/// One statement of a batch.
pub(super) struct Step {
    pub(super) query: Query,
    pub(super) ids: Ids,
}

/// The ids of what a statement publishes.
pub(super) enum Ids {
    Known(Vec<MessageId>),
    /// Its rows are they; so many.
    Answered(usize),
}

impl Ids {
    pub(super) fn collect(self, answer: Answer, ids: &mut Vec<MessageId>) -> Result<()> {
        match self {
            Ids::Known(known) => ids.extend(known),
            Ids::Answered(expected) if answer.0.len() != expected => {
                return Err(unexpected(format!(
                    "{} ids for {expected} messages",
                    answer.0.len()
                )));
            }
            Ids::Answered(_) => {
                for id in &answer.0 {
                    ids.push(id_of(id.as_deref())?);
                }
            }
        }
        Ok(())
    }
}

/// The statements that publish these, in their order. Each is made when it is its turn.
pub(super) fn steps(messages: Vec<Valid>) -> impl Iterator<Item = Step> + Send {
    let mut rest = messages;
    let mut locks = lock_keys(&rest);
    std::iter::from_fn(move || {
        if let Some(query) = locks.take() {
            let ids = Ids::Known(Vec::new());
            return Some(Step { query, ids });
        }
        if rest.is_empty() {
            return None;
        }
        let others = rest.split_off(batch_len(&rest));
        Some(step(std::mem::replace(&mut rest, others)))
    })
}

fn step(batch: Vec<Valid>) -> Step {
    match batch.iter().any(Valid::is_special) {
        true => Step {
            ids: Ids::Answered(batch.len()),
            query: publish_each(batch),
        },
        false => Step {
            ids: Ids::Known(batch.iter().map(|m| m.id).collect()),
            query: insert(batch),
        },
    }
}

/// How many of these are one statement; one message may be larger than the limit.
pub(crate) fn batch_len(messages: &[Valid]) -> usize {
    let mut bytes = 0;
    let fits = |message: &&Valid| {
        bytes += message.payload.len();
        bytes <= BATCH_BYTES
    };
    messages.iter().take(BATCH_ROWS).take_while(fits).count().max(1)
}

/// Takes the locks of those that are ordered, if there are any.
pub(crate) fn lock_keys(messages: &[Valid]) -> Option<Query> {
    let keys: BTreeSet<(&str, Option<&str>)> = messages
        .iter()
        .filter(|m| m.ordered)
        .map(|m| (m.topic.as_ref(), m.key.as_deref()))
        .collect();
    if keys.is_empty() {
        return None;
    }
    let (topics, keys) = (keys.into_iter())
        .map(|(topic, key)| (Some(topic.to_owned()), key.map(str::to_owned)))
        .unzip();
    Some(Query::new(
        LOCK_KEYS,
        vec![Bind::Texts(topics), Bind::Texts(keys)],
    ))
}

fn texts(batch: &[Valid], of: impl Fn(&Valid) -> Option<String>) -> Bind {
    Bind::Texts(batch.iter().map(of).collect())
}

/// The same without the nulls at the end, for arrays of which a shorter one goes on as nulls.
fn optional(batch: &[Valid], of: impl Fn(&Valid) -> Option<String>) -> Bind {
    let mut column: Vec<_> = batch.iter().map(of).collect();
    column.truncate(up_to_the_last(&column).len());
    Bind::Texts(column)
}

fn id(message: &Valid) -> Option<String> {
    Some(message.id.to_string())
}

fn key(message: &Valid) -> Option<String> {
    message.key.clone()
}

fn message_type(message: &Valid) -> Option<String> {
    message.message_type.as_deref().map(str::to_owned)
}

fn headers(message: &Valid) -> Option<String> {
    message.headers.as_ref().map(ToString::to_string)
}

fn content_type(message: &Valid) -> Option<String> {
    message.content_type.as_deref().map(str::to_owned)
}

fn payloads(batch: Vec<Valid>) -> Bind {
    Bind::Blobs(batch.into_iter().map(|message| message.payload).collect())
}

fn insert(batch: Vec<Valid>) -> Query {
    let (sql, topic, of_type) = match one_type(&batch) {
        Some((topic, of_type)) => (INSERT_BATCH_OF_ONE_TYPE, Bind::text(topic), Bind::maybe(of_type)),
        None => (
            INSERT_BATCH,
            texts(&batch, |m| Some(m.topic.to_string())),
            optional(&batch, message_type),
        ),
    };
    let parameters = vec![
        texts(&batch, id),
        topic,
        of_type,
        optional(&batch, key),
        optional(&batch, headers),
        optional(&batch, content_type),
        payloads(batch),
    ];
    Query::new(sql, parameters)
}

fn publish_each(batch: Vec<Valid>) -> Query {
    let window = |m: &Valid| (m.dedup.as_ref()).map_or(DEFAULT_DEDUP_WINDOW, |dedup| dedup.window);
    let parameters = vec![
        texts(&batch, id),
        texts(&batch, |m| Some(m.topic.to_string())),
        texts(&batch, message_type),
        texts(&batch, key),
        texts(&batch, headers),
        texts(&batch, content_type),
        texts(&batch, |m| m.dedup.as_ref().map(|dedup| dedup.key.clone())),
        texts(&batch, |m| Some(interval(window(m)))),
        texts(&batch, |m| m.due.and_then(When::at).map(instant)),
        texts(&batch, |m| m.due.and_then(When::span).map(interval)),
        texts(&batch, |m| m.expiry.and_then(When::at).map(instant)),
        texts(&batch, |m| m.expiry.and_then(When::span).map(interval)),
        payloads(batch),
    ];
    Query::new(PUBLISH_EACH, parameters)
}

/// The topic and type of all of them, if they have the same.
pub(crate) fn one_type(batch: &[Valid]) -> Option<(&str, Option<&str>)> {
    let first = batch.first()?;
    batch
        .iter()
        .all(|m| m.topic == first.topic && m.message_type == first.message_type)
        .then_some((&first.topic, first.message_type.as_deref()))
}

/// Without the nulls at the end, which for an optional column are often all.
pub(crate) fn up_to_the_last<T>(column: &[Option<T>]) -> &[Option<T>] {
    let len = column
        .iter()
        .rposition(Option::is_some)
        .map_or(0, |last| last + 1);
    &column[..len]
}

/// As `Publish` appends; nothing is looked up in the publisher's search_path.
const INSERT: &str = "INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload) \
     VALUES ($1::pg_catalog.text::pg_catalog.uuid, $2::pg_catalog.text, $3::pg_catalog.text, $4::pg_catalog.text, \
         $5::pg_catalog.text::pg_catalog.jsonb, $6::pg_catalog.text, $7::pg_catalog.bytea)";

const PUBLISH: &str = "SELECT postbox.publish_bytes(id => $1::pg_catalog.text::pg_catalog.uuid, topic => $2::pg_catalog.text, \
         type => $3::pg_catalog.text, key => $4::pg_catalog.text, headers => $5::pg_catalog.text::pg_catalog.jsonb, \
         content_type => coalesce($6::pg_catalog.text, 'application/json'), dedup_key => $7::pg_catalog.text, \
         dedup_window => $8::pg_catalog.text::interval, ordered => $9::pg_catalog.text::boolean, \
         deliver_at => $10::pg_catalog.text::pg_catalog.timestamptz, delay => $11::pg_catalog.text::interval, \
         expires_at => $12::pg_catalog.text::pg_catalog.timestamptz, expires_in => $13::pg_catalog.text::interval, \
         payload => $14::pg_catalog.bytea)::pg_catalog.text AS answer";

impl Valid {
    /// Whether it needs more than an append.
    pub(crate) fn is_special(&self) -> bool {
        self.dedup.is_some() || self.due.is_some() || self.expiry.is_some()
    }

    /// Whether one statement of its own, which appends, is all that it needs.
    pub(crate) fn is_plain(&self) -> bool {
        !self.ordered && !self.is_special()
    }

    /// One statement that publishes it. Where that needs more than an append, its answer is the id.
    pub(crate) fn into_query(self) -> Query {
        let mut parameters = vec![
            Bind::Text(id(&self)),
            Bind::text(self.topic.as_ref()),
            Bind::Text(message_type(&self)),
            Bind::Text(key(&self)),
            Bind::Text(headers(&self)),
            Bind::Text(content_type(&self)),
        ];
        let sql = match self.is_plain() {
            true => INSERT,
            false => {
                parameters.extend(special(&self));
                PUBLISH
            }
        };
        parameters.push(Bind::Bytes(self.payload));
        Query::new(sql, parameters)
    }
}

/// From the deduplication key on.
fn special(message: &Valid) -> [Bind; 7] {
    let dedup = message.dedup.as_ref();
    let window = dedup.map_or(DEFAULT_DEDUP_WINDOW, |dedup| dedup.window);
    let at = |when: Option<When>| Bind::Text(when.and_then(When::at).map(instant));
    let span = |when: Option<When>| Bind::Text(when.and_then(When::span).map(interval));
    [
        Bind::Text(dedup.map(|dedup| dedup.key.clone())),
        Bind::text(interval(window)),
        Bind::text(message.ordered.to_string()),
        at(message.due),
        span(message.due),
        at(message.expiry),
        span(message.expiry),
    ]
}

/// As PostgreSQL reads it whatever its DateStyle. (In RFC 3339 a year has four digits, and chrono writes a sign before five.)
pub(crate) fn instant(at: DateTime<Utc>) -> String {
    let at = storable(at);
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:06}+00",
        at.year(),
        at.month(),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.nanosecond() % 1_000_000_000 / 1_000
    )
}

/// In whole microseconds, and not shorter than asked for.
pub(crate) fn interval(span: Duration) -> String {
    let micros = span.as_nanos().div_ceil(1_000);
    format!("{}.{:06} seconds", micros / 1_000_000, micros % 1_000_000)
}

/// In whole microseconds and not earlier than asked for. What was before 1970 is past all the same, and PostgreSQL's calendar begins later
/// than chrono's.
pub(crate) fn storable(instant: DateTime<Utc>) -> DateTime<Utc> {
    let rest = instant.timestamp_subsec_nanos() % 1_000;
    let up = TimeDelta::nanoseconds(if rest == 0 { 0 } else { i64::from(1_000 - rest) });
    instant
        .checked_add_signed(up)
        .unwrap_or(instant)
        .max(DateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outgoing::Outgoing;

    #[test]
    fn instants_and_spans_are_in_microseconds_and_never_earlier() {
        let at = DateTime::from_timestamp(1_700_000_000, 1).unwrap();
        assert_eq!(instant(at), "2023-11-14 22:13:20.000001+00");
        let far = DateTime::from_timestamp(316_517_932_800, 0).unwrap();
        assert_eq!(instant(far), "12000-01-21 00:00:00.000000+00");
        assert_eq!(interval(Duration::from_nanos(1)), "0.000001 seconds");
        assert_eq!(interval(Duration::from_millis(61_500)), "61.500000 seconds");
    }

    #[test]
    fn parameters_are_as_many_as_the_statement_has() {
        let valid = |outgoing: Outgoing| outgoing.validate().unwrap();
        let plain = || Outgoing::json("carts", &1);
        let special = || {
            Outgoing::json("carts", &1)
                .delay(Duration::from_secs(1))
                .ordered()
        };
        let alone = [plain(), special()].map(|m| valid(m).into_query());
        let batches = [
            vec![plain(), plain()],
            vec![plain(), Outgoing::json("orders", &1)],
            vec![special(), plain()],
        ];
        let batches = batches.map(|batch| steps(batch.into_iter().map(valid).collect()));
        let ids = [cancel(MessageId::new()), reschedule(MessageId::new(), Utc::now())];
        for query in alone
            .into_iter()
            .chain(batches.into_iter().flatten().map(|step| step.query))
            .chain(ids)
        {
            let last = query.parameters.len();
            assert!(query.sql.contains(&format!("${last}::")), "{query:?}");
            assert!(!query.sql.contains(&format!("${}", last + 1)), "{query:?}");
        }
    }

    #[test]
    fn batches_are_cut_and_none_is_left_out() {
        let valid = |size: usize| Outgoing::bytes("t", "a/b", vec![0; size]).validate().unwrap();
        let of = |messages: Vec<Valid>| -> Vec<usize> {
            steps(messages)
                .map(|step| match step.ids {
                    Ids::Known(ids) => ids.len(),
                    Ids::Answered(many) => many,
                })
                .collect()
        };
        assert_eq!(of(Vec::new()), [0; 0]);
        assert_eq!(
            of((0..25_000).map(|_| valid(1)).collect()),
            [10_000, 10_000, 5_000]
        );
        assert_eq!(of((0..65).map(|_| valid(1 << 20)).collect()), [32, 32, 1]);
    }
}
