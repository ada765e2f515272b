//! The connection to the database.

use std::time::Duration;

use anyhow::Context;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgPool};

use crate::wrong_usage;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub(crate) struct Database {
    /// The database: postgres://user:password@host:5432/name
    #[arg(
        long,
        env = "DATABASE_URL",
        hide_env_values = true,
        value_name = "URL",
        global = true
    )]
    database_url: Option<String>,
}

impl Database {
    /// A pool on a database that answers and has the schema that this program needs.
    pub(crate) async fn open(&self, connections: u32) -> anyhow::Result<PgPool> {
        let pool = self.open_any(connections).await?;
        postbox::check_schema(&pool).await?;
        Ok(pool)
    }

    /// As [`open`](Self::open), whatever schema there is.
    pub(crate) async fn open_any(&self, connections: u32) -> anyhow::Result<PgPool> {
        let options = self.options();
        // A pool would try again and again, and then say that it timed out instead of why.
        let connection = tokio::time::timeout(CONNECT_TIMEOUT, options.connect())
            .await
            .map_err(|_| anyhow::anyhow!("no answer within {} s", CONNECT_TIMEOUT.as_secs()))
            .and_then(|connected| connected.map_err(Into::into))
            .with_context(|| {
                format!(
                    "cannot connect to {} (from DATABASE_URL or --database-url)",
                    describe(&options)
                )
            })?;
        // It has answered; how it closes does not matter.
        let _ = connection.close().await;
        Ok(PgPoolOptions::new()
            .max_connections(connections)
            .connect_lazy_with(options))
    }

    /// For a process of its own on the same database. Only after it was [opened](Self::open).
    pub(crate) fn url(&self) -> &str {
        self.database_url.as_deref().unwrap_or_default()
    }

    fn options(&self) -> PgConnectOptions {
        let url = self.database_url.as_deref().filter(|url| !url.is_empty()).unwrap_or_else(|| {
            wrong_usage("no database is named: set DATABASE_URL or give --database-url, for example postgres://user:password@localhost:5432/app")
        });
        // The URL itself is not repeated: it may hold a password.
        url.parse().unwrap_or_else(|error| {
            wrong_usage(format!(
                "the database URL (DATABASE_URL or --database-url) is not of the form postgres://user:password@host:5432/name: {error}"
            ))
        })
    }
}

fn describe(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or(options.get_username());
    let host = options
        .get_socket()
        .map_or(options.get_host().into(), |socket| socket.to_string_lossy());
    format!(
        "database {database:?} at {host}:{} as user {:?}",
        options.get_port(),
        options.get_username()
    )
}
