//! Dropping databases without being held up.
//!
//! `DROP DATABASE` waits for every session of the server to take note, and one whose client has stopped reading
//! never does. So it is given up after a while; the database is invalid then, and can still be dropped later.

use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, PgConnection};

use crate::Error;
use crate::statement::execute;

/// Some ten milliseconds are usual.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(2);

/// A connection whose statements are given up after [`TIMEOUT`].
pub(crate) async fn connect(server_url: &str) -> Result<PgConnection, Error> {
    let connecting = || Error::sql("connect to the server to drop databases");
    let options: PgConnectOptions = server_url.parse().map_err(connecting())?;
    let timeout = TIMEOUT.as_millis().to_string();
    options
        .options([("statement_timeout", timeout)])
        .connect()
        .await
        .map_err(connecting())
}

/// A name that needs no quotes. Its sessions are ended.
pub(crate) async fn drop_database(connection: &mut PgConnection, name: &str) -> Result<(), Error> {
    execute(connection, format!("drop database if exists {name} with (force)")).await
}
