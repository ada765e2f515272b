//! `postbox status`

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use postbox_dispatcher::status::{self, ConsumerStatus, Status, SubscriptionStatus, TopicStatus};

use crate::database::Database;
use crate::output::{Output, in_line};
use crate::table::Table;

/// Show topics, subscriptions with their lag, consumers and dispatchers
///
/// Topics: the earliest retained offset and the offset that the next message gets. Subscriptions: lanes are the parts into which the keys
/// are divided, owned by live consumers of all there are; the position is the least offset that is not settled; the lag is the number of
/// messages from there on, an upper bound of those not settled; the backlog is what is not settled, and oldest how long ago the first of it was
/// published. Retrying: failed messages that wait for their next attempt; parked: messages
/// behind a failed one of their key; halted: exhausted messages whose keys wait for an operator; dead: dead letters, halted ones among them
/// (postbox dead-letters). Breaker: open (messages fail broadly, so intake stopped and probes go on), full (as many failed messages wait as
/// may), closed (all is well). Consumers: a dead one is shown for a day. Slots that are older than messages are kept and still
/// there are named with who holds them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print one JSON object: schema_version, dispatchers, last_tick_at, keep_seconds, unsequenced, locks, slots, topics, subscriptions, consumers
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    let pool = database.open(1).await?;
    let status = status::read(&pool).await?;
    let mut output = Output::default();
    if args.json {
        return output.line(&serde_json::to_string(&status)?);
    }
    let now = Utc::now();
    output.line(&summary(&status, now))?;
    for table in [
        topics(&status.topics),
        subscriptions(&status.subscriptions, now),
        consumers(&status.consumers, now),
    ] {
        output.line(&format_args!("\n{table}"))?;
    }
    for lock in &status.locks {
        output.line(&format_args!(
            "\n{} is held by {} ({}) for {:.0} s: {}; {} ends that",
            lock.lock,
            lock.pid.map_or_else(
                || "a prepared transaction".to_owned(),
                |pid| format!("process {pid}")
            ),
            in_line(&lock.who),
            lock.held_seconds,
            lock.consequence,
            in_line(&lock.hint)
        ))?;
    }
    if status.rejects > 0 {
        output.line(&format_args!(
            "\n{} messages were committed and could not be sequenced; they are set aside: `postbox rejects list` says why",
            status.rejects
        ))?;
    }
    for warning in stuck(&status) {
        output.line(&format_args!("\n{warning}"))?;
    }
    Ok(())
}

fn summary(status: &Status, now: DateTime<Utc>) -> String {
    let dispatchers = match status.dispatchers {
        0 => "none connected: messages wait until `postbox run` runs".to_owned(),
        connected => format!("{connected} connected"),
    };
    let waiting = match (status.unsequenced.messages, status.unsequenced.oldest_at) {
        (1.., Some(at)) => format!(
            "\nUnsequenced     {} messages, the oldest of {}",
            status.unsequenced.messages,
            instant(at, now)
        ),
        _ => String::new(),
    };
    let last_tick = status
        .last_tick_at
        .map_or_else(|| "none yet".to_owned(), |at| instant(at, now));
    let bytes: i64 = status.slots.iter().map(|slot| slot.bytes).sum();
    format!(
        "Schema version  {}\nDispatchers     {dispatchers}\nLast tick       {last_tick}{waiting}\nRetention       {}, {} MB in the ring",
        status.schema_version,
        age(TimeDelta::milliseconds((status.keep_seconds * 1000.0) as i64)),
        megabytes(bytes)
    )
}

/// Who holds back what is older than messages are kept.
fn stuck(status: &Status) -> impl Iterator<Item = String> {
    status
        .subscriptions
        .iter()
        .filter(|subscription| subscription.held_messages > 0)
        .map(|subscription| {
            let since = subscription.held_since.map_or_else(String::new, |at| format!(", the oldest of {}", clock(at)));
            format!(
                "{} on {} holds back {} messages ({} MB) that are older than messages are kept{since}: `postbox doctor` says more",
                subscription.group_name,
                subscription.topic,
                subscription.held_messages,
                megabytes(subscription.held_bytes)
            )
        })
}

