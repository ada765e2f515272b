//! The consumer: what an application builds and runs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::clock::DatabaseClock;
use crate::cron;
use crate::error::Error;
use crate::handler::HandlerDefinition;
use crate::process::Process;
use crate::progress::Intake;
use crate::state::States;
use crate::subscription::{Subscription, plan_all};

/// Runs handlers.
///
/// ```no_run
/// # use postbox_consumer::{Consumer, handler, handlers, Json, HandlerError};
/// #[handler(group = "mail", topic = "orders")]
/// async fn send_receipt(order: Json<serde_json::Value>) -> Result<(), HandlerError> { Ok(()) }
///
/// # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// Consumer::new(pool)
///     .handlers(handlers![send_receipt])
///     .run_until(async { let _ = tokio::signal::ctrl_c().await; })
///     .await?;
/// # Ok(()) }
/// ```
///
/// **Connections.** However many groups it has, a consumer keeps one connection for its session and at most two for reading, beside
/// those of `pool`, which transactional handlers use. It connects directly: behind a transaction pooler its session does
/// not work.
///
/// **Failures of the database** are survived: it connects again by itself, and nothing is lost.
#[must_use = "it does nothing until it is run"]
pub struct Consumer {
    pool: PgPool,
    definitions: Vec<HandlerDefinition>,
    states: States,
    settings: Settings,
}

/// What an instance can be told.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) node: String,
    pub(crate) lease: Duration,
    pub(crate) grace: Duration,
    pub(crate) window: usize,
    pub(crate) max_failing: usize,
    pub(crate) unknown_types: UnknownType,
}

/// What becomes of a message of a type that no handler of the group takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnknownType {
    /// It is settled and counted.
    #[default]
    Settle,
    /// It fails, and holds its key, until a handler for it is deployed.
    Fail,
}

const MIN_LEASE: Duration = Duration::from_secs(6);

impl Consumer {
    /// A consumer on this database. `pool` serves transactional handlers, and says how to connect.
    pub fn new(pool: PgPool) -> Self {
        let host = host_name();
        Self {
            pool,
            definitions: Vec::new(),
            states: States::default(),
            settings: Settings {
                node: host.clone(),
                name: host,
                lease: Duration::from_secs(10),
                grace: Duration::from_secs(30),
                window: 1024,
                max_failing: 1000,
                unknown_types: UnknownType::default(),
            },
        }
    }

    /// Shares a value with the handlers that ask for `State<S>`. One value a type; a later one replaces an earlier.
    pub fn state<S: Clone + Send + Sync + 'static>(mut self, state: S) -> Self {
        self.states.insert(state);
        self
    }

    /// Adds handlers: `handlers![a, b]`.
    pub fn handlers(mut self, handlers: impl IntoIterator<Item = HandlerDefinition>) -> Self {
        self.definitions.extend(handlers);
        self
    }

    /// Name of the instance in `postbox status` (default: the host's name).
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.settings.name = name.into();
        self
    }

    /// Name of this node, under which durable broadcasts keep their cursors (default: the host's name). No two live instances may share it, and
    /// it should survive restarts.
    pub fn node(mut self, node: impl Into<String>) -> Self {
        self.settings.node = node.into();
        self
    }

    /// After how long without a heartbeat others take over, although the instance's connection still seems to be there: its host vanished, or it is
    /// frozen (default 10 s, at least 6 s). An instance that dies is noticed at once, by its connection.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.settings.lease = lease.max(MIN_LEASE);
        self
    }

    /// How long handlers may go on after a shutdown began (default 30 s). Those that do not finish are cancelled; their messages are
    /// delivered again.
    pub fn shutdown_grace(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// Most messages of a subscription that are in memory and not settled (default 1,024, at least eight times the concurrency). A key with a long
    /// queue fills it, so a larger one lets more other keys pass a hot key, and repeats more after a crash.
    pub fn window(mut self, messages: usize) -> Self {
        self.settings.window = messages.max(1);
        self
    }

    /// How many messages of a subscription may fail at once, over all instances, before no more are taken in (default 1,000; those parked
    /// behind them and those whose keys are halted do not count). Those that fail go on being retried.
    pub fn max_failing(mut self, messages: usize) -> Self {
        self.settings.max_failing = messages.max(1);
        self
    }

    /// What becomes of a message of a type that no handler of its group takes (default: settled and counted).
    pub fn unknown_types(mut self, policy: UnknownType) -> Self {
        self.settings.unknown_types = policy;
        self
    }

    /// Starts in the background; returns once all subscriptions are registered and lanes are being claimed.
    ///
    /// **Errors.** What is wrong with the handlers, the schema or the first connection.
    pub async fn start(self) -> Result<ConsumerHandle, Error> {
        postbox::check_schema(&self.pool).await?;
        let states = Arc::new(self.states);
        let clock = Arc::new(DatabaseClock::default());
        let crons = cron::read_all(&self.definitions)?;
        let subscriptions = Arc::new(plan_all(
            &self.definitions,
            &self.settings,
            &states,
            &self.pool,
            &clock,
        )?);
        cron::register_all(&self.pool, crons).await?;
        let readers = PgPoolOptions::new()
            .max_connections(2)
            // A broken one is noticed by the read, which is tried again.
            .test_before_acquire(false)
            .after_connect(|connection, _| {
                Box::pin(async move {
                    // Plans for reading are known in advance; see ARCHITECTURE.md, "Pinned plans".
                    sqlx::raw_sql(
                        "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_bitmapscan = off; \
                         SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off",
                    )
                    .execute(connection)
                    .await?;
                    Ok(())
                })
            })
            .connect_lazy_with((*self.pool.connect_options()).clone());
        let token = CancellationToken::new();
        let (started, on_start) = oneshot::channel();
        let process = Process::new(self.pool, readers, self.settings, clock, subscriptions.clone());
        let task = tokio::spawn(process.run(token.clone(), started));
        match on_start.await {
            Ok(()) => Ok(ConsumerHandle {
                token,
                task,
                subscriptions,
            }),
            // It ended before it began, so it says why.
            Err(_) => Err(match task.await {
                Ok(Err(error)) => error,
                Ok(Ok(())) => Error::Ended("it stopped before it began".to_owned()),
                Err(error) => Error::Ended(error.to_string()),
            }),
        }
    }

    /// Runs until `shutdown` completes, then stops gracefully: fetches nothing more, lets handlers finish within the grace, records how far it
    /// came and gives its lanes to the others.
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        let mut handle = self.start().await?;
        tokio::select! {
            () = shutdown => handle.shutdown().await,
            ended = &mut handle.task => ended.unwrap_or_else(|error| Err(Error::Ended(error.to_string()))),
        }
    }

    /// As [`run_until`](Self::run_until), with a token.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        self.run_until(shutdown.cancelled_owned()).await
    }
}

