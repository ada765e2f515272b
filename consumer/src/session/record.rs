//! Writing reports of executors: checkpoints, and with them what became of messages that they pass.

mod refused;

use std::time::Instant;

use chrono::{DateTime, Utc};
use postbox::Headers;
use sqlx::postgres::PgListener;
use sqlx::types::Json;
use sqlx::{Acquire, PgConnection, PgExecutor};
use uuid::Uuid;

use self::refused::Degree;
use crate::ids::{ConsumerId, Epoch, Lane, SubscriptionId};
use crate::protocol::journal::{Entry, Journal};
use crate::protocol::progress::{Snapshot, Unwritten};

/// It may commit asynchronously: after a crash of the server an older one counts, and what was settled since is delivered again, as if it had not
/// been written yet. Whoever waits for a disk meanwhile does not hear what is new.
const CHECKPOINT: &str = "SELECT postbox.checkpoint($1, $2, $3, $4, $5, $6, $7, $8) FROM set_config('synchronous_commit', 'off', true)";

/// All in one transaction, so that a message is never in two places or in none. By name, so that the function's order is its own affair; arrays of
/// composites would need their types' numbers looked up by every connection, and JSON a copy of every payload.
const RECORD: &str = "SELECT postbox.record( \
     by_consumer => $1, subscriptions => $2, lanes => $3, epochs => $4, positions => $5, pending_subscriptions => $6, pending_offsets \
     => $7, of_subscriptions => $8, of_lanes => $9, of_epochs => $10, offsets => $11, states => $12, attempts => $13, waits => $14, \
     failures => $15, reasons => $16, ids => $17, seqs => $18, published => $19, types => $20, keys => $21, key_hashes => $22, headers \
     => $23, content_types => $24, payloads => $25, expiries => $26, cleared_subscriptions => $27, cleared_lanes => $28, \
     lanes_of_pending => $29, parked_subscriptions => $30, parked_lanes => $31, parked_epochs => $32, parked_keys => $33, \
     parked_offsets => $34, parked_types => $35, needs_subscriptions => $36, needs_lanes => $37, needs_epochs => $38, needs_types => \
     $39)";

/// Most bytes of payloads in one statement. An array has at most a gigabyte, and the server has a statement's parameters several times.
const PORTION: usize = 8 * 1024 * 1024;

/// Reports of several subscriptions, column by column.
#[derive(Default)]
pub(crate) struct Columns {
    pub(crate) subscriptions: Vec<SubscriptionId>,
    pub(crate) lanes: Vec<Lane>,
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) positions: Vec<i64>,
    pending_subscriptions: Vec<SubscriptionId>,
    pub(crate) pending: Vec<i64>,
    pub(crate) lanes_of_pending: Vec<Lane>,
    journals: Vec<(SubscriptionId, Journal)>,
}

/// Who reports.
#[derive(Clone, Copy)]
pub(crate) struct Reporter<'a> {
    pub(crate) consumer: ConsumerId,
    pub(crate) instance: &'a str,
}

/// An entry of a journal, with its subscription and offset.
pub(crate) type Line<'a> = (SubscriptionId, i64, &'a Entry);

impl Columns {
    pub(crate) fn push(&mut self, subscription: SubscriptionId, unwritten: Unwritten) {
        if let Some(snapshot) = unwritten.snapshot {
            self.push_snapshot(subscription, snapshot);
        }
        if !unwritten.journal.is_empty() {
            self.journals.push((subscription, unwritten.journal));
        }
    }

    pub(crate) fn push_snapshot(&mut self, subscription: SubscriptionId, snapshot: Snapshot) {
        for lane in snapshot.lanes {
            self.subscriptions.push(subscription);
            self.lanes.push(lane.lane);
            self.epochs.push(lane.epoch);
            self.positions.push(lane.position);
        }
        for (offset, lane) in snapshot.pending {
            self.pending_subscriptions.push(subscription);
            self.pending.push(offset);
            self.lanes_of_pending.push(lane);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lanes.is_empty() && self.journals.is_empty()
    }

    /// Bytes of the messages that are copied.
    pub(crate) fn weight(&self) -> usize {
        self.lines().map(|(_, _, entry)| entry.weight()).sum()
    }

    fn lines(&self) -> impl Iterator<Item = Line<'_>> {
        self.journals.iter().flat_map(|(subscription, journal)| {
            let entries = journal.entries.iter();
            entries.map(|(offset, entry)| (*subscription, *offset, entry))
        })
    }

