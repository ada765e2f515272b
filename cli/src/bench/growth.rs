//! Whether a message costs the same when there is more of something else: groups, topics, keys, instances, backlog.

use std::time::Instant;

use clap::ValueEnum;

use super::environment::Environment;
use super::load::{self, BATCH, Batch, Work};
use super::report::Report;
use super::rounds::median;
use super::sink::Sink;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What there is more of; may be given again [default: all]
    #[arg(long = "of", value_enum, value_name = "WHAT")]
    what: Vec<What>,
    /// Messages a measurement
    #[arg(long, default_value_t = Self::default().messages, value_parser = clap::value_parser!(u64).range(1000..))]
    messages: u64,
    /// The largest backlog
    #[arg(long, default_value_t = Self::default().backlog, value_parser = clap::value_parser!(u64).range(1000..))]
    backlog: u64,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            what: Vec::new(),
            messages: 100_000,
            backlog: 1_000_000,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// Groups of one topic, in one process
    Groups,
    /// Topics of one group, in one process
    Topics,
    /// Keys of the messages
    Keys,
    /// Instances that share a topic
    Instances,
    /// Messages that are pending when the consumer starts
    Backlog,
}

/// A point on a curve.
#[derive(Clone, Copy)]
struct Point {
    groups: usize,
    topics: usize,
    keys: u64,
    instances: usize,
    /// They are published before the consumer starts.
    backlog: Option<u64>,
}

const ONE: Point = Point {
    groups: 1,
    topics: 1,
    keys: 1000,
    instances: 1,
    backlog: None,
};

const ROUNDS: usize = 3;
const CLIENTS: usize = 4;

impl What {
    fn name(self) -> &'static str {
        match self {
            What::Groups => "groups",
            What::Topics => "topics",
            What::Keys => "keys",
            What::Instances => "instances",
            What::Backlog => "backlog",
        }
    }

    /// From the least on, by which the others are measured.
    fn points(self, args: &Args) -> Vec<(u64, Point)> {
        let points = |values: &[u64], of: fn(u64) -> Point| values.iter().map(|n| (*n, of(*n))).collect();
        match self {
            What::Groups => points(&[1, 3, 10, 30], |n| Point {
                groups: n as usize,
                ..ONE
            }),
            What::Topics => points(&[1, 10, 50, 200], |n| Point {
                topics: n as usize,
                ..ONE
            }),
            What::Keys => points(&[1, 1_000, 1_000_000], |n| Point { keys: n, ..ONE }),
            What::Instances => points(&[1, 2, 4, 8], |n| Point {
                instances: n as usize,
                ..ONE
            }),
            What::Backlog => {
                let sizes = [args.backlog / 100, args.backlog / 10, args.backlog];
                points(&sizes, |n| Point {
                    backlog: Some(n),
                    ..ONE
                })
            }
        }
    }
}

pub(crate) async fn measure(environment: &mut Environment, args: &Args) -> anyhow::Result<Vec<Report>> {
    let what = match args.what.as_slice() {
        [] => What::value_variants(),
        some => some,
    };
    let rounds = environment.settings.rounds().min(ROUNDS);
    let steps = what.iter().map(|what| what.points(args).len() * rounds).sum();
    environment.progress.begin("growth", steps);
    let mut reports = Vec::new();
    for what in what {
        let points = what.points(args);
        let mut costs = vec![Vec::new(); points.len()];
        for _ in 0..rounds {
            for ((_, point), costs) in points.iter().zip(&mut costs) {
                costs.push(cost(environment, *point, args.messages).await?);
                environment.progress.step(what.name());
            }
        }
        let least = costs[0].clone();
        for ((number, _), costs) in points.iter().zip(costs) {
            let ratios = costs
                .iter()
                .zip(&least)
                .map(|(cost, least)| cost / least)
                .collect();
            reports.push(
                Report::verified("growth")
                    .with("of", what.name())
                    .with("number", *number)
                    .figure("us_per_delivery", median(costs))
                    .figure("ratio_to_least", median(ratios)),
            );
        }
    }
    Ok(reports)
}

/// Microseconds a delivery, from the first message's publishing, or from the start of the consumer where they are pending by then, to the last handled.
async fn cost(environment: &Environment, point: Point, messages: u64) -> anyhow::Result<f64> {
    let topics: Vec<String> = (0..point.topics).map(|_| environment.topic("growth")).collect();
    let groups: Vec<String> = (0..point.groups).map(|n| environment.group(n)).collect();
    let messages = point.backlog.unwrap_or(messages).div_ceil(BATCH) * BATCH;
    if point.backlog.is_some() {
        publish(environment, &topics, point.keys, messages).await?;
        environment.sequenced(&topics, messages).await?;
    }
    let sink = Sink::spread(environment.consumer_pool(1), &topics, &groups, point.instances).await?;
    let took = match point.backlog {
        // From the first delivery: how long it takes to get the lanes is not a matter of the backlog.
        Some(_) => {
            let handled = sink.each_handled(messages).await?;
            handled.last - handled.first
        }
        None => {
            sink.owns_its_lanes(environment).await?;
            let begun = Instant::now();
            publish(environment, &topics, point.keys, messages).await?;
            sink.each_handled(messages).await?.last - begun
        }
    };
    sink.stop().await?;
    Ok(took.as_secs_f64() * 1e6 / (messages * point.groups as u64) as f64)
}

/// In batches, spread over topics and keys.
async fn publish(
    environment: &Environment,
    topics: &[String],
    keys: u64,
    messages: u64,
) -> anyhow::Result<()> {
    let topics = topics.into();
    let work = Work::Batch(Batch::Spread { topics, keys });
    load::times(&environment.pool, CLIENTS, messages / BATCH, &work).await
}
