//! Recurring messages: cron schedules, and the register of them that dispatchers fire from.
//!
//! A schedule is a cron expression in a time zone. Each of its due times becomes one ordinary message, whatever the number of dispatchers; the
//! message says in its header [`SCHEDULED_AT`] for which due time it is, and in [`CRON`] of which schedule.
//!
//! ```no_run
//! use postbox::Outgoing;
//! use postbox::cron::{Cron, Missed, Schedule};
//!
//! # async fn example(pool: sqlx::PgPool) -> Result<(), postbox::Error> {
//! let weekdays_at_six = Schedule::parse("0 6 * * mon-fri", "Europe/Berlin")?;
//! Cron::new("daily-report", weekdays_at_six, Outgoing::json("reports", "daily"))
//!     .missed(Missed::Once)
//!     .register(&mut *pool.acquire().await?)
//!     .await?;
//! # Ok(()) }
//! ```
//!
//! # Expressions
//! Five fields: minute (0–59), hour (0–23), day of the month (1–31), month (1–12 or jan–dec), day of the week (0–7 or sun–sat, where 0 and 7 are
//! Sunday); or six, with the second (0–59) first. A field is `*`, a value, a range `a-b`, a step `*/n` or `a-b/n`, or a list of these with
//! commas. The day of the month also takes `L` (the last) and `15W` (the nearest weekday), the day of the week `mon#2` (the second) and `friL` (the last).
//! If both days are restricted, either is enough, as in Vixie cron. Macros: `@hourly`, `@daily` or `@midnight`, `@weekly`, `@monthly`,
//! `@yearly` or `@annually`.
//!
//! # When clocks change
//! A schedule whose second, minute and hour are all fixed values (lists and ranges count as fixed) names times of the day; one with a `*` or a step
//! in any of them is a rhythm.
//!
//! | | times of the day, such as `30 2 * * *` | rhythms, such as `*/15 * * * *` |
//! |---|---|---|
//! | clocks go forward: the time does not exist | fires once, at the first instant after the gap | goes on after the gap |
//! | clocks go back: the time comes twice | fires at the first of the two | fires at both |
//!
//! So a daily job runs once every day, and a job every quarter of an hour runs every quarter of an hour.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, TimeDelta, Utc};
use chrono_tz::Tz;
use croner::parser::{CronParser, Seconds, Year};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, Row};

use crate::error::Result;
use crate::outgoing::{Outgoing, When, is_name};
use crate::publish::interval;

/// Header of a firing: its due time, in RFC 3339.
pub const SCHEDULED_AT: &str = "postbox-scheduled-at";
/// Header of a firing: the name of its schedule.
pub const CRON: &str = "postbox-cron";

/// A due time that is at most so old was not missed, only a little late.
const GRACE: TimeDelta = TimeDelta::minutes(1);
/// Most missed due times that are made up for by [`Missed::All`].
pub const MAX_MISSED: usize = 1_000;

/// What is wrong with a schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CronError {
    /// The expression cannot be understood.
    #[error("cron expression {expression:?}, column {column}: {reason}")]
    Expression {
        /// The expression.
        expression: String,
        /// Where it is wrong, in characters from 1.
        column: usize,
        /// What is wrong there.
        reason: String,
    },
    /// The expression has no due time, such as the 30th of February.
    #[error("cron expression {0:?} is never due: there is no such date")]
    Never(String),
    /// There is no such time zone.
    #[error("time zone {0:?} is not known: give an IANA name such as Europe/Berlin or UTC")]
    TimeZone(String),
    /// The name is empty, too long, or has a character that is not allowed.
    #[error("cron name {0:?} is not allowed: it is 1 to 255 characters of A-Z a-z 0-9 . _ - : /")]
    Name(String),
    /// The message says something that a recurring message cannot have.
    #[error("a recurring message has no {0}: leave it out")]
    Option(&'static str),
    /// There is no such policy.
    #[error("{0:?} is no policy for missed firings; known are: skip, once, all")]
    Missed(String),
}

