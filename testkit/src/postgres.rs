//! The servers that tests use.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};
use tokio::sync::OnceCell;

use crate::cluster::{End, Stop};
use crate::engine::Engine;
use crate::provision::Provision;
use crate::rundir::RunDir;
use crate::rundir::watchdog::Watchdog;
use crate::version::{Major, OLDEST};
use crate::{Error, account::Account, shared};

/// A PostgreSQL server for tests. Clones are handles of the same server.
///
/// Which one you get, and where it comes from, is said by the function that you take it with; the order in
/// which we look for one is in the [crate's documentation](crate). Databases keep a handle of their server.
///
/// ```no_run
/// # async fn a_test() -> Result<(), postbox_testkit::Error> {
/// use postbox_testkit::TestPostgres;
///
/// let server = TestPostgres::builder().version(18).setting("max_prepared_transactions", "10").start().await?;
/// let db = server.database().await?;
/// server.kill().await?;
/// server.start().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct TestPostgres {
    server: Arc<Server>,
}

#[derive(Debug)]
struct Server {
    url: String,
    version: Major,
    tenancy: Tenancy,
}

#[derive(Debug)]
enum Tenancy {
    /// The user's, by `DATABASE_URL`.
    External,
    /// Ours, and that of other test processes.
    Shared,
    /// This handle's. Boxed, and locked by threads that may block.
    Private(Box<Mutex<Own>>),
}

/// In this order on drop: the server stops, then its files go.
#[derive(Debug)]
struct Own {
    engine: Engine,
    _watchdog: Watchdog,
}

impl TestPostgres {
    /// The server that all tests share: that of `DATABASE_URL` if set, else one of ours that other test
    /// processes use too.
    ///
    /// Ours is started by the first process that asks, within a second or two, and stopped about ten seconds
    /// after the last one has ended, by a watchdog. It is fast and not durable (`fsync=off`), with
    /// `max_connections=400` and `max_prepared_transactions=64`. It cannot be stopped or restarted: for that,
    /// take a [private](Self::private) one.
    ///
    /// # Errors
    /// Where no server can be had, with all that was tried.
    pub async fn shared() -> Result<Self, Error> {
        static SHARED: OnceCell<TestPostgres> = OnceCell::const_new();
        let server = SHARED.get_or_try_init(async || match database_url() {
            Some(url) => Self::external(url).await,
            None => Self::ours().await,
        });
        server.await.cloned()
    }

    /// A server of one's own, with PostgreSQL's default settings (so `fsync=on`), which may be stopped, killed
    /// and restarted.
    ///
    /// It and its data are gone when the last handle is dropped, or when the process ends in any way. It never
    /// is the server of `DATABASE_URL`.
    ///
    /// # Errors
    /// Where no server can be started, with all that was tried.
    pub async fn private() -> Result<Self, Error> {
        Self::builder().start().await
    }

    /// A [private](Self::private) server of a certain version, or with settings.
    pub fn builder() -> TestPostgresBuilder {
        TestPostgresBuilder {
            version: None,
            settings: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// For trying things out: the server of `DATABASE_URL` if set, else a [private](Self::private) one that
    /// disappears, with all its data, when the process ends.
    ///
    /// Use [`url`](Self::url) of it: with `DATABASE_URL` set, that is the very database that it names, and what
    /// is written there stays.
    ///
    /// # Errors
    /// Where no server can be had, with all that was tried.
    pub async fn find_or_start() -> Result<Self, Error> {
        match database_url() {
            Some(url) => Self::external(url).await,
            None => Self::private().await,
        }
    }

    async fn external(url: String) -> Result<Self, Error> {
        let wanted = wanted_version()?;
        let options: PgConnectOptions = url.parse().map_err(|source| Error::BadUrl { source })?;
        let connecting = || Error::sql("connect to the server of DATABASE_URL");
        let mut connection = options.connect().await.map_err(connecting())?;
        let number: i32 = sqlx::query_scalar("select current_setting('server_version_num')::int")
            .fetch_one(&mut connection)
            .await
            .map_err(connecting())?;
        let _ = connection.close().await;
        let version = Major(number.unsigned_abs() / 10_000);
        if !version.serves(wanted) {
            return Err(Error::wrong_version(wanted, version));
        }
        Ok(Self::new(Server {
            url,
            version,
            tenancy: Tenancy::External,
        }))
    }

    async fn ours() -> Result<Self, Error> {
        let wanted = wanted_version()?;
        let (url, version) = blocking(move || shared::join_or_start(wanted)).await?;
        Ok(Self::new(Server {
            url,
            version,
            tenancy: Tenancy::Shared,
        }))
    }

    fn new(server: Server) -> Self {
        Self {
            server: Arc::new(server),
        }
    }

    /// The URL of the server's maintenance database. It stays the same over restarts.
    ///
    /// With a password that other users of the machine do not know, where the server is ours.
    pub fn url(&self) -> &str {
        &self.server.url
    }

    /// The major version, such as 18.
    pub fn version(&self) -> u32 {
        self.server.version.0
    }

    /// A program beside the server's, such as `pg_dump`, of the same version.
    ///
    /// `None` where it is not installed, and for servers that are not [private](Self::private) or run in a container.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        match &self.server.tenancy {
            Tenancy::Private(own) => own
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .engine
                .program(name),
            Tenancy::External | Tenancy::Shared => None,
        }
    }

