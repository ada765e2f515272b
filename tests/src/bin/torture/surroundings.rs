//! What the database gives to new connections: settings that nobody expects, as an administrator may set them at any time.

use postbox_testkit::PERVERSE;
use sqlx::{AssertSqlSafe, PgPool};

use crate::plan;

/// What this program sets on its own connections.
pub(crate) const OWN: &str = "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_session_timeout = 0; \
     SET idle_in_transaction_session_timeout = 0; SET default_transaction_isolation = 'read committed'; \
     SET default_transaction_read_only = off; SET default_transaction_deferrable = off; SET standard_conforming_strings = on; \
     SET enable_indexscan = on; SET enable_nestloop = on; SET jit = off; SET work_mem = '64MB'; SET synchronous_commit = on";

/// Those that are chosen, instead of whatever was set before.
pub(crate) async fn pervert(pool: &PgPool, database: &str, which: u64) -> Result<(), sqlx::Error> {
    let mut statements = vec![format!("ALTER DATABASE {database} RESET ALL")];
    for (number, (name, value)) in PERVERSE.iter().enumerate() {
        if plan::is_chosen(which, number) {
            statements.push(format!("ALTER DATABASE {database} SET {name} = {value}"));
        }
    }
    sqlx::raw_sql(AssertSqlSafe(statements.join("; ")))
        .execute(pool)
        .await?;
    Ok(())
}

pub(crate) async fn reset(pool: &PgPool, database: &str) -> Result<(), sqlx::Error> {
    pervert(pool, database, 0).await
}
