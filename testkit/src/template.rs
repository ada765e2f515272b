//! The database with Postbox's schema that test databases are copies of.
//!
//! Its name has the fingerprint of the migrations, so that it is made anew when they change.

use sqlx::postgres::PgPoolOptions;
use sqlx::{PgConnection, PgPool};

use crate::statement::execute;
use crate::{Error, TestPostgres, removal, schema, url};

const PREFIX: &str = "postbox_template_";

/// Any number that other users of advisory locks in the maintenance database hardly use: "postbox" in ASCII.
pub(crate) const LOCK: i64 = 0x0070_6f73_7462_6f78;

/// The template's name. It is there on return.
pub(crate) async fn ensure(connection: &mut PgConnection, server: &TestPostgres) -> Result<String, Error> {
    let name = format!("{PREFIX}{}", schema::fingerprint());
    if exists(connection, &name).await? {
        return Ok(name);
    }
    // One process makes it, the others wait.
    lock(connection, "select pg_advisory_lock($1)").await?;
    let made = async {
        if exists(connection, &name).await? {
            return Ok(());
        }
        if !server.is_of_this_machine() {
            drop_others(connection, server, &name).await?;
        }
        make(connection, server, &name, None, schema::migrate).await
    };
    let made = made.await;
    lock(connection, "select pg_advisory_unlock($1)").await?;
    made.map(|()| name)
}

/// A template with more in it: `name` is its own, and is there on return. `fill` is called where it is not.
#[cfg(feature = "kit")]
pub(crate) async fn ensure_more(
    connection: &mut PgConnection,
    server: &TestPostgres,
    more: &str,
    fill: impl AsyncFnOnce(&PgPool) -> Result<(), Error>,
) -> Result<String, Error> {
    let base = ensure(connection, server).await?;
    let few: String = schema::fingerprint().chars().take(12).collect();
    let name = format!("{PREFIX}{few}_{more}");
    if exists(connection, &name).await? {
        return Ok(name);
    }
    lock(connection, "select pg_advisory_lock($1)").await?;
    let made = match exists(connection, &name).await {
        Ok(false) => make(connection, server, &name, Some(&base), fill).await,
        other => other.map(drop),
    };
    lock(connection, "select pg_advisory_unlock($1)").await?;
    made.map(|()| name)
}

async fn make(
    connection: &mut PgConnection,
    server: &TestPostgres,
    name: &str,
    base: Option<&str>,
    fill: impl AsyncFnOnce(&PgPool) -> Result<(), Error>,
) -> Result<(), Error> {
    // It gets its name when it is complete. A process that died here leaves the other name.
    let draft = format!("{name}_draft");
    execute(
        connection,
        format!("drop database if exists {draft} with (force)"),
    )
    .await?;
    let template = base.map_or(String::new(), |base| format!(" template {base}"));
    execute(connection, format!("create database {draft}{template}")).await?;
    let pool = PgPoolOptions::new()
        .max_connections(2)
        .connect(&url::with_database(server.url(), &draft))
        .await
        .map_err(Error::sql(format!("connect to {draft}")))?;
    let filled = fill(&pool).await;
    pool.close().await;
    filled?;
    // A database that others are connected to cannot be copied, so nobody may be.
    execute(
        connection,
        format!("alter database {draft} with allow_connections false"),
    )
    .await?;
    execute(connection, format!("alter database {draft} rename to {name}")).await
}

/// Those of former migrations, which would pile up in a server that stays. Another checkout that still needs one
/// makes it again.
async fn drop_others(connection: &mut PgConnection, server: &TestPostgres, name: &str) -> Result<(), Error> {
    let others: Vec<String> = sqlx::query_scalar(
        "select datname from pg_database where starts_with(datname, $1) and not starts_with(datname, $2)",
    )
    .bind(PREFIX)
    .bind(name)
    .fetch_all(connection)
    .await
    .map_err(Error::sql("look for templates"))?;
    let mut connection = removal::connect(server.url()).await?;
    for other in others.iter().filter(|other| is_plain(other)) {
        // Held up, or another user's: it can stay.
        let _ = removal::drop_database(&mut connection, other).await;
    }
    Ok(())
}

/// Needs no quotes in SQL. Names that we give are; others in the user's server may not be.
pub(crate) fn is_plain(name: &str) -> bool {
    name.chars()
        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

async fn exists(connection: &mut PgConnection, name: &str) -> Result<bool, Error> {
    sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(name)
        .fetch_one(connection)
        .await
        .map_err(Error::sql("look for the template database"))
}

async fn lock(connection: &mut PgConnection, sql: &'static str) -> Result<(), Error> {
    sqlx::query(sql)
        .bind(LOCK)
        .execute(connection)
        .await
        .map(drop)
        .map_err(Error::sql("lock the making of the template database"))
}
