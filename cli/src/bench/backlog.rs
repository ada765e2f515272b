//! Publishing and draining with many messages pending, against few.

use super::environment::Environment;
use super::load::{self, BATCH, Batch, Beside, Work};
use super::process::{Process, lanes_of};
use super::report::Report;
use super::rounds::median;

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
/// How often what is compared is measured before, and again after: the machine changes from minute to minute.
const TURNS: usize = 3;

pub(crate) async fn measure(environment: &mut Environment, args: &Args) -> anyhow::Result<Vec<Report>> {
    environment.progress.begin("backlog", 4 * TURNS + 2);
    environment.dispatch_elsewhere().await?;
    let dispatcher = Process::dispatcher(environment).await?;
    // Of a topic of its own, so that all that differs is what is pending.
    let work = Work::Business(Beside::Message {
        topic: environment.topic("publish"),
    });
    let mut few = Pending::default();
    let mut many = Pending::default();
    for _ in 0..TURNS {
        few.measure(environment, &work, FEW.min(args.messages)).await?;
    }

    let topic = environment.topic("backlog");
    environment.progress.step("piling up");
    pile_up(environment, &topic, args.messages).await?;
    for _ in 0..2 * TURNS {
        environment.progress.step("publishing with many pending");
        many.publish(environment, &work).await?;
    }
    environment.progress.step("draining many");
    many.drain(environment, &topic, args.messages).await?;

    for _ in 0..TURNS {
        few.measure(environment, &work, FEW.min(args.messages)).await?;
    }
    let dispatcher_peak = dispatcher.peak_rss_mb();
    dispatcher.stop().await?;
    environment.dispatch_here().await?;
    Ok(vec![
        Report::verified("backlog")
            .with("messages", args.messages)
            .figure("publish_ratio", median(many.published) / median(few.published))
            .figure("drain_ratio", median(many.drained) / median(few.drained))
            .figure("drained_per_s", many.per_second)
            .figure_if("dispatcher_peak_rss_mb", dispatcher_peak)
            .figure_if("consumer_peak_rss_mb", many.consumer_peak),
    ])
}

/// What was measured with so many messages pending.
#[derive(Default)]
struct Pending {
    /// Transactions a second.
    published: Vec<f64>,
    /// Deliveries a second, of many short spans.
    drained: Vec<f64>,
    /// From the first delivery to the last.
    per_second: f64,
    consumer_peak: Option<f64>,
}

impl Pending {
    /// Publishing with none pending, then so many.
    async fn measure(&mut self, environment: &Environment, work: &Work, messages: u64) -> anyhow::Result<()> {
        environment.progress.step("publishing with none pending");
        self.publish(environment, work).await?;
        let topic = environment.topic("backlog");
        pile_up(environment, &topic, messages).await?;
        environment.progress.step("draining few");
        self.drain(environment, &topic, messages).await
    }

    async fn publish(&mut self, environment: &Environment, work: &Work) -> anyhow::Result<()> {
        // What was piled up or drained just now is to be on disk, so that its writing is not measured; who may not say so waits for nothing.
        let _ = sqlx::query("CHECKPOINT").execute(&environment.pool).await;
        let (clients, span) = (environment.settings.clients(), environment.settings.span(1));
        let done = load::run(&environment.pool, clients, span, work).await?;
        self.published.push(done.per_second());
        Ok(())
    }

    async fn drain(&mut self, environment: &Environment, topic: &str, messages: u64) -> anyhow::Result<()> {
        let messages = messages.div_ceil(BATCH) * BATCH;
        let mut consumer = Process::worker(environment, topic, &[environment.group(0)], messages).await?;
        environment.lanes_owned(topic, lanes_of(1)).await?;
        let delivered = consumer.delivered().await?;
        self.consumer_peak = consumer.peak_rss_mb();
        consumer.stop().await?;
        self.per_second = delivered.deliveries as f64 / (delivered.last - delivered.first);
        match delivered.rates.is_empty() {
            true => self.drained.push(self.per_second),
            false => self.drained.extend(delivered.rates),
        }
        Ok(())
    }
}

/// Publishes exactly so many, in batches, with a group that nobody serves yet.
async fn pile_up(environment: &Environment, topic: &str, messages: u64) -> anyhow::Result<()> {
    let batch = Batch::Messages {
        topic: topic.to_owned(),
    };
    load::times(
        &environment.pool,
        CLIENTS,
        messages.div_ceil(BATCH),
        &Work::Batch(batch),
    )
    .await
}
