//! How full the server's queue of notifications is, and who holds it back.

use sqlx::PgPool;

use super::{Finding, Severity};

/// Sessions that may hold back the queue's end: it moves on with the slowest that listens, and one does not read it in a transaction, nor while its
/// client does not take what it is sent. Who listens is told to nobody.
const NOTIFY_QUEUE: &str = "SELECT pg_notification_queue_usage() AS used, ARRAY( \
         SELECT format('process %s (%s) %s', a.pid, concat_ws(' ', a.usename, nullif(a.application_name, ''), host(a.client_addr)), \
             CASE WHEN a.wait_event = 'ClientWrite' THEN format('has sent to a client that does not read for %s', \
                     date_trunc('second', clock_timestamp() - coalesce(a.state_change, a.query_start))) \
                 ELSE format('has had a transaction open for %s', date_trunc('second', clock_timestamp() - a.xact_start)) END) \
         FROM pg_stat_activity a \
         WHERE a.backend_type = 'client backend' AND a.pid <> pg_backend_pid() \
             AND (a.wait_event = 'ClientWrite' OR a.xact_start < clock_timestamp() - interval '10 seconds') \
         ORDER BY a.wait_event = 'ClientWrite' DESC, a.xact_start LIMIT 3) AS suspects";

/// A full queue makes every transaction fail that notifies.
const QUEUE_WARNING: f64 = 0.1;
const QUEUE_ERROR: f64 = 0.5;

pub(super) async fn notify_queue(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let (used, suspects): (f64, Vec<String>) = sqlx::query_as(NOTIFY_QUEUE).fetch_one(pool).await?;
    Ok(queue(used, &suspects).into_iter().collect())
}

fn queue(used: f64, suspects: &[String]) -> Option<Finding> {
    let severity = match used {
        used if used >= QUEUE_ERROR => Severity::Error,
        used if used >= QUEUE_WARNING => Severity::Warning,
        _ => return None,
    };
    let who = match suspects {
        [] => "a session that listens and does not read, of any database of this server".to_owned(),
        some => format!("probably {}", some.join("; ")),
    };
    Some(Finding::new(
        severity,
        "notify-queue",
        format!(
            "the queue of NOTIFY is {:.0} % full, and held back by {who}: once it is full, publishing fails",
            used * 100.0
        ),
        "SELECT pg_terminate_backend(…) the oldest of them; let nothing listen in a long transaction",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_of_notify_that_fills_is_a_finding_that_names_who_may_hold_it() {
        assert!(queue(0.05, &[]).is_none());
        let found = queue(0.2, &[]).expect("a finding");
        assert_eq!(found.severity, Severity::Warning);
        assert!(found.what.contains("20 % full"), "{}", found.what);
        let found = queue(0.6, &["process 7 (app)".to_owned()]).expect("a finding");
        assert_eq!(found.severity, Severity::Error);
        assert!(found.what.contains("probably process 7 (app)"), "{}", found.what);
    }
}
