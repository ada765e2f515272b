//! Texts of other collations than the database's: what is published from such columns, and what is asked for by them. An index is of one collation, so
//! what is compared in another is looked for row by row.

use crate::support::{Bench, bench};
use postbox_testkit::TestDatabase;
use sqlx::AssertSqlSafe;

/// The last is of a provider that not every server has.
const COLLATIONS: [&str; 4] = ["\"C\"", "\"POSIX\"", "ucs_basic", "loose"];

/// A table with a topic and a key of each two collations; says how many rows it has.
async fn names(db: &TestDatabase) -> i64 {
    let loose = "CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level1', deterministic = false)";
    let has_icu = sqlx::raw_sql(loose).execute(db.pool()).await.is_ok();
    let collations = &COLLATIONS[..COLLATIONS.len() - usize::from(!has_icu)];
    let mut n = 0;
    for topic in collations {
        for key in collations {
            let table = format!(
                "CREATE TABLE names_{n} (topic text COLLATE {topic}, key text COLLATE {key}); INSERT INTO names_{n} VALUES ('orders', 'Key'), ('refunds', 'key')"
            );
            sqlx::raw_sql(AssertSqlSafe(table))
                .execute(db.pool())
                .await
                .unwrap();
            n += 1;
        }
    }
    n
}

async fn run(bench: &Bench, statement: String) {
    sqlx::raw_sql(AssertSqlSafe(statement.clone()))
        .execute(bench.db.pool())
        .await
        .unwrap_or_else(|error| panic!("{statement}: {error}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_from_columns_of_any_collation_has_its_key_and_its_order() {
    let bench = bench().await;
    let tables = names(&bench.db).await;
    for n in 0..tables {
        for options in [
            "",
            ", ordered => true",
            ", dedup_key => key || 'x', dedup_window => '1 h'",
            ", delay => '1 h'",
        ] {
            run(
                &bench,
                format!("SELECT postbox.publish(topic => topic, key => key, type => key, payload => '{{}}'::jsonb{options}) FROM names_{n}"),
            )
            .await;
        }
        // Once, since all tables have the same.
        run(
            &bench,
            format!(
                "SELECT postbox.pause(key, topic, true), postbox.pause(key, topic, false) FROM names_{n}"
            ),
        )
        .await;
        let (hashes, orders): (i64, i64) = sqlx::query_as(AssertSqlSafe(format!(
            "SELECT count(*) FILTER (WHERE postbox.key_hash(n.key) = postbox.key_hash(n.key COLLATE \"default\")), \
                 count(*) FILTER (WHERE postbox.order_hash(n.topic, n.key) = postbox.order_hash(n.topic COLLATE \"default\", n.key)) FROM names_{n} n"
        )))
        .fetch_one(bench.db.pool())
        .await
        .unwrap();
        assert_eq!((hashes, orders), (2, 2), "names_{n}");
    }
    let published: (i64, i64, i64) = sqlx::query_as(
        "SELECT count(*), count(DISTINCT key), (SELECT count(*) FROM postbox.scheduled) FROM postbox.outbox",
    )
    .fetch_one(bench.db.pool())
    .await
    .unwrap();
    assert_eq!(published, (tables * 4 + 2, 2, tables * 2));
}

/// As many scans of whole segment tables as this transaction has made.
const SCANS: &str = "SELECT coalesce(sum(seq_scan), 0)::bigint FROM pg_stat_xact_user_tables WHERE schemaname = 'postbox' AND relname LIKE 'segment%'";

#[tokio::test]
async fn neither_a_step_nor_a_position_reads_all_segments_of_all_topics() {
    let db = TestDatabase::new().await.unwrap();
    let tables = names(&db).await;
    for _ in 0..3 {
        // Two topics, so that it is not the step of one topic, which looks for less.
        sqlx::raw_sql(
            "SELECT postbox.publish(topic => topic, key => key, payload => '{}'::jsonb) FROM names_0",
        )
        .execute(db.pool())
        .await
        .unwrap();
        let mut tx = db.pool().begin().await.unwrap();
        let topics = sqlx::query("SELECT * FROM postbox.sequence()")
            .fetch_all(&mut *tx)
            .await
            .unwrap();
        let scans: i64 = sqlx::query_scalar(SCANS).fetch_one(&mut *tx).await.unwrap();
        assert_eq!((topics.len(), scans), (2, 0));
        tx.commit().await.unwrap();
    }
    for n in 0..tables {
        for position in [
            "postbox.next_offset(topic)",
            "postbox.first_offset(topic)",
            "postbox.segment_at(topic, 1)",
            "postbox.recent_types(topic, 100)",
        ] {
            let mut tx = db.pool().begin().await.unwrap();
            sqlx::raw_sql(AssertSqlSafe(format!("SELECT {position} FROM names_{n}")))
                .execute(&mut *tx)
                .await
                .unwrap_or_else(|error| panic!("{position}: {error}"));
            let scans: i64 = sqlx::query_scalar(SCANS).fetch_one(&mut *tx).await.unwrap();
            assert_eq!(scans, 0, "{position} from names_{n}");
        }
    }
}
