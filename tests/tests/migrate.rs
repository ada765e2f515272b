//! The schema: made once by many at a time, never from an older program, and explained in the catalogue.

use std::process::{Command, Stdio};

use postbox::{Error, Migrated, SCHEMA_VERSION, check_schema, migrate};
use postbox_testkit::TestDatabase;
use sqlx::{AssertSqlSafe, PgPool};

mod role;
use role::Role;

/// Set for the processes that migrate.
const DATABASE: &str = "POSTBOX_TEST_MIGRATE";

async fn all_versions(pool: &PgPool) -> Vec<i32> {
    sqlx::query_scalar("SELECT version FROM postbox.schema_migration ORDER BY version")
        .fetch_all(pool)
        .await
        .expect("the register")
}

async fn run(pool: &PgPool, sql: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(sql.into()))
        .execute(pool)
        .await
        .expect("a statement of the test");
}

/// Everything that a migration could have made or changed.
async fn catalogue(pool: &PgPool) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT c.oid || ' ' || c.relname || ' ' || c.xmin FROM pg_class c WHERE c.relnamespace = 'postbox'::regnamespace \
         UNION ALL \
         SELECT p.oid || ' ' || p.proname || ' ' || p.xmin FROM pg_proc p WHERE p.pronamespace = 'postbox'::regnamespace \
         UNION ALL SELECT version || ' ' || checksum || ' ' || xmin FROM postbox.schema_migration ORDER BY 1",
    )
    .fetch_all(pool)
    .await
    .expect("the catalogue")
}

#[tokio::test]
async fn tasks_that_migrate_at_once_make_the_schema_once() {
    let db = TestDatabase::empty().await.unwrap();
    let pools: Vec<PgPool> = (0..8).map(|_| db.connect_pool(1)).collect();
    let done = futures_util::future::join_all(pools.iter().map(migrate)).await;
    let applied: Vec<Vec<i32>> = done
        .into_iter()
        .map(|result| result.expect("migrated").steps)
        .collect();
    let everything: Vec<i32> = (1..=SCHEMA_VERSION).collect();
    assert_eq!(applied.concat(), everything, "one of them did all: {applied:?}");
    assert_eq!(all_versions(db.pool()).await, everything);
    check_schema(db.pool()).await.expect("the schema is as needed");
}

#[tokio::test]
async fn processes_that_migrate_at_once_all_succeed() {
    let db = TestDatabase::empty().await.unwrap();
    let program = std::env::current_exe().expect("this program");
    let processes: Vec<_> = (0..4)
        .map(|_| {
            Command::new(&program)
                .args(["--exact", "as_a_process_that_migrates", "--nocapture"])
                .env(DATABASE, db.url())
                .stdout(Stdio::null())
                .spawn()
                .expect("a process")
        })
        .collect();
    for mut process in processes {
        assert!(process.wait().expect("its end").success());
    }
    assert_eq!(
        all_versions(db.pool()).await,
        (1..=SCHEMA_VERSION).collect::<Vec<_>>()
    );
}

/// Not a test of its own: what the processes of the test above do.
#[tokio::test]
async fn as_a_process_that_migrates() {
    if let Ok(url) = std::env::var(DATABASE) {
        let pool = PgPool::connect(&url).await.expect("a connection");
        migrate(&pool).await.expect("migrated");
    }
}

#[tokio::test]
async fn migrating_again_changes_nothing() {
    let db = TestDatabase::empty().await.unwrap();
    let migrated = migrate(db.pool()).await.unwrap();
    assert_eq!(migrated.steps, (1..=SCHEMA_VERSION).collect::<Vec<_>>());
    assert!(migrated.functions);
    let before = catalogue(db.pool()).await;
    assert_eq!(migrate(db.pool()).await.unwrap(), Migrated::default());
    assert_eq!(catalogue(db.pool()).await, before);
}