/// A cron expression in a time zone.
#[derive(Clone)]
pub struct Schedule {
    expression: String,
    zone: Tz,
    cron: croner::Cron,
}

impl Schedule {
    /// Reads a cron expression and the name of an IANA time zone.
    ///
    /// ```
    /// use postbox::cron::Schedule;
    ///
    /// let error = Schedule::parse("0 25 * * *", "UTC").unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "cron expression \"0 25 * * *\", column 3: \"25\" is no hour (0 to 23, with * , - /)"
    /// );
    /// ```
    pub fn parse(expression: &str, time_zone: &str) -> Result<Self, CronError> {
        let zone = Tz::from_str(time_zone).map_err(|_| CronError::TimeZone(time_zone.to_owned()))?;
        let cron = read(expression)?;
        let schedule = Self {
            expression: expression.trim().to_owned(),
            zone,
            cron,
        };
        match schedule.after(DateTime::UNIX_EPOCH) {
            Some(_) => Ok(schedule),
            None => Err(CronError::Never(schedule.expression)),
        }
    }

    /// The cron expression.
    pub fn expression(&self) -> &str {
        &self.expression
    }

    /// The name of the time zone.
    pub fn time_zone(&self) -> &'static str {
        self.zone.name()
    }

    /// The first due time after an instant.
    pub fn after(&self, instant: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.cron
            .find_next_occurrence(&instant.with_timezone(&self.zone), false)
            .ok()
            .map(|due| due.with_timezone(&Utc))
            .filter(|due| *due > instant)
    }

    /// The due times after an instant, one after another.
    pub fn upcoming(&self, after: DateTime<Utc>) -> impl Iterator<Item = DateTime<Utc>> {
        std::iter::successors(self.after(after), |due| self.after(*due))
    }

    /// An instant as a clock in the schedule's time zone shows it, with its offset.
    pub fn local(&self, instant: DateTime<Utc>) -> String {
        instant
            .with_timezone(&self.zone)
            .format("%Y-%m-%d %H:%M:%S %z")
            .to_string()
    }

    /// Which of the due times from `first` to `now` fire, by the policy; `first` is a due time.
    pub fn firings(&self, first: DateTime<Utc>, now: DateTime<Utc>, missed: Missed) -> Vec<DateTime<Utc>> {
        let mut due = self.latest(first, now, MAX_MISSED);
        let recent = due.partition_point(|at| *at < now - GRACE);
        match missed {
            Missed::All => {}
            Missed::Skip => drop(due.drain(..recent)),
            Missed::Once if recent > 0 => drop(due.drain(..due.len() - 1)),
            Missed::Once => {}
        }
        due
    }

    /// The latest due times from `first` to `now`, at most `most`, in order. Searched in growing spans before `now`, so that it takes no longer
    /// after a year than after an hour.
    fn latest(&self, first: DateTime<Utc>, now: DateTime<Utc>, most: usize) -> Vec<DateTime<Utc>> {
        let spans = [1, 60, 24 * 60, 32 * 24 * 60, 367 * 24 * 60].map(TimeDelta::minutes);
        let starts = spans
            .map(|span| now - span)
            .into_iter()
            .filter(|start| *start > first);
        for start in starts.chain([first]) {
            // `first` itself: it may be the instant after a gap, which the expression does not name.
            let begin = (start == first && first <= now).then_some(first);
            let mut due = VecDeque::new();
            for at in begin
                .into_iter()
                .chain(self.upcoming(start))
                .take_while(|at| *at <= now)
            {
                if due.len() == most {
                    due.pop_front();
                }
                due.push_back(at);
            }
            if due.len() == most || start == first {
                return due.into();
            }
        }
        Vec::new()
    }
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in {}", self.expression, self.zone.name())
    }
}

