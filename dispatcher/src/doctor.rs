//! What is wrong with a database, its settings or its subscriptions, and what mends it.

use serde::Serialize;
use sqlx::{FromRow, PgPool};

use crate::status;

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// A short name that does not change, for scripts: `no-dispatcher`, `old-transaction`, …
    pub name: &'static str,
    /// What is wrong, with the thing that is.
    pub what: String,
    /// What mends it.
    pub mend: String,
}

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Severity {
    /// Messages are lost, or do not move.
    Error,
    /// It costs, or will become an error.
    Warning,
    /// Worth knowing.
    Note,
}

impl Finding {
    fn new(severity: Severity, name: &'static str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            severity,
            name,
            what: what.into(),
            mend: mend.into(),
        }
    }
}

/// Examines the database; the worst first, none if all is well.
///
/// It only reads. A role that may not see other roles' sessions finds less.
///
/// **Errors.** The database does not answer.
pub async fn examine(pool: &PgPool) -> Result<Vec<Finding>, postbox::Error> {
    let mut findings = server(pool).await?;
    match postbox::check_schema(pool).await {
        Ok(()) => {
            findings.extend(privileges(pool).await?);
            findings.extend(dispatching(pool).await?);
            findings.extend(subscriptions(pool).await?);
        }
        Err(error @ postbox::Error::Database(_)) => return Err(error),
        Err(error) => findings.push(Finding::new(
            Severity::Error,
            "schema",
            error.to_string(),
            "see above; nothing else was looked at",
        )),
    }
    findings.extend(transactions(pool).await?);
    findings.sort_by_key(|finding| finding.severity);
    Ok(findings)
}

// ------------------------------------------------------------------------------------------------------------------ the server

/// Settings as a session of this role has them.
#[derive(FromRow)]
struct Settings {
    recovering: bool,
    fsync: bool,
    full_page_writes: bool,
    synchronous_commit: String,
    autovacuum: bool,
    isolation: String,
    statement_timeout_ms: i64,
    connections_left: i64,
}

const SETTINGS: &str = "SELECT pg_is_in_recovery() AS recovering, current_setting('fsync')::boolean AS fsync, \
         current_setting('full_page_writes')::boolean AS full_page_writes, \
         current_setting('synchronous_commit') AS synchronous_commit, current_setting('autovacuum')::boolean AS autovacuum, \
         current_setting('default_transaction_isolation') AS isolation, \
         (SELECT setting::bigint FROM pg_settings WHERE name = 'statement_timeout') AS statement_timeout_ms, \
         current_setting('max_connections')::bigint - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') \
             AS connections_left";

async fn server(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let settings: Settings = sqlx::query_as(SETTINGS).fetch_one(pool).await?;
    let mut findings = Vec::new();
    let mut add = |severity, name, what: String, mend: &str| {
        findings.push(Finding::new(severity, name, what, mend));
    };
    if settings.recovering {
        add(
            Severity::Error,
            "standby",
            "this server is a standby, which nothing can be written to".to_owned(),
            "name the primary in DATABASE_URL, or promote this one",
        );
    }
    if !settings.fsync {
        add(
            Severity::Error,
            "fsync",
            "fsync is off: after a crash of the host the database may be damaged beyond repair".to_owned(),
            "set fsync = on in postgresql.conf and reload",
        );
    }
    if !settings.full_page_writes {
        add(
            Severity::Warning,
            "full-page-writes",
            "full_page_writes is off: a crash of the host may leave torn pages".to_owned(),
            "set full_page_writes = on, unless the file system writes whole pages",
        );
    }
    if settings.synchronous_commit == "off" {
        add(
            Severity::Warning,
            "synchronous-commit",
            "synchronous_commit is off: a crash takes back transactions that were told to be committed, with their messages".to_owned(),
            "set synchronous_commit = on for the roles whose commits count",
        );
    }
    if !settings.autovacuum {
        add(
            Severity::Warning,
            "autovacuum",
            "autovacuum is off: tables grow, and the server stops before transaction ids run out".to_owned(),
            "set autovacuum = on and reload",
        );
    }
    if settings.isolation != "read committed" {
        add(
            Severity::Note,
            "isolation",
            format!(
                "transactions default to {}: handlers with a Tx are refused if they begin so",
                settings.isolation
            ),
            "ALTER ROLE … SET default_transaction_isolation = 'read committed' for the consumers",
        );
    }
    if (1..120_000).contains(&settings.statement_timeout_ms) {
        add(
            Severity::Warning,
            "statement-timeout",
            format!(
                "statement_timeout is {} ms for this role: a step over many waiting messages may need two minutes",
                settings.statement_timeout_ms
            ),
            "ALTER ROLE … SET statement_timeout = 0 for the dispatcher",
        );
    }
    if settings.connections_left < 5 {
        add(
            Severity::Warning,
            "connections",
            format!("only {} connections are left", settings.connections_left.max(0)),
            "raise max_connections, or make pools smaller",
        );
    }
    Ok(findings)
}

