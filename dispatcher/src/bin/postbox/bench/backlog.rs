//! Publishing and draining with many messages pending, against few.

use super::ground::Ground;
use super::load::{self, BATCH, Batch, Beside, Work};
use super::process::{Process, lanes_of};
use super::report::Report;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many are pending
    #[arg(long, default_value_t = Self::default().messages, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
}

impl Default for Args {
    fn default() -> Self {
        Self { messages: 1_000_000 }
    }
}

const FEW: u64 = 50_000;
const CLIENTS: usize = 4;

pub(crate) async fn measure(ground: &mut Ground, args: &Args) -> anyhow::Result<Vec<Report>> {
    let (clients, span) = (ground.settings.clients(), ground.settings.span(3));
    ground.progress.begin("backlog", 5);
    ground.dispatch_elsewhere().await?;
    let dispatcher = Process::dispatcher(ground).await?;

    let few = ground.topic("backlog");
    pile_up(ground, &few, FEW.min(args.messages)).await?;
    ground.progress.step("draining few");
    let (few_rate, _) = drain(ground, &few, FEW.min(args.messages)).await?;

    // A second topic publishes, so that all that differs is what is pending.
    let work = Work::Business(Beside::Message {
        topic: ground.topic("publish"),
    });
    ground.progress.step("publishing with none pending");
    let publish_before = load::run(&ground.pool, clients, span, &work).await?;
    let many = ground.topic("backlog");
    ground.progress.step("piling up");
    pile_up(ground, &many, args.messages).await?;
    ground.progress.step("publishing with many pending");
    let publish_after = load::run(&ground.pool, clients, span, &work).await?;
    ground.progress.step("draining many");
    let (many_rate, consumer_peak) = drain(ground, &many, args.messages).await?;
    let dispatcher_peak = dispatcher.peak_rss_mb();
    dispatcher.stop().await?;
    ground.dispatch_here().await?;
    Ok(vec![
        Report::verified("backlog")
            .with("messages", args.messages)
            .figure(
                "publish_ratio",
                publish_after.per_second() / publish_before.per_second(),
            )
            .figure("drain_ratio", many_rate / few_rate)
            .figure("drained_per_s", many_rate)
            .figure_if("dispatcher_peak_rss_mb", dispatcher_peak)
            .figure_if("consumer_peak_rss_mb", consumer_peak),
    ])
}

/// Publishes exactly so many, in batches, with a group that nobody serves yet.
async fn pile_up(ground: &Ground, topic: &str, messages: u64) -> anyhow::Result<()> {
    let batch = Batch::Messages {
        topic: topic.to_owned(),
    };
    load::times(
        &ground.pool,
        CLIENTS,
        messages.div_ceil(BATCH),
        &Work::Batch(batch),
    )
    .await
}

/// The rate from the first to the last, and the most memory that the consumer had.
async fn drain(ground: &Ground, topic: &str, messages: u64) -> anyhow::Result<(f64, Option<f64>)> {
    let messages = messages.div_ceil(BATCH) * BATCH;
    let mut consumer = Process::worker(ground, topic, &[ground.group(0)], messages).await?;
    ground.lanes_owned(topic, lanes_of(1)).await?;
    let delivered = consumer.delivered().await?;
    let peak = consumer.peak_rss_mb();
    consumer.stop().await?;
    Ok((
        delivered.deliveries as f64 / (delivered.last - delivered.first),
        peak,
    ))
}
