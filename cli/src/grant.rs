//! `postbox grant`

use clap::ValueEnum;

use crate::database::Database;
use crate::output::Output;

/// Let a role publish, consume, operate or look, and no more
///
/// A publisher publishes, schedules, and cancels and reschedules what it has scheduled. A consumer runs handlers; those that publish need a publisher, too. An
/// operator redrives and discards dead letters, moves, pauses and drops subscriptions, and changes schedules. A viewer reads everything, as status and doctor do. A
/// role may be several. Run it as the owner of the schema; dispatchers run as the owner, too.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The role
    role: String,
    /// What it becomes
    #[arg(long = "as", value_name = "KIND", value_enum)]
    kind: Kind,
    /// Take it back: of what the role may do in the schema postbox, only its other kinds stay
    #[arg(long)]
    revoke: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Publisher,
    Consumer,
    Operator,
    Viewer,
}

const GRANT: &str = "SELECT postbox.grant(quote_ident($1)::regrole, $2)";
const REVOKE: &str = "SELECT postbox.revoke(quote_ident($1)::regrole, $2)";

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    let kind = match args.kind {
        Kind::Publisher => "publisher",
        Kind::Consumer => "consumer",
        Kind::Operator => "operator",
        Kind::Viewer => "viewer",
    };
    let (sql, done) = match args.revoke {
        false => (GRANT, "is now"),
        true => (REVOKE, "is no longer"),
    };
    sqlx::query(sql)
        .bind(&args.role)
        .bind(kind)
        .execute(&database.open(1).await?)
        .await?;
    Output::default().line(&format_args!("role {} {done} {kind}", args.role))
}
