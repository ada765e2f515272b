//! `postbox run`

use std::time::Duration;

use postbox_dispatcher::{Dispatcher, retention};
use tracing::info;

use crate::database::Database;
use crate::{shutdown, span};

/// Run the dispatcher, which puts committed messages in order and wakes their consumers
///
/// Runs until SIGINT or SIGTERM and logs to standard error (RUST_LOG, default info). It survives restarts of the database. Any number may
/// run at once, for availability; none is the leader. It needs a direct connection, not one through a transaction pooler.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Create or upgrade the schema first, as `postbox migrate` does
    #[arg(long)]
    migrate: bool,
    /// The least pause between two steps under load, 1ms to 1s: a longer one costs less a message and adds its length to the latency
    #[arg(long, value_name = "SPAN", default_value = "1ms", value_parser = tick)]
    tick: Duration,
    /// How long messages are kept at least, 1m to 3650d, whoever has consumed them; stored in the database, which says 3d at first
    #[arg(long, value_name = "SPAN", value_parser = span::parse)]
    retention: Option<Duration>,
    /// Drop subscriptions, with their failed messages and dead letters, that had no live consumer for so long, or `never`; stored in the
    /// database, which says never at first
    #[arg(long, value_name = "SPAN", value_parser = expiry)]
    expire_abandoned: Option<Expiry>,
    /// The same for durable broadcasts of nodes, of which each node has subscriptions of its own; the database says 7d at first
    #[arg(long, value_name = "SPAN", value_parser = expiry)]
    expire_nodes: Option<Expiry>,
}

pub(crate) async fn run(database: &Database, args: Args) -> anyhow::Result<()> {
    let stop = shutdown::on_signal()?;
    let pool = database.open_any_direct(2).await?;
    if args.migrate {
        let migrated = postbox::migrate(&pool).await?;
        info!(schema_version = postbox::SCHEMA_VERSION, applied = ?migrated.steps, functions = migrated.functions, "migrated");
    }
    let mut dispatcher = Dispatcher::new(pool.clone()).tick(args.tick);
    if let Some(keep) = args.retention {
        dispatcher = dispatcher.retention(keep);
    }
    if let Some(Expiry(after)) = args.expire_abandoned {
        postbox::check_schema(&pool).await?;
        retention::set_expiry(&pool, after).await?;
    }
    if let Some(Expiry(after)) = args.expire_nodes {
        postbox::check_schema(&pool).await?;
        retention::set_node_expiry(&pool, after).await?;
    }
    dispatcher.run_until(stop.cancelled_owned()).await?;
    info!("stopped");
    Ok(())
}

fn tick(text: &str) -> Result<Duration, String> {
    let tick = span::parse(text)?;
    match (Duration::from_millis(1)..=Duration::from_secs(1)).contains(&tick) {
        true => Ok(tick),
        false => Err("the tick is 1ms to 1s".to_owned()),
    }
}

#[derive(Debug, Clone, Copy)]
struct Expiry(Option<Duration>);

fn expiry(text: &str) -> Result<Expiry, String> {
    if text == "never" {
        return Ok(Expiry(None));
    }
    match span::parse(text)? {
        Duration::ZERO => Err("it is more than zero, or never".to_owned()),
        after => Ok(Expiry(Some(after))),
    }
}