/// The fields of an expression, the optional second first, and what each takes.
const FIELDS: [(&str, &str); 6] = [
    ("second", "0 to 59, with * , - /"),
    ("minute", "0 to 59, with * , - /"),
    ("hour", "0 to 23, with * , - /"),
    ("day of the month", "1 to 31, with * , - / L W"),
    ("month", "1 to 12 or jan to dec, with * , - /"),
    ("day of the week", "0 to 7 or sun to sat, with * , - / # L"),
];

const MACROS: [&str; 7] = [
    "@hourly",
    "@daily",
    "@midnight",
    "@weekly",
    "@monthly",
    "@yearly",
    "@annually",
];

/// The expression, or where it is wrong: each part of each field is tried by itself.
fn read(expression: &str) -> Result<croner::Cron, CronError> {
    let wrong = |column: usize, reason: String| CronError::Expression {
        expression: expression.to_owned(),
        column,
        reason,
    };
    let parser = CronParser::builder()
        .seconds(Seconds::Optional)
        .year(Year::Disallowed)
        .build();
    let fields = split(expression, 0, char::is_whitespace);
    let Some((first, _)) = fields.first() else {
        return Err(wrong(
            1,
            "it is empty: it has five fields, or six with seconds".to_owned(),
        ));
    };
    let at_first = 1 + first;
    if let [(_, name)] = fields[..]
        && name.starts_with('@')
    {
        let name = name.to_ascii_lowercase();
        if !MACROS.contains(&name.as_str()) {
            let known = MACROS.join(", ");
            return Err(wrong(
                at_first,
                format!("{name:?} is no macro; known are: {known}"),
            ));
        }
        let name = if name == "@midnight" { "@daily" } else { &name };
        return parser
            .parse(name)
            .map_err(|error| wrong(at_first, error.to_string()));
    }
    if !(5..=6).contains(&fields.len()) {
        let at = fields
            .get(6)
            .map_or(expression.chars().count() + 1, |(at, _)| at + 1);
        let found = fields.len();
        let reason = format!(
            "it has {found} field{}: minute, hour, day of the month, month, day of the week; or six, with the second first",
            if found == 1 { "" } else { "s" }
        );
        return Err(wrong(at, reason));
    }
    let offset = FIELDS.len() - fields.len();
    for (n, (at, field)) in fields.iter().enumerate() {
        let (name, takes) = FIELDS[n + offset];
        for (at, part) in split(field, *at, |c| c == ',') {
            let mut alone = ["*"; FIELDS.len()];
            alone[n + offset] = part;
            if parser.parse(&alone.join(" ")).is_err() || part.is_empty() {
                return Err(wrong(at + 1, format!("{part:?} is no {name} ({takes})")));
            }
        }
        if field.starts_with(',') || field.ends_with(',') || field.contains(",,") {
            let reason = format!("{field:?} is no {name} ({takes}): a comma stands between two values");
            return Err(wrong(at + 1, reason));
        }
    }
    parser
        .parse(&expression.split_whitespace().collect::<Vec<_>>().join(" "))
        .map_err(|error| wrong(at_first, error.to_string()))
}

/// The parts between separators, each with its place in characters; empty ones are left out.
fn split(text: &str, start: usize, is_separator: impl Fn(char) -> bool) -> Vec<(usize, &str)> {
    text.split(is_separator)
        .scan(start, |at, part| {
            let here = *at;
            *at += part.chars().count() + 1;
            Some((here, part))
        })
        .filter(|(_, part)| !part.is_empty())
        .collect()
}

/// What becomes of due times that passed while no dispatcher ran. One that is at most a minute old is not missed, and always fires.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Missed {
    /// They do not fire.
    Skip,
    /// The latest one fires, for all of them.
    #[default]
    Once,
    /// Each fires, in order; of more than 1,000 the latest 1,000.
    All,
}

impl Missed {
    /// As it is stored and written: `skip`, `once` or `all`.
    pub fn as_str(self) -> &'static str {
        match self {
            Missed::Skip => "skip",
            Missed::Once => "once",
            Missed::All => "all",
        }
    }
}

impl FromStr for Missed {
    type Err = CronError;

