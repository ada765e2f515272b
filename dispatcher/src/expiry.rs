//! Forgets deduplication keys whose window is over, and consumers that are long gone.

use std::time::Duration;

use postbox_core::link::in_time;
use sqlx::PgPool;
use tracing::warn;

use crate::steady::Steady;

const EVERY: Duration = Duration::from_secs(60);
/// The connection may be dead.
const TIMEOUT: Duration = Duration::from_secs(300);

/// In batches, so that no publisher with an expired key waits long; skips what a publisher is just renewing.
const EXPIRE_KEYS: &str = "DELETE FROM postbox.dedup WHERE ctid = ANY (ARRAY( \
     SELECT ctid FROM postbox.dedup WHERE expires_at <= clock_timestamp() ORDER BY expires_at LIMIT 5000 FOR UPDATE SKIP LOCKED))";

/// What was odd is told for a day.
const FORGET_INCIDENTS: &str = "DELETE FROM postbox.incident WHERE last_at NOT BETWEEN clock_timestamp() - interval '1 day' AND clock_timestamp() + interval '1 day'";

/// Kept for a day, so that `postbox status` can show who died.
const FORGET_CONSUMERS: &str = "DELETE FROM postbox.consumer c WHERE NOT postbox.is_live(c.id) \
     AND (SELECT r.heartbeat_at FROM postbox.last_report(c.id) r) < clock_timestamp() - interval '1 day'";

pub(crate) async fn run(pool: PgPool) {
    let mut interval = tokio::time::interval(EVERY);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut steady = Steady::default();
    loop {
        interval.tick().await;
        let expired = async {
            match steady.is_steady(&pool, "forgetting what has expired").await? {
                true => expire(&pool).await,
                false => Ok(()),
            }
        };
        if let Err(error) = in_time(TIMEOUT, "expiring old rows", expired).await {
            warn!(%error, "cannot expire old rows; trying again in a minute");
        }
    }
}

pub(crate) async fn expire(pool: &PgPool) -> Result<(), sqlx::Error> {
    while sqlx::query(EXPIRE_KEYS).execute(pool).await?.rows_affected() == 5000 {}
    sqlx::query(FORGET_CONSUMERS).execute(pool).await?;
    sqlx::query(FORGET_INCIDENTS).execute(pool).await?;
    Ok(())
}
