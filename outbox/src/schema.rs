//! The schema `postbox`: its versioned steps, its functions, and which programs work with it.
//!
//! Tables change by numbered steps, each applied once. Functions are files that are replaced as a set whenever they differ, so the text in
//! force is what stands in `migrations/functions/`.

use std::fmt::Write as _;

use sqlx::{PgConnection, PgPool};
use tracing::warn;

use crate::error::{Error, Result};
use crate::transaction::Transaction;

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

macro_rules! functions {
    ($($name:literal),* $(,)?) => {
        &[$(include_str!(concat!("../migrations/functions/", $name, ".sql"))),*]
    };
}

/// In the order in which they are applied. A file that was released is never edited.
const MIGRATIONS: &[Migration] = migrations![1 "0001_schema"];

/// What tables need to be there before them, for their defaults and triggers.
const FUNCTIONS_BEFORE: &[&str] = functions!["clock", "cluster", "identity", "surroundings", "bells"];

/// The others. A body that is parsed when it is made (`RETURN …`) comes after what it calls.
const FUNCTIONS: &[&str] = functions![
    "publishing",
    "notices",
    "positions",
    "sequencer",
    "sessions",
    "locks",
    "subscriptions",
    "ownership",
    "settlement",
    "failure",
    "types",
    "filters",
    "timers",
    "cron",
    "backlog",
    "retention",
    "replay",
    "restore",
    "grants",
    "search_path",
];

/// The schema version that this release needs.
pub const SCHEMA_VERSION: i32 = MIGRATIONS[MIGRATIONS.len() - 1].version;

/// The oldest schema version whose programs work with this one, so that those which still run when it is migrated, or start again then, go on.
/// Raised by a step that takes something away from them; within a minor version none does.
const COMPATIBLE_FROM: i32 = 1;

/// One transaction-level lock makes processes that start at once migrate one after another.
const TRY_LOCK: &str = "SELECT pg_try_advisory_xact_lock(1347571761, 4)";

/// Who has it.
const LOCK_HOLDER: &str = "SELECT concat_ws(' ', 'process', l.pid, a.usename, nullif(a.application_name, ''), host(a.client_addr)) \
     FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
     WHERE l.locktype = 'advisory' AND l.classid = 1347571761 AND l.objid = 4 AND l.objsubid = 2 AND l.granted \
         AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()) LIMIT 1";

const PAUSE: &str = "SELECT pg_sleep(0.1)";

/// After so many pauses who has it is named, and again.
const PATIENCE: u32 = 50;

/// Whatever database and role default to: what is read after the lock must be newer than the lock, names mean what they mean here, and
/// defaults, bodies and texts are read as they are written.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
     SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0; \
     SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL standard_conforming_strings = on; SET LOCAL array_nulls = on; \
     SET LOCAL DateStyle = 'ISO, MDY'; SET LOCAL IntervalStyle = 'postgres'; SET LOCAL TimeZone = 'UTC'; SET LOCAL row_security = on; \
     SET LOCAL transform_null_equals = off; SET LOCAL default_table_access_method = heap; SET LOCAL client_min_messages = warning; \
     SET LOCAL \"plpgsql.extra_errors\" = 'none'; SET LOCAL \"plpgsql.extra_warnings\" = 'none'";

/// Whether there is a schema, and whether this role may do what is to be done: make one, fill an empty one, or use what is in it.
/// (`CREATE SCHEMA IF NOT EXISTS` asks for the privilege even where the schema exists.)
const MAY_MIGRATE: &str = "SELECT n.oid IS NOT NULL, \
         CASE WHEN n.oid IS NULL THEN has_database_privilege(current_database(), 'CREATE') \
             ELSE has_schema_privilege(n.oid, 'USAGE') AND has_schema_privilege(n.oid, 'CREATE') END, \
         current_user::text, current_database()::text \
     FROM (SELECT) AS one LEFT JOIN pg_namespace n ON n.nspname = 'postbox'";

const CREATE_REGISTER: &str = "
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
    CREATE TABLE IF NOT EXISTS postbox.installation (
        only_one        boolean     PRIMARY KEY DEFAULT true CHECK (only_one),
        program         text        NOT NULL,
        functions       text        NOT NULL,
        compatible_from integer     NOT NULL,
        changed_at      timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    COMMENT ON TABLE postbox.installation IS 'Its one row says which release this schema is of. Written by postbox migrate.';
    COMMENT ON COLUMN postbox.installation.only_one IS 'True.';
    COMMENT ON COLUMN postbox.installation.program IS 'The newest release that migrated: its functions are in force.';
    COMMENT ON COLUMN postbox.installation.functions IS 'Checksum of the functions.';
    COMMENT ON COLUMN postbox.installation.compatible_from IS 'Programs that need this schema version, or a newer one, work with it.';
    COMMENT ON COLUMN postbox.installation.changed_at IS 'When that was written.';
";

const INSTALLED: &str = "SELECT program, functions, compatible_from FROM postbox.installation";

const INSTALL: &str = "INSERT INTO postbox.installation (program, functions, compatible_from) VALUES ($1, $2, $3)
    ON CONFLICT (only_one) DO UPDATE
    SET program = excluded.program, functions = excluded.functions, compatible_from = excluded.compatible_from, changed_at = clock_timestamp()";

/// What [`migrate`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Migrated {
    /// Versions of the steps that were applied now.
    pub steps: Vec<i32>,
    /// Whether the functions were made or replaced now.
    pub functions: bool,
}