    fn from_str(text: &str) -> Result<Self, CronError> {
        match text {
            "skip" => Ok(Missed::Skip),
            "once" => Ok(Missed::Once),
            "all" => Ok(Missed::All),
            other => Err(CronError::Missed(other.to_owned())),
        }
    }
}

/// A recurring message, to be registered under a name.
#[derive(Debug)]
#[must_use = "it does nothing until it is registered"]
pub struct Cron {
    name: String,
    schedule: Schedule,
    missed: Missed,
    message: Outgoing,
}

impl Cron {
    /// The message that is published at each due time of the schedule. Of what can be said about publishing, `expires_in` counts from each
    /// firing; `deliver_at`, `delay`, `expires_at`, `dedup_key` and `ordered` are refused.
    pub fn new(name: impl Into<String>, schedule: Schedule, message: impl Into<Outgoing>) -> Self {
        Self {
            name: name.into(),
            schedule,
            missed: Missed::default(),
            message: message.into(),
        }
    }

    /// What becomes of missed due times (default: [`Missed::Once`]).
    pub fn missed(mut self, missed: Missed) -> Self {
        self.missed = missed;
        self
    }

    /// Registers it, or changes the one of that name; takes effect when the transaction commits. Returns its next due time.
    ///
    /// Registering what is there already changes nothing: it keeps its next due time and stays paused if it is. A changed expression or time zone
    /// counts from now. It begins with the first due time after now.
    pub async fn register(self, connection: &mut PgConnection) -> Result<Option<DateTime<Utc>>> {
        if !is_name(&self.name) {
            return Err(CronError::Name(self.name).into());
        }
        let message = self.message.validate()?;
        let refused = match (&message.due, &message.expiry) {
            (Some(_), _) => Some("deliver_at or delay"),
            (_, Some(When::At(_))) => Some("expires_at"),
            _ if message.dedup.is_some() => Some("dedup_key"),
            _ if message.ordered => Some("ordered"),
            _ => None,
        };
        if let Some(option) = refused {
            return Err(CronError::Option(option).into());
        }
        // Not before a firing that was: a due time fires once, even if the clock is set back in between.
        let since: DateTime<Utc> = sqlx::query_scalar(SINCE)
            .bind(&self.name)
            .fetch_one(&mut *connection)
            .await?;
        let next_at = self.schedule.after(since);
        Ok(sqlx::query_scalar(REGISTER)
            .bind(&self.name)
            .bind(self.schedule.expression())
            .bind(self.schedule.time_zone())
            .bind(self.missed.as_str())
            .bind(message.topic.as_ref())
            .bind(message.message_type.as_deref())
            .bind(message.key.as_deref())
            .bind(message.headers)
            .bind(message.content_type.as_deref())
            .bind(message.payload)
            .bind(message.expiry.and_then(When::span).map(interval))
            .bind(next_at)
            .fetch_one(connection)
            .await?)
    }
}

const SINCE: &str =
    "SELECT greatest(postbox.clock(), (SELECT c.last_at FROM postbox.cron c WHERE c.name = $1))";

/// What is the same is not written, so that a restart of many consumers is none of many updates.
const REGISTER: &str = "WITH given AS ( \
         INSERT INTO postbox.cron AS c (name, schedule, time_zone, missed, topic, type, key, headers, content_type, payload, \
             expires_in, next_at) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) \
         ON CONFLICT (name) DO UPDATE \
         SET schedule = excluded.schedule, time_zone = excluded.time_zone, missed = excluded.missed, topic = excluded.topic, \
             type = excluded.type, key = excluded.key, headers = excluded.headers, content_type = excluded.content_type, \
             payload = excluded.payload, expires_in = excluded.expires_in, \
             next_at = CASE WHEN (c.schedule, c.time_zone) = (excluded.schedule, excluded.time_zone) THEN c.next_at \
                 ELSE excluded.next_at END \
         WHERE (c.schedule, c.time_zone, c.missed, c.topic, c.type, c.key, c.headers, c.content_type, c.payload, c.expires_in) \
             IS DISTINCT FROM (excluded.schedule, excluded.time_zone, excluded.missed, excluded.topic, excluded.type, excluded.key, \
                 excluded.headers, excluded.content_type, excluded.payload, excluded.expires_in) \
         RETURNING c.next_at \
     ) \
     SELECT next_at FROM given UNION ALL SELECT c.next_at FROM postbox.cron c WHERE c.name = $1 LIMIT 1";

