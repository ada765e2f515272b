//! Whether everything that was published has been dealt with.

use sqlx::{AssertSqlSafe, PgPool};

use crate::chance;

/// Of one moment: what is parked may be pending at the next, and the reverse.
const LEFT: &str = "SELECT \
    (SELECT count(*) FROM postbox.outbox) - coalesce((SELECT sum(postbox.next_offset(name)) FROM postbox.topic), 0)::bigint, \
    (SELECT count(*) FROM postbox.subscription), \
    ARRAY(SELECT format('group %s lags by %s on %s', s.group_name, b.next_offset - b.position, s.topic) \
        FROM postbox.subscription s CROSS JOIN LATERAL postbox.backlog(s.id) b WHERE b.next_offset <> b.position ORDER BY 1), \
    (SELECT count(*) FROM postbox.redelivery WHERE state <> 'halted'), \
    (SELECT count(*) FROM postbox.parked_key)";

/// What is still to be done, in words; `None`: nothing.
pub(crate) async fn what_is_left(pool: &PgPool) -> anyhow::Result<Option<String>> {
    let (unsequenced, subscriptions, mut left, waiting, behind): (i64, i64, Vec<String>, i64, i64) =
        sqlx::query_as(LEFT).fetch_one(pool).await?;
    if unsequenced != 0 {
        left.push(format!("{unsequenced} messages are not in order"));
    }
    if subscriptions == 0 {
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