    /// In one transaction; `false` if some lane turned out to have another owner.
    ///
    /// What the database refuses of a message is that message's trouble: it is found, and written in other words.
    pub(crate) async fn write(
        mut self,
        listener: &mut PgListener,
        reporter: Reporter<'_>,
    ) -> Result<bool, sqlx::Error> {
        if self.is_empty() {
            return Ok(true);
        }
        if self.journals.is_empty() {
            return self.checkpoint(listener, reporter).await;
        }
        let mut refusal = match self.record(listener, reporter).await {
            Err(error) if refused::for_its_data(&error) => error,
            written => return written,
        };
        for degree in Degree::ALL {
            let culprits = refused::find(listener, reporter, &self.lines().collect::<Vec<_>>()).await?;
            if culprits.is_empty() {
                break;
            }
            for (subscription, offset, why) in culprits {
                let journal = self.journals.iter_mut().find(|(of, _)| *of == subscription);
                if let Some(entry) = journal.and_then(|(_, journal)| journal.entries.get_mut(&offset)) {
                    refused::put_otherwise(entry, degree, offset, &why);
                }
            }
            match self.record(listener, reporter).await {
                Err(error) if refused::for_its_data(&error) => refusal = error,
                written => return written,
            }
        }
        Err(refusal)
    }

    async fn checkpoint(
        &self,
        executor: impl PgExecutor<'_>,
        reporter: Reporter<'_>,
    ) -> Result<bool, sqlx::Error> {
        let accepted: i64 = sqlx::query_scalar(CHECKPOINT)
            .bind(reporter.consumer)
            .bind(&self.subscriptions)
            .bind(&self.lanes)
            .bind(&self.epochs)
            .bind(&self.positions)
            .bind(&self.pending_subscriptions)
            .bind(&self.pending)
            .bind(&self.lanes_of_pending)
            .fetch_one(executor)
            .await?;
        Ok(accepted == self.lanes.len() as i64)
    }

    async fn record(&self, listener: &mut PgListener, reporter: Reporter<'_>) -> Result<bool, sqlx::Error> {
        let lines: Vec<Line<'_>> = self.lines().collect();
        let mut portions = portions(&lines);
        let last = portions.pop().unwrap_or_default();
        let rows = Rows::of(last, reporter.instance).with_marks(&self.journals);
        let sent = (self.lanes.len() + lines.len() + rows.parked_keys.len()) as i64;
        if portions.is_empty() {
            return Ok(send(listener, reporter, self, rows).await? == sent);
        }
        let mut tx = listener.begin().await?;
        let mut accepted = 0;
        let nothing = Self::default();
        for portion in portions {
            let rows = Rows::of(portion, reporter.instance);
            accepted += send(&mut *tx, reporter, &nothing, rows).await?;
        }
        accepted += send(&mut *tx, reporter, self, rows).await?;
        tx.commit().await?;
        Ok(accepted == sent)
    }
}

/// Whether the database would take these entries, but for their payloads, which it always does. Nothing is written.
pub(crate) async fn try_out(
    connection: &mut PgConnection,
    reporter: Reporter<'_>,
    lines: &[Line<'_>],
) -> Result<(), sqlx::Error> {
    let mut tx = connection.begin().await?;
    let rows = Rows::of(lines, reporter.instance).without_payloads();
    send(&mut *tx, reporter, &Columns::default(), rows).await?;
    tx.rollback().await
}

/// Parts that one statement takes; a message that is heavier is by itself.
fn portions<'a, 'b>(lines: &'a [Line<'b>]) -> Vec<&'a [Line<'b>]> {
    let mut portions = Vec::new();
    let (mut begin, mut weight) = (0, 0);
    for (n, (_, _, entry)) in lines.iter().enumerate() {
        weight += entry.weight();
        if weight > PORTION && n > begin {
            portions.push(&lines[begin..n]);
            (begin, weight) = (n, entry.weight());
        }
    }
    portions.push(&lines[begin..]);
    portions
}

async fn send(
    executor: impl PgExecutor<'_>,
    reporter: Reporter<'_>,
    columns: &Columns,
    rows: Rows<'_>,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(RECORD)
        .bind(reporter.consumer)
        .bind(&columns.subscriptions)
        .bind(&columns.lanes)
        .bind(&columns.epochs)
        .bind(&columns.positions)
        .bind(&columns.pending_subscriptions)
        .bind(&columns.pending)
        .bind(rows.subscriptions)
        .bind(rows.lanes)
        .bind(rows.epochs)
        .bind(rows.offsets)
        .bind(rows.states)
        .bind(rows.attempts)
        .bind(rows.waits)
        .bind(rows.errors)
        .bind(rows.reasons)
        .bind(rows.ids)
        .bind(rows.seqs)
        .bind(rows.published)
        .bind(rows.types)
        .bind(rows.keys)
        .bind(rows.key_hashes)
        .bind(rows.headers)
        .bind(rows.content_types)
        .bind(rows.payloads)
        .bind(rows.expiries)
        .bind(rows.cleared_subscriptions)
        .bind(rows.cleared_lanes)
        .bind(&columns.lanes_of_pending)
        .bind(rows.parked_subscriptions)
        .bind(rows.parked_lanes)
        .bind(rows.parked_epochs)
        .bind(rows.parked_keys)
        .bind(rows.parked_offsets)
        .bind(rows.parked_types)
        .bind(rows.needs_subscriptions)
        .bind(rows.needs_lanes)
        .bind(rows.needs_epochs)
        .bind(rows.needs_types)
        .fetch_one(executor)
        .await
}

