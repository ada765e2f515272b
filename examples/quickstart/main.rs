//! A month of flights from New York, as an airline's service would see it, with Postbox carrying its events.
//!
//! ```text
//! cargo run --example quickstart
//! ```
//!
//! Every departure, arrival and cancellation is one transaction that changes the airline's tables **and** publishes an event.
//! Three groups handle the events meanwhile, on two nodes:
//!
//! - `statistics` keeps figures of each airline in a table, exactly once;
//! - `sequence` checks that each aircraft's events come in their order;
//! - the departure board is a broadcast: each node has its own.
//!
//! At the end all of that is held against what SQL says of the airline's tables.
//!
//! It uses the PostgreSQL of `DATABASE_URL`, in a database of its own that it drops afterwards; without that, it starts a
//! private server, which is gone afterwards too.
//!
//! Begin to read at [`airline`], which publishes, then see [`statistics`] and [`board`], which handle.

mod airline;
mod board;
mod event;
mod flight;
mod latency;
mod node;
mod progress;
mod replay;
mod report;
mod sequence;
mod statistics;
mod verification;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestDatabase, TestPostgres};
use tokio::time::Instant;
use tracing_subscriber::EnvFilter;

use crate::airline::Airline;
use crate::flight::History;
use crate::latency::Latencies;
use crate::node::Node;
use crate::progress::Progress;
use crate::replay::{DESKS, Replay};
use crate::report::Report;
use crate::sequence::Sequence;

/// How long the month takes, unless the machine needs longer.
const DURATION: Duration = Duration::from_secs(0);

/// Connections for the transactions of `statistics`, on each node.
const NODE_CONNECTIONS: u32 = 8;

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();

    match quickstart().await {
        Ok(Some(report)) => {
            println!("{report}");
            if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Ok(None) => {
            eprintln!("\nStopped.");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `None`: somebody pressed Ctrl-C.
async fn quickstart() -> Result<Option<Report>> {
    let history = History::january()?;
    eprintln!("Looking for PostgreSQL …");
    let server = TestPostgres::find_or_start().await?;
    let database = server.empty_database().await?;
    eprintln!("Replaying {} flights on PostgreSQL {} …", history.flights.len(), server.version());
    play(history, &database, DURATION).await.map(Some)
}

async fn play(history: History, database: &TestDatabase, duration: Duration) -> Result<Report> {
    postbox::migrate(database.pool()).await?;
    let airline = Airline::new(database.connect_pool(DESKS as u32));
    airline.open(&history.flights).await.context("cannot make the airline's tables")?;

    let sequence = Sequence::default();
    let latencies = Latencies::default();
    let dispatcher = Dispatcher::new(database.pool().clone()).start().await?;
    let mut nodes = Vec::new();
    for name in ["node-1", "node-2"] {
        nodes.push(Node::start(name, database.connect_pool(NODE_CONNECTIONS), &sequence, &latencies).await?);
    }

    let replay = Replay::default();
    let begun = Instant::now();
    let progress = Progress { replay: &replay, nodes: &nodes };
    let replaying = async {
        replay.run(history.changes, &airline, duration).await?;
        let publishing = begun.elapsed();
        progress.all_handled().await?;
        anyhow::Ok(publishing)
    };
    let publishing = tokio::select! {
        replayed = replaying => replayed?,
        () = progress.show() => unreachable!(),
    };
    let pool = database.pool();
    let mut checks = vec![
        verification::events(pool, replay.published()).await?,
        verification::statistics(pool).await?,
        verification::sequence(pool, &sequence).await?,
    ];
    for node in &nodes {
        checks.push(verification::board(pool, node.name, &node.board).await?);
    }
    for node in nodes {
        node.shutdown().await?;
    }
    dispatcher.shutdown().await;
    Ok(Report::new(checks, &latencies, replay.published(), begun, publishing))
}
