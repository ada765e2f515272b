//! `postbox status`

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use postbox_dispatcher::status::{self, ConsumerStatus, Status, SubscriptionStatus, TopicStatus};

use crate::database::Database;
use crate::output::Output;
use crate::table::Table;

/// Show topics, subscriptions with their lag, consumers and dispatchers
///
/// Topics: the earliest retained offset and the offset that the next message gets. Subscriptions: lanes are the parts into which the keys
/// are divided, owned by live consumers of all there are; the position is the least offset that is not settled; the lag is the number of
/// messages from there on, an upper bound of those not settled. Retrying: failed messages that wait for their next attempt; parked: messages
/// behind a failed one of their key; halted: exhausted messages whose keys wait for an operator; dead: dead letters, halted ones among them
/// (postbox dead-letters). Breaker: open (messages fail broadly, so intake stopped and probes go on), full (as many failed messages wait as
/// may), closed (all is well). Consumers: a dead one is shown for a day.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print one JSON object: schema_version, dispatchers, last_tick_at, topics, subscriptions, consumers
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
        subscriptions(&status.subscriptions),
        consumers(&status.consumers, now),
    ] {
        output.line(&format_args!("\n{table}"))?;
    }
    Ok(())
}

fn summary(status: &Status, now: DateTime<Utc>) -> String {
    let dispatchers = match status.dispatchers {
        0 => "none connected: messages wait until `postbox run` runs".to_owned(),
        connected => format!("{connected} connected"),
    };
    let last_tick = status
        .last_tick_at
        .map_or_else(|| "none yet".to_owned(), |at| instant(at, now));
    format!(
        "Schema version  {}\nDispatchers     {dispatchers}\nLast tick       {last_tick}",
        status.schema_version
    )
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

fn subscriptions(subscriptions: &[SubscriptionStatus]) -> Table {
    let heads = [
        "group", "topic", "order", "lanes", "position", "next", "lag", "retrying", "parked", "halted",
        "dead", "breaker",
    ];
    let mut table = Table::new("Subscriptions", &heads);
    for subscription in subscriptions {
        table.row([
            subscription.group_name.as_str().into(),
            subscription.topic.as_str().into(),
            subscription.order_mode.as_str().into(),
            format!("{}/{}", subscription.owned, subscription.lanes).into(),
            subscription.position.into(),
            subscription.next_offset.into(),
            subscription.lag.into(),
            subscription.retrying.into(),
            subscription.parked.into(),
            subscription.halted.into(),
            subscription.dead.into(),
            subscription.breaker.as_deref().unwrap_or("-").into(),
        ]);
    }
    table
}

fn consumers(consumers: &[ConsumerStatus], now: DateTime<Utc>) -> Table {
    let mut table = Table::new(
        "Consumers",
        &["id", "name", "pid", "state", "lanes", "heartbeat", "started"],
    );
    for consumer in consumers {
        let heartbeat = instant(consumer.heartbeat_at, now);
        let state = match consumer.live {
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

fn instant(at: DateTime<Utc>, now: DateTime<Utc>) -> String {
    format!("{} ({} ago)", clock(at), age(now - at))
}

fn clock(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// In the largest unit that fits. The clocks of the database and this machine may differ a little.
fn age(age: TimeDelta) -> String {
    match age.num_seconds().max(0) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}
