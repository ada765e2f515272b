//! Connections of one's own: with the settings that Postbox relies on, with a bound on every wait, and opened again after waits that grow.
//!
//! Not part of the API.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool, Row};

use crate::settings;

/// To connect, from the network to the last of the settings.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For a round trip on a connection that was not used for a while, and before it goes back to its pool.
const PING_TIMEOUT: Duration = Duration::from_secs(3);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// What is seldom needed goes again.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// A connection that was used so recently is not tested.
const FRESH: Duration = Duration::from_secs(5);

/// A pool of up to so many connections of one's own, opened when they are needed. `also` is set on each, after the settings that all have.
pub fn pool(options: PgConnectOptions, connections: u32, also: &'static str) -> PgPool {
    pool_options(connections)
        .after_connect(move |connection, _| Box::pin(set_up(connection, also)))
        .connect_lazy_with(options)
}

/// The same for one that sets up each connection itself, with [`set_up`] first.
///
/// None waits for ever: not to be opened, not to be found broken, and not on its way back, where a connection that was left in the middle of a
/// statement is closed if the server does not answer.
pub fn pool_options(connections: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(connections)
        .max_lifetime(None)
        .idle_timeout(IDLE_TIMEOUT)
        .acquire_timeout(CONNECT_TIMEOUT)
        // That test has no bound.
        .test_before_acquire(false)
        .before_acquire(|connection, about| {
            Box::pin(async move {
                if about.idle_for < FRESH {
                    return Ok(true);
                }
                let alive = in_time(PING_TIMEOUT, "a connection of the pool", connection.ping());
                Ok(alive.await.is_ok())
            })
        })
        .after_release(|connection, _| {
            Box::pin(async move {
                in_time(PING_TIMEOUT, "a connection that is given back", connection.ping()).await?;
                Ok(true)
            })
        })
}

/// Sets what Postbox relies on, and `also` what this connection is for.
///
/// # Errors
/// What the database reports.
pub async fn set_up(connection: &mut PgConnection, also: &'static str) -> Result<(), sqlx::Error> {
    settings::set(connection, also).await
}

/// Servers of which it is known that no pooler is before them.
static DIRECT: Mutex<BTreeSet<(String, u16)>> = Mutex::new(BTreeSet::new());

/// There is no pooler at this address, for as long as the process lives: it is not looked for again. For who started the server itself.
pub fn is_direct(options: &PgConnectOptions) {
    let mut direct = DIRECT.lock().unwrap_or_else(PoisonError::into_inner);
    direct.insert((options.get_host().to_owned(), options.get_port()));
}

fn is_known_as_direct(options: &PgConnectOptions) -> bool {
    let direct = DIRECT.lock().unwrap_or_else(PoisonError::into_inner);
    direct.contains(&(options.get_host().to_owned(), options.get_port()))
}

/// Refuses connections that go through a transaction pooler, where the settings, locks and notifications of a session are another's. To be asked
/// before anything is set: it would stay with a connection that others get.
///
/// While one connection is in a transaction, nobody else can have its backend. So two that were seen in the same one share it, and one that
/// changes its own has none. A pooler that cleans backends before it gives them on may not have done that yet, and gives another; but then what was
/// prepared is forgotten.
///
/// # Errors
/// [`sqlx::Error::Configuration`] that names the mend; what the database reports.
pub async fn refuse_pooler(options: &PgConnectOptions) -> Result<(), sqlx::Error> {
    if is_known_as_direct(options) {
        return Ok(());
    }
    let look = async {
        let (mut one, mut other) = (options.connect().await?, options.connect().await?);
        let mut shared = is_refused(&mut one, PREPARE, ALREADY_THERE).await?;
        let first = backend(&mut one).await?;
        for _ in 0..3 {
            let before = backend(&mut one).await?;
            sqlx::raw_sql(BEGIN).execute(&mut other).await?;
            let meanwhile = backend(&mut other).await?;
            let after = backend(&mut one).await?;
            sqlx::raw_sql("ROLLBACK").execute(&mut other).await?;
            shared |= before == meanwhile || before != after || before != first;
        }
        shared |= is_refused(&mut one, EXECUTE, FORGOTTEN).await?;
        // A backend that others get next is to have it no more; this may be another one.
        let _ = sqlx::raw_sql(FORGET).execute(&mut one).await;
        let _ = one.close().await;
        let _ = other.close().await;
        Ok::<_, sqlx::Error>(shared)
    };
    match in_time(CONNECT_TIMEOUT, "connecting", look).await? {
        false => Ok(()),
        true => Err(sqlx::Error::Configuration(
            format!(
                "{}:{} is a transaction pooler (such as PgBouncer with pool_mode = transaction), through which no dispatcher and no consumer works: \
                 it needs notifications and locks of its own session. Say how to connect directly: Dispatcher::direct and Consumer::direct, or \
                 DIRECT_DATABASE_URL or --direct-database-url; the application's pool may stay as it is",
                options.get_host(),
                options.get_port()
            )
            .into(),
        )),
    }
}