/// A schedule as it is registered.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Registered {
    /// Its name.
    pub name: String,
    /// Cron expression.
    pub schedule: String,
    /// IANA time zone.
    pub time_zone: String,
    /// What becomes of missed due times: `skip`, `once` or `all`.
    pub missed: String,
    /// Whether it does not fire.
    pub paused: bool,
    /// Topic of its messages.
    pub topic: String,
    /// Their message type.
    pub message_type: Option<String>,
    /// Their key.
    pub key: Option<String>,
    /// The next due time.
    pub next_at: Option<DateTime<Utc>>,
    /// The due time of the last firing.
    pub last_at: Option<DateTime<Utc>>,
}

const LIST: &str = "SELECT name, schedule, time_zone, missed, paused, topic, type, key, next_at, last_at FROM postbox.cron \
     WHERE name = coalesce($1, name) ORDER BY name";

async fn read_register(connection: &mut PgConnection, name: Option<&str>) -> Result<Vec<Registered>> {
    let rows = sqlx::query(LIST).bind(name).fetch_all(connection).await?;
    rows.iter()
        .map(|row| {
            Ok(Registered {
                name: row.try_get(0)?,
                schedule: row.try_get(1)?,
                time_zone: row.try_get(2)?,
                missed: row.try_get(3)?,
                paused: row.try_get(4)?,
                topic: row.try_get(5)?,
                message_type: row.try_get(6)?,
                key: row.try_get(7)?,
                next_at: row.try_get(8)?,
                last_at: row.try_get(9)?,
            })
        })
        .collect()
}

/// All schedules, by name.
pub async fn list(connection: &mut PgConnection) -> Result<Vec<Registered>> {
    read_register(connection, None).await
}

/// The schedule of this name.
pub async fn find(connection: &mut PgConnection, name: &str) -> Result<Option<Registered>> {
    Ok(read_register(connection, Some(name)).await?.pop())
}

/// Stops a schedule from firing, from the commit on. `false`: there is none of that name.
pub async fn pause(connection: &mut PgConnection, name: &str) -> Result<bool> {
    let paused = sqlx::query("UPDATE postbox.cron SET paused = true WHERE name = $1")
        .bind(name)
        .execute(connection)
        .await?;
    Ok(paused.rows_affected() > 0)
}

/// Lets a paused schedule fire again, beginning with the first due time after now: what was due while it was paused is not made up for.
/// `false`: there is none of that name.
pub async fn resume(connection: &mut PgConnection, name: &str) -> Result<bool> {
    loop {
        let Some(found) = find(connection, name).await? else {
            return Ok(false);
        };
        let schedule = Schedule::parse(&found.schedule, &found.time_zone)?;
        let since: DateTime<Utc> = sqlx::query_scalar(SINCE)
            .bind(name)
            .fetch_one(&mut *connection)
            .await?;
        let resumed = sqlx::query(RESUME)
            .bind(name)
            .bind(&found.schedule)
            .bind(&found.time_zone)
            .bind(schedule.after(since))
            .execute(&mut *connection)
            .await?;
        if resumed.rows_affected() > 0 {
            return Ok(true);
        }
        // It was changed in between: with what it is now.
    }
}

/// One that is not paused keeps its next due time.
const RESUME: &str = "UPDATE postbox.cron SET next_at = CASE WHEN paused THEN $4 ELSE next_at END, paused = false \
     WHERE name = $1 AND schedule = $2 AND time_zone = $3";

