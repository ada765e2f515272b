//! Settings of database and role that matter, and locks that others hold.

use std::time::Duration;

use postbox_core::locks::{self, LockHolder};
use sqlx::{FromRow, PgPool};

use super::{Finding, Severity};

/// As sessions of this role begin; that of the command has set its own.
#[derive(FromRow)]
struct Settings {
    isolation: String,
    read_only: bool,
    statement_timeout_ms: i64,
    lock_timeout_ms: i64,
    temp_file_limit_kb: i64,
    replication_role: String,
}

const SETTINGS: &str = "SELECT max(reset_val) FILTER (WHERE name = 'default_transaction_isolation') AS isolation, \
         bool_or(reset_val = 'on') FILTER (WHERE name = 'default_transaction_read_only') AS read_only, \
         max(reset_val::bigint) FILTER (WHERE name = 'statement_timeout') AS statement_timeout_ms, \
         max(reset_val::bigint) FILTER (WHERE name = 'lock_timeout') AS lock_timeout_ms, \
         max(setting::bigint) FILTER (WHERE name = 'temp_file_limit') AS temp_file_limit_kb, \
         max(reset_val) FILTER (WHERE name = 'session_replication_role') AS replication_role \
     FROM (SELECT name, setting, reset_val FROM pg_settings WHERE name IN ('default_transaction_isolation', 'default_transaction_read_only', \
         'statement_timeout', 'lock_timeout', 'temp_file_limit', 'session_replication_role') OFFSET 0) s";

/// A step sorts what it found; less than this is not much.
const LITTLE_KB: i64 = 1024 * 1024;
/// Publishing and settling take milliseconds, but not always.
const SHORT_MS: i64 = 1_000;

pub(super) async fn settings(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let settings: Settings = sqlx::query_as(SETTINGS).fetch_one(pool).await?;
    let mut findings = Vec::new();
    let mut add = |severity, name, what: String, hint: &str| {
        findings.push(Finding::new(severity, name, what, hint));
    };
    if settings.read_only {
        add(
            Severity::Warning,
            "read-only",
            "transactions of this role default to read only: applications that do not say otherwise cannot publish (Postbox's own sessions do)".to_owned(),
            "ALTER ROLE … SET default_transaction_read_only = off for those that publish",
        );
    }
    if settings.isolation != "read committed" {
        add(
            Severity::Note,
            "isolation",
            format!(
                "transactions default to {}: Postbox's own sessions and transactional handlers say READ COMMITTED themselves, applications that publish may fail to serialize",
                settings.isolation
            ),
            "ALTER ROLE … SET default_transaction_isolation = 'read committed', if that is not meant",
        );
    }
    for (name, milliseconds) in [
        ("statement_timeout", settings.statement_timeout_ms),
        ("lock_timeout", settings.lock_timeout_ms),
    ] {
        if (1..=SHORT_MS).contains(&milliseconds) {
            add(
                Severity::Warning,
                if name == "lock_timeout" {
                    "lock-timeout"
                } else {
                    "statement-timeout"
                },
                format!(
                    "{name} is {milliseconds} ms for this role: applications that publish, and transactional handlers, fail where that is too short"
                ),
                "ALTER ROLE … SET a longer one for the applications; Postbox's own sessions have none",
            );
        }
    }
    if (0..LITTLE_KB).contains(&settings.temp_file_limit_kb) {
        add(
            Severity::Warning,
            "temp-file-limit",
            format!(
                "temp_file_limit is {} kB: a statement over many messages may need more, and fails then",
                settings.temp_file_limit_kb
            ),
            "ALTER ROLE … SET temp_file_limit = -1 for dispatchers and consumers",
        );
    }
    if settings.replication_role != "origin" {
        add(
            Severity::Warning,
            "replication-role",
            format!(
                "session_replication_role is {}: triggers and foreign keys do nothing, so scheduled messages are found late and dropped subscriptions leave rows",
                settings.replication_role
            ),
            "ALTER ROLE … RESET session_replication_role",
        );
    }
    Ok(findings)
}

/// A transaction of Postbox's takes milliseconds.
const LONG: Duration = Duration::from_secs(5);

pub(super) async fn locks(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let holders = locks::holders(pool, LONG).await?;
    Ok(holders.into_iter().map(held).collect())
}

fn held(holder: LockHolder) -> Finding {
    let LockHolder {
        lock,
        pid,
        who,
        state,
        held_seconds,
        waiting,
        consequence,
        hint,
        ..
    } = holder;
    let process = pid.map_or_else(
        || "a prepared transaction".to_owned(),
        |pid| format!("process {pid}"),
    );
    // The others only make things slower, or are of a transaction that ends by itself.
    let severity = match lock.starts_with("advisory") && state == "idle" || waiting > 0 {
        true => Severity::Error,
        false => Severity::Warning,
    };
    Finding::new(
        severity,
        "held-lock",
        format!(
            "{process} ({who}, {state}) has held {lock} for {held_seconds:.0} s, and {waiting} wait for it: {consequence}"
        ),
        hint,
    )
}
