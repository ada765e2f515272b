//! `postbox rebase`

use std::process::ExitCode;

use postbox_dispatcher::restore::{self, Rebased};

use crate::database::Database;
use crate::output::Output;
use crate::table;
use crate::usage::ONLY_A_PREVIEW;

/// After a restore with pg_restore into another cluster: make the messages' transaction ids that cluster's own
///
/// A dispatcher does this by itself when it starts; until it is done none delivers anything new. Messages that were in order keep their
/// offsets, and groups go on where they stood when the dump was made. One transaction, which rewrites all stored messages; publishing does
/// not wait for it. Does nothing where nothing is to be done.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only say whether it is needed: exit status 0 if not, 3 if it is
    #[arg(long, conflicts_with = "force")]
    check: bool,
    /// Do it although it does not seem to be needed, which is harmless
    #[arg(long)]
    force: bool,
    /// Print one JSON object: needed, reason; and when it was done: sequenced, unsequenced, freed_lanes
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<ExitCode> {
    let pool = database.open_direct(1).await?;
    let mut output = Output::default();
    if args.check {
        let reason = restore::is_needed(&pool).await?;
        output.line(&match (&reason, args.json) {
            (_, true) => serde_json::json!({ "needed": reason.is_some(), "reason": reason }).to_string(),
            (Some(reason), false) => format!("needed: {reason}"),
            (None, false) => NOT_NEEDED.to_owned(),
        })?;
        return Ok(match reason {
            Some(_) => ExitCode::from(ONLY_A_PREVIEW),
            None => ExitCode::SUCCESS,
        });
    }
    let rebased = restore::rebase(&pool, args.force).await?;
    output.line(&match (&rebased, args.json) {
        (Some(rebased), true) => with_needed(rebased)?,
        (None, true) => serde_json::json!({ "needed": false, "reason": null }).to_string(),
        (Some(rebased), false) => in_words(rebased),
        (None, false) => NOT_NEEDED.to_owned(),
    })?;
    Ok(ExitCode::SUCCESS)
}

const NOT_NEEDED: &str = "not needed: the transaction ids are this cluster's own";

fn with_needed(rebased: &Rebased) -> anyhow::Result<String> {
    let mut object = serde_json::to_value(rebased)?;
    object["needed"] = true.into();
    Ok(object.to_string())
}

fn in_words(rebased: &Rebased) -> String {
    format!(
        "rebased, because {}\n{} keep their offsets, {} come next, {} freed",
        rebased.reason,
        table::counted(rebased.sequenced, "message", "messages"),
        table::counted(rebased.unsequenced, "message", "messages"),
        table::counted(rebased.freed_lanes, "lane", "lanes"),
    )
}
