//! `postbox dead-letters redrive`, `discard` and `release`: first what would be done, then, with --yes, that.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use postbox_dispatcher::dead_letters::{self, Filter, Tally};
use postbox_dispatcher::status;
use sqlx::PgPool;

use super::filter::FilterArgs;
use super::pace::{Pace, Rate};
use super::show::gone;
use crate::database::Database;
use crate::output::{Output, note};
use crate::progress::Progress;
use crate::shutdown;
use crate::table::{Table, counted};
use crate::usage::{ONLY_A_PREVIEW, wrong_usage};

/// Let groups run dead letters again
///
/// The messages run again from their first attempt, with their ids and a header postbox-redriven that counts; running instances take them up within
/// half a second. On SIGINT or SIGTERM no further ones are put back, and the exit status is 130.
#[derive(Debug, clap::Args)]
pub(crate) struct RedriveArgs {
    #[command(flatten)]
    which: Which,
    /// At most so many: N/s, N/m or N/h [default: as fast as it goes]
    #[arg(long, value_name = "N/s", value_parser = Rate::parse)]
    rate: Option<Rate>,
    /// Run this payload instead, from a file or from standard input (-): for one message that cannot be handled as it is
    #[arg(long, value_name = "FILE")]
    payload: Option<PathBuf>,
}

/// Delete dead letters for good; the keys of halted ones go on
#[derive(Debug, clap::Args)]
pub(crate) struct DiscardArgs {
    #[command(flatten)]
    which: Which,
}

/// Let halted keys go on without their dead letters, which stay
#[derive(Debug, clap::Args)]
pub(crate) struct ReleaseArgs {
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, clap::Args)]
struct Which {
    /// The letters with these numbers, as `list` says them
    #[arg(value_name = "NUMBER")]
    numbers: Vec<i64>,
    /// All letters there are
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    filter: FilterArgs,
    /// Do it; without this, only say what would be done
    #[arg(long)]
    yes: bool,
    /// Print one JSON object: action, done (whether it was done), letters, halted, subscriptions; and interrupted
    #[arg(long)]
    json: bool,
}

/// What is done to letters.
enum Action {
    Redrive { payload: Option<Vec<u8>> },
    Discard,
    Release,
}

pub(crate) async fn redrive(database: &Database, args: RedriveArgs) -> anyhow::Result<ExitCode> {
    args.which.check();
    let payload = match &args.payload {
        None => None,
        Some(_) if args.which.numbers.len() != 1 => {
            wrong_usage("--payload is for one message: give the number of its letter, and no filter")
        }
        Some(path) => Some(read(path)?),
    };
    args.which
        .act(database, &Action::Redrive { payload }, args.rate)
        .await
}

pub(crate) async fn discard(database: &Database, args: DiscardArgs) -> anyhow::Result<ExitCode> {
    args.which.check();
    args.which.act(database, &Action::Discard, None).await
}

pub(crate) async fn release(database: &Database, args: ReleaseArgs) -> anyhow::Result<ExitCode> {
    args.which.check();
    args.which.act(database, &Action::Release, None).await
}

impl Which {
    /// Exactly one way of saying which.
    fn check(&self) {
        let ways = [!self.numbers.is_empty(), self.all, !self.filter.is_empty()];
        match ways.iter().filter(|way| **way).count() {
            1 => {}
            0 => wrong_usage("which letters? Give their numbers, a filter such as --group, or --all"),
            _ => wrong_usage("give either numbers, or a filter, or --all"),
        }
    }

    async fn act(
        &self,
        database: &Database,
        action: &Action,
        rate: Option<Rate>,
    ) -> anyhow::Result<ExitCode> {
        let stop = shutdown::on_signal()?;
        let pool = database.open(1).await?;
        let mut filter = self.filter.filter();
        // Only there is something to release.
        filter.halted |= matches!(action, Action::Release);
        let found = self.tally(&pool, &filter).await?;
        let letters: i64 = found.iter().map(|tally| tally.letters).sum();
        let mut output = Output::default();
        if !self.yes {
            self.report(&mut output, action, &found, Done::Not)?;
            return Ok(match letters {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::from(ONLY_A_PREVIEW),
            });
        }
        let newest = found.iter().map(|tally| tally.newest).max().unwrap_or(0);
        let mut pace = Pace::new(rate);
        let mut progress = Progress::new(action.doing(), letters);
        let mut queue = Queue::new(self, &filter, newest);
        let (mut done, mut interrupted) = (0, false);
        loop {
            let batch = queue.next(&pool, pace.batch()).await?;
            if batch.is_empty() {
                break;
            }
            if !pace.wait(batch.len(), &stop).await {
                interrupted = true;
                break;
            }
            done += action.run(&pool, &batch).await?;
            progress.at(done);
        }
        progress.end();
        self.report(&mut output, action, &found, Done::So { done, interrupted })?;
        if !matches!(action, Action::Discard) {
            say_who_is_missing(&pool, &found).await?;
        }
        Ok(match interrupted {
            true => ExitCode::from(shutdown::INTERRUPTED),
            false => ExitCode::SUCCESS,
        })
    }

