//! Fresh databases.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};

use crate::statement::execute;
use crate::template::{self, is_plain};
use crate::{Error, TestPostgres, processes, removal, surroundings, url};

const PREFIX: &str = "postbox_test_";

/// In a server that other machines may use, where processes' numbers say nothing.
const OLD: Duration = Duration::from_secs(60 * 60);

/// Another advisory lock than the template's.
const CLEANING_LOCK: i64 = template::LOCK + 1;

/// The default pool's size.
const CONNECTIONS: u32 = 10;

/// A database that nobody else uses, dropped with this value.
///
/// Dropping ends the database's sessions and waits until it is gone, some ten milliseconds and two seconds at
/// most. What is left then, or by killed tests, is dropped by the next run (in the server of `DATABASE_URL`: when
/// it is an hour old).
///
/// ```no_run
/// # async fn a_test() -> Result<(), postbox_testkit::Error> {
/// use postbox_testkit::TestDatabase;
///
/// let db = TestDatabase::new().await?;
/// let mut listener = db.connect().await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct TestDatabase {
    pool: PgPool,
    options: PgConnectOptions,
    url: String,
    name: String,
    server: TestPostgres,
}

impl TestDatabase {
    /// A database with Postbox's schema, in the [shared](TestPostgres::shared) server.
    ///
    /// It is a copy of a template that is migrated once for each version of the schema.
    ///
    /// # Errors
    /// Where no server can be had, with all that was tried; where the schema cannot be created.
    pub async fn new() -> Result<Self, Error> {
        TestPostgres::shared().await?.database().await
    }

    /// A database without a schema, in the [shared](TestPostgres::shared) server.
    ///
    /// # Errors
    /// Where no server can be had, with all that was tried.
    pub async fn empty() -> Result<Self, Error> {
        TestPostgres::shared().await?.empty_database().await
    }

    pub(crate) async fn migrated_in(server: TestPostgres) -> Result<Self, Error> {
        Self::copied_in(server, template::ensure).await
    }

    /// A copy of the template whose name this gives, which makes sure that it is there.
    pub(crate) async fn copied_in(
        server: TestPostgres,
        ensure: impl AsyncFn(&mut PgConnection, &TestPostgres) -> Result<String, Error>,
    ) -> Result<Self, Error> {
        let mut connection = enter(&server).await?;
        let template = ensure(&mut connection, &server).await?;
        let name = fresh_name();
        // Where nothing is flushed, to copy files is the fastest; elsewhere it would flush everything that anybody wrote.
        let strategy = match server.is_shared() {
            true => " strategy file_copy",
            false => "",
        };
        let copy = format!("create database {name} template {template}{strategy}");
        if let Err(error) = execute(&mut connection, copy.clone()).await {
            // A process with other migrations may have dropped the template just now.
            let is_gone = matches!(&error, Error::Sql { source: sqlx::Error::Database(cause), .. }
                if cause.code().as_deref() == Some("3D000"));
            if !is_gone {
                return Err(error);
            }
            ensure(&mut connection, &server).await?;
            execute(&mut connection, copy).await?;
        }
        Self::open(server, connection, name).await
    }

    pub(crate) async fn empty_in(server: TestPostgres) -> Result<Self, Error> {
        let mut connection = enter(&server).await?;
        let name = fresh_name();
        execute(&mut connection, format!("create database {name}")).await?;
        Self::open(server, connection, name).await
    }

    async fn open(server: TestPostgres, mut connection: PgConnection, name: String) -> Result<Self, Error> {
        if surroundings::are_perverse() {
            surroundings::pervert(&mut connection, &name).await?;
        }
        let _ = connection.close().await;
        let url = url::with_database(server.url(), &name);
        let options: PgConnectOptions = url.parse().map_err(Error::sql(format!("connect to {name}")))?;
        Ok(Self {
            pool: pool_of(&options, CONNECTIONS),
            options,
            url,
            name,
            server,
        })
    }

    /// A pool of up to ten connections, opened when needed.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// A further pool, of up to `max` connections, opened when needed.
    pub fn connect_pool(&self, max: u32) -> PgPool {
        pool_of(&self.options, max)
    }

    /// From now on new connections begin with settings that nobody expects, as an administrator may have given the database: another isolation,
    /// read only, another search path, other formats and time zone, short time-outs, bad plans. Those of the pools go on with what an application
    /// sets that writes: isolation, read and write, no time-outs.
    ///
    /// # Errors
    /// Where the server does not answer.
    pub async fn pervert(&self) -> Result<(), Error> {
        let mut connection = enter(&self.server).await?;
        surroundings::pervert(&mut connection, &self.name).await?;
        let _ = connection.close().await;
        Ok(())
    }

    /// A connection outside the pools.
    ///
    /// # Errors
    /// Where the server does not run or takes no more connections.
    pub async fn connect(&self) -> Result<PgConnection, Error> {
        self.options
            .connect()
            .await
            .map_err(Error::sql(format!("connect to {}", self.name)))
    }