// -------------------------------------------------------------------------------------------------------------- transactions

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

async fn transactions(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
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

// ---------------------------------------------------------------------------------------------------------------- dispatching

/// What this role cannot do that a dispatcher or consumer does.
const MISSING: &str = "SELECT privilege FROM (VALUES \
         ('USAGE on schema postbox', has_schema_privilege('postbox', 'USAGE')), \
         ('SELECT on postbox.outbox', has_table_privilege('postbox.outbox', 'SELECT')), \
         ('INSERT on postbox.segment', has_table_privilege('postbox.segment', 'INSERT')), \
         ('INSERT on postbox.checkpoint', has_table_privilege('postbox.checkpoint', 'INSERT')), \
         ('UPDATE on postbox.lane', has_table_privilege('postbox.lane', 'UPDATE')), \
         ('DELETE on postbox.redelivery', has_table_privilege('postbox.redelivery', 'DELETE')), \
         ('DELETE on postbox.parked_key', has_table_privilege('postbox.parked_key', 'DELETE')), \
         ('TRUNCATE on postbox.outbox_0 to postbox.outbox_7', \
             (SELECT bool_and(has_table_privilege(format('postbox.outbox_%s', n), 'TRUNCATE')) FROM generate_series(0, 7) n)) \
     ) AS p (privilege, granted) WHERE NOT granted";

async fn privileges(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let role: String = sqlx::query_scalar("SELECT current_user::text")
        .fetch_one(pool)
        .await?;
    let missing: Vec<String> = sqlx::query_scalar(MISSING).fetch_all(pool).await?;
    Ok(missing
        .iter()
        .map(|privilege| {
            Finding::new(
                Severity::Error,
                "privilege",
                format!("role {role} lacks {privilege}"),
                "run dispatchers and consumers as the owner of the schema, or grant it",
            )
        })
        .collect())
}

#[derive(FromRow)]
struct Sequencing {
    waiting: bool,
    ahead: bool,
    moved: f64,
    overdue: i64,
    watched_ago: f64,
}

/// Whether rows are there that the last step did not see, and whether it saw transactions that this cluster has not had yet.
const SEQUENCING: &str = "WITH last AS (SELECT t.snapshot FROM postbox.tick t ORDER BY t.id DESC LIMIT 1) \
     SELECT EXISTS (SELECT FROM postbox.outbox o WHERE o.xid >= coalesce((SELECT pg_snapshot_xmax(snapshot) FROM last), '0')) AS waiting, \
         coalesce((SELECT pg_snapshot_xmax(snapshot) > pg_snapshot_xmax(pg_current_snapshot()) FROM last), false) AS ahead, \
         extract(epoch FROM postbox.clock() - clock_timestamp())::float8 AS moved, \
         (SELECT count(*) FROM postbox.slots() s WHERE s.overdue AND s.held_by IS NULL AND NOT s.current \
             AND s.newest_at < postbox.clock() - 2 * (SELECT r.keep FROM postbox.retention r)) AS overdue, \
         (SELECT extract(epoch FROM postbox.clock() - r.watched_at)::float8 FROM postbox.retention r) AS watched_ago";

async fn dispatching(pool: &PgPool) -> Result<Vec<Finding>, postbox::Error> {
    let dispatchers = status::dispatchers(pool).await?;
    let sequencing: Sequencing = sqlx::query_as(SEQUENCING).fetch_one(pool).await?;
    let mut findings = Vec::new();
    if sequencing.ahead {
        findings.push(Finding::new(
            Severity::Error,
            "restored",
            "the last step of the sequencer saw transactions that this cluster has not had yet: the database was restored from a dump into a younger cluster",
            "do not publish before it was rebased; restore physical backups instead",
        ));
    }
    if dispatchers == 0 {
        let (severity, what) = match sequencing.waiting {
            true => (
                Severity::Error,
                "no dispatcher is connected, and messages wait for one",
            ),
            false => (
                Severity::Warning,
                "no dispatcher is connected: messages will wait for one",
            ),
        };
        findings.push(Finding::new(
            severity,
            "no-dispatcher",
            what,
            "run `postbox run`, or start a Dispatcher in a service",
        ));
    } else if sequencing.watched_ago > 3600.0 {
        findings.push(Finding::new(
            Severity::Warning,
            "retention",
            format!(
                "dispatchers are connected, and none has looked after retention for {}",
                span(sequencing.watched_ago)
            ),
            "see their logs: they say why they cannot",
        ));
    }
    if sequencing.overdue > 0 {
        findings.push(Finding::new(
            Severity::Warning,
            "overdue",
            format!(
                "{} slots of the ring are twice as old as messages are kept and no subscription holds them",
                sequencing.overdue
            ),
            "run a dispatcher that may TRUNCATE; a transaction that is open on them is named as an old transaction",
        ));
    }
    if sequencing.moved.abs() > 1.0 {
        findings.push(Finding::new(
            Severity::Warning,
            "clock",
            format!(
                "postbox.clock() differs from the server's clock by {:.0} s",
                sequencing.moved
            ),
            "that is for tests: create the function again as in the first migration",
        ));
    }
    Ok(findings)
}

// -------------------------------------------------------------------------------------------------------------- subscriptions

async fn subscriptions(pool: &PgPool) -> Result<Vec<Finding>, postbox::Error> {
    let mut findings = Vec::new();
    for subscription in status::subscriptions(pool).await? {
        let name = format!("{} on {}", subscription.group_name, subscription.topic);
        let arguments = format!("{} {}", subscription.group_name, subscription.topic);
        let holds = match subscription.held_messages {
            0 => String::new(),
            messages => format!(
                "; it holds back {messages} messages ({} MB) that are older than messages are kept",
                megabytes(subscription.held_bytes)
            ),
        };
        let backlog = subscription.backlog;
        if !subscription.live && (backlog > 0 || subscription.held_messages > 0) {
            findings.push(Finding::new(
                if subscription.held_messages > 0 { Severity::Error } else { Severity::Warning },
                "no-consumer",
                format!(
                    "the subscription of {name} has {backlog} messages to handle and no live consumer since {}{holds}",
                    subscription.last_live_at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
                ),
                format!("start its consumers, or `postbox subscriptions drop {arguments}` if it is not needed any more"),
            ));
        } else if subscription.held_messages > 0 {
            findings.push(Finding::new(
                Severity::Error,
                "stuck",
                format!("the subscription of {name} is behind{holds}"),
                "look for failing or slow handlers, add instances, or raise its limits",
            ));
        }
        if subscription.paused {
            findings.push(Finding::new(
                Severity::Note,
                "paused",
                format!("the subscription of {name} is paused, with {backlog} messages to handle"),
                format!("`postbox subscriptions resume {arguments}`"),
            ));
        }
        if let Some(window) = &subscription.drain_window
            && let Err(error) = window.parse::<postbox_consumer::DailyWindow>()
        {
            findings.push(Finding::new(
                Severity::Error,
                "window",
                format!("the window of {name} cannot be understood and is not kept: {error}"),
                format!("`postbox subscriptions window {arguments} '22:00-06:00 Europe/Berlin'`"),
            ));
        }
    }
    Ok(findings)
}

/// Rounded up.
fn megabytes(bytes: i64) -> i64 {
    (bytes + 999_999) / 1_000_000
}

fn span(seconds: f64) -> String {
    match seconds.max(0.0) as u64 {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}
