//! The schema `postbox`: its migrations and its version.

use std::fmt::Write as _;

use sqlx::{Connection, PgConnection, PgPool};

use crate::error::{Error, Result};

struct Migration {
    version: i32,
    name: &'static str,
    sql: &'static str,
}

macro_rules! migrations {
    ($($version:literal $name:literal),* $(,)?) => {
        &[$(Migration { version: $version, name: $name, sql: include_str!(concat!("../migrations/", $name, ".sql")) }),*]
    };
}

/// In the order in which they are applied. A file that was released is never edited.
const MIGRATIONS: &[Migration] = migrations![
    1 "0001_main_path",
    2 "0002_failure",
    3 "0003_time",
    4 "0004_retention",
    5 "0005_restore",
];

/// The schema version that this release needs.
pub const SCHEMA_VERSION: i32 = MIGRATIONS[MIGRATIONS.len() - 1].version;

/// One transaction-level lock makes processes that start at once migrate one after another.
const LOCK: &str = "SELECT pg_advisory_xact_lock(1347571761, 4)";

/// Whatever the database defaults to: what is read after the lock must be newer than the lock.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

const CREATE_REGISTER: &str = "
    CREATE SCHEMA IF NOT EXISTS postbox;
    CREATE TABLE IF NOT EXISTS postbox.schema_migration (
        version    integer     PRIMARY KEY,
        name       text        NOT NULL,
        checksum   text        NOT NULL,
        applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE postbox.schema_migration IS 'One row is a migration of this schema that was applied. Written by postbox migrate.';
    COMMENT ON COLUMN postbox.schema_migration.version IS 'Its number.';
    COMMENT ON COLUMN postbox.schema_migration.name IS 'Its file.';
    COMMENT ON COLUMN postbox.schema_migration.checksum IS 'Checksum of the file as it was applied.';
    COMMENT ON COLUMN postbox.schema_migration.applied_at IS 'When.';
";

/// Creates the schema `postbox` or upgrades it to [`SCHEMA_VERSION`]; returns the versions that were applied now.
///
/// All in one transaction: after an error the database is as before. Any number of processes may call it at once. It has
/// a table of its own for what was applied, so it never meets the application's migrations.
///
/// The role needs `CREATE` on the database the first time, and to own the schema later.
pub async fn migrate(pool: &PgPool) -> Result<Vec<i32>> {
    let mut connection = pool.acquire().await?;
    let mut tx = connection.begin_with(BEGIN).await?;
    sqlx::query(LOCK).execute(&mut *tx).await?;
    if !register_exists(&mut tx).await? {
        sqlx::raw_sql(CREATE_REGISTER).execute(&mut *tx).await?;
    }
    let applied: Vec<(i32, String, String)> =
        sqlx::query_as("SELECT version, name, checksum FROM postbox.schema_migration ORDER BY version")
            .fetch_all(&mut *tx)
            .await?;
    if let Some((found, ..)) = applied.last().filter(|(version, ..)| *version > SCHEMA_VERSION) {
        return Err(Error::SchemaNewer {
            found: *found,
            known: SCHEMA_VERSION,
        });
    }
    let mut now = Vec::new();
    for migration in MIGRATIONS {
        let checksum = checksum(migration.sql);
        match applied.iter().find(|(version, ..)| *version == migration.version) {
            Some((.., known)) if *known == checksum => continue,
            Some((version, name, _)) => {
                return Err(Error::MigrationChanged {
                    version: *version,
                    name: name.clone(),
                });
            }
            None => {}
        }
        sqlx::raw_sql(migration.sql).execute(&mut *tx).await?;
        sqlx::query("INSERT INTO postbox.schema_migration (version, name, checksum) VALUES ($1, $2, $3)")
            .bind(migration.version)
            .bind(migration.name)
            .bind(checksum)
            .execute(&mut *tx)
            .await?;
        now.push(migration.version);
    }
    tx.commit().await?;
    Ok(now)
}

/// Checks that the database has the schema that this release needs.
pub async fn check_schema(pool: &PgPool) -> Result<()> {
    let mut connection = pool.acquire().await?;
    if !register_exists(&mut connection).await? {
        let database: String = sqlx::query_scalar("SELECT current_database()")
            .fetch_one(&mut *connection)
            .await?;
        return Err(Error::SchemaMissing { database });
    }
    let found: i32 = sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM postbox.schema_migration")
        .fetch_one(&mut *connection)
        .await?;
    match found {
        found if found < SCHEMA_VERSION => Err(Error::SchemaOlder {
            found,
            needed: SCHEMA_VERSION,
        }),
        found if found > SCHEMA_VERSION => Err(Error::SchemaNewer {
            found,
            known: SCHEMA_VERSION,
        }),
        _ => Ok(()),
    }
}

/// A text that changes whenever any migration does; test kits name their template databases by it.
pub fn schema_fingerprint() -> String {
    checksum(
        &MIGRATIONS
            .iter()
            .map(|migration| migration.sql)
            .collect::<String>(),
    )
}

async fn register_exists(connection: &mut PgConnection) -> Result<bool> {
    Ok(
        sqlx::query_scalar("SELECT to_regclass('postbox.schema_migration') IS NOT NULL")
            .fetch_one(connection)
            .await?,
    )
}

/// FNV-1a, 64 bits: to notice an edited file, not an attacker.
fn checksum(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut hex = String::with_capacity(16);
    // Writing to a String cannot fail.
    let _ = write!(hex, "{hash:016x}");
    hex
}