    /// What there is of what was asked for. A number that is not there is an error.
    async fn tally(&self, pool: &PgPool, filter: &Filter) -> anyhow::Result<Vec<Tally>> {
        if self.numbers.is_empty() {
            return Ok(dead_letters::tally(pool, filter).await?);
        }
        let found = dead_letters::tally_of(pool, &self.numbers).await?;
        for number in &self.numbers {
            if found.iter().map(|tally| tally.letters).sum::<i64>() == self.numbers.len() as i64 {
                break;
            }
            if dead_letters::show(pool, *number).await?.is_none() {
                return Err(anyhow!(gone(*number)));
            }
        }
        Ok(found)
    }

    fn report(
        &self,
        output: &mut Output,
        action: &Action,
        found: &[Tally],
        done: Done,
    ) -> anyhow::Result<()> {
        let letters: i64 = found.iter().map(|tally| tally.letters).sum();
        let halted: i64 = found.iter().map(|tally| tally.halted).sum();
        if self.json {
            let (is_done, count, interrupted) = match done {
                Done::Not => (false, letters, false),
                Done::So { done, interrupted } => (true, done, interrupted),
            };
            return output.line(&serde_json::json!({
                "action": action.name(), "done": is_done, "letters": count, "halted": halted,
                "subscriptions": found, "interrupted": interrupted,
            }));
        }
        match done {
            Done::Not if letters == 0 => output.line(&format_args!(
                "no dead letters fit, so there is nothing to {}",
                action.name()
            )),
            Done::Not => {
                output.line(&table_of(found))?;
                output.line(&format_args!(
                    "\nwould {} {}; nothing was done: give --yes to do it",
                    action.name(),
                    counted(letters, "dead letter", "dead letters")
                ))
            }
            Done::So { done, interrupted } => {
                output.line(&format_args!(
                    "{} {}",
                    action.past(),
                    counted(done, "dead letter", "dead letters")
                ))?;
                if interrupted {
                    note(&format!(
                        "interrupted: {} of {letters} are left as they were",
                        letters - done
                    ));
                }
                Ok(())
            }
        }
    }
}

enum Done {
    Not,
    So { done: i64, interrupted: bool },
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Action::Redrive { .. } => "redrive",
            Action::Discard => "discard",
            Action::Release => "release",
        }
    }

    fn doing(&self) -> &'static str {
        match self {
            Action::Redrive { .. } => "redriving",
            Action::Discard => "discarding",
            Action::Release => "releasing",
        }
    }

    fn past(&self) -> &'static str {
        match self {
            Action::Redrive { .. } => "redrove",
            Action::Discard => "discarded",
            Action::Release => "released the keys of",
        }
    }

    async fn run(&self, pool: &PgPool, letters: &[i64]) -> anyhow::Result<i64> {
        Ok(match self {
            Action::Redrive { payload } => dead_letters::redrive(pool, letters, payload.as_deref()).await?,
            Action::Discard => dead_letters::discard(pool, letters).await?,
            Action::Release => dead_letters::release(pool, letters).await?,
        })
    }
}

/// The numbers of the letters, the oldest first, batch by batch.
struct Queue<'a> {
    numbers: Option<std::vec::IntoIter<i64>>,
    filter: &'a Filter,
    after: i64,
    /// A letter that dies again meanwhile has a greater number.
    newest: i64,
}

impl<'a> Queue<'a> {
    fn new(which: &Which, filter: &'a Filter, newest: i64) -> Self {
        let numbers = (!which.numbers.is_empty()).then(|| {
            let mut numbers = which.numbers.clone();
            numbers.sort_unstable();
            numbers.dedup();
            numbers.into_iter()
        });
        Self {
            numbers,
            filter,
            after: 0,
            newest,
        }
    }

    async fn next(&mut self, pool: &PgPool, size: usize) -> anyhow::Result<Vec<i64>> {
        if let Some(numbers) = &mut self.numbers {
            return Ok(numbers.take(size).collect());
        }
        let batch = dead_letters::ids(pool, self.filter, self.after, self.newest, size as i64).await?;
        self.after = batch.last().copied().unwrap_or(self.after);
        Ok(batch)
    }
}

/// What was put back waits for somebody to run it.
async fn say_who_is_missing(pool: &PgPool, found: &[Tally]) -> anyhow::Result<()> {
    for subscription in status::subscriptions(pool).await? {
        let is_concerned = found
            .iter()
            .any(|tally| tally.group_name == subscription.group_name && tally.topic == subscription.topic);
        if is_concerned && !subscription.kept_by.is_empty() {
            note(&format!(
                "{} on {} does not go on for now: {}",
                subscription.group_name,
                subscription.topic,
                crate::status::kept_by(&subscription)
            ));
        }
    }
    Ok(())
}

fn table_of(found: &[Tally]) -> Table {
    let mut table = Table::new("Dead letters", &["group", "topic", "letters", "halted"]);
    for tally in found {
        table.row([
            tally.group_name.as_str().into(),
            tally.topic.as_str().into(),
            tally.letters.into(),
            tally.halted.into(),
        ]);
    }
    table
}

fn read(path: &PathBuf) -> anyhow::Result<Vec<u8>> {
    if path.as_os_str() == "-" {
        let mut payload = Vec::new();
        std::io::stdin()
            .lock()
            .read_to_end(&mut payload)
            .context("cannot read standard input")?;
        return Ok(payload);
    }
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}
