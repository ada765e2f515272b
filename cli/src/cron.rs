//! `postbox cron`

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use chrono::{DateTime, SecondsFormat, Utc};
use postbox::cron::{self, Cron, Missed, Registered, Schedule};
use postbox::{Outgoing, Publish};

use crate::database::Database;
use crate::output::{Output, in_one_line};
use crate::span;
use crate::table::Table;
use crate::usage::{ONLY_A_PREVIEW, name, wrong_usage};

/// Add, list, pause and remove recurring messages, and see when they are due
///
/// A schedule is a cron expression of five fields (minute, hour, day of the month, month, day of the week), of six with the second first, or
/// a macro: @hourly, @daily, @weekly, @monthly, @yearly. Each due time becomes one message, whatever the number of dispatchers, with the
/// headers postbox-cron (the name) and postbox-scheduled-at (the due time).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Add(Add),
    /// List schedules with their next due times
    List {
        /// Print one JSON object a schedule
        #[arg(long)]
        json: bool,
    },
    /// Stop a schedule from firing
    Pause {
        #[arg(value_parser = name)]
        name: String,
    },
    /// Let a paused schedule fire again, from its next due time on: what was due meanwhile is not made up for
    Resume {
        #[arg(value_parser = name)]
        name: String,
    },
    /// Remove a schedule; messages that it published stay
    Remove {
        #[arg(value_parser = name)]
        name: String,
        /// Without it nothing is removed, only shown, and the exit code is 3
        #[arg(long)]
        yes: bool,
    },
    /// Show when a schedule is due next; without a name, one that is not registered
    Next {
        #[arg(value_parser = name)]
        name: Option<String>,
        /// A cron expression instead of a name; needs no database
        #[arg(long, value_name = "EXPRESSION", conflicts_with = "name")]
        schedule: Option<String>,
        /// The time zone of --schedule, an IANA name
        #[arg(long, value_name = "ZONE", default_value = "UTC")]
        tz: String,
        /// How many due times
        #[arg(short = 'n', long, default_value_t = 5)]
        count: usize,
        /// Print one JSON array of instants
        #[arg(long)]
        json: bool,
    },
}

