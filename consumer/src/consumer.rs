//! The consumer: what an application builds and runs.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use postbox::MAX_NAME;
use postbox_core::link;
use postbox_core::restarts::panic_text;
use postbox_core::text;
use postbox_core::url;
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower_layer::Layer;
use tower_service::Service;
use tracing::warn;

use crate::clock::DatabaseClock;
use crate::cron;
use crate::error::Error;
use crate::extract::Invocation;
use crate::handler::filter::FiltersOfTopics;
use crate::handler::{HandlerDefinition, UnknownType};
use crate::layer::{self, HandlerService, Run};
use crate::outcome::HandlerError;
use crate::protocol::progress::Intake;
use crate::session::{Ask, Process};
use crate::settings::Settings;
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
    /// How the process's own connections are made, if not as the pool's.
    direct: Option<PgConnectOptions>,
    definitions: Vec<HandlerDefinition>,
    layers: Vec<Box<dyn Fn(Run) -> Run + Send + Sync>>,
    states: States,
    settings: Settings,
}

/// For hooks, and for handlers that take a Tx all the same.
const OWN_CONNECTIONS: u32 = 4;

impl Consumer {
    /// A consumer on this database. `pool` serves transactional handlers, and says how to connect.
    ///
    /// A tenth of its connections, and at least two, are left to the application. The others are shared by the subscriptions (a group on a topic)
    /// that have transactional handlers: each has half of its equal share to itself, so that it goes on whatever the handlers of others do, and the rest goes to who
    /// is busy. `#[handler(connections = n)]` gives a subscription so many, and no more; [`tx_pool`](Self::tx_pool) gives them all a pool of their own. Who waits for more than a second says
    /// who has the connections, in the log.
    pub fn new(pool: PgPool) -> Self {
        let host = host_name();
        Self {
            pool,
            direct: None,
            definitions: Vec::new(),
            layers: Vec::new(),
            states: States::default(),
            settings: Settings {
                node: host.clone(),
                name: host,
                lease: Duration::from_secs(10),
                grace: Duration::from_secs(30),
                window: 1024,
                max_failing: 1000,
                tx_pool: None,
                unknown_types: UnknownType::default(),
            },
        }
    }

    /// A consumer on the database of this URL, with a pool of its own of four connections: for a service that has none of sqlx 0.9, and whose handlers settle in
    /// their own transactions ([`Settlement`](crate::Settlement)) or need none. It connects when it starts.
    ///
    /// # Errors
    ///
    /// The URL is not of the form `postgres://user:password@host:5432/name`, or it names several servers.
    pub fn connect(url: &str) -> Result<Self, Error> {
        let mut servers = url::servers(url).map_err(Error::Url)?;
        match (servers.pop(), servers.is_empty()) {
            (Some(options), true) => Ok(Self::new(link::pool(options, OWN_CONNECTIONS, ""))),
            _ => Err(Error::Url(
                "it names several servers, of which a pool that you make must choose: use Consumer::new"
                    .to_owned(),
            )),
        }
    }

    /// Connects by these options, but for transactional handlers: for a pool whose connections go through a transaction pooler (PgBouncer). What a
    /// session relies on, notifications and locks of its own, is lost there. Transactional handlers may go through the pooler.
    pub fn direct(mut self, options: PgConnectOptions) -> Self {
        self.direct = Some(options);
        self
    }

    /// A pool that only transactional handlers use, all of it; it must lead to the same database (default: that of [`new`](Self::new), less what is left to
    /// the application).
    pub fn tx_pool(mut self, pool: PgPool) -> Self {
        self.settings.tx_pool = Some(pool);
        self
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

    /// Puts a tower layer around every handler of this consumer, whenever it was added: for traces, limits, or anything that is done beside each run. The
    /// layer that is given last is the outermost. An error of its own counts as the handler's, and is retried by its policy; [`HandlerFailure`](crate::HandlerFailure)
    /// carries the handler's decisions through layers that box errors. Beside a [`Tx`](crate::Tx) the transaction has begun, and
    /// commits behind all layers.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # fn example(consumer: postbox_consumer::Consumer) -> postbox_consumer::Consumer {
    /// // Most runs of each handler in this process at once, whatever its groups' concurrency.
    /// consumer.layer(tower::limit::ConcurrencyLimitLayer::new(4))
    /// # }
    /// ```
    pub fn layer<L>(mut self, layer: L) -> Self
    where
        L: Layer<HandlerService> + Send + Sync + 'static,
        L::Service: Service<Invocation, Response = ()> + Clone + Send + Sync + 'static,
        <L::Service as Service<Invocation>>::Error: Into<HandlerError>,
        <L::Service as Service<Invocation>>::Future: Send + 'static,
    {
        self.layers.push(Box::new(move |run| layer::around(&layer, run)));
        self
    }

    /// Name of the instance in `postbox status` (default: the host's name). It is cut at 255 bytes.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.settings.name = text::clean_to(MAX_NAME, name.into());
        self
    }

    /// Name of this node, under which durable broadcasts keep their cursors (default: the host's name). No two live instances may share it, and
    /// it should survive restarts.
    pub fn node(mut self, node: impl Into<String>) -> Self {
        self.settings.node = node.into();
        self
    }

