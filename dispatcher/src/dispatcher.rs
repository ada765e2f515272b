//! The dispatcher: what an application or the `postbox` command runs.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use postbox_core::link::{self, Reconnect, explain};
use postbox_core::restarts::panic_text;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::notifications::{NotificationRouter, Rings};
use crate::sequencer::{Counters, Sequencer};
use crate::timers::{self, Timers};
use crate::{expiry, restore, retention, supervised};

/// Sequences messages and wakes their consumers, promotes scheduled messages when they are due, and fires cron schedules.
///
/// It keeps two connections of its own, which must be direct (not through a transaction pooler), and now and then opens another. If the
/// database goes away it connects again by itself, with growing and jittered waits, and then looks at everything.
#[must_use = "it does nothing until it is run"]
#[derive(Debug)]
pub struct Dispatcher {
    pool: PgPool,
    tick: Duration,
    retention: Option<Duration>,
}

const MIN_TICK: Duration = Duration::from_millis(1);
const MAX_TICK: Duration = Duration::from_secs(1);

impl Dispatcher {
    /// A dispatcher for this database. `pool` says how to connect; if that is through a transaction pooler, see [`direct`](Self::direct).
    pub fn new(pool: PgPool) -> Self {
        Self {
            pool,
            tick: Duration::from_millis(1),
            retention: None,
        }
    }

    /// Connects by these options instead of those of the pool, for a pool whose connections go through a transaction pooler (PgBouncer): what a
    /// dispatcher relies on, notifications and locks of its session, is lost there.
    pub fn direct(mut self, options: PgConnectOptions) -> Self {
        self.pool = PgPoolOptions::new().connect_lazy_with(options);
        self
    }

    /// The least pause between two steps under load (default 1 ms; 1 ms to 1 s): a longer one makes larger steps, which cost less a message and come
    /// later. By itself it pauses so that steps take a fifth of a core that has nothing else to do, and a twentieth of one that has.
    pub fn tick(mut self, tick: Duration) -> Self {
        self.tick = tick;
        self
    }

    /// How long messages are kept at least, whoever has consumed them: one minute to ten years. It is stored in the database, which has 3 days
    /// until something else is said, and holds for all dispatchers; see [`retention::set_keep`].
    pub fn retention(mut self, keep: Duration) -> Self {
        self.retention = Some(keep);
        self
    }

    /// Starts in the background; returns once it is connected. In a database that was restored from another cluster it first does what
    /// [`restore::rebase`] does, and logs that as a warning.
    ///
    /// # Errors
    ///
    /// A schema that is missing, older or newer; a retention that is out of range; a first connection that fails; a restore that has not ended.
    pub async fn start(mut self) -> Result<DispatcherHandle, postbox::Error> {
        if !(MIN_TICK..=MAX_TICK).contains(&self.tick) {
            return Err(postbox::Error::Setting {
                setting: "tick of the dispatcher",
                value: format!("{:?}", self.tick),
                range: "it is 1 ms to 1 s",
            });
        }
        // The application's connections are set up as the application likes.
        let options = (*self.pool.connect_options()).clone();
        link::refuse_pooler(&options).await?;
        self.pool = link::pool(options.application_name("postbox upkeep"), 2, "");
        let check = postbox::check_schema(&self.pool);
        link::in_time(link::CONNECT_TIMEOUT, "looking at the schema", check).await?;
        if let Some(keep) = self.retention {
            let set = retention::set_keep(&self.pool, keep);
            link::in_time(link::CONNECT_TIMEOUT, "setting the retention", set).await?;
        }
        let counters = Arc::new(Counters::default());
        let (notifications, heard) = NotificationRouter::new();
        let sequencer = self.connect(&notifications, &counters).await?;
        let timing = Arc::new(timers::Counters::default());
        let timers = Timers::connect(&self.pool, self.tick, heard.clone(), timing.clone()).await?;
        let token = CancellationToken::new();
        let parts = Parts {
            sequencer,
            timers,
            notifications,
            heard,
            counters: counters.clone(),
            timing: timing.clone(),
        };
        let (end, ended) = watch::channel(None);
        let serve = self.serve(parts, token.clone());
        let task = tokio::spawn(async move {
            let served = AssertUnwindSafe(Box::pin(serve)).catch_unwind().await;
            if let Some(why) = served.unwrap_or_else(|panic| Some(panic_text(panic.as_ref()))) {
                end.send_replace(Some(why));
            }
        });
        Ok(DispatcherHandle {
            token,
            task,
            ended,
            counters,
            timing,
        })
    }

    /// What answers may be another cluster than before.
    async fn connect(
        &self,
        notifications: &NotificationRouter,
        counters: &Arc<Counters>,
    ) -> Result<Sequencer, postbox::Error> {
        restore::rebase_if_restored(&self.pool).await?;
        Ok(Sequencer::connect(&self.pool, self.tick, notifications.clone(), counters.clone()).await?)
    }

