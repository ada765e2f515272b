//! What a dispatcher and a consumer cost while nothing happens.

use std::time::{Duration, Instant};

use postbox::Publish;

use super::environment::Environment;
use super::message::message;
use super::process::{Process, lanes_of};
use super::report::Report;

/// Every statement of Postbox that is not in a transaction of its user is one of its own.
const TRANSACTIONS: &str =
    "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()";

/// Until sessions have told the server's statistics what they did, which they do within ten seconds once they are idle.
const SETTLING: Duration = Duration::from_secs(12);

pub(crate) async fn measure(environment: &mut Environment) -> anyhow::Result<Vec<Report>> {
    let span = environment.settings.span(30);
    environment.progress.begin("idle", 2);
    let topic = environment.topic("idle");
    environment.dispatch_elsewhere().await?;
    let dispatcher = Process::dispatcher(environment).await?;
    let mut consumer = Process::worker(environment, &topic, &[environment.group(0)], 1).await?;
    environment.lanes_owned(&topic, lanes_of(1)).await?;
    let mut tx = environment.pool.begin().await?;
    tx.publish(message(&topic, 0)).await?;
    tx.commit().await?;
    // It works, and now it has nothing to do.
    consumer.delivered().await?;
    tokio::time::sleep(SETTLING).await;
    environment.progress.step("waiting");

    let used = || Some(dispatcher.cpu_seconds()? + consumer.cpu_seconds()?);
    let transactions = async || {
        sqlx::query_scalar::<_, i64>(TRANSACTIONS)
            .fetch_one(&environment.pool)
            .await
    };
    let (cpu, statements, begun) = (used(), transactions().await?, Instant::now());
    tokio::time::sleep(span).await;
    let seconds = begun.elapsed().as_secs_f64();
    let cpu = cpu
        .zip(used())
        .map(|(before, after)| (after - before) / seconds * 100.0);
    // But for the one that asks.
    let statements = (transactions().await? - statements - 1).max(0) as f64 / seconds;
    let rss = consumer.rss_mb();
    let dispatcher_rss = dispatcher.rss_mb();
    environment.progress.step("done");
    consumer.stop().await?;
    dispatcher.stop().await?;
    environment.dispatch_here().await?;
    Ok(vec![
        Report::verified("idle")
            .figure("seconds", seconds)
            .figure_if("core_percent", cpu)
            .figure("statements_per_s", statements)
            .figure_if("consumer_rss_mb", rss)
            .figure_if("dispatcher_rss_mb", dispatcher_rss),
    ])
}
