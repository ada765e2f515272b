//! What a message adds to a business transaction.

use super::environment::Environment;
use super::load::{self, Beside, Work};
use super::report::Report;
use super::rounds::Rounds;
use super::sink::Sink;

pub(crate) async fn measure(environment: &mut Environment) -> anyhow::Result<Vec<Report>> {
    let topic = environment.topic("publish");
    let (rounds, span) = (environment.settings.rounds(), environment.settings.span(1));
    let beside = [
        Beside::Message { topic: topic.clone() },
        Beside::PlainInsert,
        Beside::Nothing,
        Beside::QueueInsert,
    ];
    let kinds = if environment.settings.compare { 4 } else { 3 };
    environment.progress.begin("publish", rounds * kinds + 1);
    let mut rates = Rounds::<4>::new();
    let mut published = 0;
    for round in 0..rounds {
        let mut figures = [f64::NAN; 4];
        // Each is first and last in turn, so that none profits from its place.
        for place in 0..kinds {
            let kind = (place + round) % kinds;
            let work = Work::Business(beside[kind].clone());
            let done = load::run(&environment.pool, environment.settings.clients(), span, &work).await?;
            if kind == 0 {
                published += done.count;
            }
            figures[kind] = done.per_second();
            environment.progress.step("publishing");
        }
        rates.add(figures);
    }
    environment.progress.step("counting");
    let sink = Sink::start(environment.consumer_pool(1), &topic, &[environment.group(0)]).await?;
    sink.each_handled(published).await?;
    sink.stop().await?;
    Ok(vec![
        Report::verified("publish")
            .with("messages", published)
            .figure("tx_per_s", rates.median(0))
            .figure("plain_tx_per_s", rates.median(1))
            .figure("ratio_to_plain_insert", rates.ratio(0, 1))
            .figure("ratio_to_no_message", rates.ratio(0, 2))
            .figure("plain_insert_ratio_to_no_message", rates.ratio(1, 2))
            .figure("textbook_ratio_to_plain_insert", rates.ratio(3, 1)),
    ])
}
