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
mod outcome;
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
use sqlx::PgPool;
use tokio::time::Instant;
use tracing_subscriber::EnvFilter;

use crate::airline::Airline;
use crate::flight::History;
use crate::latency::Latencies;
use crate::node::{Node, lanes_are_divided};
use crate::outcome::Outcome;
use crate::progress::Progress;
use crate::replay::{DESKS, Replay};
use crate::report::{Report, thousands};
use crate::sequence::Sequence;
use crate::verification::verify;

/// Connections for the transactions of `statistics`, on each node.
const NODE_CONNECTIONS: u32 = 8;

/// A commit does not wait for the disk. This database is dropped at the end, so a crash can lose nothing; one with real data
/// keeps the default.
const DO_NOT_WAIT_FOR_THE_DISK: &str = "DO $$ BEGIN \
     EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$";

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,sqlx=error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();

    match quickstart().await {
        Ok(Some(report)) => {
            println!("{report}");
            if report.is_good() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Ok(None) => {
            eprintln!("Stopped.");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `None`: it was stopped with Ctrl-C.
async fn quickstart() -> Result<Option<Report>> {
    let history = History::january()?;
    eprintln!("Looking for PostgreSQL, which is fetched if this machine has none …");
    let server = TestPostgres::find_or_start().await?;
    let database = server.empty_database().await?;
    eprintln!(
        "Replaying {} flights, with PostgreSQL {} …",
        thousands(history.flights.len() as u64),
        server.version()
    );

    let Some(outcome) = play(history, &database).await? else {
        return Ok(None);
    };
    let checks = verify(database.pool(), &outcome).await?;
    Ok(Some(Report::new(&outcome, checks)))
}

/// Replays the history while two nodes handle its events; returns when they have handled all.
async fn play(history: History, database: &TestDatabase) -> Result<Option<Outcome>> {
    sqlx::raw_sql(DO_NOT_WAIT_FOR_THE_DISK)
        .execute(&mut database.connect().await?)
        .await?;
    postbox::migrate(database.pool()).await?;
    let airline = Airline::new(open_pool(database, DESKS as u32).await?);
    airline
        .open(&history.flights)
        .await
        .context("cannot make the airline's tables")?;

    let dispatcher = Dispatcher::new(database.pool().clone()).start().await?;
    let sequence = Sequence::default();
    let latencies = Latencies::default();
    let mut nodes = Vec::new();
    for name in ["node-1", "node-2"] {
        let pool = open_pool(database, NODE_CONNECTIONS).await?;
        nodes.push(Node::start(name, pool, &sequence, &latencies).await?);
    }
    lanes_are_divided(database.pool()).await?;

    let replay = Replay::default();
    let progress = Progress {
        replay: &replay,
        nodes: &nodes,
    };
    let begun = Instant::now();
    let replaying = async {
        replay.run(history.changes, &airline).await?;
        let publishing = begun.elapsed();
        progress.all_handled().await?;
        Ok(publishing)
    };
    let ended: Result<Option<Duration>> = tokio::select! {
        publishing = replaying => publishing.map(Some),
        interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| None).map_err(Into::into),
        never = progress.show() => match never {},
    };
    eprintln!();

    let boards = nodes.iter().map(|node| (node.name, node.board.clone())).collect();
    for node in nodes {
        node.shutdown().await?;
    }
    dispatcher.shutdown().await;
    let published = replay.published();
    Ok(ended?.map(|publishing| Outcome {
        published,
        begun,
        publishing,
        sequence,
        boards,
        latencies,
    }))
}

/// A pool with all its connections open, so that the first events need not wait for them.
async fn open_pool(database: &TestDatabase, connections: u32) -> Result<PgPool> {
    let pool = database.connect_pool(connections);
    let mut open = Vec::new();
    for _ in 0..connections {
        open.push(pool.acquire().await?);
    }
    drop(open);
    Ok(pool)
}
