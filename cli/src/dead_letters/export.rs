//! `postbox dead-letters export`

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use postbox_dispatcher::dead_letters;

use super::filter::FilterArgs;
use super::letter;
use crate::database::Database;
use crate::output::{Output, note};
use crate::table::counted;

/// Write dead letters whole, one JSON object a line, the oldest first
///
/// An object has id, group, topic, offset, message_id, type, key, headers, content_type, published_at, died_at, attempts, reason, halted,
/// instance, errors, and payload (a text) or payload_base64 (where it is not UTF-8). Nothing is changed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    filter: FilterArgs,
    /// To this file, which must not be there yet [default: standard output]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// As it is: the lines are JSON in any case
    #[arg(long)]
    json: bool,
}

/// Letters in memory at once; each may be large.
const PAGE: i64 = 50;

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<ExitCode> {
    let pool = database.open(1).await?;
    let filter = args.filter.filter();
    let mut target = match &args.out {
        None => Target::Output(Output::default()),
        Some(path) => {
            let file = File::create_new(path).with_context(|| format!("cannot create {}", path.display()))?;
            Target::File(BufWriter::new(file), path)
        }
    };
    let newest = dead_letters::tally(&pool, &filter)
        .await?
        .iter()
        .map(|tally| tally.newest)
        .max();
    let (mut after, mut written) = (0, 0);
    while let Some(newest) = newest {
        let page = dead_letters::whole(&pool, &filter, after, newest, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = last.id;
        for letter in &page {
            target.line(&letter::json(letter)?)?;
            written += 1;
        }
    }
    target.finish()?;
    if args.out.is_some() {
        note(&format!(
            "{} written",
            counted(written, "dead letter", "dead letters")
        ));
    }
    Ok(ExitCode::SUCCESS)
}

enum Target<'a> {
    Output(Output),
    File(BufWriter<File>, &'a PathBuf),
}

impl Target<'_> {
    fn line(&mut self, line: &str) -> anyhow::Result<()> {
        match self {
            Target::Output(output) => output.line(&line),
            Target::File(file, path) => writeln!(file, "{line}").with_context(|| cannot_write(path)),
        }
    }

    /// On the disk, because the next command may be `discard`.
    fn finish(self) -> anyhow::Result<()> {
        let Target::File(file, path) = self else {
            return Ok(());
        };
        let file = file.into_inner().map_err(std::io::IntoInnerError::into_error);
        file.and_then(|file| file.sync_all())
            .with_context(|| cannot_write(path))
    }
}

fn cannot_write(path: &std::path::Path) -> String {
    format!("cannot write {}", path.display())
}
