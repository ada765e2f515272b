//! Torture: tries to make Postbox lose, double or reorder a message.
//!
//! Producers, dispatchers and consumers run as processes of their own against a private PostgreSQL. From a seed they are killed, frozen,
//! stopped and cut off, and the server with them; then everything is healed, and a history that was kept outside the database is
//! judged. See docs/internals/testing.md.

mod chance;
mod clock;
mod consumer;
mod cut_back;
mod dispatcher;
mod evidence;
mod fleet;
mod forger;
mod history;
mod ledger;
mod message;
mod plan;
mod producer;
mod proxy;
mod quiescence;
mod report;
mod role;
mod run;
mod server_clock;
mod surroundings;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::role::RoleArgs;

/// Tries to make Postbox lose, double or reorder a message
///
/// Exit codes: 0 nothing found, 1 a guarantee was broken (or it did not come to rest), 2 it could not be run. The same seed gives the
/// same plan; timing is the machine's.
#[derive(Debug, Parser)]
#[command(name = "torture", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// For how long faults are injected; healing and judging come after
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What the plan is made from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Keep the logs of a run that found nothing too
    #[arg(long)]
    keep: bool,
    /// Where the logs are kept; default: a folder among the temporary files
    #[arg(long, value_name = "FOLDER")]
    logs: Option<PathBuf>,
    /// Takes the database back to an earlier state in the middle; default: by the seed, two of five do
    #[arg(long, value_name = "HOW")]
    cut_back: Option<plan::CutBack>,
    /// SQL that breaks Postbox on purpose, to see that it is caught; there are some beside the source
    #[arg(long, value_name = "FILE")]
    sabotage: Option<PathBuf>,
}

/// What a process of a run does; not for use by hand.
#[derive(Debug, Subcommand)]
#[command(hide = true)]
enum Role {
    #[command(hide = true)]
    Produce(RoleArgs),
    #[command(hide = true)]
    Dispatch(RoleArgs),
    #[command(hide = true)]
    Consume(RoleArgs),
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.role {
        Some(Role::Produce(args)) => producer::run(args).await.map(|()| true),
        Some(Role::Dispatch(args)) => dispatcher::run(args).await.map(|()| true),
        Some(Role::Consume(args)) => consumer::run(args).await.map(|()| true),
        None => run::run(cli.run).await,
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
