//! `postbox bench worker`: a consumer as a process of its own.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tokio::io::AsyncReadExt;

use super::process::Delivered;
use super::sink::Sink;
use crate::database::Database;
use crate::output::Output;
use crate::shutdown;
use crate::usage::name;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Topic
    #[arg(long, value_parser = name)]
    topic: String,
    /// Group; may be given again
    #[arg(long = "group", required = true, value_parser = name)]
    groups: Vec<String>,
    /// Stop after each group has handled so many; 0: when standard input is closed
    #[arg(long)]
    messages: u64,
}

pub(crate) async fn run(database: &Database, args: &Args) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    let pool = database.open(1).await?;
    let sink = Sink::start(pool, &args.topic, &args.groups).await?;
    let work = async {
        if args.messages > 0 {
            let handled = sink.each_handled(args.messages).await?;
            let delivered = Delivered {
                deliveries: sink.handled(),
                first: unix_seconds(handled.first),
                last: unix_seconds(handled.last),
                rates: handled.rates,
            };
            Output::default().line(&serde_json::to_string(&delivered)?)?;
        }
        // The bench keeps it open for as long as it wants this one.
        let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
        anyhow::Ok(())
    };
    tokio::select! {
        ended = work => ended?,
        () = stop.cancelled() => {}
    }
    sink.stop().await?;
    // A read of standard input cannot be cancelled, and would hold up the end.
    std::process::exit(0);
}

fn unix_seconds(at: Instant) -> f64 {
    let at = SystemTime::now() - at.elapsed();
    at.duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
