//! `postbox subscriptions`: list, seek, replay, pause, resume, limit, window, drop.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat, Utc};
use postbox_consumer::DailyWindow;
use postbox_dispatcher::status::{self, SubscriptionStatus};
use postbox_dispatcher::subscriptions::{self, Change, Override, Position};
use sqlx::PgPool;

use crate::database::Database;
use crate::output::{Output, warn};
use crate::table::Table;
use crate::usage::{ONLY_A_PREVIEW, name};

/// Copied for a replay at once, so that the exception path stays small.
const REPLAY_AT_ONCE: u16 = 1000;
const REPLAY_POLL: Duration = Duration::from_millis(200);
/// How often it says what is waited for.
const TELL_AGAIN: Duration = Duration::from_secs(5);
/// To look at everything costs more than to count.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Look at subscriptions, move them, replay, pause, limit or drop them
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    List(List),
    Seek(Seek),
    Replay(Replay),
    /// Start no more messages of a group, on a topic or on all; what runs is finished. The group need not exist yet
    ///
    /// Running consumers follow within a second, and one that starts later starts nothing.
    Pause(Target),
    /// Start messages again
    Resume(Target),
    Limit(Limit),
    Window(Window),
    Drop(Drop),
}

/// List subscriptions with their backlog, its age, what they hold back and their settings
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Print one JSON array; the fields are those of subscriptions in `postbox status --json`
    #[arg(long)]
    json: bool,
}

/// Move a subscription: from there on every message is delivered, again or for the first time
///
/// Running consumers follow within a second. Messages that failed before the new position stay in redelivery, those after it come again from the
/// log; dead letters stay. Without --yes it only says what it would do, and exits with 3.
#[derive(Debug, clap::Args)]
pub(crate) struct Seek {
    #[arg(value_parser = name)]
    group: String,
    #[arg(value_parser = name)]
    topic: String,
    /// earliest, latest, an offset, an instant (2026-11-22T08:00:00Z), or a span ago (90m, 2d)
    #[arg(long, value_name = "POSITION", value_parser = crate::position::parse)]
    to: Position,
    /// Do it
    #[arg(long)]
    yes: bool,
    /// Deliver messages that were redriven with another payload as they were published
    #[arg(long)]
    original_payloads: bool,
}

/// Have settled messages of a range run again by one group, without moving it
///
/// They are copied to redelivery in order, a thousand at a time, with a header postbox-replayed; messages that are not settled yet are left
/// out, since they come anyway. It ends when the last was taken up; interrupted, it says how far it came. Without --yes it only says what it
/// would do, and exits with 3.
#[derive(Debug, clap::Args)]
pub(crate) struct Replay {
    #[arg(value_parser = name)]
    group: String,
    #[arg(value_parser = name)]
    topic: String,
    /// The first message: earliest, an offset, an instant, or a span ago
    #[arg(long, value_name = "POSITION", value_parser = crate::position::parse)]
    from: Position,
    /// Before which message to end: latest, an offset, an instant, or a span ago
    #[arg(long, value_name = "POSITION", value_parser = crate::position::parse)]
    to: Position,
    /// Do it
    #[arg(long)]
    yes: bool,
}

// No doc comment: it would become that of the commands which have it.
#[derive(Debug, clap::Args)]
pub(crate) struct Target {
    #[arg(value_parser = name)]
    group: String,
    /// All topics of the group if it is left out
    #[arg(value_parser = name)]
    topic: Option<String>,
}

/// Limit how many messages are started in a second
///
/// An instance has the part of the group's limit that is its share of the lanes. It counts before the limit that the handlers have in code, until
/// it is set to `default`.
#[derive(Debug, clap::Args)]
pub(crate) struct Limit {
    #[command(flatten)]
    target: Target,
    /// By all instances together: messages a second, `none`, or `default`
    #[arg(long, value_name = "N", value_parser = rate, required_unless_present = "instance_rate")]
    rate: Option<Rate>,
    /// By each instance: messages a second, `none`, or `default`
    #[arg(long, value_name = "N", value_parser = rate)]
    instance_rate: Option<Rate>,
}

