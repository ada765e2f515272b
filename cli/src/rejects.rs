//! `postbox rejects`

use anyhow::anyhow;
use chrono::SecondsFormat;
use postbox_dispatcher::rejects::{self, Changes};
use sqlx::PgPool;

use crate::database::Database;
use crate::output::{Output, warn};
use crate::table::Table;
use crate::usage::name;

/// List, admit and discard messages that were committed and could not be sequenced
///
/// A plain INSERT into postbox.outbox is not checked. What it gives a topic that is not allowed, and what no step of the sequencer succeeds with, is set
/// aside here with the reason, so that all others go on. Nobody gets it until it is admitted again.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List them, the oldest first
    List {
        /// Only those with greater numbers
        #[arg(long, value_name = "SEQ", default_value_t = 0)]
        after: i64,
        /// Most messages to list
        #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..))]
        limit: i64,
        /// Print one JSON object a message: seq, id, topic, type, key, bytes, published_at, rejected_at, reason
        #[arg(long)]
        json: bool,
    },
    /// Publish one again under its id, changed so that it breaks no rule
    Readmit {
        #[arg(value_name = "SEQ")]
        seq: i64,
        /// Another topic
        #[arg(long, value_parser = name)]
        topic: Option<String>,
        /// Another type
        #[arg(long = "type", value_name = "TYPE", value_parser = name)]
        message_type: Option<String>,
        /// Another key
        #[arg(long)]
        key: Option<String>,
        /// Another payload
        #[arg(long)]
        payload: Option<String>,
    },
    /// Delete them for good, by their numbers
    Discard {
        #[arg(value_name = "SEQ", required = true)]
        seqs: Vec<i64>,
    },
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    let pool = database.open(1).await?;
    match args.command {
        Command::List { after, limit, json } => list(&pool, after, limit, json).await,
        Command::Readmit {
            seq,
            topic,
            message_type,
            key,
            payload,
        } => {
            let changes = Changes {
                topic,
                message_type,
                key,
                payload: payload.map(String::into_bytes),
            };
            match rejects::readmit(&pool, seq, &changes).await? {
                Some(id) => Output::default().line(&format_args!("published {id}")),
                None => Err(anyhow!(
                    "no message {seq} was set aside; see `postbox rejects list`"
                )),
            }
        }
        Command::Discard { seqs } => match rejects::discard(&pool, &seqs).await? {
            0 => Err(anyhow!("none of them was set aside; see `postbox rejects list`")),
            discarded => Output::default().line(&format_args!("discarded {discarded}")),
        },
    }
}

async fn list(pool: &PgPool, after: i64, limit: i64, json: bool) -> anyhow::Result<()> {
    let rejects = rejects::list(pool, after, limit).await?;
    let mut output = Output::default();
    if json {
        return rejects
            .iter()
            .try_for_each(|reject| output.line(&serde_json::to_string(reject)?));
    }
    let mut table = Table::new("Set aside", &["seq", "published at", "topic", "bytes", "reason"]);
    for reject in &rejects {
        let instant = reject
            .published_at
            .map(|at| at.to_rfc3339_opts(SecondsFormat::Millis, true));
        table.row([
            reject.seq.to_string().into(),
            instant.unwrap_or_else(|| "-".to_owned()).into(),
            short(reject.topic.as_deref().unwrap_or("-")).into(),
            reject
                .bytes
                .map_or_else(|| "-".to_owned(), |bytes| bytes.to_string())
                .into(),
            short(&reject.reason).into(),
        ]);
    }
    output.line(&table)?;
    if rejects.len() as i64 == limit {
        warn("there may be more: raise --limit, or go on with --after");
    }
    Ok(())
}

/// One line, and no character that a terminal takes for a command.
fn short(text: &str) -> String {
    let escaped: String = text
        .chars()
        .take(120)
        .flat_map(|c| match c.is_control() {
            true => c.escape_default().collect::<Vec<char>>(),
            false => vec![c],
        })
        .collect();
    escaped
}
