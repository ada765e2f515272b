//! What is wrong with a database, its settings or its subscriptions, and what mends it.

mod failing;
mod notify_queue;
mod surroundings;
mod transactions;

use sqlx::{FromRow, PgPool};

use super::finding::span;
pub use super::finding::{Finding, Severity};
use super::{oddities, types};
use crate::status::{self, SubscriptionStatus};

/// Examines the database; the worst first, none if all is well.
///
/// It only reads. A role that may not see other roles' sessions finds less.
///
/// # Errors
///
/// The database does not answer.
pub async fn examine(pool: &PgPool) -> Result<Vec<Finding>, postbox::Error> {
    let role: String = sqlx::query_scalar("SELECT current_user::text")
        .fetch_one(pool)
        .await?;
    let mut findings = server(pool).await?;
    findings.extend(surroundings::settings(pool).await?);
    match postbox::check_schema(pool).await {
        Ok(()) => {
            findings.extend(allowed(&role, "its own rights", privileges(pool).await)?);
            findings.extend(allowed(&role, "the dispatchers' work", dispatching(pool).await)?);
            findings.extend(allowed(
                &role,
                "messages that were set aside",
                rejects(pool).await.map(|found| found.into_iter().collect()),
            )?);
            findings.extend(allowed(&role, "locks", surroundings::locks(pool).await)?);
            findings.extend(allowed(&role, "subscriptions", subscriptions(pool).await)?);
            findings.extend(allowed(
                &role,
                "clocks, instances and notifications",
                oddities::examine(pool).await,
            )?);
        }
        Err(error @ postbox::Error::Database(_)) => {
            findings.extend(allowed(&role, "the schema", Err(error))?);
        }
        Err(error) => findings.push(Finding::new(
            Severity::Error,
            "schema",
            error.to_string(),
            "see above; nothing else was looked at",
        )),
    }
    findings.extend(notify_queue::notify_queue(pool).await?);
    findings.extend(allowed(
        &role,
        "transactions",
        transactions::transactions(pool).await,
    )?);
    findings.sort_by_key(|finding| finding.severity);
    Ok(findings)
}

/// What this role may not look at is a finding, too.
fn allowed(
    role: &str,
    what: &str,
    looked: Result<Vec<Finding>, impl Into<postbox::Error>>,
) -> Result<Vec<Finding>, postbox::Error> {
    match looked.map_err(Into::into) {
        Err(postbox::Error::Database(error)) if error.code() == Some(INSUFFICIENT_PRIVILEGE) => {
            Ok(vec![Finding::new(
                Severity::Error,
                "privilege",
                format!("role {role} may not look at {what}, so that was left out: {error}"),
                format!("the owner of the schema runs `postbox grant {role} --as viewer`"),
            )])
        }
        other => other,
    }
}

const INSUFFICIENT_PRIVILEGE: &str = "42501";

// ------------------------------------------------------------------------------------------------------------------ the server

/// Settings as a session of this role has them.
#[derive(FromRow)]
struct Settings {
    recovering: bool,
    fsync: bool,
    full_page_writes: bool,
    synchronous_commit: String,
    autovacuum: bool,
    connections_left: i64,
}

const SETTINGS: &str = "SELECT pg_is_in_recovery() AS recovering, current_setting('fsync')::boolean AS fsync, \
         current_setting('full_page_writes')::boolean AS full_page_writes, \
         current_setting('synchronous_commit') AS synchronous_commit, current_setting('autovacuum')::boolean AS autovacuum, \
         current_setting('max_connections')::bigint - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') \
             AS connections_left";

