//! When to look for what is due: just when the next is, at once when something is scheduled that is due sooner, seldom when nothing happens.
//!
//! The bell is the sequencer's with another lock; see ARCHITECTURE.md, "Time".

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox_consumer::link::{self, in_time};
use sqlx::PgPool;
use sqlx::postgres::PgListener;

use crate::cron::Crons;
use crate::promotion::{Look, Promotion};
use crate::sequencer::closed;

/// Without anything new for so long, timers that poll go to sleep.
const BUSY_FOR: Duration = Duration::from_millis(60);
/// How long a sleeper sleeps at most. What is due within a minute rings; this finds the rest, a clock that was changed, and lost bells.
const SLEEPING_POLL: Duration = Duration::from_secs(1);
/// One that cannot sleep, because a transaction that scheduled something is still open.
const WAITING_POLL: Duration = Duration::from_millis(20);
/// Another dispatcher's timers are at the bell; these step in when something has been due for so long.
const STANDBY_WAIT: Duration = Duration::from_millis(100);
/// So many bells within so long: from then on polling is cheaper than being rung.
const RUSH: (u32, Duration) = (6, Duration::from_millis(40));
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

const TAKE_BELL: &str = "SELECT pg_try_advisory_lock(1347571761, 5)";
const GIVE_BELL: &str = "SELECT pg_advisory_unlock(1347571761, 5)";
const BELL_IS_TAKEN: &str = "SELECT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 1347571761 \
     AND l.objid = 5 AND l.objsubid = 2 AND l.granted AND l.mode = 'ExclusiveLock' \
     AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()))";

/// Unlike the sequencer's steps these commit durably: a message that was promoted again after a crash of the server would come to a broadcast
/// from memory a second time.
const SETTINGS: &str = "SET synchronous_commit = on; SET default_transaction_isolation = 'read committed'";

#[derive(Debug, Default)]
pub(crate) struct Counters {
    promoted: AtomicU64,
    fired: AtomicU64,
}

impl Counters {
    pub(crate) fn read(&self) -> (u64, u64) {
        (
            self.promoted.load(Ordering::Relaxed),
            self.fired.load(Ordering::Relaxed),
        )
    }
}

pub(crate) struct Timers {
    listener: PgListener,
    // Holds the one connection.
    _pool: PgPool,
    tick: Duration,
    counters: Arc<Counters>,
    promotion: Promotion,
    crons: Crons,
    /// When to look at the schedules again.
    cron_at: Instant,
}

impl Timers {
    pub(crate) async fn connect(
        pool: &PgPool,
        tick: Duration,
        counters: Arc<Counters>,
    ) -> Result<Self, sqlx::Error> {
        let options = (*pool.connect_options())
            .clone()
            .application_name("postbox timers");
        let (mut listener, own) = link::open(options, "postbox_scheduled", STATEMENT_TIMEOUT).await?;
        listener.listen("postbox_cron").await?;
        sqlx::raw_sql(SETTINGS).execute(&mut listener).await?;
        Ok(Self {
            listener,
            _pool: own,
            tick,
            counters,
            promotion: Promotion::default(),
            crons: Crons::default(),
            cron_at: Instant::now(),
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

    /// Polls while messages are scheduled that are due soon, then sleeps at the bell until there is a rush of them again.
    async fn work_and_sleep(&mut self) -> Result<(), sqlx::Error> {
        let mut worked = Instant::now();
        while worked.elapsed() < BUSY_FOR {
            let look = self.look().await?;
            if look.is_fresh || look.is_full {
                worked = Instant::now();
            }
            if !look.is_full {
                tokio::time::sleep(self.tick).await;
            }
        }
        let taken = sqlx::query_scalar(TAKE_BELL).fetch_one(&mut self.listener);
        if in_time(STATEMENT_TIMEOUT, taken).await? {
            return self.sleep().await;
        }
        let others = sqlx::query_scalar(BELL_IS_TAKEN).fetch_one(&mut self.listener);
        if in_time(STATEMENT_TIMEOUT, others).await? {
            return self.stand_by().await;
        }
        let look = self.look().await?;
        if !look.is_full {
            tokio::time::sleep(WAITING_POLL.min(self.pause(&look))).await;
        }
        Ok(())
    }

    /// Holds the bell, so that everyone who schedules something for soon rings, and looks when one does or something is due.
    async fn sleep(&mut self) -> Result<(), sqlx::Error> {
        let mut rings = 0;
        let mut since = Instant::now();
        loop {
            // Everyone who did not ring has committed, so the first of these looks sees what they scheduled.
            let look = self.look().await?;
            if look.is_full {
                continue;
            }
            if self.ring(self.pause(&look)).await? {
                rings += 1;
                if rings >= RUSH.0 {
                    if since.elapsed() < RUSH.1 {
                        break;
                    }
                    rings = 0;
                    since = Instant::now();
                }
            }
        }
        let given = sqlx::query(GIVE_BELL).execute(&mut self.listener);
        in_time(STATEMENT_TIMEOUT, given).await?;
        Ok(())
    }

    /// Another dispatcher's timers are at the bell: steps in when they do not answer, and tries to take their place.
    async fn stand_by(&mut self) -> Result<(), sqlx::Error> {
        let look = self.look().await?;
        let due_in = look.due_in.unwrap_or(SLEEPING_POLL) + STANDBY_WAIT;
        if self.ring(due_in.min(SLEEPING_POLL)).await? {
            tokio::time::sleep(STANDBY_WAIT).await;
        }
        Ok(())
    }

    /// How long nothing is due; after a promotion no less than a tick, so that many that are due one after another are moved together.
    fn pause(&self, look: &Look) -> Duration {
        let least = if look.promoted > 0 {
            self.tick
        } else {
            Duration::ZERO
        };
        let due_in = look.due_in.unwrap_or(SLEEPING_POLL);
        let cron_in = self.cron_at.saturating_duration_since(Instant::now());
        due_in.min(cron_in).max(least).min(SLEEPING_POLL)
    }

    /// Waits for a notification; `false` after `at_most`.
    async fn ring(&mut self, at_most: Duration) -> Result<bool, sqlx::Error> {
        let first = match tokio::time::timeout(at_most, self.listener.try_recv()).await {
            Ok(Ok(Some(notification))) => notification,
            Ok(Ok(None)) => return Err(closed()),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(false),
        };
        let mut next = Some(first);
        while let Some(notification) = next {
            if notification.channel() == "postbox_cron" {
                self.cron_at = Instant::now();
            }
            next = self.listener.next_buffered();
        }
        Ok(true)
    }

    /// Promotes a batch of what is due, and fires what is due.
    async fn look(&mut self) -> Result<Look, sqlx::Error> {
        if self.cron_at <= Instant::now() {
            let (fired, due_in) = self.crons.step(&mut self.listener).await?;
            self.counters.fired.fetch_add(fired, Ordering::Relaxed);
            self.cron_at = Instant::now() + due_in.unwrap_or(SLEEPING_POLL).min(SLEEPING_POLL);
        }
        let look = self.promotion.step(&mut self.listener).await?;
        self.counters
            .promoted
            .fetch_add(look.promoted.unsigned_abs(), Ordering::Relaxed);
        Ok(look)
    }
}