#[tokio::test]
async fn a_database_that_defaults_to_stricter_isolation_is_migrated_by_many_at_once() {
    let db = TestDatabase::empty().await.unwrap();
    let strict = format!(
        "ALTER DATABASE {} SET default_transaction_isolation = 'serializable'",
        db.name()
    );
    run(db.pool(), strict).await;
    let pools: Vec<PgPool> = (0..6).map(|_| db.connect_pool(1)).collect();
    for pool in &pools {
        sqlx::query("SELECT 1").execute(pool).await.expect("connected");
    }
    // All have begun before the first can end.
    let mut gate = db.connect().await.unwrap();
    sqlx::query("SELECT pg_advisory_lock(1347571761, 4)")
        .execute(&mut gate)
        .await
        .unwrap();
    let opening = async {
        postbox_testkit::eventually(std::time::Duration::from_secs(10), async || {
            let waiting: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM pg_stat_activity a \
                 WHERE a.datname = current_database() AND a.xact_start IS NOT NULL AND a.pid <> pg_backend_pid()",
            )
            .fetch_one(db.pool())
            .await
            .map_err(|error| error.to_string())?;
            if waiting == 6 {
                Ok(())
            } else {
                Err(format!("{waiting} wait"))
            }
        })
        .await;
        sqlx::query("SELECT pg_advisory_unlock(1347571761, 4)")
            .execute(&mut gate)
            .await
            .unwrap();
    };
    let (done, ()) = tokio::join!(futures_util::future::join_all(pools.iter().map(migrate)), opening);
    for result in done {
        result.expect("migrated");
    }
}

/// As a release to come would leave it.
async fn migrated_by_a_newer_release(pool: &PgPool, compatible_from: i32) -> i32 {
    let newer = SCHEMA_VERSION + 1;
    run(
        pool,
        format!(
            "INSERT INTO postbox.schema_migration (version, name, checksum) VALUES ({newer}, 'x', 'y'); \
             UPDATE postbox.installation SET program = '999.0.0', functions = 'theirs', compatible_from = {compatible_from}"
        ),
    )
    .await;
    newer
}