async fn server(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let settings: Settings = sqlx::query_as(SETTINGS).fetch_one(pool).await?;
    let mut findings = Vec::new();
    let mut add = |severity, name, what: String, hint: &str| {
        findings.push(Finding::new(severity, name, what, hint));
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

// ---------------------------------------------------------------------------------------------------------------- dispatching

/// What this role cannot do that a dispatcher or consumer does.
const MISSING: &str = "SELECT privilege FROM (VALUES \
         ('USAGE on schema postbox', has_schema_privilege('postbox', 'USAGE')), \
         ('SELECT on postbox.outbox', has_table_privilege('postbox.outbox', 'SELECT')), \
         ('SELECT, INSERT and UPDATE on postbox.run', (SELECT bool_and(has_table_privilege('postbox.run', p)) FROM unnest('{SELECT,INSERT,UPDATE}'::text[]) p)), \
         ('INSERT on postbox.incident', has_table_privilege('postbox.incident', 'INSERT')), \
         ('INSERT on postbox.segment', has_table_privilege('postbox.segment', 'INSERT')), \
         ('INSERT on postbox.checkpoint', has_table_privilege('postbox.checkpoint', 'INSERT')), \
         ('UPDATE on postbox.lane', has_table_privilege('postbox.lane', 'UPDATE')), \
         ('DELETE on postbox.redelivery', has_table_privilege('postbox.redelivery', 'DELETE')), \
         ('DELETE on postbox.parked_key', has_table_privilege('postbox.parked_key', 'DELETE')), \
         ('TRUNCATE on postbox.outbox_0 to postbox.outbox_7', \
             (SELECT bool_and(has_table_privilege(format('postbox.outbox_%s', n), 'TRUNCATE')) FROM generate_series(0, 7) n)) \
     ) AS p (privilege, granted) WHERE NOT granted";

/// What roles this one was made, by itself or by membership.
const KINDS: &str = "SELECT DISTINCT g.kind FROM postbox.role_grant g JOIN pg_roles r ON r.rolname = g.role \
     WHERE pg_has_role(r.oid, 'USAGE') ORDER BY 1";

async fn privileges(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let role: String = sqlx::query_scalar("SELECT current_user::text")
        .fetch_one(pool)
        .await?;
    let kinds: Vec<String> = sqlx::query_scalar(KINDS).fetch_all(pool).await?;
    let missing: Vec<String> = sqlx::query_scalar(MISSING).fetch_all(pool).await?;
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    // Who was made something by `postbox grant` is meant to have no more.
    if !kinds.is_empty() {
        return Ok(vec![Finding::new(
            Severity::Note,
            "role",
            format!("role {role} is {}: it can run no dispatcher", kinds.join(" and ")),
            "dispatchers run as the owner of the schema",
        )]);
    }
    Ok(missing
        .iter()
        .map(|privilege| {
            Finding::new(
                Severity::Error,
                "privilege",
                format!("role {role} lacks {privilege}"),
                format!("run dispatchers as the owner of the schema, who grants others what they need with `postbox grant {role} --as consumer` (publisher, operator, viewer)"),
            )
        })
        .collect())
}

#[derive(FromRow)]
struct Sequencing {
    waiting: i64,
    waiting_seconds: Option<f64>,
    ahead: bool,
    moved: f64,
    overdue: i64,
    watched_ago: f64,
}

/// Whether rows are there that the last step did not see, and whether it saw transactions that this cluster has not had yet.
const SEQUENCING: &str = "WITH last AS (SELECT t.snapshot FROM postbox.tick t ORDER BY t.id DESC LIMIT 1) \
     SELECT u.messages AS waiting, extract(epoch FROM postbox.clock() - u.oldest_at)::float8 AS waiting_seconds, \
         coalesce((SELECT pg_snapshot_xmax(snapshot) > pg_snapshot_xmax(pg_current_snapshot()) FROM last), false) AS ahead, \
         extract(epoch FROM postbox.clock() - clock_timestamp())::float8 AS moved, \
         (SELECT count(*) FROM postbox.slots() s WHERE s.overdue AND s.held_by IS NULL AND NOT s.current \
             AND s.newest_at < postbox.clock() - 2 * (SELECT r.keep FROM postbox.retention r)) AS overdue, \
         (SELECT extract(epoch FROM postbox.clock() - r.watched_at)::float8 FROM postbox.retention r) AS watched_ago \
     FROM postbox.unsequenced() u";

async fn rejects(pool: &PgPool) -> Result<Option<Finding>, postbox::Error> {
    let Some(first) = crate::rejects::list(pool, 0, 1).await?.pop() else {
        return Ok(None);
    };
    let count = crate::rejects::count(pool).await?;
    Ok(Some(Finding::new(
        Severity::Error,
        "rejects",
        format!(
            "messages that were committed could not be sequenced and are set aside: {count}, the first (seq {}) because {:?}",
            first.seq, first.reason
        ),
        "look with `postbox rejects list`, then `postbox rejects readmit` or `discard`; and publish with postbox.publish() or the API, which check what they are given",
    )))
}

/// A step takes milliseconds, and seconds after a long pause. A message may have been published long before its transaction ended.
const LONG: f64 = 60.0;

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
            0 => (
                Severity::Warning,
                "no dispatcher is connected: messages will wait for one".to_owned(),
            ),
            messages => (
                Severity::Error,
                format!(
                    "no dispatcher is connected, and {messages} messages wait for one, the first for {}",
                    span(sequencing.waiting_seconds.unwrap_or(0.0))
                ),
            ),
        };
        findings.push(Finding::new(
            severity,
            "no-dispatcher",
            what,
            "run `postbox run`, or start a Dispatcher in a service",
        ));
    } else if sequencing.waiting > 0 && sequencing.waiting_seconds.is_some_and(|seconds| seconds > LONG) {
        findings.push(Finding::new(
            Severity::Error,
            "unsequenced",
            format!(
                "{dispatchers} dispatchers are connected, and {} messages wait to be put in order, the first for {}",
                sequencing.waiting,
                span(sequencing.waiting_seconds.unwrap_or(0.0))
            ),
            "their logs say why they cannot; if a lock is held, it is named here, too",
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
    let subscriptions = status::subscriptions(pool).await?;
    let mut findings = of_subscriptions(&subscriptions);
    findings.extend(types::examine(pool, &subscriptions).await?);
    Ok(findings)
}

fn of_subscriptions(subscriptions: &[SubscriptionStatus]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for subscription in subscriptions {
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
        if let Some(at) = subscription.expires_at {
            findings.push(Finding::new(
                Severity::Warning,
                "expires",
                format!(
                    "the subscription of {name} has no live consumer and will be dropped, with its failed messages, at {}",
                    at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
                ),
                "start its consumers, or raise `postbox run --expire-abandoned` (--expire-nodes for durable broadcasts)",
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
        findings.extend(failing::failing(subscription));
        if let Some(window) = &subscription.drain_window
            && let Err(error) = window.parse::<postbox_core::DailyWindow>()
        {
            findings.push(Finding::new(
                Severity::Error,
                "window",
                format!("the window of {name} cannot be understood and is not kept: {error}"),
                format!("`postbox subscriptions window {arguments} '22:00-06:00 Europe/Berlin'`"),
            ));
        }
    }
    findings
}

/// Rounded up.
fn megabytes(bytes: i64) -> i64 {
    (bytes + 999_999) / 1_000_000
}
