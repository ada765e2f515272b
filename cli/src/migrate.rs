//! `postbox migrate`

use postbox::SCHEMA_VERSION;

use crate::database::Database;
use crate::output::Output;

/// Create Postbox's schema in the database, or upgrade it
///
/// All in one transaction: after an error the database is as before. Does nothing when the schema is up to date, so it can run at every
/// deployment, and at once from many places. A schema of a newer program is left as it is; it is refused if this program does not work with it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print one JSON object: applied (the numbers of the steps applied now), functions (whether they were replaced now), schema_version
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    let pool = database.open_any_direct(1).await?;
    let migrated = postbox::migrate(&pool).await?;
    let mut output = Output::default();
    if args.json {
        return output.line(&serde_json::json!({
            "applied": migrated.steps, "functions": migrated.functions, "schema_version": SCHEMA_VERSION
        }));
    }
    for version in &migrated.steps {
        output.line(&format_args!("applied migration {version}"))?;
    }
    if migrated.functions {
        output.line(&"replaced the functions")?;
    }
    match migrated.steps.is_empty() {
        true => output.line(&format_args!(
            "up to date: the schema is at version {SCHEMA_VERSION}"
        )),
        false => output.line(&format_args!("the schema is at version {SCHEMA_VERSION}")),
    }
}