/// These connections are set up by nobody, and the other one is asked meanwhile.
const BEGIN: &str = "BEGIN READ ONLY; SET LOCAL idle_in_transaction_session_timeout = '1min'";
const PREPARE: &str = "PREPARE postbox_session AS SELECT 1";
const EXECUTE: &str = "EXECUTE postbox_session";
const FORGET: &str = "DEALLOCATE postbox_session";
/// A prepared statement of this name exists, or does not.
const ALREADY_THERE: &str = "42P05";
const FORGOTTEN: &str = "26000";

/// Whether the server refuses this with this code.
async fn is_refused(
    connection: &mut PgConnection,
    sql: &'static str,
    code: &str,
) -> Result<bool, sqlx::Error> {
    match sqlx::raw_sql(sql).execute(connection).await {
        Ok(_) => Ok(false),
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(code) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Without a prepared statement, which a pooler might have elsewhere.
async fn backend(connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
    sqlx::raw_sql("SELECT pg_catalog.pg_backend_pid()")
        .fetch_one(connection)
        .await?
        .try_get(0)
}

/// Closes the connections of a pool, and does not wait for one that is dead.
pub async fn close(pool: &PgPool) {
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, pool.close()).await;
}

/// A listener, and the pool that holds its one connection for as long as it is wanted.
///
/// It does not connect again by itself: whoever has it must know that the connection was lost, and what went with it.
///
/// The server ends it after a minute without a statement, since whoever has it speaks every second or so: then he is gone, or frozen, and what he
/// holds others wait for.
pub async fn open(
    options: PgConnectOptions,
    channels: &[&str],
    also: &'static str,
) -> Result<(PgListener, PgPool), sqlx::Error> {
    let address = format!("{}:{}", options.get_host(), options.get_port());
    let pool = pool(options, 1, also);
    let listen = async {
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.ignore_pool_close_event(true);
        listener.eager_reconnect(false);
        sqlx::raw_sql("SET idle_session_timeout = '1min'")
            .execute(&mut listener)
            .await?;
        if !channels.is_empty() {
            listener.listen_all(channels.iter().copied()).await?;
        }
        Ok(listener)
    };
    match in_time(CONNECT_TIMEOUT, "connecting", listen).await {
        Ok(listener) => Ok((listener, pool)),
        // A pool tries again and again, and then says that it timed out.
        Err(sqlx::Error::PoolTimedOut) => Err(timed_out(format!(
            "{address} accepted no connection within {CONNECT_TIMEOUT:?}"
        ))),
        Err(error) => Err(error),
    }
}

/// The result, or an error if the server does not answer: a connection can be dead without a word. `what` was waited for is in its text.
pub async fn in_time<T, E: From<sqlx::Error>>(
    limit: Duration,
    what: &str,
    statement: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match tokio::time::timeout(limit, statement).await {
        Ok(result) => result,
        Err(_) => Err(timed_out(format!("the server did not answer within {limit:?} ({what})")).into()),
    }
}

/// As [`in_time`], for a statement that may take long: every ten seconds the server is asked, over another connection of `pool`, whether the process
/// `backend` is still at work. If it is not, its answer was lost, or the statement never came.
pub async fn while_at_work<T>(
    limit: Duration,
    what: &str,
    (pool, backend): (&PgPool, i32),
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    let mut statement = std::pin::pin!(statement);
    let begun = Instant::now();
    loop {
        if let Ok(result) = tokio::time::timeout(LOOK_AFTER.min(limit), &mut statement).await {
            return result;
        }
        if begun.elapsed() >= limit {
            return Err(timed_out(format!(
                "the server did not answer within {limit:?} ({what})"
            )));
        }
        let look = sqlx::query_scalar(IS_AT_WORK).bind(backend).fetch_one(pool);
        if !in_time(CONNECT_TIMEOUT, "whether the server is at work", look)
            .await
            .unwrap_or(false)
        {
            // Its answer may be on its way just now.
            if let Ok(result) = tokio::time::timeout(PING_TIMEOUT, &mut statement).await {
                return result;
            }
            return Err(sqlx::Error::Io(std::io::Error::new(
                std::io::ErrorKind::ConnectionAborted,
                format!(
                    "the connection is dead: the server is not at work on what was asked {:?} ago ({what})",
                    begun.elapsed()
                ),
            )));
        }
    }
}

const LOOK_AFTER: Duration = Duration::from_secs(10);

/// A role may see its own sessions.
const IS_AT_WORK: &str = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND state = 'active')";