#[tokio::test]
async fn a_newer_schema_that_no_longer_works_is_refused_and_left_as_it_is() {
    let db = TestDatabase::new().await.unwrap();
    let newer = migrated_by_a_newer_release(db.pool(), SCHEMA_VERSION + 1).await;
    let before = catalogue(db.pool()).await;
    for result in [migrate(db.pool()).await.map(drop), check_schema(db.pool()).await] {
        match result {
            Err(Error::SchemaNewer { found, known }) => assert_eq!((found, known), (newer, SCHEMA_VERSION)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(catalogue(db.pool()).await, before);
}

#[tokio::test]
async fn a_newer_schema_that_works_with_this_program_is_used_as_it_is() {
    let db = TestDatabase::new().await.unwrap();
    migrated_by_a_newer_release(db.pool(), SCHEMA_VERSION).await;
    let before = catalogue(db.pool()).await;
    assert_eq!(migrate(db.pool()).await.unwrap(), Migrated::default());
    check_schema(db.pool()).await.expect("it works with it");
    let dispatcher = postbox_dispatcher::Dispatcher::new(db.pool().clone())
        .start()
        .await
        .expect("a process that starts again goes on");
    dispatcher.shutdown().await;
    assert_eq!(catalogue(db.pool()).await, before);
}

async fn installed(pool: &PgPool) -> (String, String) {
    sqlx::query_as("SELECT program, functions FROM postbox.installation")
        .fetch_one(pool)
        .await
        .expect("the installation")
}

/// A function in a form that this program does not have.
const THEIRS: &str = "CREATE OR REPLACE FUNCTION postbox.next_offset(of_topic text) RETURNS bigint LANGUAGE sql AS 'SELECT 77::bigint'";

async fn next_offset(pool: &PgPool) -> i64 {
    sqlx::query_scalar("SELECT postbox.next_offset('x')")
        .fetch_one(pool)
        .await
        .expect("an offset")
}

#[tokio::test]
async fn functions_of_an_older_release_are_replaced_and_those_of_a_newer_one_stay() {
    let db = TestDatabase::new().await.unwrap();
    let (program, functions) = installed(db.pool()).await;
    run(db.pool(), THEIRS).await;
    run(
        db.pool(),
        "UPDATE postbox.installation SET program = '0.0.9', functions = 'theirs'",
    )
    .await;
    let migrated = migrate(db.pool()).await.unwrap();
    assert!(migrated.functions && migrated.steps.is_empty(), "{migrated:?}");
    assert_eq!(next_offset(db.pool()).await, 0);
    assert_eq!(installed(db.pool()).await, (program, functions));

    run(db.pool(), THEIRS).await;
    run(
        db.pool(),
        "UPDATE postbox.installation SET program = '999.0.0', functions = 'theirs'",
    )
    .await;
    assert_eq!(migrate(db.pool()).await.unwrap(), Migrated::default());
    assert_eq!(
        next_offset(db.pool()).await,
        77,
        "a newer release's function stays"
    );
}

#[tokio::test]
async fn a_longer_retention_survives_new_functions() {
    let db = TestDatabase::new().await.unwrap();
    run(db.pool(), "SELECT postbox.set_retention('60 days')").await;
    run(db.pool(), "UPDATE postbox.installation SET functions = 'theirs'").await;
    let slot = "SELECT postbox.slot_of('2026-03-01 00:00Z') || ' ' || postbox.slot_of('2026-03-09 12:00Z')";
    let before: String = sqlx::query_scalar(slot).fetch_one(db.pool()).await.unwrap();
    assert!(migrate(db.pool()).await.unwrap().functions);
    let after: String = sqlx::query_scalar(slot).fetch_one(db.pool()).await.unwrap();
    assert_eq!(after, before);
}

#[tokio::test]
async fn a_migration_that_was_applied_in_another_form_is_refused() {
    let db = TestDatabase::new().await.unwrap();
    run(
        db.pool(),
        "UPDATE postbox.schema_migration SET checksum = 'other' WHERE version = 1",
    )
    .await;
    let before = catalogue(db.pool()).await;
    match migrate(db.pool()).await {
        Err(Error::MigrationChanged { version: 1, name }) => assert_eq!(name, "0001_schema"),
        other => panic!("{other:?}"),
    }
    assert_eq!(catalogue(db.pool()).await, before);
}

#[tokio::test]
async fn a_schema_that_is_missing_or_older_is_said_to_be() {
    let db = TestDatabase::empty().await.unwrap();
    match check_schema(db.pool()).await {
        Err(Error::SchemaMissing { database }) => assert_eq!(database, db.name()),
        other => panic!("{other:?}"),
    }
    migrate(db.pool()).await.unwrap();
    check_schema(db.pool()).await.expect("it is as needed");
    run(
        db.pool(),
        format!("DELETE FROM postbox.schema_migration WHERE version = {SCHEMA_VERSION}"),
    )
    .await;
    match check_schema(db.pool()).await {
        Err(Error::SchemaOlder { found, needed }) => {
            assert_eq!((found, needed), (SCHEMA_VERSION - 1, SCHEMA_VERSION));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_failed_migration_leaves_the_database_as_it_was() {
    let db = TestDatabase::empty().await.unwrap();
    // In the way of the migrations.
    run(
        db.pool(),
        "CREATE SCHEMA postbox; CREATE TABLE postbox.outbox (mine int); INSERT INTO postbox.outbox VALUES (7)",
    )
    .await;
    assert!(matches!(migrate(db.pool()).await, Err(Error::Database(_))));
    let relations: Vec<String> = sqlx::query_scalar(
        "SELECT relname::text FROM pg_class WHERE relnamespace = 'postbox'::regnamespace ORDER BY 1",
    )
    .fetch_all(db.pool())
    .await
    .unwrap();
    assert_eq!(relations, ["outbox"]);
    let mine: i32 = sqlx::query_scalar("SELECT mine FROM postbox.outbox")
        .fetch_one(db.pool())
        .await
        .unwrap();
    assert_eq!(mine, 7);
}

#[tokio::test]
async fn an_applications_own_migrations_are_never_met() {
    let db = TestDatabase::empty().await.unwrap();
    let application = "CREATE TABLE _sqlx_migrations (version bigint PRIMARY KEY, description text NOT NULL, \
            installed_on timestamptz NOT NULL DEFAULT now(), success boolean NOT NULL, checksum bytea NOT NULL, \
            execution_time bigint NOT NULL); \
         INSERT INTO _sqlx_migrations VALUES (1, 'orders', now(), true, '\\x00', 1), (999, 'later', now(), true, '\\x01', 1); \
         CREATE TABLE schema_migration (version int); CREATE TABLE outbox (id int)";
    run(db.pool(), application).await;
    migrate(db.pool()).await.unwrap();
    migrate(db.pool()).await.unwrap();
    let versions: Vec<i64> = sqlx::query_scalar("SELECT version FROM _sqlx_migrations ORDER BY 1")
        .fetch_all(db.pool())
        .await
        .unwrap();
    assert_eq!(versions, [1, 999]);
    let in_public: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'",
    )
    .fetch_one(db.pool())
    .await
    .unwrap();
    assert_eq!(in_public, 3, "Postbox makes nothing outside its schema");
}

#[tokio::test]
async fn every_table_column_sequence_and_function_says_what_it_is() {
    let db = TestDatabase::new().await.unwrap();
    let silent: Vec<String> = sqlx::query_scalar(
        "SELECT 'relation ' || c.relname FROM pg_class c \
         WHERE c.relnamespace = 'postbox'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm') \
             AND coalesce(obj_description(c.oid, 'pg_class'), '') = '' \
         UNION ALL \
         SELECT 'column ' || c.relname || '.' || a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid \
         WHERE c.relnamespace = 'postbox'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm') AND NOT c.relispartition \
             AND a.attnum > 0 AND NOT a.attisdropped AND coalesce(col_description(c.oid, a.attnum), '') = '' \
         UNION ALL \
         SELECT 'sequence ' || c.relname FROM pg_class c \
         WHERE c.relnamespace = 'postbox'::regnamespace AND c.relkind = 'S' AND coalesce(obj_description(c.oid, 'pg_class'), '') = '' \
             AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'i') \
         UNION ALL \
         SELECT 'function ' || p.proname FROM pg_proc p \
         WHERE p.pronamespace = 'postbox'::regnamespace AND coalesce(obj_description(p.oid, 'pg_proc'), '') = ''",
    )
    .fetch_all(db.pool())
    .await
    .unwrap();
    assert_eq!(silent, Vec::<String>::new(), "without a COMMENT");
    let tables: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_class WHERE relnamespace = 'postbox'::regnamespace AND relkind IN ('r', 'p')",
    )
    .fetch_one(db.pool())
    .await
    .unwrap();
    assert!(tables > 40, "the query above looks at the tables: {tables}");
}

#[tokio::test]
async fn a_role_without_rights_is_told_which_it_lacks() {
    let db = TestDatabase::empty().await.unwrap();
    let role = Role::new(&db).await;
    let says = migrate(&role.pool).await.expect_err("it may not").to_string();
    assert!(
        says.contains("may not create the schema postbox")
            && says.contains(&format!("GRANT CREATE ON DATABASE \"{}\"", db.name())),
        "{says}"
    );

    migrate(db.pool()).await.unwrap();
    let before = catalogue(db.pool()).await;
    for result in [
        migrate(&role.pool).await.map(drop),
        check_schema(&role.pool).await,
    ] {
        let says = result.expect_err("it may not").to_string();
        assert!(says.contains("schema postbox"), "{says}");
    }
    assert_eq!(catalogue(db.pool()).await, before);
    role.drop(&db).await;
}
