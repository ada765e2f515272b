//! When to take a step of the sequencer: at once when a publisher rings, paced under load, seldom when nothing happens.
//!
//! The step itself is the SQL function `postbox.step`; the bell is explained in docs/internals/bell.md.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox::log;
use postbox_core::announcements::{self, Announcement, Announcements};
use postbox_core::link::{in_time, while_at_work};
use postbox_core::seal;
use sqlx::postgres::{PgNotification, PgRow};
use sqlx::{FromRow, PgPool, Row};
use tracing::{error, warn};

use crate::bell::{BUSY_FOR, Bell, Burst, SLEEPING_POLL, STANDBY_WAIT, Taken, WAITING_POLL};
use crate::flood::Floods;
use crate::idle::IdleCores;
use crate::notifications::{self, NotificationRouter};
use crate::pace::Step;
use crate::parts::{self, Parts};

/// So many rings within a tenth of a second, and so few messages in [`BUSY_FOR`]: in between, being rung costs about what polling does. A step for each
/// ring of 600 a second takes a quarter of a core, as polling does, and the message comes sooner. While nobody waits for messages polling costs next to
/// nothing.
const MANY: (u32, i64) = (60, 30);
const MANY_IN_VAIN: (u32, i64) = (16, 8);
/// A statement that takes longer means that the connection is dead. A step over many millions of messages is slow.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);
const KEY_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(crate) struct Counters {
    steps: AtomicU64,
    messages: AtomicU64,
    /// Outlives connections, since a part may be what they are lost of.
    parts: Parts,
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
    bell: Bell,
    /// Other connections, to look after that of the bell.
    pool: PgPool,
    notifications: NotificationRouter,
    tick: Duration,
    counters: Arc<Counters>,
    /// To consumers in this process.
    announcements: Announcements,
    /// By which consumers know that what a step tells is true.
    key: Vec<u8>,
    floods: Floods,
    last: Last,
    idle: IdleCores,
    /// When it was said that messages were set aside.
    rejects_told: Option<Instant>,
}

/// What the last step returned, which spares the next one looking it up.
#[derive(Default, sqlx::FromRow)]
struct Last {
    last_tick: Option<i64>,
    last_look: Option<String>,
    last_seq: Option<i64>,
    last_slot: Option<i16>,
    last_topic: Option<String>,
    last_head: Option<i64>,
}

/// For consumers in this process a few small messages come with the step; larger ones are read by who needs them.
const SMALL: i32 = 8 * 1024;

/// The bell of who publishes.
const BELL: i32 = 2;

/// A step may commit asynchronously: whatever depends on it durably is behind it in the WAL. The others are those of `postbox.sequence`.
const SETTINGS: &str = "SET synchronous_commit = off; \
     SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_hashagg = off; SET jit = off; SET plan_cache_mode = force_generic_plan";

const STEP: &str = "SELECT s.last_tick, s.last_look::text, s.last_seq, s.last_slot, s.last_topic, s.last_head, s.messages, \
         coalesce(cardinality(s.topics), 0) AS topics, s.news, s.rejected, \
         r.seq, r.id, r.type, r.key, r.headers, r.content_type, r.payload, r.published_at, r.expires_at \
     FROM postbox.step($1, $2::text::pg_snapshot, $3, $4, $5, $6, $7, $8, $9, $10) s LEFT JOIN LATERAL unnest(s.rows) r ON true";
/// Where the columns of messages begin.
const ROWS: usize = 10;

const REJECT_NEXT: &str = "SELECT postbox.reject_next($1)";

/// Messages that break a rule may come in any number, and each is in `postbox rejects list`.
const TELL_REJECTS_EVERY: Duration = Duration::from_secs(60);

impl Sequencer {
    pub(crate) async fn connect(
        pool: &PgPool,
        tick: Duration,
        notifications: NotificationRouter,
        counters: Arc<Counters>,
    ) -> Result<Self, sqlx::Error> {
        let mut bell = Bell::connect(
            pool,
            BELL,
            "postbox dispatcher",
            &notifications::CHANNELS,
            SETTINGS,
        )
        .await?;
        notifications.has_missed();
        let key = in_time(
            KEY_TIMEOUT,
            "looking where this is",
            seal::run_key(&mut bell.connection),
        )
        .await?;
        Ok(Self {
            floods: Floods::new(notifications::CHANNELS, notifications.heard.clone()),
            notifications,
            announcements: Announcements::of(&key),
            key,
            bell,
            pool: pool.clone(),
            tick,
            counters,
            last: Last::default(),
            idle: IdleCores::default(),
            rejects_told: None,
        })
    }

    /// Runs until the connection is lost.
    pub(crate) async fn run(mut self) -> sqlx::Error {
        loop {
            if let Err(error) = self.work_and_sleep().await {
                match self.bell.is_locked_out("the sequencer", &error).await {
                    Ok(true) => {}
                    Ok(false) => return error,
                    Err(error) => return error,
                }
            }
        }
    }

    /// Polls while there is much work, then sleeps at the bell until there is a burst again.
    async fn work_and_sleep(&mut self) -> Result<(), sqlx::Error> {
        let (mut since, mut found) = (Instant::now(), 0);
        self.floods.watch(&mut self.bell.connection).await?;
        loop {
            let begun = Instant::now();
            let step = self.step().await?;
            let (_, few) = many(&step);
            found += step.messages;
            let pause = step.pause(begun.elapsed(), self.idle.look());
            self.pause(pause.max(self.tick)).await?;
            if since.elapsed() >= BUSY_FOR {
                if found <= few {
                    break;
                }
                (since, found) = (Instant::now(), 0);
            }
        }
        match self.bell.take().await? {
            Taken::Mine => self.sleep().await,
            Taken::Others => self.stand_by().await,
            Taken::Busy => {
                self.step().await?;
                self.pause(WAITING_POLL).await
            }
        }
    }

