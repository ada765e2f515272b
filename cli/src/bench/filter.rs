//! A group that wants one message in so many, by type or by a filter, against one that handles all.

use std::time::Instant;

use postbox::Publish;
use postbox_consumer::{HandlerDefinition, UnknownType};

use super::environment::Environment;
use super::message::message;
use super::report::Report;
use super::rounds::median;
use super::sink::Sink;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Messages in the topic
    #[arg(long, default_value_t = Self::default().messages, value_parser = clap::value_parser!(u64).range(1000..))]
    messages: u64,
    /// Types that they have in turns
    #[arg(long, default_value_t = Self::default().types, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    types: u64,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            messages: 200_000,
            types: 100,
        }
    }
}

/// Whoever is wanted.
const WANTED: &str = "postbox.bench.0";

const ROUNDS: usize = 3;

type Want = fn(HandlerDefinition) -> HandlerDefinition;

pub(crate) async fn measure(environment: &mut Environment, args: &Args) -> anyhow::Result<Vec<Report>> {
    let rounds = environment.settings.rounds().min(ROUNDS);
    let messages = args.messages.div_ceil(args.types) * args.types;
    let of_one = messages / args.types;
    let wants: [(&str, u64, Want); 3] = [
        ("all", messages, |handler| handler),
        ("one type", of_one, |handler| {
            handler.message_type(WANTED).unknown(UnknownType::Settle)
        }),
        ("a filter of one type", of_one, |handler| {
            handler.filter(format!("$.type == {WANTED:?}"))
        }),
    ];
    environment.progress.begin("filter", rounds * wants.len());
    let mut costs = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        let topic = environment.topic("filter");
        publish(environment, &topic, messages, args.types).await?;
        environment
            .sequenced(std::slice::from_ref(&topic), messages)
            .await?;
        for (n, (what, count, want)) in wants.iter().enumerate() {
            let sink =
                Sink::wanting(environment.consumer_pool(1), &topic, &environment.group(n), want).await?;
            // In the first tenth it learns which types nobody handles.
            let before = sink.has_handled(count / 10).await?;
            let begun = Instant::now();
            let handled = sink.each_handled(*count).await?;
            sink.stop().await?;
            let part = (count - before) as f64 / *count as f64;
            costs[n].push((handled.last - begun).as_secs_f64() * 1e6 / (messages as f64 * part));
            environment.progress.step(what);
        }
    }
    let all = costs[0].clone();
    let reports = wants.iter().zip(costs).map(|((what, count, _), costs)| {
        let ratios = costs.iter().zip(&all).map(|(cost, all)| cost / all).collect();
        Report::verified("filter")
            .with("wants", *what)
            .with("messages", messages)
            .with("handled", *count)
            .figure("us_per_message_of_topic", median(costs))
            .figure("ratio_to_all", median(ratios))
    });
    Ok(reports.collect())
}

async fn publish(environment: &Environment, topic: &str, messages: u64, types: u64) -> anyhow::Result<()> {
    let all: Vec<u64> = (0..messages).collect();
    for batch in all.chunks(10_000) {
        let typed = batch
            .iter()
            .map(|n| message(topic, *n).message_type(format!("postbox.bench.{}", n % types)));
        let mut tx = environment.pool.begin().await?;
        tx.publish_all(typed).await?;
        tx.commit().await?;
    }
    Ok(())
}