/// Add a schedule, or change the one of that name, and print its next due time
///
///   postbox cron add nightly '0 3 * * *' reports --tz Europe/Berlin --payload '{"kind": "nightly"}'
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
struct Add {
    /// Name of the schedule: 1 to 255 characters of A-Z a-z 0-9 . _ - : /
    #[arg(value_parser = name)]
    name: String,
    /// Cron expression
    schedule: String,
    /// Topic of its messages
    #[arg(value_parser = name)]
    topic: String,
    /// The time zone in which the expression is read, an IANA name such as Europe/Berlin
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    tz: String,
    /// What becomes of due times that passed while no dispatcher ran: once (the latest fires), skip or all (the latest 1,000 at most). One
    /// that is at most a minute old is not missed
    #[arg(long, value_name = "POLICY", default_value = "once")]
    missed: Missed,
    /// The payload, JSON
    #[arg(long, value_name = "JSON", default_value = "null")]
    payload: String,
    /// Ordering key [default: none]
    #[arg(long)]
    key: Option<String>,
    /// Message type [default: none]
    #[arg(long = "type", value_name = "TYPE", value_parser = name)]
    message_type: Option<String>,
    /// How long after its firing a message expires: a number with ms, s, m or h [default: never]
    #[arg(long, value_name = "SPAN", value_parser = span::parse)]
    expires_in: Option<Duration>,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Remove { name, yes: false } => return preview_removal(database, &name).await,
        Command::Add(add) => add.run(database).await,
        Command::List { json } => list(database, json).await,
        Command::Pause { name } => {
            let paused = cron::pause(&mut *database.open(1).await?.acquire().await?, &name).await?;
            told(paused, &name, "paused")
        }
        Command::Resume { name } => {
            let resumed = cron::resume(&mut *database.open(1).await?.acquire().await?, &name).await?;
            told(resumed, &name, "resumed")
        }
        Command::Remove { name, yes: true } => {
            let removed = cron::remove(&mut *database.open(1).await?.acquire().await?, &name).await?;
            told(removed, &name, "removed")
        }
        Command::Next {
            name,
            schedule,
            tz,
            count,
            json,
        } => {
            let schedule = match (name, schedule) {
                (Some(name), _) => {
                    let found = find(database, &name).await?;
                    Schedule::parse(&found.schedule, &found.time_zone)?
                }
                (None, Some(expression)) => parse(&expression, &tz),
                (None, None) => wrong_usage("give the NAME of a schedule, or --schedule EXPRESSION"),
            };
            next(&schedule, count, json)
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

fn parse(expression: &str, time_zone: &str) -> Schedule {
    Schedule::parse(expression, time_zone).unwrap_or_else(|error| wrong_usage(error))
}

impl Add {
    async fn run(self, database: &Database) -> anyhow::Result<()> {
        let schedule = parse(&self.schedule, &self.tz);
        if let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(&self.payload) {
            wrong_usage(format!("the payload is not JSON: {}", in_one_line(&error.into())));
        }
        let mut message = Outgoing::bytes(self.topic, postbox::JSON, self.payload);
        if let Some(key) = self.key {
            message = message.key(key);
        }
        if let Some(message_type) = self.message_type {
            message = message.message_type(message_type);
        }
        if let Some(span) = self.expires_in {
            message = message.expires_in(span);
        }
        let pool = database.open(1).await?;
        let cron = Cron::new(self.name, schedule, message).missed(self.missed);
        let mut tx = pool.begin().await?;
        let next_at = tx.register(cron).await?;
        tx.commit().await?;
        Output::default().line(&at(next_at))
    }
}

fn at(instant: Option<DateTime<Utc>>) -> String {
    instant.map_or_else(
        || "-".to_owned(),
        |at| at.to_rfc3339_opts(SecondsFormat::Secs, true),
    )
}

async fn list(database: &Database, json: bool) -> anyhow::Result<()> {
    let schedules = cron::list(&mut *database.open(1).await?.acquire().await?).await?;
    let mut output = Output::default();
    if json {
        return schedules
            .iter()
            .try_for_each(|schedule| output.line(&serde_json::to_string(schedule)?));
    }
    let heads = ["name", "schedule", "time zone", "topic", "missed", "next", "last"];
    let mut table = Table::new("Schedules", &heads);
    for schedule in &schedules {
        let next = match schedule.paused {
            true => "paused".to_owned(),
            false => at(schedule.next_at),
        };
        table.row([
            schedule.name.as_str().into(),
            schedule.schedule.as_str().into(),
            schedule.time_zone.as_str().into(),
            schedule.topic.as_str().into(),
            schedule.missed.as_str().into(),
            next.into(),
            at(schedule.last_at).into(),
        ]);
    }
    output.line(&table)
}

async fn find(database: &Database, name: &str) -> anyhow::Result<Registered> {
    cron::find(&mut *database.open(1).await?.acquire().await?, name)
        .await?
        .with_context(|| format!("there is no schedule {name:?}: see `postbox cron list`"))
}

async fn preview_removal(database: &Database, name: &str) -> anyhow::Result<ExitCode> {
    let found = find(database, name).await?;
    Output::default().line(&format_args!(
        "{name} ({:?} in {}, topic {}, next {}) would be removed: give --yes to remove it",
        found.schedule,
        found.time_zone,
        found.topic,
        at(found.next_at)
    ))?;
    Ok(ExitCode::from(ONLY_A_PREVIEW))
}

fn told(done: bool, name: &str, what: &str) -> anyhow::Result<()> {
    match done {
        true => Output::default().line(&format_args!("{what} {name}")),
        false => Err(anyhow!("there is no schedule {name:?}: see `postbox cron list`")),
    }
}

fn next(schedule: &Schedule, count: usize, json: bool) -> anyhow::Result<()> {
    let mut output = Output::default();
    let due = schedule.upcoming(Utc::now()).take(count);
    if json {
        let due: Vec<String> = due.map(|due| at(Some(due))).collect();
        return output.line(&serde_json::to_string(&due)?);
    }
    for due in due {
        output.line(&format_args!("{}  {}", at(Some(due)), schedule.local(due)))?;
    }
    Ok(())
}