/// Creates the schema `postbox` or upgrades it to [`SCHEMA_VERSION`].
///
/// All in one transaction: after an error the database is as before. Any number of processes may call it at once. It has
/// a table of its own for what was applied, so it never meets the application's migrations.
///
/// Functions are replaced, all of them, whenever this program has them in another form, unless a newer release put them there. A schema that a
/// newer release migrated is left as it is: without a word if this program works with it, which it does within a minor version.
///
/// The role needs `CREATE` on the database the first time, or a schema `postbox` that it owns (`CREATE SCHEMA postbox AUTHORIZATION …`), and to
/// own what is in it later.
///
/// # Errors
///
/// [`Error::MayNotMigrate`] if a grant is missing, [`Error::Encoding`] in a database whose encoding is not UTF8, [`Error::SchemaNewer`] if this program does not work with the schema, [`Error::MigrationChanged`] if a step was applied in another form, and the
/// database's own.
pub async fn migrate(pool: &PgPool) -> Result<Migrated> {
    let mut tx = Transaction::begin(pool, BEGIN).await?;
    check_encoding(&mut tx).await?;
    lock(&mut tx).await?;
    create_schema(&mut tx).await?;
    if !register_exists(&mut tx).await? {
        sqlx::raw_sql(CREATE_REGISTER).execute(&mut *tx).await?;
    }
    let applied: Vec<(i32, String, String)> =
        sqlx::query_as("SELECT version, name, checksum FROM postbox.schema_migration ORDER BY version")
            .fetch_all(&mut *tx)
            .await?;
    let installed = installed(&mut tx).await?;
    let found = applied.last().map_or(0, |(version, ..)| *version);
    if found > SCHEMA_VERSION {
        check_compatible(found, installed.as_ref())?;
        return Ok(Migrated::default());
    }
    let mut migrated = Migrated {
        steps: Vec::new(),
        functions: installed.as_ref().is_none_or(Installed::is_to_be_replaced),
    };
    if migrated.functions {
        apply(&mut tx, FUNCTIONS_BEFORE).await?;
    }
    for migration in MIGRATIONS {
        let checksum = checksum([migration.sql]);
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
        migrated.steps.push(migration.version);
    }
    if migrated.functions {
        apply(&mut tx, FUNCTIONS).await?;
        sqlx::query(INSTALL)
            .bind(PROGRAM)
            .bind(functions_checksum())
            .bind(COMPATIBLE_FROM)
            .execute(&mut *tx)
            .await?;
    }
    tx.commit().await?;
    Ok(migrated)
}

/// Waits for whoever migrates, and says who that is if it takes long.
async fn lock(connection: &mut PgConnection) -> Result<()> {
    let mut pauses = 0;
    while !sqlx::query_scalar(TRY_LOCK).fetch_one(&mut *connection).await? {
        sqlx::query(PAUSE).execute(&mut *connection).await?;
        pauses += 1;
        if pauses % PATIENCE == 0 {
            let holder: Option<String> = sqlx::query_scalar(LOCK_HOLDER)
                .fetch_optional(&mut *connection)
                .await?;
            warn!(
                holder = holder.unwrap_or_default(),
                "waiting to migrate: somebody else migrates, or holds advisory lock (1347571761, 4)"
            );
        }
    }
    Ok(())
}

/// The schema, unless it is there: a database administrator may have made it for this role.
async fn create_schema(connection: &mut PgConnection) -> Result<()> {
    let (exists, may, role, database): (bool, bool, String, String) =
        sqlx::query_as(MAY_MIGRATE).fetch_one(&mut *connection).await?;
    if !may {
        return Err(Error::MayNotMigrate {
            role,
            database,
            exists,
        });
    }
    if !exists {
        sqlx::raw_sql("CREATE SCHEMA postbox").execute(connection).await?;
    }
    Ok(())
}

const PROGRAM: &str = env!("CARGO_PKG_VERSION");

/// What `postbox.installation` says.
struct Installed {
    program: String,
    functions: String,
    compatible_from: i32,
}

impl Installed {
    /// By this program's functions: a newer release's stay.
    fn is_to_be_replaced(&self) -> bool {
        self.functions != functions_checksum() && release(&self.program) <= release(PROGRAM)
    }
}