    /// After how long without a heartbeat others take over, although the instance's connection still seems to be there: its host vanished, or it is
    /// frozen (default 10 s; 6 s to 1 h). An instance that dies is noticed at once, by its connection.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.settings.lease = lease;
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
        self.settings.window = messages;
        self
    }

    /// How many messages of a subscription may fail at once, over all instances, before no more are taken in (default 1,000; those parked
    /// behind them and those whose keys are halted do not count). Those that fail go on being retried.
    pub fn max_failing(mut self, messages: usize) -> Self {
        self.settings.max_failing = messages;
        self
    }

    /// What becomes of a message of a type that no live instance of its group handles (default: it waits), for subscriptions whose handlers do not
    /// say it themselves (`unknown = "settle"`). A broadcast from memory settles it always.
    pub fn unknown_types(mut self, policy: UnknownType) -> Self {
        self.settings.unknown_types = policy;
        self
    }

    /// Starts in the background; returns once all subscriptions are registered and lanes are being claimed.
    ///
    /// # Errors
    ///
    /// What is wrong with the handlers, the settings, the schema or the first connection.
    pub async fn start(mut self) -> Result<ConsumerHandle, Error> {
        self.settings.check()?;
        for definition in &mut self.definitions {
            let run = definition.run.take();
            definition.run = run.map(|run| self.layers.iter().fold(run, |run, layer| layer(run)));
        }
        let direct = match &self.direct {
            Some(options) => options.clone(),
            None => (*self.pool.connect_options()).clone(),
        };
        link::refuse_pooler(&direct).await?;
        // The application's connections are set up as the application likes.
        let own = link::pool(direct.application_name("postbox upkeep"), 2, "");
        let check = postbox::check_schema(&own);
        link::in_time(link::CONNECT_TIMEOUT, "looking at the schema", check).await?;
        let states = Arc::new(self.states);
        let clock = Arc::new(DatabaseClock::default());
        let crons = cron::read_all(&self.definitions)?;
        let filters = FiltersOfTopics::read(&own, &self.definitions);
        let filters = link::in_time(link::CONNECT_TIMEOUT, "reading filters", filters).await?;
        let subscriptions = Arc::new(plan_all(
            &self.definitions,
            &self.settings,
            &states,
            (&self.pool, &own),
            &clock,
            &filters,
        )?);
        let register = cron::register_all(&own, crons);
        link::in_time(link::CONNECT_TIMEOUT, "registering schedules", register).await?;
        let token = CancellationToken::new();
        let (started, on_start) = oneshot::channel();
        let (asks, asked) = mpsc::unbounded_channel();
        let process = Process::new(own, self.settings, clock, subscriptions.clone(), asked);
        let running = process.run(token.clone(), started);
        let (end, ended) = watch::channel(None);
        let task = tokio::spawn(async move {
            let result = AssertUnwindSafe(running).catch_unwind().await;
            let result = result.unwrap_or_else(|panic| Err(Error::Ended(panic_text(panic.as_ref()))));
            if let Err(error) = &result {
                end.send_replace(Some(error.to_string()));
            }
            result
        });
        match on_start.await {
            Ok(()) => Ok(ConsumerHandle {
                token,
                task,
                ended,
                subscriptions,
                asks,
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
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start); and [`Error::Ended`] if it ends by itself (see [`ConsumerHandle::ended`]), after which the process had better end,
    /// too, and be started again.
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> Result<(), Error> {
        let mut handle = self.start().await?;
        tokio::select! {
            () = shutdown => handle.shutdown().await,
            ended = &mut handle.task => ended.unwrap_or_else(|error| Err(Error::Ended(error.to_string()))),
        }
    }

    /// As [`run_until`](Self::run_until), with a token.
    ///
    /// # Errors
    ///
    /// As [`run_until`](Self::run_until).
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        self.run_until(shutdown.cancelled_owned()).await
    }
}

/// A consumer that runs in the background. Dropping it stops the consumer gracefully, without waiting for it.
#[derive(Debug)]
pub struct ConsumerHandle {
    token: CancellationToken,
    task: JoinHandle<Result<(), Error>>,
    ended: watch::Receiver<Option<String>>,
    subscriptions: Arc<Vec<Subscription>>,
    asks: mpsc::UnboundedSender<Ask>,
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
    /// Messages of a type that no live instance handles, which were settled by [`UnknownType::Settle`].
    pub unknown: u64,
    /// Messages that failed and run again.
    pub retrying: u64,
    /// Messages that expired before they were handled.
    pub expired: u64,
    /// Messages that their handler's [`filter`](crate::HandlerDefinition::filter) does not want, which were passed.
    pub filtered: u64,
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
    ///
    /// # Errors
    ///
    /// [`Error::Ended`]: it had ended by itself before.
    pub async fn shutdown(mut self) -> Result<(), Error> {
        self.token.cancel();
        (&mut self.task)
            .await
            .unwrap_or_else(|error| Err(Error::Ended(error.to_string())))
    }

    /// Waits until it ends by itself, and says why. It does so when a part of it has panicked six times in a row; a part that panics is started again
    /// before, and neither handlers nor the database ever end it. Whoever keeps the handle should wait for this, and end the process.
    ///
    /// # Cancellation safety
    ///
    /// It may be dropped and called again.
    pub async fn ended(&self) -> String {
        let mut ended = self.ended.clone();
        let why = ended
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|why| why.clone());
        match why {
            Some(why) => why,
            // It was told to.
            None => std::future::pending().await,
        }
    }

    /// For the testkit.
    pub(crate) fn asks(&self) -> &mpsc::UnboundedSender<Ask> {
        &self.asks
    }

    /// Why it has ended by itself, if it has.
    pub(crate) fn why_ended(&self) -> Option<String> {
        self.ended.borrow().clone()
    }

    /// How many executors it has.
    pub(crate) fn executors(&self) -> usize {
        self.subscriptions.len()
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
                filtered: counters.filtered.load(Ordering::Relaxed),
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
