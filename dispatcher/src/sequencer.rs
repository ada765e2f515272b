//! When to take a step of the sequencer: at once when a publisher rings, paced under load, seldom when nothing happens.
//!
//! The step itself is the SQL function `postbox.sequence`; the bell is explained in ARCHITECTURE.md, "The bell".

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox_consumer::link::{self, in_time};
use sqlx::PgPool;
use sqlx::postgres::PgListener;

/// Without work for so long, a dispatcher that polls goes to sleep.
const BUSY_FOR: Duration = Duration::from_millis(60);
/// A sleeper is woken by the bell; this is for a bell that was lost with a connection, and for two-phase commits.
const SLEEPING_POLL: Duration = Duration::from_secs(1);
/// A dispatcher that cannot sleep, because a transaction with a message is still open.
const WAITING_POLL: Duration = Duration::from_millis(20);
/// Another dispatcher sleeps at the bell, so this one only steps in if that one does not answer.
const STANDBY_WAIT: Duration = Duration::from_millis(100);
/// The pause between two steps, however slow they are.
const LONGEST_TICK: Duration = Duration::from_millis(50);
/// So many bells within so long: from then on polling is cheaper than being rung.
const RUSH: (u32, Duration) = (6, Duration::from_millis(40));
/// A statement that takes longer means that the connection is dead. A step over many millions of messages is slow.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(crate) struct Counters {
    steps: AtomicU64,
    messages: AtomicU64,
}

impl Counters {
    pub(crate) fn read(&self) -> (u64, u64) {
        (
            self.steps.load(Ordering::Relaxed),
            self.messages.load(Ordering::Relaxed),
        )
    }
}

pub(crate) struct Sequencer {
    listener: PgListener,
    // Holds the one connection.
    _pool: PgPool,
    tick: Duration,
    counters: Arc<Counters>,
    /// What the last step returned.
    last_tick: Option<i64>,
    last_look: Option<String>,
}

/// Whoever can take the bell exclusively has no publisher in flight that thinks the dispatcher awake.
const TAKE_BELL: &str = "SELECT pg_try_advisory_lock(1347571761, 2)";
const GIVE_BELL: &str = "SELECT pg_advisory_unlock(1347571761, 2)";

/// Whether another dispatcher sleeps at the bell.
const BELL_IS_TAKEN: &str = "SELECT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 1347571761 \
     AND l.objid = 2 AND l.objsubid = 2 AND l.granted AND l.mode = 'ExclusiveLock' \
     AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()))";

/// A step may commit asynchronously: whatever depends on it durably is behind it in the WAL. And it must be READ COMMITTED, whatever
/// the database defaults to.
const SETTINGS: &str = "SET synchronous_commit = off; SET default_transaction_isolation = 'read committed'";

/// With what the last step returned, so that one which finds nothing costs next to nothing.
const STEP: &str = "SELECT last_tick, last_look::text, (SELECT coalesce(sum(n), 0)::bigint FROM unnest(counts) n) \
     FROM postbox.step($1, $2::text::pg_snapshot)";

enum Bell {
    Mine,
    /// Another dispatcher sleeps there.
    Others,
    /// Publishers are in flight.
    Busy,
}

impl Sequencer {
    pub(crate) async fn connect(
        pool: &PgPool,
        tick: Duration,
        counters: Arc<Counters>,
    ) -> Result<Self, sqlx::Error> {
        let options = (*pool.connect_options())
            .clone()
            .application_name("postbox dispatcher");
        let (mut listener, own) = link::open(options, "postbox_outbox", STATEMENT_TIMEOUT).await?;
        sqlx::raw_sql(SETTINGS).execute(&mut listener).await?;
        Ok(Self {
            listener,
            _pool: own,
            tick,
            counters,
            last_tick: None,
            last_look: None,
        })
    }

    /// Runs until the connection is lost.
    pub(crate) async fn run(mut self) -> sqlx::Error {
        loop {
            if let Err(error) = self.work_and_sleep().await {
                return error;
            }
        }
    }

