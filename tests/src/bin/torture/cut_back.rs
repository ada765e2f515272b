//! A database that goes back to an earlier state: an asynchronous standby that lags is promoted after its primary died, or a base backup is recovered to
//! a point in time. Nothing else is done to Postbox: these are physical copies, for which docs/internals/restore.md asks nothing of an operator but
//! that the fleet's address leads there.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use postbox_testkit::{TestPostgres, TestPostgresBuilder};
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, PgConnection};
use uuid::Uuid;

use crate::clock;
use crate::history::{Line, Log};
use crate::ledger;
use crate::plan;
use crate::proxy::{Address, Proxy};

/// Whatever the database defaults to.
const SETTINGS: [(&str, &str); 4] = [
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("default_transaction_read_only", "off"),
];
/// For a standby to catch up, and for the archive.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server whose clock is set may cut off whoever copies it.
const TRIES: u32 = 5;

/// Takes the place of the server that is ended.
pub(crate) struct CutBack {
    pub(crate) server: TestPostgres,
    pub(crate) database: String,
    /// Where the fleet finds the database.
    pub(crate) address: Address,
    pub(crate) archive: Archive,
    pub(crate) log: Log,
}

/// Where the server puts its write-ahead log.
#[derive(Clone, Debug)]
pub(crate) struct Archive(PathBuf);

impl Archive {
    /// For a server that is about to be started.
    pub(crate) fn prepare(
        folder: &Path,
        cut_back: Option<plan::CutBack>,
        server: TestPostgresBuilder,
    ) -> anyhow::Result<(Self, TestPostgresBuilder)> {
        let folder = folder.canonicalize()?.join("archive");
        if cut_back != Some(plan::CutBack::Recovery) {
            return Ok((Self(folder), server.setting("wal_keep_size", "1GB")));
        }
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        // The server's user is another one.
        fs::set_permissions(&folder, PermissionsExt::from_mode(0o777))?;
        let to = folder.display();
        let server = server.setting("archive_mode", "on").setting(
            "archive_command",
            format!("cp %p {to}/%f.part && mv {to}/%f.part {to}/%f"),
        );
        Ok((Self(folder), server))
    }
}

impl CutBack {
    /// Returns the server that there is then.
    pub(crate) async fn run(self, how: plan::CutBack, by: Duration) -> anyhow::Result<TestPostgres> {
        match how {
            plan::CutBack::Failover => self.fail_over(by).await.context("failover"),
            plan::CutBack::Recovery => self.recover(by).await.context("recovery to a point in time"),
        }
    }

    async fn fail_over(self, behind: Duration) -> anyhow::Result<TestPostgres> {
        let stream = Proxy::open(Address::of(self.options(&self.server)?.get_port())).await?;
        let mut tries = 1;
        let standby = loop {
            match self.server.standby(stream.port()).await {
                Ok(standby) => break standby,
                Err(error) if tries == TRIES => return Err(error.into()),
                Err(_) => tries += 1,
            }
        };
        let mut primary = self.connect(&self.server).await?;
        wait_until(
            &mut primary,
            "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE state = 'streaming')",
            &[],
        )
        .await
        .context("the standby does not follow")?;
        stream.stall(true);
        tokio::time::sleep(behind).await;
        let (from, dead) = self.end(primary).await?;
        drop(stream);
        standby.promote().await?;
        self.begin(&standby, from, dead).await?;
        Ok(standby)
    }

    async fn recover(self, behind: Duration) -> anyhow::Result<TestPostgres> {
        let mut tries = 1;
        let backup = loop {
            match self.server.backup().await {
                Ok(backup) => break backup,
                Err(error) if tries == TRIES => return Err(error.into()),
                Err(_) => tries += 1,
            }
        };
        let mut primary = self.connect(&self.server).await?;
        let file: String = sqlx::query_scalar("SELECT pg_walfile_name(pg_create_restore_point('here'))")
            .fetch_one(&mut primary)
            .await?;
        sqlx::query("SELECT pg_switch_wal()")
            .execute(&mut primary)
            .await?;
        wait_until(
            &mut primary,
            "SELECT coalesce(last_archived_wal >= $1, false) FROM pg_stat_archiver",
            &[&file],
        )
        .await
        .context("the archive does not have it")?;
        tokio::time::sleep(behind).await;
        let (from, dead) = self.end(primary).await?;
        self.server.recover_to(backup, &self.archive.0, "here").await?;
        self.begin(&self.server, from, dead).await?;
        Ok(self.server)
    }

    /// The server dies with what only it has; it says before which dead letters these are, since their keys have gone on.
    async fn end(&self, mut primary: PgConnection) -> anyhow::Result<(u64, Vec<(String, Uuid)>)> {
        let dead = ledger::dead_letters(&mut primary).await?;
        let from = clock::now();
        self.server.kill().await?;
        self.address.close();
        Ok((from, dead))
    }

    /// Takes down what the database has, and lets the fleet in.
    async fn begin(&self, server: &TestPostgres, from: u64, dead: Vec<(String, Uuid)>) -> anyhow::Result<()> {
        let mut connection = self.connect(server).await?;
        let kept = ledger::committed(&mut connection).await?;
        self.log.write(&Line::CutBack {
            from,
            to: clock::now(),
            kept: kept.into_iter().map(|message| message.id).collect(),
            dead,
        });
        self.address.lead_to(self.options(server)?.get_port());
        Ok(())
    }

    fn options(&self, server: &TestPostgres) -> anyhow::Result<PgConnectOptions> {
        Ok(server.url().parse::<PgConnectOptions>()?.database(&self.database))
    }

    async fn connect(&self, server: &TestPostgres) -> anyhow::Result<PgConnection> {
        Ok(self.options(server)?.options(SETTINGS).connect().await?)
    }
}

async fn wait_until(
    connection: &mut PgConnection,
    condition: &'static str,
    arguments: &[&str],
) -> anyhow::Result<()> {
    let waiting = async {
        loop {
            let mut query = sqlx::query_scalar::<_, bool>(condition);
            for argument in arguments {
                query = query.bind(*argument);
            }
            if query.fetch_one(&mut *connection).await? {
                return anyhow::Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await?
}
