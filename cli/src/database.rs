//! The connection to the database.

use std::time::Duration;

use anyhow::Context;
use postbox_core::{link, url};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgPool};

use crate::usage::wrong_usage;

#[derive(Debug, clap::Args)]
pub(crate) struct Database {
    /// The database: postgres://user:password@host:5432/name; of several servers (host1:5432,host2:5432) the first that can be written to
    #[arg(
        long,
        env = "DATABASE_URL",
        hide_env_values = true,
        value_name = "URL",
        global = true
    )]
    database_url: Option<String>,
    /// The same database, not through a transaction pooler, for what needs that: `run`, `consume`, `migrate` and `rebase`
    #[arg(
        long,
        env = "DIRECT_DATABASE_URL",
        hide_env_values = true,
        value_name = "URL",
        global = true
    )]
    direct_database_url: Option<String>,
}

impl Database {
    /// A pool on a database that answers and has the schema that this program needs.
    pub(crate) async fn open(&self, connections: u32) -> anyhow::Result<PgPool> {
        checked(self.open_any(connections).await?).await
    }

    /// As [`open`](Self::open), whatever schema there is.
    pub(crate) async fn open_any(&self, connections: u32) -> anyhow::Result<PgPool> {
        let answers = first_that_answers(self.servers()).await;
        let options = answers.context("(from DATABASE_URL or --database-url)")?;
        Ok(pool(options, connections))
    }

    /// As [`open`](Self::open), for what a transaction pooler would not do.
    pub(crate) async fn open_direct(&self, connections: u32) -> anyhow::Result<PgPool> {
        checked(self.open_any_direct(connections).await?).await
    }

    /// As [`open_any`](Self::open_any), for what a transaction pooler would not do.
    pub(crate) async fn open_any_direct(&self, connections: u32) -> anyhow::Result<PgPool> {
        let Some(url) = self.direct_database_url.as_deref().filter(|url| !url.is_empty()) else {
            return self.open_any(connections).await;
        };
        let servers = url::servers(url).unwrap_or_else(|error| {
            wrong_usage(format!(
                "the direct database URL (DIRECT_DATABASE_URL or --direct-database-url) is not of the form postgres://user:password@host:5432/name: {error}"
            ))
        });
        let answers = first_that_answers(servers).await;
        let options = answers.context("(from DIRECT_DATABASE_URL or --direct-database-url)")?;
        Ok(pool(options, connections))
    }

    /// For a process of its own on the same database. Only after it was [opened](Self::open).
    pub(crate) fn url(&self) -> &str {
        self.database_url.as_deref().unwrap_or_default()
    }

    /// All that the URL names.
    pub(crate) fn servers(&self) -> Vec<PgConnectOptions> {
        let url = self.database_url.as_deref().filter(|url| !url.is_empty()).unwrap_or_else(|| {
            wrong_usage("no database is named: set DATABASE_URL or give --database-url, for example postgres://user:password@localhost:5432/app")
        });
        url::servers(url).unwrap_or_else(|error| {
            wrong_usage(format!(
                "the database URL (DATABASE_URL or --database-url) is not of the form postgres://user:password@host:5432/name: {error}"
            ))
        })
    }
}

fn pool(options: PgConnectOptions, connections: u32) -> PgPool {
    link::pool(options.application_name("postbox command"), connections, "")
}

async fn checked(pool: PgPool) -> anyhow::Result<PgPool> {
    postbox::check_schema(&pool).await?;
    Ok(pool)
}

/// Of several the first that can be written to, or else that answers.
async fn first_that_answers(servers: Vec<PgConnectOptions>) -> anyhow::Result<PgConnectOptions> {
    let several = servers.len() > 1;
    let (mut standby, mut failed) = (None, None);
    for options in servers {
        match answers(&options, several).await {
            Ok(true) => return Ok(options),
            Ok(false) => standby = standby.or(Some(options)),
            Err(error) => {
                let error = error.context(format!("cannot connect to {}", describe(&options)));
                failed = Some(match failed {
                    Some(before) => error.context(format!("{before:#}")),
                    None => error,
                });
            }
        }
    }
    standby.ok_or_else(|| failed.unwrap_or_else(|| anyhow::anyhow!("the URL names no server")))
}

/// Whether it can be written to, if that is asked. A pool would try again and again, and then say that it timed out instead of why.
async fn answers(options: &PgConnectOptions, asked: bool) -> anyhow::Result<bool> {
    let answer = async {
        let mut connection = options.connect().await?;
        let writable = match asked {
            true => {
                sqlx::query_scalar("SELECT NOT pg_catalog.pg_is_in_recovery()")
                    .fetch_one(&mut connection)
                    .await?
            }
            false => true,
        };
        // It has answered; how it closes does not matter.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, connection.close()).await;
        Ok(writable)
    };
    link::in_time(link::CONNECT_TIMEOUT, "connecting", answer)
        .await
        .map_err(|error: sqlx::Error| error.into())
}

const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

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
