//! Databases in other encodings than UTF8: refused with the reason, before anything is there, and by doctor where a schema came by a restore.

use postbox::Error;
use postbox_consumer::{Consumer, HandlerDefinition};
use postbox_dispatcher::{Dispatcher, doctor};
use postbox_testkit::TestDatabase;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgPool};

const ENCODINGS: [&str; 4] = ["SQL_ASCII", "LATIN1", "WIN1252", "EUC_JP"];

/// A database in this encoding, in the server of `db`.
async fn in_encoding(db: &TestDatabase, encoding: &str) -> (String, PgPool) {
    let name = format!("{}_{}", db.name(), encoding.to_lowercase());
    run(
        db.pool(),
        format!(
            "CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        ),
    )
    .await;
    let options: PgConnectOptions = db.url().parse().unwrap();
    let pool = PgPoolOptions::new()
        .max_connections(4)
        .connect_lazy_with(options.database(&name));
    (name, pool)
}

async fn run(pool: &PgPool, sql: String) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(pool).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_in_another_encoding_is_refused_with_the_reason() {
    let db = TestDatabase::new().await.unwrap();
    for encoding in ENCODINGS {
        let (name, pool) = in_encoding(&db, encoding).await;
        let error = postbox::migrate(&pool).await.expect_err(encoding);
        assert!(
            matches!(&error, Error::Encoding { database, .. } if *database == name),
            "{error:?}"
        );
        let says = error.to_string();
        assert!(says.contains(encoding) && says.contains("UTF8"), "{says}");
        let schemas: i64 = sqlx::query_scalar("SELECT count(*) FROM pg_namespace WHERE nspname = 'postbox'")
            .fetch_one(&pool)
            .await
            .unwrap();
        assert_eq!(schemas, 0, "nothing was made");

        // As after a restore: nothing starts there, and doctor says why.
        let findings = doctor::examine(&pool).await.unwrap();
        assert!(
            findings.iter().any(|finding| finding.what.contains(encoding)),
            "{findings:?}"
        );
        let error = Dispatcher::new(pool.clone()).start().await.expect_err(encoding);
        assert!(matches!(error, Error::Encoding { .. }), "{error:?}");
        let handler = HandlerDefinition::new("h")
            .group("g")
            .topic("t")
            .call(|_| Box::pin(async { Ok(()) }));
        let error = Consumer::new(pool.clone())
            .handlers([handler])
            .start()
            .await
            .expect_err(encoding);
        assert!(error.to_string().contains(encoding), "{error}");
        pool.close().await;
        run(db.pool(), format!("DROP DATABASE {name} WITH (FORCE)")).await;
    }
}
