//! A connection of one's own that hears notifications, and the waits before it is opened again.
//!
//! For sessions here and for the sequencer in `postbox-dispatcher`. Not part of the API.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};

/// A listener, and the pool that holds its one connection for as long as it is wanted.
///
/// It does not connect again by itself: whoever has it must know that the connection was lost, and what went with it.
pub async fn open(
    options: PgConnectOptions,
    channels: &[&str],
    within: Duration,
) -> Result<(PgListener, PgPool), sqlx::Error> {
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None)
        .acquire_timeout(within)
        .connect_with(options)
        .await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.ignore_pool_close_event(true);
    listener.eager_reconnect(false);
    if !channels.is_empty() {
        listener.listen_all(channels.iter().copied()).await?;
    }
    Ok((listener, pool))
}

/// The statement's result, or an error if the server does not answer: a connection can be dead without a word.
pub async fn in_time<T>(
    limit: Duration,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    match tokio::time::timeout(limit, statement).await {
        Ok(result) => result,
        Err(_) => Err(sqlx::Error::Io(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("the server did not answer within {limit:?}"),
        ))),
    }
}

/// The waits before each attempt to connect again: from 50 ms, twice as long each time, up to 5 s, and each up to half as long again, so that
/// many who lost the same server do not come back at the same moment.
#[derive(Debug)]
pub struct Reconnect {
    wait: Duration,
}

impl Reconnect {
    const FIRST: Duration = Duration::from_millis(50);
    const LAST: Duration = Duration::from_secs(5);

    /// The connection was just lost.
    #[must_use]
    pub fn new() -> Self {
        Self { wait: Self::FIRST }
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
        }
    }
}
