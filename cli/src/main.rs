//! The `postbox` command: creates the schema, dispatches, looks, publishes, schedules, consumes and measures.

mod bench;
mod completions;
mod consume;
mod cron;
mod database;
mod dead_letters;
mod doctor;
mod grant;
mod messages;
mod migrate;
mod output;
mod position;
mod progress;
mod publish;
mod rebase;
mod rejects;
mod run;
mod scheduled;
mod shutdown;
mod span;
mod status;
mod subscriptions;
mod table;
mod usage;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::database::Database;
use crate::usage::wrong_usage;

/// Postbox: a transactional outbox and messaging on PostgreSQL
///
/// The database is named by DATABASE_URL or --database-url. Data goes to standard output, everything else to standard error; RUST_LOG
/// chooses what is logged (for example RUST_LOG=postbox_consumer=info). Exit codes: 0 done, 1 failed, 2 wrong usage, 3 something would be done
/// and was not (a preview without --yes), 130 interrupted before all was done.
#[derive(Debug, Parser)]
#[command(name = "postbox", version)]
struct Cli {
    #[command(flatten)]
    database: Database,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Migrate(migrate::Args),
    Run(run::Args),
    Status(status::Args),
    Doctor(doctor::Args),
    Grant(grant::Args),
    #[command(subcommand)]
    Subscriptions(subscriptions::Command),
    Publish(publish::Args),
    Consume(consume::Args),
    Messages(messages::Args),
    DeadLetters(dead_letters::Args),
    Rebase(rebase::Args),
    Rejects(rejects::Args),
    Bench(Box<bench::Args>),
    Scheduled(scheduled::Args),
    Cron(cron::Args),
    Completions(completions::Args),
}

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { database, command } = Cli::parse();
    log_to_stderr(match command {
        Command::Run(_) => "info,sqlx::postgres::notice=warn",
        // Some of its handlers fail on purpose.
        Command::Bench(_) => "error",
        // What waits for its window says so.
        Command::Consume(_) => "warn,sqlx=error,postbox_consumer::pace=info",
        _ => "warn,sqlx=error",
    });
    let needs = match &command {
        Command::Publish(_) | Command::Scheduled(_) => "publisher",
        Command::Consume(_) => "consumer",
        Command::Status(_) | Command::Doctor(_) | Command::Messages(_) => "viewer",
        _ => "operator",
    };
    let done = |result: anyhow::Result<()>| result.map(|()| ExitCode::SUCCESS);
    let result = match command {
        Command::Migrate(args) => done(migrate::run(&database, args).await),
        Command::Run(args) => done(run::run(&database, args).await),
        Command::Status(args) => done(status::run(&database, args).await),
        Command::Doctor(args) => done(doctor::run(&database, args).await),
        Command::Grant(args) => done(grant::run(&database, args).await),
        Command::Subscriptions(command) => subscriptions::run(&database, command).await,
        Command::Publish(args) => done(publish::run(&database, args).await),
        Command::Consume(args) => done(consume::run(&database, args).await),
        Command::Messages(args) => messages::run(&database, args).await,
        Command::DeadLetters(args) => dead_letters::run(&database, args).await,
        Command::Rebase(args) => rebase::run(&database, args).await,
        Command::Rejects(args) => done(rejects::run(&database, args).await),
        Command::Bench(args) => done(bench::run(&database, *args).await),
        Command::Scheduled(args) => done(scheduled::run(&database, args).await),
        Command::Cron(args) => cron::run(&database, args).await,
        Command::Completions(args) => done(completions::run::<Cli>(&args)),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            let error = match output::is_denied(&error) {
                true => anyhow::anyhow!(
                    "{}; the owner of the schema grants it: postbox grant ROLE --as {needs} (migrate, run and rebase are for the owner)",
                    output::in_one_line(&error)
                ),
                false => error,
            };
            output::print_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr(default: &str) {
    let filter = std::env::var("RUST_LOG")
        .ok()
        .filter(|directives| !directives.is_empty());
    let filter = match EnvFilter::try_new(filter.as_deref().unwrap_or(default)) {
        Ok(filter) => filter,
        Err(error) => wrong_usage(format!("RUST_LOG cannot be understood: {error}")),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // It would panic where standard error cannot be written to, and what cannot be logged must not stop what is logged.
        .log_internal_errors(false)
        .init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
