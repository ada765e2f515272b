//! A database role with no rights but those it is given, dropped at the end.

use postbox_testkit::TestDatabase;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgPool};

pub(crate) struct Role {
    pub(crate) name: String,
    /// What it does, it does here.
    pub(crate) pool: PgPool,
}

impl Role {
    pub(crate) async fn new(db: &TestDatabase) -> Self {
        Self::named(db, "role").await
    }

    /// One of several.
    #[allow(dead_code, reason = "not every suite has several")]
    pub(crate) async fn named(db: &TestDatabase, prefix: &str) -> Self {
        let name = format!("{prefix}_{}", db.name());
        run(db, format!("CREATE ROLE {name}")).await;
        let options: PgConnectOptions = db.url().parse().expect("the URL of the database");
        let pool = PgPoolOptions::new()
            .max_connections(4)
            .connect_lazy_with(options.options([("role", name.as_str())]));
        Self { name, pool }
    }

    /// Roles belong to the server, so they do not go with the database.
    pub(crate) async fn drop(self, db: &TestDatabase) {
        self.pool.close().await;
        run(db, format!("DROP OWNED BY {0}; DROP ROLE {0}", self.name)).await;
    }
}

async fn run(db: &TestDatabase, sql: String) {
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(db.pool())
        .await
        .expect("roles");
}
