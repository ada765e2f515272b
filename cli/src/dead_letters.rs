//! `postbox dead-letters`

mod action;
mod export;
mod filter;
mod letter;
mod list;
mod pace;
mod show;

use std::process::ExitCode;

use clap::Subcommand;

use crate::database::Database;

/// List, show, redrive, discard, release and export messages that groups have given up
///
/// A dead letter is one message that one group has given up, whole, with its last errors. Redriven, the group runs it again from its first
/// attempt, with its id and a header postbox-redriven that counts. Discarded, it is deleted for good. Released, its key goes on without it
/// (where the handler halts keys), and the letter stays.
///
/// redrive, discard and release only say what they would do, and end with exit status 3, unless --yes is given. A filter (--group … --reason)
/// finds the letters that fit all of it.
///
///   postbox dead-letters list --group mail --since 2h
///   postbox dead-letters redrive --group mail --reason timeout --rate 50/s --yes
///   postbox dead-letters redrive 17 --payload mended.json --yes
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(list::Args),
    Show(show::Args),
    Redrive(action::RedriveArgs),
    Discard(action::DiscardArgs),
    Release(action::ReleaseArgs),
    Export(export::Args),
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::List(args) => list::run(database, args).await,
        Command::Show(args) => show::run(database, args).await,
        Command::Redrive(args) => action::redrive(database, args).await,
        Command::Discard(args) => action::discard(database, args).await,
        Command::Release(args) => action::release(database, args).await,
        Command::Export(args) => export::run(database, args).await,
    }
}