    /// Ends all sessions and stops, with everything written (PostgreSQL's *fast* shutdown). On return the
    /// server has ended. Does nothing when it is stopped.
    ///
    /// Once begun, it is completed even if the future is dropped; so are the others.
    ///
    /// # Errors
    /// For a server that is not private, and when it has not ended within a minute.
    pub async fn stop(&self) -> Result<(), Error> {
        self.with_own("stop", |own| own.engine.stop(Stop::Fast)).await
    }

    /// Stops at once, without writing what is in memory (PostgreSQL's *immediate* shutdown): the next start
    /// recovers from the write-ahead log. Does nothing when it is stopped.
    ///
    /// # Errors
    /// For a server that is not private, and when it has not ended within a minute.
    pub async fn stop_immediate(&self) -> Result<(), Error> {
        self.with_own("stop", |own| own.engine.stop(Stop::Immediate))
            .await
    }

    /// Ends the server and all its processes with SIGKILL, and clears the shared memory that they leave: what
    /// a crash of the machine does, except that what was written to files survives without `fsync` too.
    ///
    /// # Errors
    /// For a server that is not private.
    pub async fn kill(&self) -> Result<(), Error> {
        self.with_own("kill", |own| own.engine.kill()).await
    }

    /// Starts it again, with its data and at the same URL. On return it takes connections, after recovery if
    /// that was needed. Does nothing when it runs.
    ///
    /// # Errors
    /// For a server that is not private, and when it does not start; then with the end of its log.
    pub async fn start(&self) -> Result<(), Error> {
        self.with_own("start", |own| own.engine.start()).await
    }

    /// [Stops](Self::stop) and [starts](Self::start) it.
    ///
    /// # Errors
    /// Those of both.
    pub async fn restart(&self) -> Result<(), Error> {
        self.with_own("restart", |own| {
            own.engine.stop(Stop::Fast)?;
            own.engine.start()
        })
        .await
    }

    /// A base backup of the whole server, taken while it runs.
    ///
    /// # Errors
    /// For a server that is not private, one in a container, and what `pg_basebackup` says.
    pub async fn backup(&self) -> Result<TestBackup, Error> {
        let folder = self.with_own("back up", |own| own.engine.backup()).await?;
        Ok(TestBackup { folder })
    }

    /// Ends the server as in a crash and starts what the backup has in its place, at the same URL: what a failover to a standby that has not received
    /// the last commits does, or a recovery to a point in time. What was committed since is lost, and the server is on a new timeline. On return it
    /// takes connections.
    ///
    /// # Errors
    /// For a server that is not private, one in a container, and when it does not start.
    pub async fn recover(&self, backup: TestBackup) -> Result<(), Error> {
        self.with_own("recover", move |own| {
            own.engine.recover(&backup.folder, &End::Backup)
        })
        .await
    }

    /// The same up to a restore point (`pg_create_restore_point`), by the write-ahead log that the server's `archive_command` has put into a folder.
    ///
    /// # Errors
    /// Those of [`recover`](Self::recover), and where the archive does not reach to that point.
    pub async fn recover_to(
        &self,
        backup: TestBackup,
        archive: impl Into<PathBuf>,
        point: impl Into<String>,
    ) -> Result<(), Error> {
        let end = End::Point {
            archive: archive.into(),
            name: point.into(),
        };
        self.with_own("recover", move |own| own.engine.recover(&backup.folder, &end))
            .await
    }

