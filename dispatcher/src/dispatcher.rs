//! The dispatcher: what an application or the `postbox` command runs.

use std::sync::Arc;
use std::time::Duration;

use postbox_consumer::link::Reconnect;
use sqlx::PgPool;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::ear::{Ear, Rings};
use crate::sequencer::{Counters, Sequencer};
use crate::timers::{self, Timers};
use crate::{expiry, restore, retention};

/// Sequences messages and wakes their consumers, promotes scheduled messages when they are due, and fires cron schedules.
///
/// It keeps two connections of its own, which must be direct (not through a transaction pooler), and now and then borrows one of `pool`. If the
/// database goes away it connects again by itself, with growing and jittered waits, and then looks at everything.
#[must_use = "it does nothing until it is run"]
#[derive(Debug)]
pub struct Dispatcher {
    pool: PgPool,
    tick: Duration,
    retention: Option<Duration>,
}

impl Dispatcher {
    /// A dispatcher for this database.
    pub fn new(pool: PgPool) -> Self {
        Self {
            pool,
            tick: Duration::from_millis(4),
            retention: None,
        }
    }

    /// The pause between two steps under load (default 4 ms; longer where there is more to do, up to 50 ms): a longer one makes larger steps, which cost less a message and come later.
    pub fn tick(mut self, tick: Duration) -> Self {
        self.tick = tick.max(Duration::from_millis(1));
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
    /// **Errors.** A schema that is missing, older or newer; a retention that is out of range; a first connection that fails; a restore that has not ended.
    pub async fn start(self) -> Result<DispatcherHandle, postbox::Error> {
        postbox::check_schema(&self.pool).await?;
        if let Some(keep) = self.retention {
            retention::set_keep(&self.pool, keep).await?;
        }
        let counters = Arc::new(Counters::default());
        let (ear, heard) = Ear::new();
        let sequencer = self.connect(&ear, &counters).await?;
        let timing = Arc::new(timers::Counters::default());
        let timers = Timers::connect(&self.pool, self.tick, heard.clone(), timing.clone()).await?;
        let token = CancellationToken::new();
        let parts = Parts {
            sequencer,
            timers,
            ear,
            heard,
            counters: counters.clone(),
            timing: timing.clone(),
        };
        let serve = self.serve(parts, token.clone());
        let task = tokio::spawn(serve);
        Ok(DispatcherHandle {
            token,
            task,
            counters,
            timing,
        })
    }

    /// What answers may be another cluster than before.
    async fn connect(&self, ear: &Ear, counters: &Arc<Counters>) -> Result<Sequencer, postbox::Error> {
        restore::rebase_if_restored(&self.pool).await?;
        Ok(Sequencer::connect(&self.pool, self.tick, ear.clone(), counters.clone()).await?)
    }

    /// Runs until `shutdown` completes.
    pub async fn run_until(self, shutdown: impl Future<Output = ()>) -> Result<(), postbox::Error> {
        let handle = self.start().await?;
        shutdown.await;
        handle.shutdown().await;
        Ok(())
    }

    async fn serve(self, parts: Parts, token: CancellationToken) {
        let (pool, tick) = (&self.pool, self.tick);
        let expiry = expiry::run(pool.clone());
        let retention = retention::run(pool.clone());
        let sequencing = async {
            let mut sequencer = parts.sequencer;
            info!("dispatching");
            loop {
                let error = sequencer.run().await;
                warn!(%error, "lost the connection; connecting again");
                sequencer = reconnect(|| self.connect(&parts.ear, &parts.counters)).await;
                info!("connected again");
            }
        };
        // On a connection of their own, so that a burst that becomes due does not hold up what is published now.
        let timers = async {
            let mut timers = parts.timers;
            loop {
                let error = timers.run().await;
                warn!(%error, "the timers lost their connection; connecting again");
                let connect = || Timers::connect(pool, tick, parts.heard.clone(), parts.timing.clone());
                timers = reconnect(connect).await;
            }
        };
        tokio::select! {
            () = token.cancelled() => {}
            () = expiry => {}
            () = retention => {}
            () = sequencing => {}
            () = timers => {}
        }
    }
}

/// What it keeps running.
struct Parts {
    sequencer: Sequencer,
    timers: Timers,
    ear: Ear,
    heard: watch::Receiver<Rings>,
    counters: Arc<Counters>,
    timing: Arc<timers::Counters>,
}

async fn reconnect<T, E, F>(connect: impl Fn() -> F) -> T
where
    E: std::fmt::Display,
    F: Future<Output = Result<T, E>>,
{
    let mut reconnect = Reconnect::new();
    loop {
        reconnect.wait().await;
        match connect().await {
            Ok(connected) => return connected,
            Err(error) => warn!(%error, "cannot connect; trying again"),
        }
    }
}

/// A dispatcher that runs in the background. Dropping it stops the dispatcher.
#[derive(Debug)]
pub struct DispatcherHandle {
    token: CancellationToken,
    task: JoinHandle<()>,
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

    /// How many steps found messages, and how many messages those were.
    pub fn sequenced(&self) -> (u64, u64) {
        self.counters.read()
    }

    /// How many scheduled messages it promoted when they were due, and how many due times of cron schedules it fired.
    pub fn timed(&self) -> (u64, u64) {
        self.timing.read()
    }
}

impl Drop for DispatcherHandle {
    fn drop(&mut self) {
        self.token.cancel();
    }
}