async fn installed(connection: &mut PgConnection) -> Result<Option<Installed>> {
    let row: Option<(String, String, i32)> = sqlx::query_as(INSTALLED).fetch_optional(connection).await?;
    Ok(row.map(|(program, functions, compatible_from)| Installed {
        program,
        functions,
        compatible_from,
    }))
}

/// Whether this program works with a schema of a newer version.
fn check_compatible(found: i32, installed: Option<&Installed>) -> Result<()> {
    match installed {
        Some(installed) if installed.compatible_from <= SCHEMA_VERSION => Ok(()),
        _ => Err(Error::SchemaNewer {
            found,
            known: SCHEMA_VERSION,
        }),
    }
}

/// Major, minor and patch, which order releases.
fn release(version: &str) -> [u64; 3] {
    let mut numbers = version
        .split(['.', '-', '+'])
        .map(|number| number.parse().unwrap_or(0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0))
}

async fn apply(connection: &mut PgConnection, files: &'static [&'static str]) -> Result<()> {
    // Functions of one file call those of another that comes later.
    sqlx::raw_sql("SET LOCAL check_function_bodies = off")
        .execute(&mut *connection)
        .await?;
    for file in files {
        sqlx::raw_sql(*file).execute(&mut *connection).await?;
    }
    Ok(())
}

fn functions_checksum() -> String {
    checksum(FUNCTIONS_BEFORE.iter().chain(FUNCTIONS).copied())
}

/// Checks that the database has the schema that this release needs, or a newer one that it works with. A role that may only publish may not
/// see which it has: it is told that all is well.
///
/// # Errors
///
/// The schema is missing, older or newer than this program works with, or the database has another encoding than UTF8: the error says which,
/// and what to do. Else the database's.
pub async fn check_schema(pool: &PgPool) -> Result<()> {
    let mut connection = pool.acquire().await?;
    // A schema may have come here by a restore.
    check_encoding(&mut connection).await?;
    if !register_exists(&mut connection).await? {
        let database: String = sqlx::query_scalar("SELECT current_database()")
            .fetch_one(&mut *connection)
            .await?;
        return Err(Error::SchemaMissing { database });
    }
    let may_look: bool =
        sqlx::query_scalar("SELECT has_table_privilege('postbox.schema_migration', 'SELECT')")
            .fetch_one(&mut *connection)
            .await?;
    if !may_look {
        return Ok(());
    }
    let found: i32 = sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM postbox.schema_migration")
        .fetch_one(&mut *connection)
        .await?;
    match found {
        found if found < SCHEMA_VERSION => Err(Error::SchemaOlder {
            found,
            needed: SCHEMA_VERSION,
        }),
        found if found > SCHEMA_VERSION => {
            check_compatible(found, installed(&mut connection).await?.as_ref())
        }
        _ => Ok(()),
    }
}

/// A text that changes whenever any step or function does; test kits name their template databases by it.
pub fn schema_fingerprint() -> String {
    let steps = MIGRATIONS.iter().map(|migration| migration.sql);
    checksum(steps.chain(FUNCTIONS_BEFORE.iter().chain(FUNCTIONS).copied()))
}

/// In another encoding than UTF8 one key, header or error after the other could not be stored or read: SQL_ASCII keeps bytes that are no text, and
/// the others have only some characters.
async fn check_encoding(connection: &mut PgConnection) -> Result<()> {
    let (database, encoding): (String, String) =
        sqlx::query_as("SELECT current_database()::text, current_setting('server_encoding')")
            .fetch_one(connection)
            .await?;
    match encoding.as_str() {
        "UTF8" => Ok(()),
        _ => Err(Error::Encoding { database, encoding }),
    }
}

async fn register_exists(connection: &mut PgConnection) -> Result<bool> {
    Ok(
        sqlx::query_scalar("SELECT to_regclass('postbox.schema_migration') IS NOT NULL")
            .fetch_one(connection)
            .await?,
    )
}

/// FNV-1a, 64 bits: to notice an edited file, not an attacker.
fn checksum<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let bytes = texts.into_iter().flat_map(str::bytes);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut hex = String::with_capacity(16);
    // Writing to a String cannot fail.
    let _ = write!(hex, "{hash:016x}");
    hex
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_ordered_by_their_numbers() {
        assert!(release("0.10.0") > release("0.9.12"));
        assert!(release("1.0.0-rc.1") >= release("1.0.0"));
        assert_eq!(release("x"), [0, 0, 0]);
    }

    #[test]
    fn every_file_of_functions_is_applied() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations/functions");
        let files = std::fs::read_dir(folder).expect("the folder").count();
        assert_eq!(files, FUNCTIONS_BEFORE.len() + FUNCTIONS.len());
    }
}
