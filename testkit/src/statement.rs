//! Statements that the testkit makes up.

use sqlx::{AssertSqlSafe, PgConnection};

use crate::Error;

/// Of commands with a name of ours, which cannot be a parameter.
pub(crate) async fn execute(connection: &mut PgConnection, sql: String) -> Result<(), Error> {
    let what = sql.clone();
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(connection)
        .await
        .map(drop)
        .map_err(Error::sql(what))
}
