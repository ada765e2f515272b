//! `postbox scheduled`

use std::time::Duration;

use anyhow::anyhow;
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use postbox::{MaybeTimestamptz, MessageId, Publish, Timestamptz};
use serde::Serialize;
use sqlx::PgPool;
use uuid::Uuid;

use crate::database::Database;
use crate::output::{Output, warn};
use crate::span;
use crate::table::Table;
use crate::usage::{name, wrong_usage};

/// List, cancel and reschedule messages that are not yet due
///
/// A message is scheduled with `postbox publish --at` or `--delay`, or by a program; it has the id that it was given then.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List messages that are not yet due, the next first
    List {
        /// Only of this topic
        #[arg(long, value_parser = name)]
        topic: Option<String>,
        /// Most messages to list
        #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..))]
        limit: i64,
        /// Print one JSON object a message: id, deliver_at, topic, type, key, expires_at, scheduled_at
        #[arg(long)]
        json: bool,
    },
    /// Cancel messages by their ids, all in one transaction; fails if none of them is pending
    Cancel {
        #[arg(value_name = "ID", required = true)]
        ids: Vec<MessageId>,
    },
    /// Move a message to another instant; fails if it is not pending
    Reschedule {
        #[arg(value_name = "ID")]
        id: MessageId,
        /// The instant, in RFC 3339; one in the past means now
        #[arg(long, value_name = "INSTANT", conflicts_with = "delay")]
        at: Option<DateTime<Utc>>,
        /// So long from now, by the clock of this machine: a number with ms, s, m or h
        #[arg(long, value_name = "SPAN", value_parser = span::parse)]
        delay: Option<Duration>,
    },
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::List { topic, limit, json } => list(&database.open(1).await?, topic, limit, json).await,
        Command::Cancel { ids } => cancel(&database.open(1).await?, ids).await,
        Command::Reschedule { id, at, delay } => {
            let Some(instant) = at.or_else(|| delay.map(|delay| later(Utc::now(), delay))) else {
                wrong_usage("give --at INSTANT or --delay SPAN");
            };
            reschedule(&database.open(1).await?, id, instant).await
        }
    }
}

/// No further than there are instants.
fn later(from: DateTime<Utc>, delay: Duration) -> DateTime<Utc> {
    let delay = TimeDelta::from_std(delay).unwrap_or(TimeDelta::MAX);
    from.checked_add_signed(delay).unwrap_or(DateTime::<Utc>::MAX_UTC)
}

#[derive(Serialize, sqlx::FromRow)]
struct Scheduled {
    id: Uuid,
    #[sqlx(try_from = "Timestamptz")]
    deliver_at: DateTime<Utc>,
    topic: String,
    r#type: Option<String>,
    key: Option<String>,
    #[sqlx(try_from = "MaybeTimestamptz")]
    expires_at: Option<DateTime<Utc>>,
    #[sqlx(try_from = "Timestamptz")]
    scheduled_at: DateTime<Utc>,
}

const LIST: &str = "SELECT id, deliver_at, topic, type, key, expires_at, scheduled_at FROM postbox.scheduled \
     WHERE topic = coalesce($1, topic) ORDER BY deliver_at, n LIMIT $2";

async fn list(pool: &PgPool, topic: Option<String>, limit: i64, json: bool) -> anyhow::Result<()> {
    let messages: Vec<Scheduled> = sqlx::query_as(LIST)
        .bind(topic)
        .bind(limit)
        .fetch_all(pool)
        .await?;
    let mut output = Output::default();
    if json {
        return messages
            .iter()
            .try_for_each(|message| output.line(&serde_json::to_string(message)?));
    }
    let mut table = Table::new("Scheduled", &["id", "deliver at", "topic", "type", "key"]);
    for message in &messages {
        let deliver_at = message.deliver_at.to_rfc3339_opts(SecondsFormat::AutoSi, true);
        table.row([
            message.id.to_string().into(),
            deliver_at.into(),
            message.topic.as_str().into(),
            message.r#type.as_deref().unwrap_or("-").into(),
            message.key.as_deref().unwrap_or("-").into(),
        ]);
    }
    output.line(&table)?;
    if messages.len() as i64 == limit {
        warn("there may be more: raise --limit");
    }
    Ok(())
}

async fn cancel(pool: &PgPool, ids: Vec<MessageId>) -> anyhow::Result<()> {
    let mut output = Output::default();
    let mut cancelled = Vec::new();
    let mut tx = pool.begin().await?;
    for id in &ids {
        if tx.cancel(*id).await? {
            cancelled.push(*id);
        } else {
            warn(&format!(
                "message {id} is not pending: it was delivered, cancelled or never scheduled"
            ));
        }
    }
    tx.commit().await?;
    for id in &cancelled {
        output.line(&format_args!("cancelled {id}"))?;
    }
    match cancelled.is_empty() {
        true => Err(anyhow!("nothing was cancelled")),
        false => Ok(()),
    }
}

async fn reschedule(pool: &PgPool, id: MessageId, instant: DateTime<Utc>) -> anyhow::Result<()> {
    let mut tx = pool.begin().await?;
    let pending = tx.reschedule(id, instant).await?;
    tx.commit().await?;
    if !pending {
        return Err(anyhow!(
            "message {id} is not pending: it was delivered, cancelled or never scheduled"
        ));
    }
    let instant = instant.to_rfc3339_opts(SecondsFormat::AutoSi, true);
    Output::default().line(&format_args!("rescheduled {id} to {instant}"))
}