    /// Runs until `shutdown` completes.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start); and [`postbox::Error::Ended`] if it ends by itself (see [`DispatcherHandle::ended`]), after which the
    /// process had better end, too, and be started again.
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> Result<(), postbox::Error> {
        let handle = self.start().await?;
        let why = tokio::select! {
            () = shutdown => None,
            why = handle.ended() => Some(why),
        };
        handle.shutdown().await;
        why.map_or(Ok(()), |why| Err(postbox::Error::Ended(why)))
    }

    /// Until it is told to stop, or says why it cannot go on.
    async fn serve(self, parts: Parts, token: CancellationToken) -> Option<String> {
        let (dispatcher, pool) = (&self, &self.pool);
        let (notifications, heard, counters, timing) =
            (&parts.notifications, &parts.heard, &parts.counters, &parts.timing);
        let (mut sequencer, mut timers) = (Some(parts.sequencer), Some(parts.timers));
        let expiry = supervised::run("expiry", || expiry::run(pool.clone()));
        let retention = supervised::run("retention", || retention::run(pool.clone()));
        let sequencing = supervised::run("the sequencer", || {
            let connected = sequencer.take();
            async move {
                let connect = || dispatcher.connect(notifications, counters);
                let mut waits = Reconnect::new();
                let mut sequencer = match connected {
                    Some(sequencer) => sequencer,
                    None => reconnect(&mut waits, connect).await,
                };
                info!("dispatching");
                loop {
                    let error = sequencer.run().await;
                    warn!(error = explain(&error), "lost the connection; connecting again");
                    sequencer = reconnect(&mut waits, connect).await;
                    info!("connected again");
                }
            }
        });
        // On a connection of their own, so that a burst that becomes due does not hold up what is published now.
        let timing = supervised::run("timers", || {
            let connected = timers.take();
            async move {
                let connect = || Timers::connect(pool, dispatcher.tick, heard.clone(), timing.clone());
                let mut waits = Reconnect::new();
                let mut timers = match connected {
                    Some(timers) => timers,
                    None => reconnect(&mut waits, connect).await,
                };
                loop {
                    let error = timers.run().await;
                    warn!(
                        error = explain(&error),
                        "the timers lost their connection; connecting again"
                    );
                    timers = reconnect(&mut waits, connect).await;
                }
            }
        });
        let ended = tokio::select! {
            () = token.cancelled() => None,
            why = expiry => Some(why),
            why = retention => Some(why),
            why = sequencing => Some(why),
            why = timing => Some(why),
        };
        link::close(pool).await;
        ended
    }
}

/// What it keeps running.
struct Parts {
    sequencer: Sequencer,
    timers: Timers,
    notifications: NotificationRouter,
    heard: watch::Receiver<Rings>,
    counters: Arc<Counters>,
    timing: Arc<timers::Counters>,
}

async fn reconnect<T, E, F>(waits: &mut Reconnect, connect: impl Fn() -> F) -> T
where
    E: std::fmt::Display,
    F: Future<Output = Result<T, E>>,
{
    waits.lost();
    loop {
        waits.wait().await;
        match connect().await {
            Ok(connected) => {
                waits.connected();
                return connected;
            }
            Err(error) => warn!(%error, "cannot connect; trying again"),
        }
    }
}

/// A dispatcher that runs in the background. Dropping it stops the dispatcher.
#[derive(Debug)]
pub struct DispatcherHandle {
    token: CancellationToken,
    task: JoinHandle<()>,
    ended: watch::Receiver<Option<String>>,
    counters: Arc<Counters>,
    timing: Arc<timers::Counters>,
}

impl DispatcherHandle {
    /// Stops it and waits for it.
    pub async fn shutdown(mut self) {
        self.token.cancel();
        // It ends by the token; a panic in it was reported where it happened.
        let _ = (&mut self.task).await;
    }

    /// Waits until it ends by itself, and says why. It does so when a part of it has panicked six times in a row; a part that panics is started again
    /// before, and what the database does never ends it. Whoever keeps the handle should wait for this, and end the process.
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

    /// What it has done since it started.
    pub fn stats(&self) -> DispatcherStats {
        let (steps, messages) = self.counters.read();
        let (promoted, fired) = self.timing.read();
        DispatcherStats {
            steps,
            messages,
            promoted,
            fired,
        }
    }
}

/// What a dispatcher has done since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DispatcherStats {
    /// Steps that found messages.
    pub steps: u64,
    /// Messages that got their offsets.
    pub messages: u64,
    /// Scheduled messages that were published when they were due.
    pub promoted: u64,
    /// Due times of cron schedules that were fired.
    pub fired: u64,
}

impl Drop for DispatcherHandle {
    fn drop(&mut self) {
        self.token.cancel();
    }
}