/// Removes a schedule; messages that it published stay. `false`: there was none of that name.
pub async fn remove(connection: &mut PgConnection, name: &str) -> Result<bool> {
    let removed = sqlx::query("DELETE FROM postbox.cron WHERE name = $1")
        .bind(name)
        .execute(connection)
        .await?;
    Ok(removed.rows_affected() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("an instant in RFC 3339")
    }

    fn schedule(expression: &str, zone: &str) -> Schedule {
        Schedule::parse(expression, zone).expect("a schedule")
    }

    /// The due times of a span, in the local time of the zone, with the offset.
    fn due(expression: &str, zone: &str, from: &str, to: &str) -> Vec<String> {
        let schedule = schedule(expression, zone);
        let (from, to) = (at(from), at(to));
        schedule
            .upcoming(from)
            .take_while(|at| *at <= to)
            .map(|at| schedule.local(at)[5..].replace(":00 ", " "))
            .collect()
    }

    #[test]
    fn what_is_wrong_is_shown_where_it_is() {
        for (expression, column, says) in [
            ("", 1, "it is empty"),
            ("   ", 1, "it is empty"),
            ("61 * * * *", 1, "\"61\" is no minute (0 to 59"),
            ("  0  24 * * *", 6, "\"24\" is no hour (0 to 23"),
            ("0 0 0 * *", 5, "\"0\" is no day of the month (1 to 31"),
            ("0 0 * 13 *", 7, "\"13\" is no month (1 to 12"),
            ("0 0 * * 8", 9, "\"8\" is no day of the week (0 to 7"),
            ("0 0 * * mon-fry", 9, "\"mon-fry\" is no day of the week"),
            ("1,2,99,4 * * * *", 5, "\"99\" is no minute"),
            ("1,,2 * * * *", 1, "a comma stands between two values"),
            ("*/0 * * * *", 1, "\"*/0\" is no minute"),
            ("99 * * * * *", 1, "\"99\" is no second"),
            ("0 6 * *", 8, "it has 4 fields: minute, hour"),
            ("0 0 6 * * * 2027", 13, "it has 7 fields"),
            ("@noon", 1, "\"@noon\" is no macro; known are: @hourly, @daily"),
            ("ü * * * *", 1, "\"ü\" is no minute"),
        ] {
            match Schedule::parse(expression, "UTC") {
                Err(CronError::Expression {
                    column: found,
                    reason,
                    ..
                }) => {
                    assert_eq!(found, column, "column of {expression:?}: {reason}");
                    assert!(
                        reason.starts_with(says) || reason.contains(says),
                        "{expression:?}: {reason}"
                    );
                }
                other => panic!("{expression:?} gave {other:?}"),
            }
        }
        assert_eq!(
            Schedule::parse("0 0 30 2 *", "UTC").unwrap_err(),
            CronError::Never("0 0 30 2 *".to_owned())
        );
        let zone = Schedule::parse("@daily", "Europe/Berlyn").unwrap_err();
        assert!(zone.to_string().contains("Europe/Berlyn"), "{zone}");
    }

    #[test]
    fn macros_names_and_seconds_are_understood() {
        for (expression, next) in [
            ("@hourly", "2026-01-01T01:00:00Z"),
            ("@daily", "2026-01-02T00:00:00Z"),
            ("@midnight", "2026-01-02T00:00:00Z"),
            ("@WEEKLY", "2026-01-04T00:00:00Z"),
            ("@monthly", "2026-02-01T00:00:00Z"),
            ("@yearly", "2027-01-01T00:00:00Z"),
            ("*/10 * * * * *", "2026-01-01T00:00:10Z"),
            ("0 6 * * mon-fri", "2026-01-01T06:00:00Z"),
            ("0 6 * FEB SUN", "2026-02-01T06:00:00Z"),
            ("0 6 * * 7", "2026-01-04T06:00:00Z"),
            ("0 0 L * *", "2026-01-31T00:00:00Z"),
            ("0 0 * * fri#2", "2026-01-09T00:00:00Z"),
            ("0 0 13 * fri", "2026-01-02T00:00:00Z"),
        ] {
            let next_at = schedule(expression, "UTC").after(at("2026-01-01T00:00:00Z"));
            assert_eq!(next_at, Some(at(next)), "{expression}");
        }
    }

    #[test]
    fn where_clocks_go_forward_a_time_of_the_day_fires_once_after_the_gap_and_a_rhythm_goes_on() {
        // 02:00 → 03:00.
        let day = ("2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
        assert_eq!(
            due("30 2 * * *", "Europe/Berlin", day.0, day.1),
            ["03-29 03:00 +0200", "03-30 02:30 +0200"]
        );
        assert_eq!(
            due(
                "*/30 * * * *",
                "Europe/Berlin",
                "2026-03-29T00:00:00Z",
                "2026-03-29T02:00:00Z"
            ),
            [
                "03-29 01:30 +0100",
                "03-29 03:00 +0200",
                "03-29 03:30 +0200",
                "03-29 04:00 +0200"
            ]
        );
        // 02:00 → 03:00.
        let day = ("2026-03-07T12:00:00Z", "2026-03-09T12:00:00Z");
        assert_eq!(
            due("15 2 * * *", "America/New_York", day.0, day.1),
            ["03-08 03:00 -0400", "03-09 02:15 -0400"]
        );
        assert_eq!(
            due(
                "*/30 * * * *",
                "America/New_York",
                "2026-03-08T06:00:00Z",
                "2026-03-08T08:00:00Z"
            ),
            [
                "03-08 01:30 -0500",
                "03-08 03:00 -0400",
                "03-08 03:30 -0400",
                "03-08 04:00 -0400"
            ]
        );
        // 02:00 → 02:30.
        let day = ("2026-10-03T00:00:00Z", "2026-10-04T20:00:00Z");
        assert_eq!(
            due("15 2 * * *", "Australia/Lord_Howe", day.0, day.1),
            ["10-04 02:30 +1100", "10-05 02:15 +1100"]
        );
        assert_eq!(
            due(
                "*/15 * * * *",
                "Australia/Lord_Howe",
                "2026-10-03T15:00:00Z",
                "2026-10-03T16:00:00Z"
            ),
            [
                "10-04 01:45 +1030",
                "10-04 02:30 +1100",
                "10-04 02:45 +1100",
                "10-04 03:00 +1100"
            ]
        );
    }

    #[test]
    fn where_clocks_go_back_a_time_of_the_day_fires_once_and_a_rhythm_goes_on() {
        // 03:00 → 02:00.
        let day = ("2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z");
        assert_eq!(
            due("30 2 * * *", "Europe/Berlin", day.0, day.1),
            ["10-25 02:30 +0200", "10-26 02:30 +0100"]
        );
        assert_eq!(
            due(
                "*/30 * * * *",
                "Europe/Berlin",
                "2026-10-24T23:30:00Z",
                "2026-10-25T02:00:00Z"
            ),
            [
                "10-25 02:00 +0200",
                "10-25 02:30 +0200",
                "10-25 02:00 +0100",
                "10-25 02:30 +0100",
                "10-25 03:00 +0100"
            ]
        );
        // 02:00 → 01:00.
        let day = ("2026-10-31T12:00:00Z", "2026-11-02T12:00:00Z");
        assert_eq!(
            due("15 1 * * *", "America/New_York", day.0, day.1),
            ["11-01 01:15 -0400", "11-02 01:15 -0500"]
        );
        assert_eq!(
            due(
                "*/30 * * * *",
                "America/New_York",
                "2026-11-01T04:30:00Z",
                "2026-11-01T07:00:00Z"
            ),
            [
                "11-01 01:00 -0400",
                "11-01 01:30 -0400",
                "11-01 01:00 -0500",
                "11-01 01:30 -0500",
                "11-01 02:00 -0500"
            ]
        );
        // 02:00 → 01:30.
        let day = ("2026-04-04T00:00:00Z", "2026-04-05T20:00:00Z");
        assert_eq!(
            due("45 1 * * *", "Australia/Lord_Howe", day.0, day.1),
            ["04-05 01:45 +1100", "04-06 01:45 +1030"]
        );
        assert_eq!(
            due(
                "*/15 * * * *",
                "Australia/Lord_Howe",
                "2026-04-04T14:15:00Z",
                "2026-04-04T15:30:00Z"
            ),
            [
                "04-05 01:30 +1100",
                "04-05 01:45 +1100",
                "04-05 01:30 +1030",
                "04-05 01:45 +1030",
                "04-05 02:00 +1030"
            ]
        );
    }

    #[test]
    fn due_times_only_ever_go_forward_through_a_year_of_every_zone() {
        for (n, zone) in chrono_tz::TZ_VARIANTS.iter().enumerate() {
            // Rhythms of every twentieth zone only, to be done soon.
            let expressions = ["30 2 * * *", "0 0 * * *", "7 */3 * * *", "*/20 * * * *"];
            for expression in &expressions[..if n % 20 == 0 { 4 } else { 2 }] {
                let schedule = schedule(expression, zone.name());
                let mut last = at("2026-01-01T00:00:00Z");
                let end = at("2027-01-01T00:00:00Z");
                let mut days = 0;
                for due in schedule.upcoming(last).take_while(|due| *due <= end) {
                    assert!(due > last, "{expression} in {zone}: {due} after {last}");
                    (last, days) = (due, days + 1);
                }
                if *expression == "30 2 * * *" {
                    assert!((365..=366).contains(&days), "{zone}: {days} in a year");
                }
            }
        }
    }

    #[test]
    fn missed_due_times_fire_by_the_policy() {
        let every_minute = schedule("* * * * *", "UTC");
        let (first, now) = (at("2026-05-01T11:00:00Z"), at("2026-05-01T12:00:10Z"));
        let firings = |missed| every_minute.firings(first, now, missed);
        assert_eq!(firings(Missed::Skip), [at("2026-05-01T12:00:00Z")]);
        assert_eq!(firings(Missed::Once), [at("2026-05-01T12:00:00Z")]);
        let all = firings(Missed::All);
        assert_eq!(
            (all.len(), all[0], all[60]),
            (61, first, at("2026-05-01T12:00:00Z"))
        );

        let daily = schedule("@daily", "UTC");
        let first = at("2026-04-28T00:00:00Z");
        assert!(daily.firings(first, now, Missed::Skip).is_empty());
        assert_eq!(
            daily.firings(first, now, Missed::Once),
            [at("2026-05-01T00:00:00Z")]
        );
        assert_eq!(daily.firings(first, now, Missed::All).len(), 4);

        // A little late is not missed.
        let seconds = schedule("* * * * * *", "UTC");
        let first = now - TimeDelta::seconds(3);
        for missed in [Missed::Skip, Missed::Once, Missed::All] {
            assert_eq!(seconds.firings(first, now, missed).len(), 4, "{missed:?}");
        }
        // Bounded, and quick after a year.
        let all = seconds.firings(at("2025-05-01T11:00:00Z"), now, Missed::All);
        assert_eq!((all.len(), all[999]), (MAX_MISSED, now));
        assert!(
            seconds
                .firings(now + TimeDelta::seconds(1), now, Missed::All)
                .is_empty()
        );
    }

    #[test]
    fn a_time_in_a_gap_fires_also_when_it_is_looked_for_late() {
        let schedule = schedule("30 2 * * *", "Europe/Berlin");
        let first = schedule.after(at("2026-03-28T12:00:00Z")).expect("a due time");
        assert_eq!(first, at("2026-03-29T01:00:00Z"));
        for seconds in [0, 30, 90, 90_000] {
            let firings = schedule.firings(first, first + TimeDelta::seconds(seconds), Missed::All);
            assert_eq!(firings[0], first, "{seconds} s late");
        }
    }
}