fn timed_out(text: String) -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, text))
}

/// A lock that was not had in time (`lock_not_available`).
pub fn is_locked_out(error: &sqlx::Error) -> bool {
    code(error).as_deref() == Some("55P03")
}

/// The error with what mends it, where the surroundings are to blame.
pub fn explain(error: &sqlx::Error) -> String {
    let hint = match code(error).as_deref() {
        Some("08P01") => {
            "a pooler may refuse a parameter: PgBouncer wants ignore_startup_parameters = extra_float_digits"
        }
        Some("25001" | "25P02") => {
            "the pool lent a connection with somebody's open transaction, and what was written there is lost: a begin() that was cancelled leaves one, sqlx issue 4393"
        }
        Some("25006") => {
            "the server is a standby, or a trigger or function sets transaction_read_only: name the primary, or promote this one"
        }
        Some("42501") => "this role lacks a privilege: postbox doctor says which",
        Some("53400") => {
            "a limit of the server was reached, such as temp_file_limit: ALTER ROLE … SET temp_file_limit = -1 for this role"
        }
        Some("53100") => "the server's disk is full",
        Some("53300") => "the server has no connection left: raise max_connections, or make pools smaller",
        Some("55P03") => "somebody holds a lock that Postbox needs: postbox doctor says who",
        Some("57014") => "a time-out of the server or an operator cancelled it: look for statement_timeout",
        Some("42P01" | "42883" | "42703") => {
            "the schema is not what this program needs: postbox migrate, and postbox doctor"
        }
        _ => return error.to_string(),
    };
    format!("{error} ({hint})")
}

fn code(error: &sqlx::Error) -> Option<std::borrow::Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// The waits before each attempt to connect again: from 50 ms, twice as long each time, up to 5 s, and each up to half as long again, so that
/// many who lost the same server do not come back at the same moment.
///
/// To connect is not to work: what connects and fails at once, again and again, waits as long as what does not connect. Only after
/// [`STEADY`] does a loss count as the first again.
#[derive(Debug)]
pub struct Reconnect {
    wait: Duration,
    connected: Instant,
}

/// A connection that lasted so long was well.
pub const STEADY: Duration = Duration::from_secs(5);

impl Reconnect {
    const FIRST: Duration = Duration::from_millis(50);
    const LAST: Duration = Duration::from_secs(5);

    /// For a connection that was just made.
    #[must_use]
    pub fn new() -> Self {
        Self {
            wait: Self::FIRST,
            connected: Instant::now(),
        }
    }

    /// It is there again.
    pub fn connected(&mut self) {
        self.connected = Instant::now();
    }

    /// It was lost.
    pub fn lost(&mut self) {
        if self.connected.elapsed() >= STEADY {
            self.wait = Self::FIRST;
        }
    }

    /// Waits until the next attempt is due.
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }

    fn next(&mut self) -> Duration {
        let wait = jittered(self.wait);
        self.wait = (self.wait * 2).min(Self::LAST);
        wait
    }
}

impl Default for Reconnect {
    fn default() -> Self {
        Self::new()
    }
}

/// Between the span and one and a half times it.
fn jittered(span: Duration) -> Duration {
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos());
    span + span.mul_f64(f64::from(nanos % 1_000) / 2_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_five_seconds_and_are_half_as_long_again_at_most() {
        let mut reconnect = Reconnect::new();
        for due in [50, 100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000, 5_000] {
            let (due, wait) = (Duration::from_millis(due), reconnect.next());
            assert!(wait >= due && wait < due.mul_f64(1.5), "{wait:?} for {due:?}");
            // To connect is not enough.
            reconnect.connected();
            reconnect.lost();
        }
        if let Some(before) = Instant::now().checked_sub(STEADY) {
            reconnect.connected = before;
            reconnect.lost();
            assert!(reconnect.next() < Duration::from_millis(75));
        }
    }
}