fn topics(topics: &[TopicStatus]) -> Table {
    let mut table = Table::new("Topics", &["topic", "first", "next"]);
    for topic in topics {
        table.row([
            topic.topic.as_str().into(),
            topic.first_offset.into(),
            topic.next_offset.into(),
        ]);
    }
    table
}

fn subscriptions(subscriptions: &[SubscriptionStatus], now: DateTime<Utc>) -> Table {
    let heads = [
        "group", "topic", "order", "lanes", "position", "next", "lag", "backlog", "oldest", "retrying",
        "parked", "waiting", "halted", "dead", "filtered", "unknown", "breaker", "kept by",
    ];
    let mut table = Table::new("Subscriptions", &heads);
    for subscription in subscriptions {
        table.row([
            subscription.group_name.as_str().into(),
            subscription.topic.as_str().into(),
            subscription.order_mode.to_string().into(),
            format!("{}/{}", subscription.owned, subscription.lanes).into(),
            subscription.position.into(),
            subscription.next_offset.into(),
            subscription.lag.into(),
            subscription.backlog.into(),
            subscription
                .oldest_at
                .map_or_else(|| "-".to_owned(), |at| age(now - at))
                .into(),
            subscription.retrying.into(),
            subscription.parked.into(),
            waiting(subscription).into(),
            subscription.halted.into(),
            subscription.dead.into(),
            subscription.filtered.into(),
            subscription.unknown.into(),
            subscription
                .breaker
                .map_or_else(|| "-".to_owned(), |breaker| breaker.to_string())
                .into(),
            kept_by(subscription).into(),
        ]);
    }
    table
}

/// With the types that nobody handles.
fn waiting(subscription: &SubscriptionStatus) -> String {
    let types = subscription.waiting_types.iter().map(|name| match name.as_str() {
        "" => "untyped messages",
        name => name,
    });
    let types: Vec<&str> = types.collect();
    match types.is_empty() {
        true => subscription.waiting.to_string(),
        false => format!("{} (for {})", subscription.waiting, types.join(", ")),
    }
}

pub(crate) fn kept_by(subscription: &SubscriptionStatus) -> String {
    match &subscription.kept_by[..] {
        [] => "-".to_owned(),
        reasons => reasons.join(", "),
    }
}

fn consumers(consumers: &[ConsumerStatus], now: DateTime<Utc>) -> Table {
    let mut table = Table::new(
        "Consumers",
        &["id", "name", "pid", "state", "lanes", "heartbeat", "started"],
    );
    for consumer in consumers {
        let heartbeat = instant(consumer.heartbeat_at, now);
        let state = match consumer.live {
            true if consumer.silent => "silent: its process is stopped or its host gone".to_owned(),
            true => "live".to_owned(),
            false => format!("dead since {}", clock(consumer.heartbeat_at)),
        };
        table.row([
            i64::from(consumer.id).into(),
            consumer.name.as_str().into(),
            i64::from(consumer.pid).into(),
            state.into(),
            consumer.lanes.into(),
            heartbeat.into(),
            instant(consumer.started_at, now).into(),
        ]);
    }
    table
}

/// Rounded up.
pub(crate) fn megabytes(bytes: i64) -> i64 {
    (bytes + 999_999) / 1_000_000
}

fn instant(at: DateTime<Utc>, now: DateTime<Utc>) -> String {
    format!("{} ({} ago)", clock(at), age(now - at))
}

fn clock(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// In the largest unit that fits. The clocks of the database and this machine may differ a little.
pub(crate) fn age(age: TimeDelta) -> String {
    match age.num_seconds().max(0) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}