/// Journals, column by column.
#[derive(Default)]
struct Rows<'a> {
    subscriptions: Vec<SubscriptionId>,
    lanes: Vec<Lane>,
    epochs: Vec<Epoch>,
    offsets: Vec<i64>,
    states: Vec<&'static str>,
    attempts: Vec<i32>,
    /// Seconds until it is due.
    waits: Vec<f64>,
    errors: Vec<Json<serde_json::Value>>,
    reasons: Vec<Option<&'a str>>,
    ids: Vec<Option<Uuid>>,
    seqs: Vec<Option<i64>>,
    published: Vec<Option<DateTime<Utc>>>,
    types: Vec<Option<&'a str>>,
    keys: Vec<Option<&'a str>>,
    key_hashes: Vec<Option<i32>>,
    headers: Vec<Option<Json<&'a Headers>>>,
    content_types: Vec<Option<&'a str>>,
    payloads: Vec<Option<&'a [u8]>>,
    expiries: Vec<Option<DateTime<Utc>>>,
    cleared_subscriptions: Vec<SubscriptionId>,
    cleared_lanes: Vec<Lane>,
    parked_subscriptions: Vec<SubscriptionId>,
    parked_lanes: Vec<Lane>,
    parked_epochs: Vec<Epoch>,
    parked_keys: Vec<i32>,
    parked_offsets: Vec<Option<i64>>,
    parked_types: Vec<Option<&'a str>>,
    needs_subscriptions: Vec<SubscriptionId>,
    needs_lanes: Vec<Lane>,
    needs_epochs: Vec<Epoch>,
    needs_types: Vec<Option<&'a str>>,
}

impl<'a> Rows<'a> {
    fn of(lines: &[Line<'a>], instance: &str) -> Self {
        let mut rows = Self::default();
        let now = Instant::now();
        for (subscription, offset, entry) in lines {
            rows.subscriptions.push(*subscription);
            rows.lanes.push(entry.lane);
            rows.epochs.push(entry.epoch);
            rows.offsets.push(*offset);
            rows.states.push(entry.disposition.as_str());
            rows.attempts.push(entry.attempts as i32);
            rows.waits
                .push(entry.due.saturating_duration_since(now).as_secs_f64());
            let errors = entry.failures.iter().map(|failure| {
                serde_json::json!({
                    "attempt": failure.attempt, "at": failure.at, "error": failure.error, "instance": instance,
                })
            });
            rows.errors.push(Json(errors.collect()));
            rows.reasons.push(entry.reason.as_deref());
            let message = entry.record.as_ref().map(|record| record.message());
            let bare = entry.bare;
            rows.seqs.push(message.map(|m| m.seq));
            // What could not be read is copied by the server, which is asked for it by a number without an id.
            let message = message.filter(|m| m.unreadable.is_none());
            rows.ids.push(message.map(|m| m.id.as_uuid()));
            rows.published.push(message.map(|m| m.published_at));
            rows.types.push(message.and_then(|m| m.message_type.as_deref()));
            rows.keys.push(message.and_then(|m| m.key.as_deref()));
            rows.key_hashes.push(message.and_then(|m| m.key_hash));
            let headers = message.filter(|_| !bare).and_then(|m| m.headers.as_deref());
            rows.headers.push(headers.map(Json));
            let content_type = message.filter(|_| !bare);
            rows.content_types
                .push(content_type.and_then(|m| m.content_type.as_deref()));
            rows.payloads.push(message.map(|m| m.payload.as_ref()));
            rows.expiries.push(message.and_then(|m| m.expires_at));
        }
        rows
    }

    /// With what is of keys and lanes.
    fn with_marks(mut self, journals: &'a [(SubscriptionId, Journal)]) -> Self {
        for (subscription, journal) in journals {
            for (key, parked) in &journal.parked {
                self.parked_subscriptions.push(*subscription);
                self.parked_lanes.push(parked.lane);
                self.parked_epochs.push(parked.epoch);
                self.parked_keys.push(*key);
                self.parked_offsets.push(parked.offset);
                self.parked_types.push(parked.waits_for.as_deref());
            }
            for (lane, needs) in &journal.needs {
                // A row of its own says that there are none.
                let types = needs.types.iter().map(|name| Some(name.as_str()));
                let none = needs.types.is_empty().then_some(None);
                for name in types.chain(none) {
                    self.needs_subscriptions.push(*subscription);
                    self.needs_lanes.push(*lane);
                    self.needs_epochs.push(needs.epoch);
                    self.needs_types.push(name);
                }
            }
            for lane in &journal.cleared {
                self.cleared_subscriptions.push(*subscription);
                self.cleared_lanes.push(*lane);
            }
        }
        self
    }

    fn without_payloads(mut self) -> Self {
        for payload in self.payloads.iter_mut().flatten() {
            *payload = &[];
        }
        self
    }
}
