//! From publish to handler, everything at once.

use super::baseline::Reader;
use super::environment::Environment;
use super::load::{self, BATCH, Batch, Work};
use super::report::Report;
use super::rounds::Rounds;
use super::sink::{LANES, Sink};

/// Enough to keep two cores busy with batches.
const CLIENTS: usize = 4;

pub(crate) async fn measure(environment: &mut Environment) -> anyhow::Result<Vec<Report>> {
    let topic = environment.topic("throughput");
    let (rounds, span) = (environment.settings.rounds(), environment.settings.span(1));
    let clients = environment.settings.clients().min(CLIENTS);
    let kinds = if environment.settings.compare { 3 } else { 2 };
    environment.progress.begin("throughput", rounds * kinds);
    let sink = Sink::start(environment.consumer_pool(1), &topic, &[environment.group(0)]).await?;
    environment.lanes_owned(&topic, LANES).await?;
    let messages = Work::Batch(Batch::Messages { topic });
    let mut rates = Rounds::<3>::new();
    let mut published = 0;
    for _ in 0..rounds {
        let mut figures = [f64::NAN; 3];
        let done = load::run(&environment.pool, clients, span, &messages).await?;
        published += done.count;
        let handled = sink.each_handled(published).await?;
        figures[0] = done.count as f64 / (handled.last - done.begun).as_secs_f64();
        environment.progress.step("Postbox");

        let reader = Reader::of_log(environment).await?;
        let done = load::run(&environment.pool, clients, span, &Work::Batch(Batch::Log)).await?;
        let last = reader.has_read(done.count, true).await?;
        figures[1] = reader.read() as f64 / (last - done.begun).as_secs_f64();
        drop(reader);
        environment.progress.step("the baseline");

        if environment.settings.compare {
            let reader = Reader::of_queue(environment).await?;
            let done = load::run(&environment.pool, clients, span, &Work::Batch(Batch::Queue)).await?;
            let last = reader.has_read(done.count, false).await?;
            figures[2] = done.count as f64 / (last - done.begun).as_secs_f64();
            environment.progress.step("the textbook outbox");
        }
        rates.add(figures);
    }
    sink.stop().await?;
    let compared = |figure: f64| environment.settings.compare.then_some(figure);
    Ok(vec![
        Report::verified("throughput")
            .with("messages", published)
            .with("batch", BATCH)
            .figure("messages_per_s", rates.median(0))
            .figure("baseline_messages_per_s", rates.median(1))
            .figure("ratio_to_baseline", rates.ratio(0, 1))
            .figure_if("ratio_to_skip_locked", compared(rates.ratio(0, 2))),
    ])
}
