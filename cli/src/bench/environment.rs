//! Where benches run: the database, tables of their own, names of their own, and a dispatcher.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use postbox_dispatcher::{Dispatcher, DispatcherHandle, status};
use serde_json::{Value, json};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, PgConnection, PgPool, Row};

use super::Settings;
use super::progress::Progress;
use crate::database::Database;
use crate::output::warn;

/// Of all topics and groups of benches. Nothing else may begin with it.
const PREFIX: &str = "postbox.bench.";

/// One bench at a time: two would measure each other.
const ONLY_ONE: &str = "SELECT pg_try_advisory_lock(1347571766, 1)";

/// What is left of one that was killed is removed first. The baselines are tables without anything that a plain insert would not need.
const CREATE: &str = "
    DROP SCHEMA IF EXISTS postbox_bench CASCADE;
    CREATE SCHEMA postbox_bench;
    CREATE TABLE postbox_bench.business (id bigint, note text);
    CREATE TABLE postbox_bench.plain (id uuid, topic text, type text, key text, headers jsonb, content_type text, payload bytea,
        published_at timestamptz DEFAULT clock_timestamp());
    CREATE TABLE postbox_bench.log (n bigserial PRIMARY KEY, LIKE postbox_bench.plain INCLUDING DEFAULTS);
    CREATE TABLE postbox_bench.queue (n bigserial PRIMARY KEY, LIKE postbox_bench.plain INCLUDING DEFAULTS);
    CREATE TABLE postbox_bench.effect (message bigint, note text);";

const DROP: &str = "DROP SCHEMA IF EXISTS postbox_bench CASCADE";

const FORGET_GROUPS: &str = "DELETE FROM postbox.subscription WHERE starts_with(group_name, $1)";
const FORGET_TOPICS: &str = "DELETE FROM postbox.topic WHERE starts_with(name, $1)";

const OWNED_LANES: &str = "SELECT count(*) FROM postbox.lane l JOIN postbox.subscription s ON s.id = l.subscription_id \
     WHERE s.topic = $1 AND l.consumer_id IS NOT NULL";

/// What explains a figure.
const SERVER_SETTINGS: &str = "SELECT current_setting('server_version') AS version, current_setting('fsync') AS fsync, \
     current_setting('synchronous_commit') AS synchronous_commit, current_setting('shared_buffers') AS shared_buffers";

/// How long what must come may take.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Environment {
    pub(crate) settings: Settings,
    pub(crate) server: Server,
    pub(crate) progress: Progress,
    /// A connection for each client, and some.
    pub(crate) pool: PgPool,
    options: PgConnectOptions,
    url: String,
    run: String,
    topics: AtomicU32,
    dispatcher: Option<DispatcherHandle>,
    /// Holds the lock.
    own: PgConnection,
}

pub(crate) struct Server {
    pub(crate) version: String,
    pub(crate) cores: usize,
    settings: Value,
}

impl Environment {
    pub(crate) async fn prepare(database: &Database, settings: Settings) -> anyhow::Result<Self> {
        let pool = database.open(u32::from(settings.clients) + 8).await?;
        let options = (*pool.connect_options()).clone();
        let mut own = options.connect().await?;
        let alone: bool = sqlx::query_scalar(ONLY_ONE).fetch_one(&mut own).await?;
        ensure!(
            alone,
            "another `postbox bench` runs in this database: wait until it has ended"
        );
        forget(&mut own).await?;
        sqlx::raw_sql(CREATE)
            .execute(&mut own)
            .await
            .context("cannot create the bench's tables; the role needs CREATE on the database")?;
        if status::dispatchers(&pool).await? > 0 {
            warn(
                "a dispatcher is connected already, and is what dispatches here; its own latency is measured best where it is the only one",
            );
        }
        let server = Server::ask(&mut own).await?;
        let mut environment = Self {
            progress: Progress::new(settings.json),
            settings,
            server,
            pool,
            options,
            url: database.url().to_owned(),
            run: uuid::Uuid::now_v7().simple().to_string(),
            topics: AtomicU32::new(0),
            dispatcher: None,
            own,
        };
        environment.dispatch_here().await?;
        Ok(environment)
    }

    /// Removes what [`prepare`](Self::prepare) made, and the groups and topics.
    pub(crate) async fn clean(mut self) -> anyhow::Result<()> {
        self.dispatch_elsewhere().await?;
        sqlx::raw_sql(DROP)
            .execute(&mut self.own)
            .await
            .context("cannot drop the schema postbox_bench")?;
        forget(&mut self.own).await
    }

