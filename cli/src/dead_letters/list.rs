//! `postbox dead-letters list`

use std::process::ExitCode;

use postbox_dispatcher::dead_letters::{self, DeadLetter};

use super::filter::FilterArgs;
use super::letter;
use crate::database::Database;
use crate::output::Output;
use crate::table::Table;

/// List dead letters, the newest first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    filter: FilterArgs,
    /// At most so many
    #[arg(long, value_name = "N", default_value = "50", value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Only letters older than the one with this number: the last of one page is where the next begins
    #[arg(long, value_name = "NUMBER")]
    before: Option<i64>,
    /// Print one JSON object a line: all that is known, but for the payload
    #[arg(long)]
    json: bool,
}

/// Read at once, so that a long list takes little memory.
const PAGE: i64 = 500;

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<ExitCode> {
    let pool = database.open(1).await?;
    let filter = args.filter.filter();
    let mut output = Output::default();
    let mut left = i64::from(args.limit);
    let mut before = args.before;
    let mut table = Table::new("Dead letters", HEADS);
    while left > 0 {
        let page = dead_letters::list(&pool, &filter, before, left.min(PAGE)).await?;
        left -= page.len() as i64;
        let is_last = (page.len() as i64) < PAGE;
        before = page.last().map(|letter| letter.id).or(before);
        for letter in &page {
            match args.json {
                true => output.line(&letter::json(letter)?)?,
                false => row(&mut table, letter),
            }
        }
        if is_last {
            break;
        }
    }
    if !args.json {
        output.line(&table)?;
        if left == 0
            && let Some(before) = before
        {
            output.line(&format_args!("\nThere may be more: --before {before}"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

const HEADS: &[&str] = &[
    "number",
    "group",
    "topic",
    "type",
    "key",
    "attempts",
    "halted",
    "given up at",
    "reason",
];
/// Characters of a key and a reason; `show` has them whole.
const WIDTH: usize = 60;

fn row(table: &mut Table, letter: &DeadLetter) {
    table.row([
        letter.id.into(),
        letter.group_name.as_str().into(),
        letter.topic.as_str().into(),
        letter.message_type.as_deref().unwrap_or("-").into(),
        letter.key.as_deref().map_or("-".to_owned(), in_short).into(),
        i64::from(letter.attempts).into(),
        if letter.halted { "yes" } else { "no" }.into(),
        letter::clock(letter.died_at).into(),
        in_short(&letter.reason).into(),
    ]);
}

/// On one line, and not too long.
fn in_short(text: &str) -> String {
    let line = text.replace(|c: char| c.is_control(), " ");
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
