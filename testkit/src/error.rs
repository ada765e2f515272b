//! What can go wrong before a test has its database, and what to do about it.

use std::fmt;
use std::path::PathBuf;

use crate::version::Major;

/// Why there is no server or no database.
///
/// Its `Debug` is its message, because tests `unwrap` it.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No rule gave a server.
    #[error(
        "no PostgreSQL for the tests: {tried}. Do one of: set DATABASE_URL to a server where databases may be \
         created (tests that stop their server need more); install PostgreSQL {wanted} (Debian and Ubuntu: `apt-get install postgresql`, Fedora: `dnf \
         install postgresql-server`, macOS: `brew install postgresql@18`); install npm, through which the \
         binaries are then fetched; or run Docker and build with the cargo feature `docker`"
    )]
    NoPostgres {
        /// What would have done: a major version, or "15 or newer".
        wanted: String,
        /// Where we looked, and what was missing there.
        tried: String,
    },

    /// `POSTBOX_TEST_POSTGRES` is not a major version.
    #[error(
        "POSTBOX_TEST_POSTGRES is {value:?}: set it to a major version, 15 or newer, such as 18, or unset it"
    )]
    BadVersion {
        /// What it is set to.
        value: String,
    },

    /// The server of `DATABASE_URL` has another version than was asked for.
    #[error(
        "DATABASE_URL names a PostgreSQL {found} server, but {wanted} is needed: name another server, or unset \
         DATABASE_URL to have one started"
    )]
    WrongVersion {
        /// What was asked for: a major version, or "15 or newer".
        wanted: String,
        /// The server's major version.
        found: u32,
    },

    /// `DATABASE_URL` is no URL of a PostgreSQL database.
    #[error("DATABASE_URL is not of the form postgres://user:password@host:port/database: {source}")]
    BadUrl {
        /// What the driver says.
        source: sqlx::Error,
    },

    /// We are root, PostgreSQL refuses root, and there is nobody else to run it as.
    #[error(
        "PostgreSQL refuses to run as root, and there is neither a user `postgres` nor `nobody`: create one, or run the tests as an ordinary user"
    )]
    NoUnprivilegedUser,

    /// A folder that we would keep servers in belongs to somebody else.
    #[error("{} belongs to another user or is not a folder: remove it, or set TMPDIR to a folder of your own", path.display())]
    NotOurs {
        /// The folder.
        path: PathBuf,
    },

    /// A program that makes or fetches a server failed.
    #[error("`{program}` failed ({status}); its output ends:\n{output}")]
    Program {
        /// The program, with the arguments that matter.
        program: String,
        /// How it ended.
        status: String,
        /// The last lines that it wrote.
        output: String,
    },

    /// A server did not start.
    #[error("the PostgreSQL server did not start ({reason}); {} ends:\n{output}", log.display())]
    Start {
        /// How it ended, or how long we waited.
        reason: String,
        /// Its log file.
        log: PathBuf,
        /// The log's last lines.
        output: String,
    },

    /// A server did not stop.
    #[error("the PostgreSQL server did not stop within {seconds} s, `kill()` would stop it; {} ends:\n{output}", log.display())]
    Stop {
        /// How long we waited.
        seconds: u64,
        /// Its log file.
        log: PathBuf,
        /// The log's last lines.
        output: String,
    },

    /// Stopping and starting is for private servers only.
    #[error(
        "cannot {operation} a server that others use: take one of your own with `TestPostgres::private()`"
    )]
    NotPrivate {
        /// What was asked for.
        operation: &'static str,
    },

    /// The shared server is being stopped and does not end.
    #[error("the shared server in {} neither serves nor ends: end its processes and remove that folder", path.display())]
    Stuck {
        /// Its folder.
        path: PathBuf,
    },

    /// A container could not be started, stopped or asked.
    #[error("cannot {what}: {message}; is Docker running, and may this user use it?")]
    Container {
        /// What was to be done.
        what: &'static str,
        /// What Docker says.
        message: String,
    },

    /// A file or a process could not be had.
    #[error("cannot {what}: {source}; check the rights and the free space there")]
    Io {
        /// What was to be done, and with which file.
        what: String,
        /// The cause.
        source: std::io::Error,
    },

    /// The server refused something.
    #[error("cannot {what}: {source}; see that the server runs and that its user may do this")]
    Sql {
        /// What was to be done.
        what: String,
        /// The cause.
        source: sqlx::Error,
    },

    /// Postbox's schema could not be created in the template database.
    #[error("cannot create Postbox's schema in the template database: {source}; mend the migration")]
    Migrate {
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The migrations that a test brings cannot be applied.
    #[cfg(feature = "kit")]
    #[error("cannot apply the migrations of the test: {source}; mend the migration")]
    Migrations {
        /// The cause.
        source: sqlx::migrate::MigrateError,
    },

    /// The dispatcher of a test does not start.
    #[cfg(feature = "kit")]
    #[error("cannot start the test's dispatcher: {source}")]
    Dispatcher {
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn sql(what: impl Into<String>) -> impl FnOnce(sqlx::Error) -> Self {
        let what = what.into();
        move |source| Self::Sql { what, source }
    }

    pub(crate) fn wrong_version(wanted: Option<Major>, found: Major) -> Self {
        Self::WrongVersion {
            wanted: crate::version::describe(wanted),
            found: found.0,
        }
    }
}
