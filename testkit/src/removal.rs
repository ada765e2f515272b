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

/// So often it is looked whether sessions that were ended are gone, and so long after each look.
const GOING: u32 = 50;
const A_MOMENT: Duration = Duration::from_millis(2);

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
    end_sessions(connection, name).await?;
    execute(connection, format!("drop database if exists {name} with (force)")).await
}

/// Waits until the sessions are gone: who drops a database with some left sleeps for a tenth of a second before it looks again. What is not gone soon is for
/// that.
async fn end_sessions(connection: &mut PgConnection, name: &str) -> Result<(), Error> {
    const END: &str = "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()";
    for _ in 0..GOING {
        let left: i64 = sqlx::query_scalar(END)
            .bind(name)
            .fetch_one(&mut *connection)
            .await
            .map_err(Error::sql(format!("end the sessions of {name}")))?;
        if left == 0 {
            break;
        }
        tokio::time::sleep(A_MOMENT).await;
    }
    Ok(())
}
