//! The business tables: what producers and transactional handlers write in the same database.

use sqlx::{PgExecutor, PgPool};
use uuid::Uuid;

/// `account` gives numbers under the lock of its key's row. `entry` has a row for each message, written in its transaction: the message is
/// to be delivered iff the row is there. `effect` has no unique constraint: doubles are to be counted, not prevented.
pub(crate) const TABLES: &str = "
    CREATE SCHEMA torture;
    CREATE TABLE torture.account (key text PRIMARY KEY, n bigint NOT NULL) WITH (fillfactor = 50);
    CREATE TABLE torture.entry (id uuid NOT NULL, topic text NOT NULL, key text NOT NULL, n bigint NOT NULL);
    CREATE TABLE torture.effect (place bigserial, id uuid NOT NULL, key text NOT NULL, n bigint NOT NULL, instance text NOT NULL);
";

pub(crate) const ADD_ACCOUNTS: &str = "INSERT INTO torture.account SELECT k, 0 FROM unnest($1::text[]) AS k";

pub(crate) const NEXT_NUMBER: &str = "UPDATE torture.account SET n = n + 1 WHERE key = $1 RETURNING n";

pub(crate) const ADD_ENTRY: &str = "INSERT INTO torture.entry (id, topic, key, n) VALUES ($1, $2, $3, $4)";

pub(crate) const ADD_EFFECT: &str =
    "INSERT INTO torture.effect (id, key, n, instance) VALUES ($1, $2, $3, $4)";

/// A message that was committed.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct Committed {
    pub(crate) id: Uuid,
    pub(crate) topic: String,
    pub(crate) key: String,
    pub(crate) n: i64,
}

/// A row that a transactional handler committed.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct Effect {
    pub(crate) id: Uuid,
    pub(crate) key: String,
    pub(crate) n: i64,
}

pub(crate) async fn committed(pool: impl PgExecutor<'_>) -> Result<Vec<Committed>, sqlx::Error> {
    sqlx::query_as("SELECT id, topic, key, n FROM torture.entry")
        .fetch_all(pool)
        .await
}

/// In the order in which they were written.
pub(crate) async fn effects(pool: &PgPool) -> Result<Vec<Effect>, sqlx::Error> {
    sqlx::query_as("SELECT id, key, n FROM torture.effect ORDER BY place")
        .fetch_all(pool)
        .await
}

/// Group and message of each dead letter.
pub(crate) async fn dead_letters(pool: impl PgExecutor<'_>) -> Result<Vec<(String, Uuid)>, sqlx::Error> {
    sqlx::query_as(
        "SELECT s.group_name, d.message_id FROM postbox.dead_letter d JOIN postbox.subscription s ON s.id = d.subscription_id",
    )
    .fetch_all(pool)
    .await
}
