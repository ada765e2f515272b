//! The bell: how one that polls falls asleep without missing who needs it. Why none is missed is in docs/internals/bell.md.

use std::time::{Duration, Instant};

use postbox_core::link::{self, in_time};
use postbox_core::locks::Complaints;
use sqlx::PgPool;
use sqlx::postgres::{PgListener, PgNotification};

/// One that polls goes to sleep after so long with little or no work.
pub(crate) const BUSY_FOR: Duration = Duration::from_millis(60);
/// How long a sleeper sleeps at most: for what does not ring, and for a ring that was lost with a connection.
pub(crate) const SLEEPING_POLL: Duration = Duration::from_secs(1);
/// The pause of one that cannot sleep, because somebody who did not ring has not ended his transaction.
pub(crate) const WAITING_POLL: Duration = Duration::from_millis(20);
/// Another dispatcher is at the bell, so this one only steps in if that one does not answer for so long.
pub(crate) const STANDBY_WAIT: Duration = Duration::from_millis(100);
/// Of a burst: within so long come more rings than somebody wants to answer one by one.
const BURST: Duration = Duration::from_millis(100);
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a lock is tried for that somebody else has.
const LOCKED_OUT_PAUSE: Duration = Duration::from_millis(500);

/// Whoever can take it exclusively has nobody in flight who thinks him awake.
const TAKE: &str = "SELECT pg_try_advisory_lock(1347571761, $1)";
const GIVE: &str = "SELECT pg_advisory_unlock(1347571761, $1)";

/// Whether another dispatcher sleeps there.
const IS_TAKEN: &str = "SELECT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.classid = 1347571761 \
     AND l.objid = $1::oid AND l.objsubid = 2 AND l.granted AND l.mode = 'ExclusiveLock' \
     AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()))";

/// A connection that may hold a bell; everything that must not outlive its hold on it goes through it.
pub(crate) struct Bell {
    lock: i32,
    complaints: Complaints,
    /// Its process at the server.
    pub(crate) backend: i32,
    pub(crate) connection: PgListener,
    // Holds the one connection.
    _pool: PgPool,
}

/// What came of an attempt to take it.
pub(crate) enum Taken {
    /// Everybody rings from now on, and who did not has committed.
    Mine,
    /// Another dispatcher sleeps there.
    Others,
    /// Somebody who did not ring is in flight.
    Busy,
}

impl Bell {
    /// Connects under this application name, sets `settings`, and listens to these channels. `lock` is the bell's advisory lock in class 1347571761.
    pub(crate) async fn connect(
        pool: &PgPool,
        lock: i32,
        name: &str,
        channels: &[&str],
        settings: &'static str,
    ) -> Result<Self, sqlx::Error> {
        let options = (*pool.connect_options()).clone().application_name(name);
        let (mut connection, own) = link::open(options, channels, settings).await?;
        let backend = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut connection);
        let backend = in_time(STATEMENT_TIMEOUT, "looking where this is", backend).await?;
        Ok(Self {
            lock,
            complaints: Complaints::default(),
            backend,
            connection,
            _pool: own,
        })
    }

    pub(crate) async fn take(&mut self) -> Result<Taken, sqlx::Error> {
        if self.ask(TAKE).await? {
            return Ok(Taken::Mine);
        }
        Ok(if self.ask(IS_TAKEN).await? {
            Taken::Others
        } else {
            Taken::Busy
        })
    }

    pub(crate) async fn give(&mut self) -> Result<(), sqlx::Error> {
        self.ask(GIVE).await?;
        Ok(())
    }

    async fn ask(&mut self, statement: &'static str) -> Result<bool, sqlx::Error> {
        let answer = sqlx::query_scalar(statement)
            .bind(self.lock)
            .fetch_one(&mut self.connection);
        in_time(STATEMENT_TIMEOUT, "the bell", answer).await
    }

    /// Whether the statement is to be tried again: it did not get a lock, and who has that was said. Whoever holds a lock is not a lost connection.
    pub(crate) async fn is_locked_out(
        &mut self,
        waiting: &str,
        error: &sqlx::Error,
    ) -> Result<bool, sqlx::Error> {
        if !link::is_locked_out(error) {
            return Ok(false);
        }
        self.complaints.complain(waiting, &mut self.connection).await?;
        tokio::time::sleep(LOCKED_OUT_PAUSE).await;
        Ok(true)
    }

    /// Waits for a ring, for so long at most, whatever else is heard; how many there are by then. One look answers all of them.
    pub(crate) async fn rings(
        &mut self,
        at_most: Duration,
        is_ring: impl Fn(&PgNotification) -> bool,
    ) -> Result<u32, sqlx::Error> {
        let end = tokio::time::Instant::now() + at_most;
        let mut rings = 0;
        // What has come is had at once, so a flood of what is no ring would never let the time end by itself.
        while rings == 0 && tokio::time::Instant::now() < end {
            let first = match tokio::time::timeout_at(end, self.connection.try_recv()).await {
                Ok(Ok(Some(notification))) => notification,
                Ok(Ok(None)) => return Err(closed()),
                Ok(Err(error)) => return Err(error),
                Err(_) => return Ok(0),
            };
            rings += u32::from(is_ring(&first));
            while let Some(notification) = self.connection.next_buffered() {
                rings += u32::from(is_ring(&notification));
            }
        }
        Ok(rings)
    }
}

/// Whether rings come in a burst.
pub(crate) struct Burst {
    rings: u32,
    since: Instant,
}

impl Burst {
    pub(crate) fn new() -> Self {
        Self {
            rings: 0,
            since: Instant::now(),
        }
    }

    /// Whether there are so many of them. Each counts, also those that come while a look is slow.
    pub(crate) fn is_on_with(&mut self, rings: u32, many: u32) -> bool {
        self.rings += rings;
        if self.rings < many {
            return false;
        }
        let is_on = self.since.elapsed() < BURST;
        *self = Self::new();
        is_on
    }
}

fn closed() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(
        std::io::ErrorKind::UnexpectedEof,
        "the server closed the connection",
    ))
}
