//! From the return of the commit to the start of the handler, at a steady rate.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use postbox_consumer::Consumer;

use super::baseline;
use super::chart::{self, Point};
use super::environment::Environment;
use super::process::Process;
use super::report::Report;
use super::rounds::quantile;
use super::sink::LANES;
use super::timeline::Timeline;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Messages a second; may be given again
    #[arg(long = "rate", value_name = "N", default_values_t = Self::default().rates, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rates: Vec<u32>,
    /// At many rates, from 1 to 20,000
    #[arg(long, conflicts_with = "rates")]
    sweep: bool,
    /// Draw what was found into this file
    #[arg(long, value_name = "FILE.svg", value_parser = svg)]
    svg: Option<PathBuf>,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            rates: vec![100, 5_000],
            sweep: false,
            svg: None,
        }
    }
}

/// Of a sweep: where each way of waiting is, and where one goes over into the next.
const SWEEP: [u32; 13] = [
    1, 10, 50, 100, 200, 500, 700, 1_000, 2_000, 3_500, 5_000, 10_000, 20_000,
];

fn svg(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension().is_some_and(|extension| extension == "svg") {
        true => Ok(path),
        false => Err("the file's name ends in .svg".to_owned()),
    }
}

/// A client can do about so many transactions a second.
const A_CLIENT: u32 = 700;

/// Before it counts: plans are made, caches filled, and the dispatcher has found its pace.
const WARM_UP: Duration = Duration::from_secs(1);

pub(crate) async fn measure(environment: &mut Environment, args: &Args) -> anyhow::Result<Vec<Report>> {
    let span = environment.settings.span(10);
    let rates = if args.sweep { &SWEEP[..] } else { &args.rates };
    environment.progress.begin("latency", 2 * rates.len() + 1);
    let baseline = baseline::notify_round_trip(environment, 300).await?;
    environment.progress.step("the baseline");
    let mut reports = Vec::new();
    let mut places = Vec::new();
    for place in ["embedded", "sidecar"] {
        let sidecar = if place == "sidecar" {
            environment.dispatch_elsewhere().await?;
            Some(Process::dispatcher(environment).await?)
        } else {
            None
        };
        let mut points = Vec::new();
        for rate in rates {
            let used = used_by(sidecar.as_ref(), environment).await?;
            let begun = Instant::now();
            let flow = flow(environment, *rate, span).await?;
            let seconds = begun.elapsed().as_secs_f64();
            let core_percent = used
                .zip(used_by(sidecar.as_ref(), environment).await?)
                .map(|(before, after)| (after - before) / seconds * 100.0);
            environment.progress.step(place);
            let point = Point {
                rate: *rate,
                p50_ms: flow.quantile_ms(0.5),
                p99_ms: flow.quantile_ms(0.99),
                core_percent,
            };
            reports.push(
                Report::verified("latency")
                    .with("rate", *rate)
                    .with("dispatcher", place)
                    .with("messages", flow.len())
                    .figure("p50_ms", point.p50_ms)
                    .figure("p99_ms", point.p99_ms)
                    .figure("max_ms", flow.quantile_ms(1.0))
                    .figure_if("dispatcher_core_percent", core_percent)
                    .figure("notify_round_trip_p50_ms", baseline),
            );
            points.push(point);
        }
        places.push((place, points));
        if let Some(sidecar) = sidecar {
            sidecar.stop().await?;
        }
    }
    environment.dispatch_here().await?;
    if let Some(path) = &args.svg {
        chart::write(path, &places)?;
    }
    Ok(reports)
}

/// Seconds of a core that the dispatcher has used so far, if it is a process of its own.
async fn used_by(sidecar: Option<&Process>, environment: &Environment) -> anyhow::Result<Option<f64>> {
    match sidecar {
        Some(sidecar) => sidecar.cpu_seconds_with_server(environment).await,
        None => Ok(None),
    }
}

/// What became of a steady flow of messages.
pub(crate) struct Flow {
    /// When each was due to be published, and how long it took from commit to handler, in seconds.
    pub(crate) messages: Vec<(f64, f64)>,
    /// When each was handled.
    pub(crate) handled: Vec<f64>,
}

impl Flow {
    fn len(&self) -> usize {
        self.messages.len()
    }

    fn quantile_ms(&self, q: f64) -> f64 {
        quantile(self.messages.iter().map(|(_, took)| took * 1000.0).collect(), q)
    }
}

/// Publishes at a rate, one message a transaction, and handles them in this process. The warm-up is left out of what is returned.
pub(crate) async fn flow(environment: &Environment, rate: u32, span: Duration) -> anyhow::Result<Flow> {
    let topic = environment.topic("latency");
    let total = ((span + WARM_UP).as_secs_f64() * f64::from(rate)) as usize;
    let timeline = Timeline::of(total);
    let handler = timeline.handler(environment, &topic);
    let consumer = Consumer::new(environment.consumer_pool(1))
        .name("postbox-bench")
        .handlers([handler])
        .start()
        .await?;
    environment.lanes_owned(&topic, LANES).await?;

    let clients = rate.div_ceil(A_CLIENT) as usize;
    let begin = timeline.now();
    let mut publishers = Vec::new();
    for client in 0..clients {
        let mut connection = environment.pool.acquire().await?;
        let (timeline, topic) = (timeline.clone(), topic.clone());
        publishers.push(tokio::spawn(async move {
            for n in (client..total).step_by(clients) {
                let due = begin + (n as u64 * 1_000_000_000) / u64::from(rate);
                timeline.until(due).await;
                timeline.publish(&mut connection, &topic, n).await?;
            }
            anyhow::Ok(())
        }));
    }
    for publisher in publishers {
        publisher.await.context("a client ended")??;
    }
    timeline.all_handled(total).await?;
    consumer.shutdown().await?;

    let seconds = |nanos: u64| nanos as f64 / 1e9;
    let warm = (WARM_UP.as_secs_f64() * f64::from(rate)) as usize;
    Ok(Flow {
        messages: (warm..total)
            .map(|n| {
                let took = seconds(timeline.took(n));
                (n.saturating_sub(warm) as f64 / f64::from(rate), took)
            })
            .collect(),
        handled: (warm..total)
            .map(|n| {
                let after_start = timeline.handled(n).saturating_sub(begin);
                seconds(after_start) - WARM_UP.as_secs_f64()
            })
            .collect(),
    })
}
