//! `postbox doctor`

use postbox_dispatcher::doctor::{self, Severity};

use crate::database::Database;
use crate::output::{Output, in_line};

/// Say what is wrong with the database, its settings or the subscriptions, and what mends it
///
/// Looks for: a missing or other schema, missing privileges, no dispatcher, subscriptions without a consumer and what they hold back, slots that
/// should have been truncated, old and prepared transactions, replication slots, and settings of the server that matter. It only reads.
/// Exit code 0: it looked, and nothing it found is an error; 1: there is an error among the findings, or it could not look. Warnings are no failure but
/// with --fail-on warning, notes never are.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print one JSON array; an element has severity (error, warning, note), name, what, mend
    #[arg(long)]
    json: bool,
    /// Which findings are a failure: a probe may want warnings to be one
    #[arg(long, value_enum, default_value_t = FailOn::Error)]
    fail_on: FailOn,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum FailOn {
    Error,
    Warning,
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
                "{severity}: {} [{}]\n    hint: {}",
                in_line(&finding.what),
                finding.name,
                in_line(&finding.hint)
            ))?;
        }
    }
    let fails = |finding: &&doctor::Finding| match args.fail_on {
        FailOn::Error => finding.severity == Severity::Error,
        FailOn::Warning => finding.severity <= Severity::Warning,
    };
    let failures = findings.iter().filter(fails).count();
    let what = match args.fail_on {
        FailOn::Error => "errors",
        FailOn::Warning => "errors or warnings",
    };
    anyhow::ensure!(
        failures == 0,
        "{failures} of {} findings are {what}",
        findings.len()
    );
    Ok(())
}
