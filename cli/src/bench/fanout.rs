//! Many groups on one topic: each has a cursor, and a process reads each message once.

use anyhow::ensure;
use postbox::Publish;

use super::environment::Environment;
use super::message::message;
use super::process::{Process, lanes_of};
use super::report::Report;
use super::rounds::median;
use super::sink::Sink;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Messages a measurement
    #[arg(long, default_value_t = Self::default().messages, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
    /// Groups
    #[arg(long, default_value_t = Self::default().groups, value_parser = clap::value_parser!(u16).range(1..=200))]
    groups: u16,
    /// Over so many processes the groups are spread in the second measurement
    #[arg(long, default_value_t = Self::default().processes, value_parser = clap::value_parser!(u16).range(1..=20))]
    processes: u16,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            messages: 200_000,
            groups: 30,
            processes: 3,
        }
    }
}

/// More would only repeat.
const ROUNDS: usize = 3;

pub(crate) async fn measure(environment: &mut Environment, args: &Args) -> anyhow::Result<Vec<Report>> {
    let rounds = environment.settings.rounds().min(ROUNDS);
    environment.progress.begin("fanout", 2 * rounds);
    let groups: Vec<String> = (0..usize::from(args.groups))
        .map(|n| environment.group(n))
        .collect();
    let (mut together, mut apart) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        together.push(in_one_process(environment, args, &groups).await?);
        environment.progress.step("in one process");
        apart.push(in_processes(environment, args, &groups).await?);
        environment.progress.step("in several processes");
    }
    let report = |processes: u16, rates: Vec<f64>| {
        Report::verified("fanout")
            .with("groups", args.groups)
            .with("processes", processes)
            .with("messages", args.messages)
            .figure("deliveries_per_s", median(rates))
    };
    Ok(vec![report(1, together), report(args.processes, apart)])
}

async fn in_one_process(environment: &Environment, args: &Args, groups: &[String]) -> anyhow::Result<f64> {
    let topic = environment.topic("fanout");
    let sink = Sink::start(environment.consumer_pool(1), &topic, groups).await?;
    environment.lanes_owned(&topic, lanes_of(groups.len())).await?;
    publish(environment, &topic, args.messages).await?;
    let handled = sink.each_handled(args.messages).await?;
    let deliveries = sink.handled();
    sink.stop().await?;
    Ok(deliveries as f64 / (handled.last - handled.first).as_secs_f64())
}

async fn in_processes(environment: &Environment, args: &Args, groups: &[String]) -> anyhow::Result<f64> {
    let topic = environment.topic("fanout");
    let mut processes = Vec::new();
    for groups in groups.chunks(groups.len().div_ceil(usize::from(args.processes))) {
        processes.push(Process::worker(environment, &topic, groups, args.messages).await?);
    }
    environment.lanes_owned(&topic, lanes_of(groups.len())).await?;
    publish(environment, &topic, args.messages).await?;
    let (mut deliveries, mut first, mut last) = (0, f64::INFINITY, 0.0_f64);
    for process in &mut processes {
        let delivered = process.delivered().await?;
        deliveries += delivered.deliveries;
        first = first.min(delivered.first);
        last = last.max(delivered.last);
    }
    for process in processes {
        process.stop().await?;
    }
    let expected = args.messages * groups.len() as u64;
    ensure!(
        deliveries == expected,
        "{deliveries} of {expected} deliveries came"
    );
    Ok(deliveries as f64 / (last - first))
}

/// All in one transaction, so that from the first delivery on nothing but reading and handling is measured.
pub(crate) async fn publish(environment: &Environment, topic: &str, messages: u64) -> anyhow::Result<()> {
    let mut tx = environment.pool.begin().await?;
    let mut published = 0;
    while published < messages {
        let batch = (messages - published).min(10_000);
        tx.publish_all((published..published + batch).map(|n| message(topic, n)))
            .await?;
        published += batch;
    }
    tx.commit().await?;
    Ok(())
}