/// Start messages only at certain times of the day
///
/// It counts before the window that the handlers have in code, until it is set to `default`.
#[derive(Debug, clap::Args)]
pub(crate) struct Window {
    #[arg(value_parser = name)]
    group: String,
    #[arg(value_parser = name)]
    topic: String,
    /// By the wall clock of a time zone (UTC if none is named), such as "22:00-06:00 Europe/Berlin" or "00:00-06:00,12:00-13:00"; `none` for always, or `default`
    #[arg(value_parser = window)]
    window: Times,
}

/// Forget a subscription, with its position, its failed messages and its dead letters
///
/// It must have no live consumer. Without --yes it only says what it would do, and exits with 3.
#[derive(Debug, clap::Args)]
pub(crate) struct Drop {
    #[arg(value_parser = name)]
    group: String,
    #[arg(value_parser = name)]
    topic: String,
    /// Do it
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, Clone, Copy)]
struct Rate(Override<f64>);

#[derive(Debug, Clone)]
struct Times(Override<DailyWindow>);

pub(crate) async fn run(database: &Database, command: Command) -> anyhow::Result<ExitCode> {
    let pool = database.open(1).await?;
    match command {
        Command::List(args) => list(&pool, args).await?,
        Command::Seek(args) => return seek(&pool, args).await,
        Command::Replay(args) => return replay(&pool, args).await,
        Command::Pause(target) => pause(&pool, &target, true).await?,
        Command::Resume(target) => pause(&pool, &target, false).await?,
        Command::Limit(Limit {
            target,
            rate,
            instance_rate,
        }) => {
            let changes: Vec<Change> = [
                rate.map(|Rate(rate)| Change::RateLimit(rate)),
                instance_rate.map(|Rate(rate)| Change::InstanceRateLimit(rate)),
            ]
            .into_iter()
            .flatten()
            .collect();
            change(&pool, &target, &changes).await?;
        }
        Command::Window(Window { group, topic, window }) => {
            let target = Target {
                group,
                topic: Some(topic),
            };
            change(&pool, &target, &[Change::DrainWindow(window.0)]).await?;
        }
        Command::Drop(args) => return forget(&pool, args).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(pool: &PgPool, args: List) -> anyhow::Result<()> {
    let subscriptions = status::subscriptions(pool).await?;
    let mut output = Output::default();
    if args.json {
        return output.line(&serde_json::to_string(&subscriptions)?);
    }
    output.line(&table(&subscriptions, Utc::now()))
}

fn table(subscriptions: &[SubscriptionStatus], now: DateTime<Utc>) -> Table {
    let heads = [
        "group",
        "topic",
        "lanes",
        "position",
        "next",
        "backlog",
        "oldest",
        "held back",
        "types",
        "kept by",
        "settings",
    ];
    let mut table = Table::new("Subscriptions", &heads);
    for subscription in subscriptions {
        let about = if subscription.backlog_exact { "" } else { "about " };
        let oldest = subscription
            .oldest_at
            .map_or_else(|| "-".to_owned(), |at| crate::status::age(now - at));
        let held = match subscription.held_messages {
            0 => "-".to_owned(),
            messages => format!(
                "{messages} ({} MB)",
                crate::status::megabytes(subscription.held_bytes)
            ),
        };
        table.row([
            subscription.group_name.as_str().into(),
            subscription.topic.as_str().into(),
            format!("{}/{}", subscription.owned, subscription.lanes).into(),
            subscription.position.into(),
            subscription.next_offset.into(),
            format!("{about}{}", subscription.backlog).into(),
            oldest.into(),
            held.into(),
            types(subscription).into(),
            crate::status::kept_by(subscription).into(),
            settings(subscription).into(),
        ]);
    }
    table
}

/// What its live instances handle.
fn types(subscription: &SubscriptionStatus) -> String {
    let types = subscription.types.iter().map(String::as_str);
    match types.clone().any(|name| name == "*") {
        true => "all".to_owned(),
        false if subscription.types.is_empty() => "-".to_owned(),
        false => types
            .filter(|name| !name.is_empty())
            .collect::<Vec<_>>()
            .join(" "),
    }
}

fn settings(subscription: &SubscriptionStatus) -> String {
    let settings: Vec<String> = [
        (!subscription.live).then(|| {
            let since = subscription
                .last_live_at
                .to_rfc3339_opts(SecondsFormat::Secs, true);
            format!("no consumer since {since}")
        }),
        subscription.paused.then(|| "paused".to_owned()),
        subscription.rate_limit.map(|rate| format!("{rate}/s")),
        subscription
            .instance_rate_limit
            .map(|rate| format!("{rate}/s each")),
        subscription.drain_window.clone(),
    ]
    .into_iter()
    .flatten()
    .chain(filters(subscription))
    .collect();
    settings.join(", ")
}

/// Each once, with the type that it is for.
fn filters(subscription: &SubscriptionStatus) -> impl Iterator<Item = String> {
    let filters = subscription.filters.0.iter().filter_map(|(name, filter)| {
        let filter = filter.as_ref()?;
        Some(match name.as_str() {
            "" | "*" => format!("filter {filter}"),
            name => format!("filter of {name} {filter}"),
        })
    });
    filters.collect::<BTreeSet<String>>().into_iter()
}

async fn seek(pool: &PgPool, args: Seek) -> anyhow::Result<ExitCode> {
    let subscription = subscriptions::find(pool, &args.group, &args.topic).await?;
    let mut output = Output::default();
    if args.yes {
        let offset = match args.original_payloads {
            false => subscriptions::seek(pool, subscription, args.to).await?,
            true => subscriptions::seek_with_original_payloads(pool, subscription, args.to).await?,
        };
        output.line(&format_args!(
            "{} on {} is at offset {offset}",
            args.group, args.topic
        ))?;
        if let Some(kept) = kept(pool, &args.group, &args.topic).await? {
            warn(&format!("nothing is delivered yet: {kept}"));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let target = subscriptions::resolve(pool, &args.topic, args.to).await?;
    let all = status::subscriptions(pool).await?;
    let now = all
        .iter()
        .find(|one| one.group_name == args.group && one.topic == args.topic)
        .map_or(target, |one| one.position);
    let effect = match target - now {
        0 => "which is where it is".to_owned(),
        ahead if ahead > 0 => format!("so up to {ahead} messages would not be delivered"),
        behind => format!("so {} messages would be delivered again", -behind),
    };
    let edited = match subscriptions::edited(pool, subscription, target).await? {
        0 => String::new(),
        edited => format!(
            "; {edited} of them were redriven with another payload and come as they were published, which needs --original-payloads (replay gives the payloads that they were redriven with)"
        ),
    };
    output.line(&format_args!(
        "{} on {} would go from offset {now} to {target}, {effect}{edited}; --yes does it",
        args.group, args.topic
    ))?;
    Ok(ExitCode::from(ONLY_A_PREVIEW))
}

async fn replay(pool: &PgPool, args: Replay) -> anyhow::Result<ExitCode> {
    let subscription = subscriptions::find(pool, &args.group, &args.topic).await?;
    let mut next = subscriptions::resolve(pool, &args.topic, args.from).await?;
    let end = subscriptions::resolve(pool, &args.topic, args.to).await?;
    let mut output = Output::default();
    if !args.yes {
        output.line(&format_args!(
            "{} on {} would get offsets {next} to before {end} again, up to {} messages; --yes does it",
            args.group,
            args.topic,
            (end - next).max(0)
        ))?;
        return Ok(ExitCode::from(ONLY_A_PREVIEW));
    }
    let mut total = 0;
    while next < end {
        let (reached, replayed) =
            subscriptions::replay(pool, subscription, next, end, REPLAY_AT_ONCE).await?;
        total += replayed;
        if reached <= next {
            warn(&format!(
                "from offset {next} on the messages are not settled yet, and come anyway"
            ));
            break;
        }
        next = reached;
        warn(&format!("to be replayed up to offset {next} of {end}"));
        until_replayed(pool, subscription, &args).await?;
    }
    output.line(&format_args!("replayed {total} messages, up to offset {next}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Waits until consumers have run what was copied; says at once when nobody will, and what it waits for.
async fn until_replayed(pool: &PgPool, subscription: i32, args: &Replay) -> anyhow::Result<()> {
    let mut told: Option<Option<String>> = None;
    let (mut told_at, mut looked_at) = (Instant::now(), None::<Instant>);
    loop {
        let waiting = subscriptions::replaying(pool, subscription).await?;
        if waiting == 0 {
            return Ok(());
        }
        if looked_at.is_none_or(|at| at.elapsed() >= LOOK_AGAIN) {
            looked_at = Some(Instant::now());
            let kept = kept(pool, &args.group, &args.topic).await?;
            let is_news = told.as_ref().map_or(kept.is_some(), |told| *told != kept);
            if is_news || told_at.elapsed() >= TELL_AGAIN {
                let why = kept.as_deref().map_or_else(String::new, |kept| {
                    format!(": {kept}; Ctrl-C leaves them there, to run as soon as that is over")
                });
                warn(&format!("{waiting} messages wait to be run{why}"));
                told_at = Instant::now();
            }
            told = Some(kept);
        }
        tokio::time::sleep(REPLAY_POLL).await;
    }
}

/// What keeps a subscription from going on.
async fn kept(pool: &PgPool, group: &str, topic: &str) -> anyhow::Result<Option<String>> {
    let all = status::subscriptions(pool).await?;
    let one = all
        .iter()
        .find(|one| one.group_name == group && one.topic == topic);
    Ok(one
        .filter(|one| !one.kept_by.is_empty())
        .map(|one| format!("{group} on {topic}: {}", crate::status::kept_by(one))))
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.topic {
            Some(topic) => write!(f, "{} on {topic}", self.group),
            None => f.write_str(&self.group),
        }
    }
}

async fn change(pool: &PgPool, target: &Target, changes: &[Change]) -> anyhow::Result<()> {
    let mut changed = 0;
    for change in changes {
        changed = subscriptions::change(pool, &target.group, target.topic.as_deref(), change).await?;
    }
    let of = target.to_string();
    anyhow::ensure!(
        changed > 0,
        "there is no subscription of {of}: `postbox subscriptions list` shows those there are"
    );
    Output::default().line(&format_args!("changed {changed} subscriptions of {of}"))
}

/// A pause is for what comes later, too, so a group need not exist.
async fn pause(pool: &PgPool, target: &Target, paused: bool) -> anyhow::Result<()> {
    let change = Change::Paused(paused);
    let count = subscriptions::change(pool, &target.group, target.topic.as_deref(), &change).await?;
    let of = target.to_string();
    let mut output = Output::default();
    match (count, paused) {
        (0, true) => output.line(&format_args!(
            "there is no subscription of {of} yet: it will begin paused (`postbox subscriptions list` shows those there are)"
        )),
        (0, false) => output.line(&format_args!("there is no subscription of {of}, and none will begin paused")),
        (_, true) => output.line(&format_args!("paused {count} subscriptions of {of}")),
        (_, false) => output.line(&format_args!("resumed {count} subscriptions of {of}")),
    }
}

async fn forget(pool: &PgPool, args: Drop) -> anyhow::Result<ExitCode> {
    let subscription = subscriptions::find(pool, &args.group, &args.topic).await?;
    let mut output = Output::default();
    if args.yes {
        subscriptions::forget(pool, subscription).await?;
        output.line(&format_args!("dropped {} on {}", args.group, args.topic))?;
        return Ok(ExitCode::SUCCESS);
    }
    let all = status::subscriptions(pool).await?;
    let backlog = all
        .iter()
        .find(|one| one.group_name == args.group && one.topic == args.topic)
        .map_or(0, |one| one.backlog);
    output.line(&format_args!(
        "{} on {} would be forgotten with its {backlog} unsettled messages, its failed messages and its dead letters; --yes does it",
        args.group, args.topic
    ))?;
    Ok(ExitCode::from(ONLY_A_PREVIEW))
}

fn rate(text: &str) -> Result<Rate, String> {
    match text {
        "default" => return Ok(Rate(Override::Default)),
        "none" => return Ok(Rate(Override::Off)),
        _ => {}
    }
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate < 1e9 => Ok(Rate(Override::To(rate))),
        _ => Err(
            "a rate is a number of messages a second above 0 and below a billion, none, or default"
                .to_owned(),
        ),
    }
}

fn window(text: &str) -> Result<Times, String> {
    match text {
        "default" => return Ok(Times(Override::Default)),
        "none" => return Ok(Times(Override::Off)),
        _ => {}
    }
    match text.parse() {
        Ok(window) => Ok(Times(Override::To(window))),
        Err(error) => Err(error.to_string()),
    }
}
