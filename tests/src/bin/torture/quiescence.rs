//! Whether everything that was published has been dealt with.

use sqlx::{AssertSqlSafe, PgPool};

use crate::chance;

/// What is still to be done, in words; `None`: nothing.
pub(crate) async fn what_is_left(pool: &PgPool) -> anyhow::Result<Option<String>> {
    let unsequenced: i64 = sqlx::query_scalar(
        "SELECT (SELECT count(*) FROM postbox.outbox) - coalesce(sum(postbox.next_offset(name)), 0)::bigint FROM postbox.topic",
    )
    .fetch_one(pool)
    .await?;
    // After the look at the outbox: what is sequenced meanwhile is waited for too.
    let status = postbox_dispatcher::status::read(pool).await?;
    let waiting: i64 = sqlx::query_scalar("SELECT count(*) FROM postbox.redelivery WHERE state <> 'halted'")
        .fetch_one(pool)
        .await?;
    let behind: i64 = sqlx::query_scalar("SELECT count(*) FROM postbox.parked_key")
        .fetch_one(pool)
        .await?;
    let mut left = Vec::new();
    if unsequenced != 0 {
        left.push(format!("{unsequenced} messages are not in order"));
    }
    for subscription in &status.subscriptions {
        if subscription.lag != 0 {
            left.push(format!(
                "group {} lags by {} on {}",
                subscription.group_name, subscription.lag, subscription.topic
            ));
        }
    }
    if status.subscriptions.is_empty() {
        left.push("nobody has subscribed".to_owned());
    }
    if waiting != 0 {
        left.push(format!("{waiting} messages wait for another attempt"));
    }
    if behind != 0 {
        left.push(format!("{behind} keys have parked messages"));
    }
    Ok((!left.is_empty()).then(|| left.join(", ")))
}

/// Decides what becomes of transactions that were prepared some time ago: whoever prepared them is gone, and they hold locks.
pub(crate) async fn decide_prepared(pool: &PgPool, seed: u64, older_than_s: f64) -> anyhow::Result<()> {
    let orphans: Vec<String> = sqlx::query_scalar(
        "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() AND prepared < now() - make_interval(secs => $1)",
    )
    .bind(older_than_s)
    .fetch_all(pool)
    .await?;
    for gid in orphans {
        let commits = chance::throw(seed, gid.as_bytes(), 2) == 0;
        let verb = if commits { "COMMIT" } else { "ROLLBACK" };
        // Its name was made by a producer of ours; and it may have been quicker.
        let _ = sqlx::raw_sql(AssertSqlSafe(format!("{verb} PREPARED '{gid}'")))
            .execute(pool)
            .await;
    }
    Ok(())
}
