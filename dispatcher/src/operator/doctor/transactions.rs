//! Transactions that last, and what else holds back the server's cleaning up.

use sqlx::{FromRow, PgPool};

use super::{Finding, Severity, span};

#[derive(FromRow)]
struct OldTransaction {
    pid: Option<i32>,
    who: String,
    state: String,
    seconds: f64,
    publishes: bool,
}

/// Others wait for nothing of it, but it holds the horizon below which dead rows are removed, and messages that it published are not seen.
const OLD_TRANSACTIONS: &str = "SELECT a.pid, concat_ws(' ', a.usename, nullif(a.application_name, ''), host(a.client_addr)) AS who, \
         coalesce(a.state, 'running') AS state, extract(epoch FROM clock_timestamp() - a.xact_start)::float8 AS seconds, \
         EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.mode = 'RowExclusiveLock' AND l.database = a.datid \
             AND l.relation = to_regclass('postbox.outbox')) AS publishes \
     FROM pg_stat_activity a \
     WHERE a.datname = current_database() AND a.xact_start < clock_timestamp() - interval '1 minute' \
         AND (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL) AND a.backend_type = 'client backend' \
     UNION ALL \
     SELECT NULL, format('%s, prepared as %L', p.owner, p.gid), 'prepared', \
         extract(epoch FROM clock_timestamp() - p.prepared)::float8, false \
     FROM pg_prepared_xacts p WHERE p.database = current_database() AND p.prepared < clock_timestamp() - interval '1 minute' \
     ORDER BY 4 DESC LIMIT 10";

const OLD_SLOTS: &str = "SELECT slot_name::text FROM pg_replication_slots WHERE NOT active AND (xmin IS NOT NULL OR restart_lsn IS NOT NULL)";

pub(super) async fn transactions(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let old: Vec<OldTransaction> = sqlx::query_as(OLD_TRANSACTIONS).fetch_all(pool).await?;
    let mut findings: Vec<Finding> = old
        .iter()
        .map(|transaction| {
            let age = span(transaction.seconds);
            let published = match transaction.publishes {
                true => "; what it published is delivered when it commits, and its slot is not truncated before",
                false => "",
            };
            match transaction.pid {
                Some(pid) => Finding::new(
                    Severity::Warning,
                    "old-transaction",
                    format!(
                        "process {pid} ({}) has had a transaction open for {age} ({}): dead rows are not removed meanwhile{published}",
                        transaction.who, transaction.state
                    ),
                    format!(
                        "end it, or SELECT pg_terminate_backend({pid}); idle_in_transaction_session_timeout prevents it"
                    ),
                ),
                None => Finding::new(
                    Severity::Warning,
                    "prepared-transaction",
                    format!(
                        "a transaction of {} has been waiting for {age}: it keeps its locks, and dead rows are not removed meanwhile",
                        transaction.who
                    ),
                    "COMMIT PREPARED or ROLLBACK PREPARED it, by the name that is quoted",
                ),
            }
        })
        .collect();
    let slots: Vec<String> = sqlx::query_scalar(OLD_SLOTS).fetch_all(pool).await?;
    findings.extend(slots.iter().map(|slot| {
        Finding::new(
            Severity::Warning,
            "replication-slot",
            format!("replication slot {slot:?} is not in use and holds back the log, perhaps dead rows too"),
            format!("start its subscriber, or SELECT pg_drop_replication_slot('{slot}')"),
        )
    }));
    Ok(findings)
}