    /// Moves Postbox's time on, by so much more at every call: what is published from now on, due, expired or retained goes by the moved time.
    /// Leases and heartbeats do not.
    ///
    /// # Errors
    /// Where the database has no schema or does not answer.
    pub async fn advance(&self, by: Duration) -> Result<(), Error> {
        const MOVE: &str = "DO $$ BEGIN EXECUTE format(
            'CREATE OR REPLACE FUNCTION postbox.clock() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE
             RETURN clock_timestamp() + interval ''%s microseconds''',
            round(extract(epoch FROM postbox.clock() - clock_timestamp()) * 1000000) + current_setting('postbox_test.by')::numeric); END $$";
        let moving = || Error::sql("move the clock");
        let mut tx = self.pool.begin().await.map_err(moving())?;
        sqlx::query("SELECT set_config('postbox_test.by', $1, true)")
            .bind(by.as_micros().to_string())
            .execute(&mut *tx)
            .await
            .map_err(moving())?;
        sqlx::raw_sql(MOVE).execute(&mut *tx).await.map_err(moving())?;
        // The dispatchers need not find out by themselves.
        sqlx::raw_sql("NOTIFY postbox_scheduled; NOTIFY postbox_cron")
            .execute(&mut *tx)
            .await
            .map_err(moving())?;
        tx.commit().await.map_err(moving())
    }

    /// For programs and libraries that connect by themselves.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The database's name. It needs no quotes in SQL.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The server that the database is in.
    pub fn server(&self) -> &TestPostgres {
        &self.server
    }
}

/// Of an application that sets what it relies on, where that is not the default.
fn pool_of(options: &PgConnectOptions, max: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(max)
        .after_connect(|connection, _| {
            Box::pin(async move {
                let isolation: String =
                    sqlx::query_scalar("SELECT pg_catalog.current_setting('default_transaction_isolation')")
                        .fetch_one(&mut *connection)
                        .await?;
                if isolation != "read committed" {
                    sqlx::raw_sql(surroundings::FOR_TESTS).execute(connection).await?;
                }
                Ok(())
            })
        })
        .connect_lazy_with(options.clone())
}

impl Drop for TestDatabase {
    fn drop(&mut self) {
        let (server, name) = (self.server.url().to_owned(), self.name.clone());
        // A thread, because nobody awaits a drop, and the test's own runtime may be ending.
        let thread = std::thread::spawn(move || drop_now(&server, &name));
        let _ = thread.join();
    }
}

/// As well as it goes: a stopped server has other ways to lose its data.
fn drop_now(server_url: &str, name: &str) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
        return;
    };
    let work = async {
        let mut connection = removal::connect(server_url).await?;
        removal::drop_database(&mut connection, name).await?;
        connection.close().await.map_err(Error::sql("disconnect"))
    };
    let done = runtime.block_on(async { tokio::time::timeout(2 * removal::TIMEOUT, work).await });
    if !matches!(done, Ok(Ok(()))) {
        tracing::debug!(name, ?done, "left for the next run");
    }
}

impl TestPostgres {
    /// A fresh database in this server, with Postbox's schema.
    ///
    /// # Errors
    /// Where the server does not run, or does not let us create one.
    pub async fn database(&self) -> Result<TestDatabase, Error> {
        TestDatabase::migrated_in(self.clone()).await
    }

    /// A fresh database in this server, without a schema.
    ///
    /// # Errors
    /// Where the server does not run, or does not let us create one.
    pub async fn empty_database(&self) -> Result<TestDatabase, Error> {
        TestDatabase::empty_in(self.clone()).await
    }
}

/// A connection to the maintenance database; the first one of the process cleans up there.
async fn enter(server: &TestPostgres) -> Result<PgConnection, Error> {
    let connection = PgConnection::connect(server.url())
        .await
        .map_err(Error::sql("connect to the server"))?;
    if is_first_visit(server) {
        drop_leftovers(server).await?;
    }
    Ok(connection)
}

fn is_first_visit(server: &TestPostgres) -> bool {
    static VISITED: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let mut visited = VISITED.lock().unwrap_or_else(PoisonError::into_inner);
    visited.get_or_insert_default().insert(server.url().to_owned())
}

/// One process at a time; the others need not wait for it.
async fn drop_leftovers(server: &TestPostgres) -> Result<(), Error> {
    let looking = || Error::sql("look for databases of former tests");
    let mut connection = removal::connect(server.url()).await?;
    let names: Vec<String> =
        sqlx::query_scalar("select datname from pg_database where starts_with(datname, $1)")
            .bind(PREFIX)
            .fetch_all(&mut connection)
            .await
            .map_err(looking())?;
    let mut leftovers = names
        .iter()
        .filter(|name| is_leftover(name, server.is_of_this_machine()))
        .peekable();
    if leftovers.peek().is_some() && try_lock(&mut connection).await.map_err(looking())? {
        for name in leftovers {
            if removal::drop_database(&mut connection, name).await.is_err() {
                // Another user's, or a session holds us up: the next process tries again.
                break;
            }
        }
    }
    let _ = connection.close().await;
    Ok(())
}

/// Until the connection is closed.
async fn try_lock(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select pg_try_advisory_lock($1)")
        .bind(CLEANING_LOCK)
        .fetch_one(connection)
        .await
}

fn is_leftover(name: &str, of_this_machine: bool) -> bool {
    let Some(parts) = name.strip_prefix(PREFIX).filter(|_| is_plain(name)) else {
        return false;
    };
    let numbers: Option<Vec<u64>> = parts.split('_').map(|part| part.parse().ok()).collect();
    let Some([pid, time, _]) = numbers.as_deref() else {
        return false;
    };
    if of_this_machine {
        return u32::try_from(*pid).is_ok_and(|pid| !processes::alive(pid));
    }
    unix_seconds().saturating_sub(*time) > OLD.as_secs()
}

/// `postbox_test_<process>_<unix time>_<count>`.
fn fresh_name() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{}_{}_{count}", std::process::id(), unix_seconds())
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_databases_of_ended_processes_are_leftovers() {
        assert!(!is_leftover(&fresh_name(), true));
        assert!(is_leftover("postbox_test_4194305_1_0", true));
        assert!(!is_leftover("postbox_test_mine", true));
    }

    #[test]
    fn where_processes_are_unknown_only_old_databases_are_leftovers() {
        assert!(!is_leftover(&fresh_name(), false));
        assert!(is_leftover(
            &format!("{PREFIX}1_{}_0", unix_seconds() - 3_700),
            false
        ));
    }
}