    /// A standby of this server, which streams asynchronously: a private server of its own, that takes connections which only read. It receives
    /// through a port of 127.0.0.1 that leads to this server: its own, or that of a proxy, by which the standby can be made to lag.
    ///
    /// # Errors
    /// For a server that is not private, one in a container, and what `pg_basebackup` says.
    pub async fn standby(&self, through: u16) -> Result<Self, Error> {
        let version = self.server.version;
        let own = self
            .with_own("make a standby of", move |own| {
                let dir = RunDir::private(Account::for_servers()?)?;
                let watchdog = Watchdog::while_owned(&dir)?;
                let engine = own.engine.standby(dir, through)?;
                Ok(Own {
                    engine,
                    _watchdog: watchdog,
                })
            })
            .await?;
        Ok(Self::new(Server {
            url: own.engine.url(),
            version,
            tenancy: Tenancy::Private(Box::new(Mutex::new(own))),
        }))
    }

    /// Makes a standby a primary, on a new timeline, whatever became of the server that it followed. On return it takes connections that write.
    ///
    /// # Errors
    /// Where it does not answer or is none.
    pub async fn promote(&self) -> Result<(), Error> {
        let promoting = || Error::sql("promote the standby");
        let mut connection = PgConnection::connect(self.url()).await.map_err(promoting())?;
        sqlx::query("SELECT pg_catalog.pg_promote(true, 120)")
            .execute(&mut connection)
            .await
            .map_err(promoting())?;
        let _ = connection.close().await;
        Ok(())
    }

    async fn with_own<T: Send + 'static>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&mut Own) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let server = Arc::clone(&self.server);
        blocking(move || match &server.tenancy {
            Tenancy::Private(own) => work(&mut own.lock().unwrap_or_else(PoisonError::into_inner)),
            Tenancy::External | Tenancy::Shared => Err(Error::NotPrivate { operation }),
        })
        .await
    }

    /// Whether it is ours, and that of other test processes.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.server.tenancy, Tenancy::Shared)
    }

    /// Whether databases of processes that have ended may be known by their process's number.
    pub(crate) fn is_of_this_machine(&self) -> bool {
        !matches!(self.server.tenancy, Tenancy::External)
    }
}

/// What a [private](TestPostgres::private) server had at one moment; gone with the server.
#[derive(Debug)]
#[must_use = "a backup does nothing until it is recovered"]
pub struct TestBackup {
    folder: PathBuf,
}

/// Makes a [private](TestPostgres::private) server.
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until `start` is called"]
pub struct TestPostgresBuilder {
    version: Option<Major>,
    settings: Vec<(String, String)>,
    environment: Vec<(String, String)>,
}

impl TestPostgresBuilder {
    /// A major version, 15 or newer, such as 18. Default: `POSTBOX_TEST_POSTGRES`, else the newest on the machine.
    pub fn version(mut self, major: u32) -> Self {
        self.version = Some(Major(major));
        self
    }

    /// A setting as in `postgresql.conf`; it holds over restarts.
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.push((name.into(), value.into()));
        self
    }

    /// A variable of the server's environment, such as `LD_PRELOAD`; not where the server runs in a container.
    pub fn environment(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Makes its data directory and starts it.
    ///
    /// # Errors
    /// Where no server can be started, with all that was tried; with the end of its log if it does not start.
    pub async fn start(self) -> Result<TestPostgres, Error> {
        let wanted = match self.version {
            Some(version) => Some(version),
            None => wanted_version()?,
        };
        blocking(move || {
            let provision = Provision::find(wanted)?;
            let version = provision.major();
            let dir = RunDir::private(Account::for_servers()?)?;
            let watchdog = Watchdog::while_owned(&dir)?;
            let engine = Engine::create(provision, dir, self.settings, self.environment)?;
            let url = engine.url();
            let own = Own {
                engine,
                _watchdog: watchdog,
            };
            Ok(TestPostgres::new(Server {
                url,
                version,
                tenancy: Tenancy::Private(Box::new(Mutex::new(own))),
            }))
        })
        .await
    }
}

fn database_url() -> Option<String> {
    std::env::var("DATABASE_URL")
        .ok()
        .filter(|url| !url.trim().is_empty())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::Io {
            what: String::from("finish the work on the server"),
            source: error.into(),
        })
    })
}

/// What `POSTBOX_TEST_POSTGRES` asks for.
fn wanted_version() -> Result<Option<Major>, Error> {
    let Some(value) = std::env::var_os("POSTBOX_TEST_POSTGRES").filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let value = value.to_string_lossy().into_owned();
    match value.trim().parse().map(Major) {
        Ok(major) if major >= OLDEST => Ok(Some(major)),
        _ => Err(Error::BadVersion { value }),
    }
}