/// A consumer that runs in the background. Dropping it stops the consumer gracefully, without waiting for it.
#[derive(Debug)]
pub struct ConsumerHandle {
    token: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
    subscriptions: Arc<Vec<Subscription>>,
}

/// What a subscription did in this process since it started.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscriptionStats {
    /// Group; for broadcasts a name made from the handler's.
    pub group: String,
    /// Topic.
    pub topic: String,
    /// Messages handled, but for those that were discarded.
    pub handled: u64,
    /// Runs that failed; of a batch, the messages of which its handler said so.
    pub failed: u64,
    /// Messages that handlers discarded.
    pub discarded: u64,
    /// Messages of a type that no handler takes.
    pub unknown: u64,
    /// Messages that failed and run again.
    pub retrying: u64,
    /// Messages that expired before they were handled.
    pub expired: u64,
    /// Messages given up since it started.
    pub dead: u64,
    /// Messages given up whose keys wait for an operator.
    pub halted: u64,
    /// Whether the circuit breaker is open: everything fails, and no more is taken in until a probe succeeds.
    pub breaker_open: bool,
    /// Offset after the last message taken in.
    pub position: i64,
}

impl ConsumerHandle {
    /// Stops gracefully and waits for it.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        self.token.cancel();
        (&mut self.task)
            .await
            .unwrap_or_else(|error| Err(Error::Ended(error.to_string())))
    }

    /// What every subscription did so far.
    pub fn stats(&self) -> Vec<SubscriptionStats> {
        let stats = |subscription: &Subscription| {
            let counters = &subscription.plan.counters;
            SubscriptionStats {
                group: subscription.plan.group.to_string(),
                topic: subscription.plan.topic.to_string(),
                handled: counters.handled.load(Ordering::Relaxed),
                failed: counters.failed.load(Ordering::Relaxed),
                discarded: counters.discarded.load(Ordering::Relaxed),
                unknown: counters.unknown.load(Ordering::Relaxed),
                retrying: counters.retrying.load(Ordering::Relaxed),
                expired: counters.expired.load(Ordering::Relaxed),
                dead: counters.dead.load(Ordering::Relaxed),
                halted: counters.halted.load(Ordering::Relaxed),
                breaker_open: counters.intake() == Intake::Open,
                position: counters.position.load(Ordering::Relaxed),
            }
        };
        self.subscriptions.iter().map(stats).collect()
    }
}

impl Drop for ConsumerHandle {
    fn drop(&mut self) {
        self.token.cancel();
    }
}

impl std::fmt::Debug for Subscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} <- {}", self.plan.group, self.plan.topic)
    }
}

fn host_name() -> String {
    let name = std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/etc/hostname").ok());
    match name.as_deref().map(str::trim) {
        Some(name) if postbox::is_name(name) => name.to_owned(),
        _ => {
            warn!("the host has no usable name; calling this instance \"localhost\"");
            "localhost".to_owned()
        }
    }
}

pub(crate) fn log_subscription(subscription: &Subscription) {
    let plan = &subscription.plan;
    let handlers: Vec<&str> = plan.router.handlers().map(|handler| handler.name).collect();
    info!(
        group = %plan.group, topic = %plan.topic, order = plan.order.as_str(), lanes = plan.lanes,
        concurrency = plan.concurrency, handlers = handlers.join(" "), "subscribed"
    );
}
