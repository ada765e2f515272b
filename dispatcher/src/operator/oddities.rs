//! What dispatchers and consumers noticed, and what two looks some time apart show: instances that are silent, clocks that were set.

use std::time::{Duration, Instant};

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::{FromRow, PgPool};

use super::finding::{Finding, Severity, span};

/// The longest wait for the heartbeats of instances that seem silent.
const LISTEN: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Clocks of one system differ by less.
const FAR: TimeDelta = TimeDelta::seconds(5);

pub(super) async fn examine(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let mut findings = silent(pool).await?;
    findings.extend(incidents(pool).await?);
    findings.extend(own_clock(pool).await?);
    Ok(findings)
}

// -------------------------------------------------------------------------------------------------------------- silent instances

#[derive(FromRow)]
pub(super) struct Instance {
    pub(super) id: i32,
    name: String,
    beat: i32,
    lanes: i64,
    lease: f64,
    /// By the server's clock, which may have been set since.
    age: f64,
}

const INSTANCES: &str = "SELECT c.id, c.name, s.beat, (SELECT count(*) FROM postbox.lane l WHERE l.consumer_id = c.id) AS lanes, \
         extract(epoch FROM c.lease)::float8 AS lease, \
         extract(epoch FROM clock_timestamp() - r.heartbeat_at)::float8 AS age \
     FROM postbox.sessions() s JOIN postbox.consumer c ON c.id = s.consumer_id CROSS JOIN LATERAL postbox.last_report(c.id) r";

/// Those that hold their connection and say nothing. A clock that was set makes others look so: they are listened to, for up to half a lease or 5 s.
pub(super) async fn silent_instances(pool: &PgPool) -> Result<Vec<Instance>, sqlx::Error> {
    let seems_silent = |instance: &Instance| !(-1.0..instance.lease).contains(&instance.age);
    let mut suspects: Vec<Instance> = sqlx::query_as(INSTANCES).fetch_all(pool).await?;
    suspects.retain(seems_silent);
    let begun = Instant::now();
    // They are heard of four times a lease.
    let patience = suspects
        .iter()
        .filter_map(|suspect| Duration::try_from_secs_f64(suspect.lease / 2.0).ok())
        .fold(Duration::ZERO, Duration::max)
        .min(LISTEN);
    while !suspects.is_empty() && begun.elapsed() < patience {
        tokio::time::sleep(LOOK_EVERY).await;
        let now: Vec<Instance> = sqlx::query_as(INSTANCES).fetch_all(pool).await?;
        suspects.retain(|suspect| {
            now.iter()
                .any(|instance| instance.id == suspect.id && instance.beat == suspect.beat)
        });
    }
    Ok(suspects)
}

async fn silent(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    Ok(silent_instances(pool)
        .await?
        .iter()
        .map(|suspect| {
            Finding::new(
                if suspect.lanes > 0 { Severity::Error } else { Severity::Warning },
                "silent",
                format!(
                    "instance {} ({}) holds its connection, and {} lanes, and says nothing; its last heartbeat was {}",
                    suspect.name,
                    suspect.id,
                    suspect.lanes,
                    match suspect.age < 0.0 {
                        true => "when the server's clock was ahead of now".to_owned(),
                        false => format!("{} ago", span(suspect.age)),
                    }
                ),
                "look whether its process is stopped, or its host gone; other instances of its groups take its lanes after its lease",
            )
        })
        .collect())
}

// -------------------------------------------------------------------------------------------------------------- what was noticed

#[derive(FromRow)]
struct Incident {
    kind: String,
    observer: String,
    what: String,
    times: i64,
    last_at: DateTime<Utc>,
}

/// The clock may have been set since.
const INCIDENTS: &str = "SELECT kind, observer, what, times, last_at FROM postbox.incident \
     WHERE last_at BETWEEN clock_timestamp() - interval '1 day' AND clock_timestamp() + interval '1 day' ORDER BY last_at DESC LIMIT 20";

async fn incidents(pool: &PgPool) -> Result<Vec<Finding>, sqlx::Error> {
    let incidents: Vec<Incident> = sqlx::query_as(INCIDENTS).fetch_all(pool).await?;
    Ok(incidents
        .iter()
        .map(|incident| {
            let (name, what, hint) = match incident.kind.as_str() {
                "notifications" => (
                    "notifications",
                    "notifications of Postbox's channels that are not Postbox's were heard by",
                    "find who sends them: every role that may connect can; REVOKE CONNECT from those that need not. What they say is not believed, and \
                     how often it is looked at for them is limited",
                ),
                "clock" | "clock-offset" => (
                    "clock",
                    "a clock was noticed by",
                    "keep the clocks of the database's host and of the instances' in step (NTP); what is due, expires or is kept goes by the database's",
                ),
                _ => ("noticed", "something odd was noticed by", "see its log"),
            };
            Finding::new(
                Severity::Warning,
                name,
                format!(
                    "{what} {}: {} ({} times, last at {})",
                    incident.observer,
                    incident.what,
                    incident.times,
                    incident.last_at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
                ),
                hint,
            )
        })
        .collect())
}

async fn own_clock(pool: &PgPool) -> Result<Option<Finding>, sqlx::Error> {
    let asked = Utc::now();
    let server: DateTime<Utc> = sqlx::query_scalar("SELECT clock_timestamp()")
        .fetch_one(pool)
        .await?;
    // The later of what it can be and the earlier, whichever is less off.
    let (least, most) = (asked - server, Utc::now() - server);
    let off = match least > TimeDelta::zero() {
        true => least,
        false => most.min(TimeDelta::zero()),
    };
    Ok((off.abs() > FAR).then(|| {
        Finding::new(
            Severity::Warning,
            "clock",
            format!(
                "the clock of the database's host is {} s {} this machine's",
                off.abs().num_seconds(),
                if off > TimeDelta::zero() {
                    "behind"
                } else {
                    "ahead of"
                }
            ),
            "keep them in step (NTP)",
        )
    }))
}