    /// A dispatcher in this process, if there is none at all.
    pub(crate) async fn dispatch_here(&mut self) -> anyhow::Result<()> {
        if self.dispatcher.is_none() && status::dispatchers(&self.pool).await? == 0 {
            self.dispatcher = Some(Dispatcher::new(self.pool.clone()).start().await?);
        }
        Ok(())
    }

    /// Ends the dispatcher in this process; the server has seen it go.
    pub(crate) async fn dispatch_elsewhere(&mut self) -> anyhow::Result<()> {
        if let Some(dispatcher) = self.dispatcher.take() {
            let before = status::dispatchers(&self.pool).await?;
            dispatcher.shutdown().await;
            self.dispatchers(before - 1).await?;
        }
        Ok(())
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// A topic that nobody has used.
    pub(crate) fn topic(&self, bench: &str) -> String {
        let number = self.topics.fetch_add(1, Ordering::Relaxed);
        format!("{PREFIX}{}.{bench}.{number}", self.run)
    }

    /// A group's name; a group is told by it together with its topic.
    pub(crate) fn group(&self, number: usize) -> String {
        format!("{PREFIX}{}.group.{number}", self.run)
    }

    /// A connection outside the pool.
    pub(crate) async fn connect(&self) -> anyhow::Result<PgConnection> {
        Ok(self.options.connect().await?)
    }

    /// A pool for a consumer: it only tells it how to connect, unless its handlers are transactional.
    pub(crate) fn consumer_pool(&self, connections: u32) -> PgPool {
        PgPoolOptions::new()
            .max_connections(connections)
            .connect_lazy_with(self.options.clone())
    }

    /// Until so many lanes of a topic have an owner: all that is published from then on is handled at once.
    pub(crate) async fn lanes_owned(&self, topic: &str, lanes: i64) -> anyhow::Result<()> {
        self.until("the consumers own their lanes", async || {
            let owned: i64 = sqlx::query_scalar(OWNED_LANES)
                .bind(topic)
                .fetch_one(&self.pool)
                .await?;
            Ok(owned == lanes)
        })
        .await
    }

    /// Until so many messages of these topics together have their offsets.
    pub(crate) async fn sequenced(&self, topics: &[String], messages: u64) -> anyhow::Result<()> {
        self.until("the messages are sequenced", async || {
            let now: i64 = sqlx::query_scalar(
                "SELECT coalesce(sum(postbox.next_offset(t)), 0)::bigint FROM unnest($1::text[]) t",
            )
            .bind(topics)
            .fetch_one(&self.pool)
            .await?;
            Ok(now == messages as i64)
        })
        .await
    }

    /// Until so many dispatchers are connected.
    pub(crate) async fn dispatchers(&self, count: i64) -> anyhow::Result<()> {
        self.until("the dispatchers are connected", async || {
            Ok(status::dispatchers(&self.pool).await? == count)
        })
        .await
    }

    async fn until(&self, what: &str, holds: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
        let begun = tokio::time::Instant::now();
        while !holds().await? {
            ensure!(
                begun.elapsed() < PATIENCE,
                "{} s passed before {what}",
                PATIENCE.as_secs()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    pub(crate) fn settings_as_json(&self) -> Value {
        json!({
            "clients": self.settings.clients,
            "rounds": self.settings.rounds(),
            "seconds": self.settings.seconds,
            "compare": self.settings.compare,
            "server": self.server.settings,
        })
    }
}

impl Server {
    async fn ask(connection: &mut PgConnection) -> anyhow::Result<Self> {
        let row = sqlx::query(SERVER_SETTINGS).fetch_one(connection).await?;
        let text = |name: &str| row.try_get::<String, _>(name);
        Ok(Self {
            version: text("version")?,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            settings: json!({
                "fsync": text("fsync")?,
                "synchronous_commit": text("synchronous_commit")?,
                "shared_buffers": text("shared_buffers")?,
            }),
        })
    }
}

async fn forget(connection: &mut PgConnection) -> anyhow::Result<()> {
    for statement in [FORGET_GROUPS, FORGET_TOPICS] {
        sqlx::query(statement)
            .bind(PREFIX)
            .execute(&mut *connection)
            .await
            .context("cannot remove the bench's groups and topics")?;
    }
    Ok(())
}
