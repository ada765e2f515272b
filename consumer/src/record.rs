//! Writing reports of executors: checkpoints, and with them what became of messages that they pass.

use std::time::Instant;

use chrono::{DateTime, Utc};
use postbox::Headers;
use sqlx::PgExecutor;
use sqlx::types::Json;
use uuid::Uuid;

use crate::journal::Journal;
use crate::progress::{Snapshot, Unwritten};

/// It may commit asynchronously: after a crash of the server an older one counts, and what was settled since is delivered again, as if it had not
/// been written yet. Whoever waits for a disk meanwhile does not hear what is new.
const CHECKPOINT: &str = "SELECT postbox.checkpoint($1, $2, $3, $4, $5, $6, $7, $8) FROM set_config('synchronous_commit', 'off', true)";

/// All in one transaction, so that a message is never in two places or in none.
const RECORD: &str = "SELECT postbox.record($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, \
     $19, $20, $21, $22, $23, $24, $25, $26, $27, $28, $29, $30, $31, $32, $33, $34)";

/// Reports of several subscriptions, column by column.
#[derive(Default)]
pub(crate) struct Columns {
    pub(crate) subscriptions: Vec<i32>,
    pub(crate) lanes: Vec<i16>,
    pub(crate) epochs: Vec<i32>,
    pub(crate) positions: Vec<i64>,
    pending_subscriptions: Vec<i32>,
    pub(crate) pending: Vec<i64>,
    pub(crate) lanes_of_pending: Vec<i16>,
    journals: Vec<(i32, Journal)>,
}

impl Columns {
    pub(crate) fn push(&mut self, subscription: i32, unwritten: Unwritten) {
        if let Some(snapshot) = unwritten.snapshot {
            self.push_snapshot(subscription, snapshot);
        }
        if !unwritten.journal.is_empty() {
            self.journals.push((subscription, unwritten.journal));
        }
    }

    pub(crate) fn push_snapshot(&mut self, subscription: i32, snapshot: Snapshot) {
        for lane in snapshot.lanes {
            self.subscriptions.push(subscription);
            self.lanes.push(lane.lane as i16);
            self.epochs.push(lane.epoch);
            self.positions.push(lane.position);
        }
        for (offset, lane) in snapshot.pending {
            self.pending_subscriptions.push(subscription);
            self.pending.push(offset);
            self.lanes_of_pending.push(lane as i16);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lanes.is_empty() && self.journals.is_empty()
    }

    /// One statement; `false` if some lane turned out to have another owner.
    pub(crate) async fn write(
        self,
        executor: impl PgExecutor<'_>,
        consumer: i32,
        instance: &str,
    ) -> Result<bool, sqlx::Error> {
        if self.is_empty() {
            return Ok(true);
        }
        let lanes = self.lanes.len() as i64;
        if self.journals.is_empty() {
            let accepted: i64 = sqlx::query_scalar(CHECKPOINT)
                .bind(consumer)
                .bind(self.subscriptions)
                .bind(self.lanes)
                .bind(self.epochs)
                .bind(self.positions)
                .bind(self.pending_subscriptions)
                .bind(self.pending)
                .bind(self.lanes_of_pending)
                .fetch_one(executor)
                .await?;
            return Ok(accepted == lanes);
        }
        let rows = Rows::of(&self.journals, instance);
        let sent = lanes + (rows.offsets.len() + rows.parked_keys.len()) as i64;
        let accepted: i64 = sqlx::query_scalar(RECORD)
            .bind(consumer)
            .bind(self.subscriptions)
            .bind(self.lanes)
            .bind(self.epochs)
            .bind(self.positions)
            .bind(self.pending_subscriptions)
            .bind(self.pending)
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
            .bind(rows.calm_subscriptions)
            .bind(rows.calm_lanes)
            .bind(self.lanes_of_pending)
            .bind(rows.parked_subscriptions)
            .bind(rows.parked_lanes)
            .bind(rows.parked_epochs)
            .bind(rows.parked_keys)
            .bind(rows.parked_offsets)
            .fetch_one(executor)
            .await?;
        Ok(accepted == sent)
    }
}

/// Journals, column by column.
#[derive(Default)]
struct Rows<'a> {
    subscriptions: Vec<i32>,
    lanes: Vec<i16>,
    epochs: Vec<i32>,
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
    calm_subscriptions: Vec<i32>,
    calm_lanes: Vec<i16>,
    parked_subscriptions: Vec<i32>,
    parked_lanes: Vec<i16>,
    parked_epochs: Vec<i32>,
    parked_keys: Vec<i32>,
    parked_offsets: Vec<Option<i64>>,
}

impl<'a> Rows<'a> {
    fn of(journals: &'a [(i32, Journal)], instance: &str) -> Self {
        let mut rows = Self::default();
        let now = Instant::now();
        for (subscription, journal) in journals {
            for (offset, entry) in &journal.entries {
                rows.subscriptions.push(*subscription);
                rows.lanes.push(entry.lane as i16);
                rows.epochs.push(entry.epoch);
                rows.offsets.push(*offset);
                rows.states.push(entry.fate.as_str());
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
                rows.ids.push(message.map(|m| m.id.as_uuid()));
                rows.seqs.push(message.map(|m| m.seq));
                rows.published.push(message.map(|m| m.published_at));
                rows.types.push(message.and_then(|m| m.message_type.as_deref()));
                rows.keys.push(message.and_then(|m| m.key.as_deref()));
                rows.key_hashes.push(message.and_then(|m| m.key_hash));
                rows.headers
                    .push(message.and_then(|m| m.headers.as_deref()).map(Json));
                rows.content_types
                    .push(message.and_then(|m| m.content_type.as_deref()));
                rows.payloads.push(message.map(|m| m.payload.as_ref()));
                rows.expiries.push(message.and_then(|m| m.expires_at));
            }
            for (key, parked) in &journal.parked {
                rows.parked_subscriptions.push(*subscription);
                rows.parked_lanes.push(parked.lane as i16);
                rows.parked_epochs.push(parked.epoch);
                rows.parked_keys.push(*key);
                rows.parked_offsets.push(parked.offset);
            }
            for lane in &journal.calm {
                rows.calm_subscriptions.push(*subscription);
                rows.calm_lanes.push(*lane as i16);
            }
        }
        rows
    }
}
