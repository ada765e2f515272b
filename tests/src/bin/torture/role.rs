//! What all processes of a run have in common: how they are told what to be, and how they end.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::history::Log;

#[derive(Debug, Args)]
pub(crate) struct RoleArgs {
    /// Name of this process, and of its history
    #[arg(long)]
    pub(crate) name: String,
    #[arg(long)]
    pub(crate) seed: u64,
    #[arg(long)]
    pub(crate) folder: PathBuf,
    /// Of the program: consumers of version 1 have no handlers for the newer types
    #[arg(long, default_value_t = 2)]
    pub(crate) version: u8,
    #[arg(long, env = "DATABASE_URL")]
    pub(crate) database_url: String,
}

/// A process of a run.
pub(crate) struct Role {
    pub(crate) pool: PgPool,
    pub(crate) log: Log,
    /// Cancelled by SIGTERM.
    pub(crate) stop: CancellationToken,
}

impl Role {
    /// `settings` are what this application sets on each of its connections, whatever the database defaults to.
    pub(crate) fn begin(args: &RoleArgs, connections: u32, settings: &'static str) -> anyhow::Result<Self> {
        tracing_subscriber::fmt()
            .with_env_filter(
                EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sqlx=error")),
            )
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
        let options: PgConnectOptions = args.database_url.parse()?;
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(Duration::from_secs(5))
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    sqlx::raw_sql(settings).execute(connection).await?;
                    Ok(())
                })
            })
            .connect_lazy_with(options);
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let token = stop.clone();
        tokio::spawn(async move {
            terminate.recv().await;
            token.cancel();
        });
        // Its standard input is a pipe from the process that judges; nobody is left behind when that one is gone. A thread, because the
        // runtime would wait for such a read at its end.
        std::thread::spawn(|| {
            let _ = std::io::stdin().read(&mut [0; 1]);
            std::process::exit(3);
        });
        Ok(Self {
            pool,
            log: Log::create(&args.folder, &args.name)?,
            stop,
        })
    }
}

/// Tries until it works, since the server may be down just now; `None`: this process was told to stop.
pub(crate) async fn until_it_starts<T, E: std::fmt::Display>(
    stop: &CancellationToken,
    start: impl AsyncFn() -> Result<T, E>,
) -> Option<T> {
    loop {
        match start().await {
            Ok(started) => return Some(started),
            Err(error) => tracing::warn!(%error, "cannot start yet"),
        }
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(Duration::from_millis(300)) => {}
        }
    }
}
