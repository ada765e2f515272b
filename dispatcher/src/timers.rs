//! When to look for what is due: just when the next is, at once when something is scheduled that is due sooner, seldom when nothing happens.
//!
//! See docs/internals/time.md.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chrono::TimeDelta;
use postbox_core::clock::{self, ClockWatch};
use postbox_core::link::in_time;
use sqlx::PgPool;
use tokio::sync::watch;
use tracing::warn;

use crate::bell::{BUSY_FOR, Bell, Burst, SLEEPING_POLL, STANDBY_WAIT, Taken, WAITING_POLL};
use crate::cron::Crons;
use crate::notifications::Rings;
use crate::promotion::{Look, Promotion};

/// The bell of who schedules something that is due within a minute. Who does not is found by the poll, as is a clock that was changed.
const BELL: i32 = 5;

/// Whoever makes the first schedule rings; this is for a ring that was lost.
const WITHOUT_SCHEDULES: Duration = Duration::from_secs(10);

/// The least pause between two looks while many are due.
const TICK: Duration = Duration::from_millis(4);
/// So many rings within a tenth of a second: from then on polling is cheaper than being rung.
const MANY: u32 = 16;

/// Unlike the sequencer's steps these commit durably: a message that was promoted again after a crash of the server would come to a broadcast
/// from memory a second time.
const SETTINGS: &str = "SET synchronous_commit = on";

const NOTE_CLOCK: &str = "SELECT postbox.note_incident('clock', 'a dispatcher', $1)";
const TIMEOUT: Duration = Duration::from_secs(10);

/// Anybody can ring, any number of times, and every ring would read all schedules.
const RUNG_AGAIN: Duration = Duration::from_millis(100);

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
    bell: Bell,
    heard: watch::Receiver<Rings>,
    /// What was heard by the last look.
    rings: Rings,
    tick: Duration,
    counters: Arc<Counters>,
    promotion: Promotion,
    crons: Crons,
    /// When to look at the schedules again.
    cron_at: Instant,
    cron_looked: Instant,
    /// Whether the database's clock is set.
    clock: ClockWatch,
}

impl Timers {
    pub(crate) async fn connect(
        pool: &PgPool,
        tick: Duration,
        heard: watch::Receiver<Rings>,
        counters: Arc<Counters>,
    ) -> Result<Self, sqlx::Error> {
        let rings = *heard.borrow();
        Ok(Self {
            bell: Bell::connect(pool, BELL, "postbox timers", &[], SETTINGS).await?,
            rings,
            heard,
            tick: tick.max(TICK),
            counters,
            promotion: Promotion::default(),
            crons: Crons::default(),
            cron_at: Instant::now(),
            cron_looked: Instant::now(),
            clock: ClockWatch::default(),
        })
    }

    /// Runs until the connection is lost.
    pub(crate) async fn run(mut self) -> sqlx::Error {
        loop {
            if let Err(error) = self.work_and_sleep().await {
                match self.bell.is_locked_out("the timers", &error).await {
                    Ok(true) => {}
                    Ok(false) => return error,
                    Err(error) => return error,
                }
            }
        }
    }

    /// Polls while messages are scheduled that are due soon, then sleeps at the bell until there is a burst of them again.
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
        match self.bell.take().await? {
            Taken::Mine => self.sleep().await,
            Taken::Others => self.stand_by().await,
            Taken::Busy => {
                let look = self.look().await?;
                if !look.is_full {
                    tokio::time::sleep(WAITING_POLL.min(self.pause(&look))).await;
                }
                Ok(())
            }
        }
    }

    /// Holds the bell, so that everyone who schedules something for soon rings, and looks when one does or something is due.
    async fn sleep(&mut self) -> Result<(), sqlx::Error> {
        let mut burst = Burst::new();
        loop {
            // Everyone who did not ring has committed, so the first of these looks sees what they scheduled.
            let look = self.look().await?;
            if !look.is_full && burst.is_on_with(self.rings(self.pause(&look)).await, MANY) {
                return self.bell.give().await;
            }
        }
    }

    /// Another dispatcher's timers are at the bell: steps in when they do not answer, and tries to take their place.
    async fn stand_by(&mut self) -> Result<(), sqlx::Error> {
        let look = self.look().await?;
        let due_in = look.due_in.unwrap_or(SLEEPING_POLL) + STANDBY_WAIT;
        if self.rings(due_in.min(SLEEPING_POLL)).await > 0 {
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

    /// Waits for a ring; how many there are by then.
    async fn rings(&mut self, at_most: Duration) -> u32 {
        // At once if there was one since. The sequencer's end is there as long as this one.
        let _ = tokio::time::timeout(at_most, self.heard.changed()).await;
        let now = *self.heard.borrow_and_update();
        let before = std::mem::replace(&mut self.rings, now);
        if now.cron != before.cron {
            self.cron_at = self.cron_at.min(self.cron_looked + RUNG_AGAIN);
        }
        now.scheduled.wrapping_sub(before.scheduled)
    }

    /// In the log, and for doctor.
    async fn tell_of_clock(&mut self, step: TimeDelta) -> Result<(), sqlx::Error> {
        let what = format!("the database's clock was set {}", clock::in_words(step));
        warn!(what, "everything that is due, kept or expires goes by it");
        let note = sqlx::query(NOTE_CLOCK)
            .bind(what)
            .execute(&mut self.bell.connection);
        in_time(TIMEOUT, "noting what is odd", note).await?;
        Ok(())
    }

    /// Promotes a batch of what is due, and fires what is due.
    async fn look(&mut self) -> Result<Look, sqlx::Error> {
        if self.cron_at <= Instant::now() {
            self.cron_looked = Instant::now();
            let (fired, due_in) = self.crons.step(&mut self.bell.connection).await?;
            self.counters.fired.fetch_add(fired, Ordering::Relaxed);
            self.cron_at =
                Instant::now() + due_in.map_or(WITHOUT_SCHEDULES, |due_in| due_in.min(SLEEPING_POLL));
        }
        let asked = Instant::now();
        let look = self.promotion.step(&mut self.bell.connection).await?;
        if let Some(step) = self.clock.look(look.now, asked, Instant::now()) {
            self.tell_of_clock(step).await?;
        }
        self.counters
            .promoted
            .fetch_add(look.promoted.unsigned_abs(), Ordering::Relaxed);
        Ok(look)
    }
}
