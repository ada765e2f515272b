//! `postbox messages`

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::anyhow;
use chrono::{DateTime, SecondsFormat, Utc};
use clap::Subcommand;
use postbox_dispatcher::messages::{self, GroupState, Whereabouts};
use uuid::Uuid;

use crate::database::Database;
use crate::output::{Output, in_line};
use crate::table::{Table, counted};

/// Where a message is
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Show(ShowArgs),
}

/// Show a message, and where it is for each group of its topic
///
/// States: scheduled (not yet due), unsequenced (no dispatcher has given it an offset yet), waiting (to be run, or running), retrying (it failed; with its attempts and
/// last error), parked (behind a failed message of its key), unhandled (waits for an instance that handles its type), halted (attempts exhausted, its key waits for an operator), redriven (to be run
/// again), dead (given up; with the number of its dead letter), filtered (passed, since the group's filter does not
/// want it), delivered (the group has passed it: handled, discarded, of a type it does not
/// take, or from before its start). Exit status 1 if there is no such message: never committed, cancelled, or no longer retained.
#[derive(Debug, clap::Args)]
struct ShowArgs {
    /// Message id
    id: Uuid,
    /// Print one JSON object: id, topic, deliver_at, offset, type, key, headers, content_type, published_at, bytes, in_log, groups
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<ExitCode> {
    let Command::Show(args) = args.command;
    let pool = database.open(1).await?;
    let message = messages::show(&pool, args.id).await?.ok_or_else(|| {
        anyhow!(
            "there is no message {}: its transaction did not commit, or it was cancelled, or it is no longer retained",
            args.id
        )
    })?;
    Output::default().line(&match args.json {
        true => serde_json::to_string(&message)?,
        false => human(&message),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn human(message: &Whereabouts) -> String {
    let or_none = |text: &Option<String>| text.as_deref().unwrap_or("-").to_owned();
    let instant = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Millis, true);
    let offset = match (message.offset, message.deliver_at, &message.rejected) {
        (Some(offset), ..) => offset.to_string(),
        (None, Some(due), _) => format!("none yet: it is due at {}", instant(due)),
        (None, None, Some(_)) => "none: it was set aside, see `postbox rejects list`".to_owned(),
        (None, None, None) => "none yet: no dispatcher has put it in order".to_owned(),
    };
    let content_type = message.content_type.as_deref().unwrap_or(postbox::JSON);
    let payload = format!("{} of {content_type}", counted(message.bytes, "byte", "bytes"));
    let in_log = match (message.in_log, message.deliver_at) {
        (true, _) => "yes",
        (false, Some(_)) => "until it is due, and then in the log",
        (false, None) => "no: only groups that failed to handle it have copies",
    };
    let mut text = String::new();
    for (name, value) in [
        ("Message", message.id.to_string()),
        ("Topic", message.topic.clone()),
        ("Offset", offset),
        ("Type", or_none(&message.message_type)),
        ("Key", or_none(&message.key)),
        ("Published at", instant(message.published_at)),
        ("Payload", payload),
        ("Retained", in_log.to_owned()),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<14}{}", in_line(&value));
    }
    let _ = write!(text, "\n{}", groups(&message.groups));
    text
}

fn groups(groups: &[GroupState]) -> Table {
    let mut table = Table::new(
        "Groups",
        &[
            "group",
            "state",
            "attempts",
            "dead letter",
            "next attempt",
            "last error",
        ],
    );
    for group in groups {
        let number = |number: Option<i64>| number.map_or("-".into(), |number| number.to_string());
        table.row([
            group.group.as_str().into(),
            group.state.to_string().into(),
            number(group.attempt.map(i64::from)).into(),
            number(group.dead_letter).into(),
            group
                .due_at
                .map_or("-".to_owned(), |at| {
                    at.to_rfc3339_opts(SecondsFormat::Millis, true)
                })
                .into(),
            group
                .last_error
                .as_deref()
                .map_or("-".to_owned(), |error| {
                    error.replace(|c: char| c.is_control(), " ")
                })
                .into(),
        ]);
    }
    table
}
