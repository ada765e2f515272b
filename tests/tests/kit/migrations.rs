//! Databases with the service's own migrations.

use postbox_consumer::{HandlerError, Tx, handler, handlers};
use postbox_testkit::{Kit, TestDatabase};
use sqlx::migrate::Migrator;

use crate::messages::{OrderPaid, paid};

static MIGRATOR: Migrator = sqlx::migrate!("tests/kit/migrations");

#[handler(group = "inventory")]
async fn reserve(order: OrderPaid, mut tx: Tx) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO reservation (order_id) VALUES ($1) ON CONFLICT (order_id) DO UPDATE SET runs = reservation.runs + 1")
        .bind(order.order_id)
        .execute(&mut *tx)
        .await?;
    Ok(())
}

async fn runs(kit: &Kit) -> Vec<(i64, i32)> {
    sqlx::query_as("SELECT order_id, runs FROM reservation ORDER BY 1")
        .fetch_all(kit.pool())
        .await
        .unwrap()
}

#[postbox_testkit::test(migrator = MIGRATOR)]
async fn the_services_tables_are_there_and_empty(kit: Kit) {
    kit.consumer(handlers![reserve]).start().await;
    kit.fail_once(reserve);
    kit.publish(&paid(1)).await;
    kit.settled().await;
    assert_eq!(runs(&kit).await, []);
    kit.advance(std::time::Duration::from_secs(2 * 3600)).await;
    kit.settled().await;
    assert_eq!(runs(&kit).await, [(1, 1)], "exactly once");
}

/// As a service does at its start.
#[postbox_testkit::test(migrations = "tests/kit/migrations")]
async fn a_service_that_migrates_finds_nothing_to_do(kit: Kit) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO reservation (order_id) VALUES (1)")
        .execute(kit.pool())
        .await?;
    MIGRATOR.run(kit.pool()).await.unwrap();
    postbox::migrate(kit.pool()).await.unwrap();
    assert_eq!(runs(&kit).await, [(1, 1)]);
    Ok(())
}

#[tokio::test]
async fn a_migration_that_fails_says_so_and_the_next_one_is_tried() {
    use sqlx::SqlSafeStr;
    use sqlx::migrate::{Migration, MigrationType};
    let migrator = |sql: &'static str| {
        let migration = Migration::new(
            1,
            "tables".into(),
            MigrationType::Simple,
            sql.into_sql_str(),
            false,
        );
        Migrator::with_migrations(vec![migration])
    };
    let wrong = TestDatabase::migrated(&migrator("CREATE TABLE a (id nothing)")).await;
    let error = wrong.unwrap_err().to_string();
    assert!(
        error.contains("cannot apply the migrations of the test"),
        "{error}"
    );
    assert!(error.contains("nothing"), "{error}");
    let right = TestDatabase::migrated(&migrator("CREATE TABLE a (id bigint)"))
        .await
        .unwrap();
    sqlx::query("INSERT INTO a (id) VALUES (1)")
        .execute(right.pool())
        .await
        .unwrap();
    // A copy, not the template.
    let other = TestDatabase::migrated(&migrator("CREATE TABLE a (id bigint)"))
        .await
        .unwrap();
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM a")
        .fetch_one(other.pool())
        .await
        .unwrap();
    assert_eq!(rows, 0);
}
