//! `postbox bench`

mod backlog;
mod baseline;
mod chart;
mod environment;
mod failures;
mod fanout;
mod filter;
mod growth;
mod held_xmin;
mod idle;
mod latency;
mod load;
mod message;
mod process;
mod progress;
mod publish;
mod report;
mod rounds;
mod sink;
mod throughput;
mod timeline;
mod timers;
mod tx;
mod worker;

use std::time::Duration;

use anyhow::bail;
use clap::Subcommand;

use self::environment::Environment;
use self::report::Report;
use crate::database::Database;
use crate::output::Output;
use crate::shutdown;

/// Measure Postbox on your own database, beside what PostgreSQL itself charges
///
/// Every figure has its baseline from the same run: rounds of both take turns, and a ratio is the median of the rounds' ratios. Every message is
/// counted on the other side; if one is missing, the bench fails.
///
/// It needs the schema (`postbox migrate`). Its tables are in a schema of their own, postbox_bench; its topics and groups begin with
/// postbox.bench. All of them are removed at the end, also on Ctrl-C; only the published messages stay, in the ring, until their slots are truncated.
/// Other topics are left alone, but it takes all the server's time while it runs. Where no dispatcher is connected, it runs one.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    bench: Bench,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// A transaction with a message, against the same with a plain insert, and with neither
    Publish,
    /// Batches from publish to handler, against a plain insert and a range read by cursor
    Throughput,
    /// Many groups on one topic, in one process and in several
    Fanout(fanout::Args),
    /// A group that wants one message in a hundred, by type or by a filter, against one that handles all
    Filter(filter::Args),
    /// From commit to handler, with the dispatcher in the process and beside it
    Latency(latency::Args),
    /// Handlers that share their transaction with the acknowledgement, against bare transactions
    Tx,
    /// What a dispatcher and a consumer cost while nothing happens
    Idle,
    /// Publishing and draining with many messages pending, against few
    Backlog(backlog::Args),
    /// A backlog of which one key in ten fails three times, against one without failures
    Failures(failures::Args),
    /// Throughput and latency while another session holds the xmin horizon: the last ten seconds against the first
    HeldXmin,
    /// How late scheduled messages come, and how long many take that are due at once
    Timers(timers::Args),
    /// What a delivery costs with more groups, topics, keys, instances or backlog, against few
    Growth(growth::Args),
    /// All of them, one after another
    All,
    /// A consumer that counts; what benches start as processes of their own
    #[command(hide = true)]
    Worker(worker::Args),
}

/// What all benches have in common.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Settings {
    /// Print one JSON object a line: bench, verified, postgres, cores, settings, and the figures
    #[arg(long, global = true)]
    json: bool,
    /// Measure the textbook outbox too: insert, select for update skip locked, delete (publish and throughput)
    #[arg(long, global = true)]
    compare: bool,
    /// How long one measurement takes [default: 1 a round; latency and timers 10, idle 30, held-xmin 60]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: Option<u64>,
    /// Rounds of measurements that take turns [default: 9]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: Option<u16>,
    /// Clients that publish at once
    #[arg(long, global = true, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=200))]
    clients: u16,
}

impl Settings {
    fn span(&self, default: u64) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(default))
    }

    fn rounds(&self) -> usize {
        usize::from(self.rounds.unwrap_or(9))
    }

    fn clients(&self) -> usize {
        usize::from(self.clients)
    }
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    if let Bench::Worker(worker) = &args.bench {
        return worker::run(database, worker).await;
    }
    let mut environment = Environment::prepare(database, args.settings.clone()).await?;
    let result = tokio::select! {
        result = args.bench.run(&mut environment) => result,
        () = stop.cancelled() => Err(anyhow::anyhow!("interrupted")),
    };
    environment.clean().await?;
    result
}

impl Bench {
    async fn run(&self, environment: &mut Environment) -> anyhow::Result<()> {
        let mut failed = false;
        let all = Self::everything();
        let benches = match self {
            Bench::All => all.as_slice(),
            one => std::slice::from_ref(one),
        };
        for bench in benches {
            let reports = match Box::pin(bench.measure(environment)).await {
                Ok(reports) => reports,
                // It is reported as every figure is, so that scripts see which one it was.
                Err(error) => {
                    failed = true;
                    vec![Report::failed(bench.name(), &error)]
                }
            };
            environment.progress.done();
            let mut output = Output::default();
            for report in reports {
                if environment.settings.json {
                    output.line(&report.json(environment)?)?;
                } else {
                    output.line(&format_args!("{}\n", report.table()))?;
                }
            }
        }
        if failed {
            bail!("not every bench could be verified");
        }
        Ok(())
    }

    fn everything() -> [Bench; 12] {
        [
            Bench::Publish,
            Bench::Throughput,
            Bench::Fanout(fanout::Args::default()),
            Bench::Filter(filter::Args::default()),
            Bench::Latency(latency::Args::default()),
            Bench::Tx,
            Bench::Idle,
            Bench::Backlog(backlog::Args::default()),
            Bench::Failures(failures::Args::default()),
            Bench::HeldXmin,
            Bench::Timers(timers::Args::default()),
            Bench::Growth(growth::Args::default()),
        ]
    }

    fn name(&self) -> &'static str {
        match self {
            Bench::Publish => "publish",
            Bench::Throughput => "throughput",
            Bench::Fanout(_) => "fanout",
            Bench::Filter(_) => "filter",
            Bench::Latency(_) => "latency",
            Bench::Tx => "tx",
            Bench::Idle => "idle",
            Bench::Backlog(_) => "backlog",
            Bench::Failures(_) => "failures",
            Bench::HeldXmin => "held-xmin",
            Bench::Timers(_) => "timers",
            Bench::Growth(_) => "growth",
            Bench::All | Bench::Worker(_) => "all",
        }
    }

    async fn measure(&self, environment: &mut Environment) -> anyhow::Result<Vec<Report>> {
        match self {
            Bench::Publish => publish::measure(environment).await,
            Bench::Throughput => throughput::measure(environment).await,
            Bench::Fanout(args) => fanout::measure(environment, args).await,
            Bench::Filter(args) => filter::measure(environment, args).await,
            Bench::Latency(args) => latency::measure(environment, args).await,
            Bench::Tx => tx::measure(environment).await,
            Bench::Idle => idle::measure(environment).await,
            Bench::Backlog(args) => backlog::measure(environment, args).await,
            Bench::Failures(args) => failures::measure(environment, args).await,
            Bench::HeldXmin => held_xmin::measure(environment).await,
            Bench::Timers(args) => timers::measure(environment, args).await,
            Bench::Growth(args) => growth::measure(environment, args).await,
            Bench::All | Bench::Worker(_) => Ok(Vec::new()),
        }
    }
}