    /// Polls while there is work, then sleeps at the bell until there is a rush again.
    async fn work_and_sleep(&mut self) -> Result<(), sqlx::Error> {
        let mut worked = Instant::now();
        while worked.elapsed() < BUSY_FOR {
            let begun = Instant::now();
            if self.step().await? > 0 {
                worked = Instant::now();
            }
            // Steps are larger and cheaper a message where they are slower, and take a tenth of the time at most.
            tokio::time::sleep(self.tick.max(begun.elapsed() * 9).min(LONGEST_TICK)).await;
        }
        match self.take_bell().await? {
            Bell::Mine => self.sleep().await,
            Bell::Others => self.stand_by().await,
            Bell::Busy => {
                self.step().await?;
                tokio::time::sleep(WAITING_POLL).await;
                Ok(())
            }
        }
    }

    /// Holds the bell, so that every publisher rings, and steps when one does.
    async fn sleep(&mut self) -> Result<(), sqlx::Error> {
        // Everyone who did not ring has committed, so this look sees what they published.
        self.step().await?;
        let mut rings = 0;
        let mut since = Instant::now();
        loop {
            rings += self.ring(SLEEPING_POLL).await?;
            if rings >= RUSH.0 {
                if since.elapsed() < RUSH.1 {
                    break;
                }
                rings = 0;
                since = Instant::now();
            }
            self.step().await?;
        }
        in_time(
            STATEMENT_TIMEOUT,
            sqlx::query(GIVE_BELL).execute(&mut self.listener),
        )
        .await?;
        Ok(())
    }

    /// Another dispatcher is at the bell: steps in when it does not answer, and tries to take its place.
    async fn stand_by(&mut self) -> Result<(), sqlx::Error> {
        if self.ring(SLEEPING_POLL).await? > 0 {
            tokio::time::sleep(STANDBY_WAIT).await;
        }
        self.step().await?;
        Ok(())
    }

    /// Waits for a publisher's notification; how many there are by then, none after `at_most`.
    async fn ring(&mut self, at_most: Duration) -> Result<u32, sqlx::Error> {
        let mut rings = match tokio::time::timeout(at_most, self.listener.try_recv()).await {
            Ok(Ok(Some(_))) => 1,
            Ok(Ok(None)) => return Err(closed()),
            Ok(Err(error)) => return Err(error),
            Err(_) => 0,
        };
        // One step answers all that have rung so far. Each counts: where steps are slow a rush is many rings at once.
        while self.listener.next_buffered().is_some() {
            rings += 1;
        }
        Ok(rings)
    }

    async fn take_bell(&mut self) -> Result<Bell, sqlx::Error> {
        let taken = sqlx::query_scalar(TAKE_BELL).fetch_one(&mut self.listener);
        if in_time(STATEMENT_TIMEOUT, taken).await? {
            return Ok(Bell::Mine);
        }
        let others = sqlx::query_scalar(BELL_IS_TAKEN).fetch_one(&mut self.listener);
        Ok(if in_time(STATEMENT_TIMEOUT, others).await? {
            Bell::Others
        } else {
            Bell::Busy
        })
    }

    async fn step(&mut self) -> Result<i64, sqlx::Error> {
        let step = sqlx::query_as(STEP)
            .bind(self.last_tick)
            .bind(self.last_look.take())
            .fetch_one(&mut self.listener);
        let (tick, look, messages): (Option<i64>, Option<String>, i64) = in_time(STEP_TIMEOUT, step).await?;
        (self.last_tick, self.last_look) = (tick, look);
        if messages > 0 {
            self.counters.steps.fetch_add(1, Ordering::Relaxed);
            self.counters
                .messages
                .fetch_add(messages as u64, Ordering::Relaxed);
        }
        Ok(messages)
    }
}

pub(crate) fn closed() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(
        std::io::ErrorKind::UnexpectedEof,
        "the server closed the connection",
    ))
}
