//! The clock of the server, which can be set: by the library libfaketime where it is installed, with which the server is started then; else only the
//! clock by which Postbox publishes, retains and expires.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use postbox_testkit::TestPostgresBuilder;
use sqlx::{AssertSqlSafe, PgPool};

const LIBRARIES: [&str; 5] = [
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib64/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
    "/usr/local/lib/faketime/libfaketime.so.1",
];

pub(crate) enum ServerClock {
    /// It reads by how many seconds it is wrong from this file.
    Library(PathBuf),
    Function,
}

impl ServerClock {
    /// For a server that is about to be started.
    pub(crate) fn prepare(server: TestPostgresBuilder) -> anyhow::Result<(Self, TestPostgresBuilder)> {
        let Some(library) = LIBRARIES.into_iter().find(|library| Path::new(library).exists()) else {
            return Ok((Self::Function, server));
        };
        // Where the server's user may read it.
        let name = format!("postbox-torture-clock-{}", std::process::id());
        let file = std::env::temp_dir().join(name);
        fs::write(&file, "+0").with_context(|| format!("cannot write {}", file.display()))?;
        let server = server
            .environment("LD_PRELOAD", library)
            .environment("FAKETIME_TIMESTAMP_FILE", file.display().to_string())
            .environment("FAKETIME_NO_CACHE", "1")
            .environment("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .environment("DONT_FAKE_MONOTONIC", "1");
        Ok((Self::Library(file), server))
    }

    /// Wrong by so many seconds from now on.
    pub(crate) async fn set(&self, pool: &PgPool, by: i64) -> anyhow::Result<()> {
        match self {
            Self::Library(file) => {
                // In one step, so that nobody reads half of it.
                let new = file.with_extension("new");
                fs::write(&new, format!("{by:+}"))?;
                fs::rename(new, file)?;
            }
            Self::Function => {
                sqlx::raw_sql(AssertSqlSafe(format!(
                    "CREATE OR REPLACE FUNCTION postbox.clock() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE \
                     RETURN clock_timestamp() + make_interval(secs => {by})"
                )))
                .execute(pool)
                .await?;
            }
        }
        Ok(())
    }
}

impl Drop for ServerClock {
    fn drop(&mut self) {
        if let Self::Library(file) = self {
            let _ = fs::remove_file(file);
        }
    }
}
