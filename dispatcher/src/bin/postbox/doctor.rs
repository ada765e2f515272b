//! `postbox doctor`

use postbox_dispatcher::doctor::{self, Severity};

use crate::database::Database;
use crate::output::Output;

/// Say what is wrong with the database, its settings or the subscriptions, and what mends it
///
/// Looks for: a missing or other schema, missing privileges, no dispatcher, subscriptions without a consumer and what they hold back, slots that
/// should have been truncated, old and prepared transactions, replication slots, and settings of the server that matter. It only reads.
/// Fails (exit code 1) if there is an error among the findings; warnings and notes are no failure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print one JSON array; an element has severity (error, warning, note), name, what, mend
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    let pool = database.open_any(1).await?;
    let findings = doctor::examine(&pool).await?;
    let mut output = Output::default();
    if args.json {
        output.line(&serde_json::to_string(&findings)?)?;
    } else if findings.is_empty() {
        output.line(&"nothing is wrong")?;
    } else {
        for finding in &findings {
            let severity = match finding.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
                _ => "note",
            };
            output.line(&format_args!(
                "{severity}: {} [{}]\n    mend: {}",
                finding.what, finding.name, finding.mend
            ))?;
        }
    }
    let errors = findings
        .iter()
        .filter(|finding| finding.severity == Severity::Error)
        .count();
    anyhow::ensure!(errors == 0, "{errors} of {} findings are errors", findings.len());
    Ok(())
}
