//! A steady flow while another session holds the xmin horizon: whether the end is as fast as the beginning.

use sqlx::Connection;

use super::environment::Environment;
use super::latency::{Flow, flow};
use super::report::Report;
use super::rounds::quantile;

const RATE: u32 = 2_000;
/// The beginning and the end that are compared, in seconds.
const EDGE: f64 = 10.0;

pub(crate) async fn measure(environment: &mut Environment) -> anyhow::Result<Vec<Report>> {
    let span = environment.settings.span(60);
    environment.progress.begin("held-xmin", 1);
    let mut other = environment.connect().await?;
    let mut held = other.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
    // With a snapshot and a number of its own, so that it holds both the horizon and xmin.
    sqlx::query("SELECT pg_current_xact_id()::text, count(*) FROM postbox.subscription")
        .execute(&mut *held)
        .await?;
    let flow = flow(environment, RATE, span).await?;
    sqlx::query("SELECT 1").execute(&mut *held).await?;
    held.rollback().await?;
    environment.progress.step("done");
    let edge = EDGE.min(span.as_secs_f64() / 2.0);
    let end = span.as_secs_f64();
    let (first, last) = ((0.0, edge), (end - edge, end));
    Ok(vec![
        Report::verified("held-xmin")
            .with("seconds", span.as_secs())
            .with("rate", RATE)
            .figure("throughput_ratio", handled(&flow, last) / handled(&flow, first))
            .figure("p99_ratio", p99_ms(&flow, last) / p99_ms(&flow, first))
            .figure("first_p99_ms", p99_ms(&flow, first))
            .figure("last_p99_ms", p99_ms(&flow, last)),
    ])
}

fn handled(flow: &Flow, (from, to): (f64, f64)) -> f64 {
    flow.handled.iter().filter(|at| (from..to).contains(*at)).count() as f64
}

fn p99_ms(flow: &Flow, (from, to): (f64, f64)) -> f64 {
    let took = flow.messages.iter().filter(|(due, _)| (from..to).contains(due));
    quantile(took.map(|(_, took)| took * 1000.0).collect(), 0.99)
}