    /// Holds the bell, so that every publisher rings, and steps when one does.
    async fn sleep(&mut self) -> Result<(), sqlx::Error> {
        // Everyone who did not ring has committed, so this look sees what they published.
        let mut step = self.step().await?;
        let mut burst = Burst::new();
        while !burst.is_on_with(self.rings(SLEEPING_POLL).await?, many(&step).0) {
            step = self.step().await?;
            self.floods.watch(&mut self.bell.connection).await?;
        }
        self.bell.give().await
    }

    /// Waits for a ring; how many there are by then.
    async fn rings(&mut self, at_most: Duration) -> Result<u32, sqlx::Error> {
        self.bell
            .rings(at_most, |said| self.notifications.hears(said))
            .await
    }

    /// Waits, whoever rings.
    async fn pause(&mut self, span: Duration) -> Result<(), sqlx::Error> {
        let hear = |said: &PgNotification| {
            self.notifications.hears(said);
            false
        };
        self.bell.rings(span, hear).await?;
        Ok(())
    }

    /// Another dispatcher is at the bell: steps in when it does not answer, and tries to take its place.
    async fn stand_by(&mut self) -> Result<(), sqlx::Error> {
        if self.rings(SLEEPING_POLL).await? > 0 {
            self.pause(STANDBY_WAIT).await?;
        }
        self.step().await?;
        Ok(())
    }

    /// What cannot be done at once is done in parts, down to the message that is to blame.
    async fn step(&mut self) -> Result<Step, sqlx::Error> {
        let mut done = match self.step_once(None).await {
            Err(error) if parts::is_to_be_parted(&error) => {
                self.counters.parts.failed(&error);
                // A connection that gave no answer in time gives none later.
                if error.as_database_error().is_none() {
                    return Err(error);
                }
                Step::default()
            }
            step => step?,
        };
        while let Some(at_most) = self.counters.parts.at_most() {
            match self.step_once(Some(at_most)).await {
                Ok(step) => {
                    done.messages += step.messages;
                    done.topics = done.topics.max(step.topics);
                    done.is_awaited |= step.is_awaited;
                    match self.last.last_look {
                        Some(_) => self.counters.parts.all_done(),
                        None => self.counters.parts.succeeded(),
                    }
                }
                Err(error) if at_most == 1 && parts::is_of_a_message(&error) => {
                    self.reject_next(&error).await?
                }
                Err(error) if parts::is_to_be_parted(&error) => {
                    self.counters.parts.failed(&error);
                    // One message cannot be parted.
                    if at_most == 1 || error.as_database_error().is_none() {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    async fn reject_next(&mut self, why: &sqlx::Error) -> Result<(), sqlx::Error> {
        let reject = sqlx::query_scalar(REJECT_NEXT)
            .bind(format!("it cannot be sequenced: {why}"))
            .fetch_one(&mut self.bell.connection);
        let seq: Option<i64> = in_time(STEP_TIMEOUT, "setting a message aside", reject).await?;
        error!(seq, error = %why, "a message cannot be sequenced and is set aside; see `postbox rejects list`");
        Ok(())
    }

    async fn step_once(&mut self, at_most: Option<i64>) -> Result<Step, sqlx::Error> {
        let last = match at_most {
            None => std::mem::take(&mut self.last),
            Some(_) => Last::default(),
        };
        let next_tick = last.last_tick.map(|tick| tick + 1);
        let _stepping = self.announcements.stepping();
        let step = sqlx::query(STEP)
            .bind(last.last_tick)
            .bind(last.last_look)
            .bind(last.last_seq)
            .bind(last.last_slot)
            .bind(last.last_topic)
            .bind(last.last_head)
            .bind(self.announcements.is_attended().then_some(SMALL))
            .bind(at_most)
            .bind(next_tick.map(|tick| seal::sealed(&self.key, tick)))
            .bind(&self.key)
            .fetch_all(&mut self.bell.connection);
        let at = (&self.pool, self.bell.backend);
        let rows = while_at_work(STEP_TIMEOUT, "a step of the sequencer", at, step).await?;
        let first = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        self.last = Last::from_row(first)?;
        let messages: i64 = first.try_get("messages")?;
        let text: Option<String> = first.try_get("news")?;
        let is_awaited = messages == 0 || text.is_some();
        if let Some(text) = text {
            self.announcements.announce(announcement(text, &rows));
        }
        if messages > 0 {
            self.counters.steps.fetch_add(1, Ordering::Relaxed);
            self.counters
                .messages
                .fetch_add(messages as u64, Ordering::Relaxed);
        }
        if let Some(rejected) = first.try_get::<Option<i64>, _>("rejected")?
            && self
                .rejects_told
                .is_none_or(|at| at.elapsed() > TELL_REJECTS_EVERY)
        {
            self.rejects_told = Some(Instant::now());
            warn!(
                messages = rejected,
                "messages were committed whose topic is not allowed; they are set aside: see `postbox rejects list`"
            );
        }
        Ok(Step {
            messages,
            topics: u32::try_from(first.try_get::<i32, _>("topics")?).unwrap_or(0),
            is_awaited,
        })
    }
}

fn many(step: &Step) -> (u32, i64) {
    match step.is_awaited {
        true => MANY,
        false => MANY_IN_VAIN,
    }
}

/// With the messages, if they came along.
fn announcement(text: String, rows: &[PgRow]) -> Announcement {
    let segment = announcements::topics(&text).find_map(|(_, _, segment)| segment);
    // Consumers read what does not come.
    let messages = segment.and_then(|segment| log::messages_of(&segment, rows, ROWS).ok().flatten());
    Announcement { text, messages }
}
