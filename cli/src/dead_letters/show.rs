//! `postbox dead-letters show`

use std::process::ExitCode;

use anyhow::Context;
use postbox_dispatcher::dead_letters;

use super::letter;
use crate::database::Database;
use crate::output::Output;

/// Show one dead letter whole, with its errors and its payload
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Number of the letter, as `list` says it
    number: i64,
    /// Print one JSON object; the payload is a text, or payload_base64 where it is not UTF-8
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<ExitCode> {
    let pool = database.open(1).await?;
    let letter = dead_letters::show(&pool, args.number)
        .await?
        .with_context(|| gone(args.number))?;
    Output::default().line(&match args.json {
        true => letter::json(&letter)?,
        false => letter::human(&letter),
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn gone(number: i64) -> String {
    format!(
        "there is no dead letter {number}: it may have been redriven or discarded (postbox dead-letters list)"
    )
}
