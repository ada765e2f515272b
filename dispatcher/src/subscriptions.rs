//! What an operator may do to subscriptions: move them, replay, pause, limit, drop.

use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, NaiveDate, Utc};
use postbox_consumer::DailyWindow;
use sqlx::PgPool;

/// A position in a topic, as an operator says it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Position {
    /// The earliest retained message.
    Earliest,
    /// Behind the newest message.
    Latest,
    /// An offset.
    Offset(i64),
    /// The first message published at or after an instant.
    At(DateTime<Utc>),
    /// The first message published so long ago or later.
    Ago(Duration),
}

impl Position {
    /// As `postbox.start_offset` takes it.
    fn to_sql(self) -> (&'static str, Option<String>) {
        match self {
            Position::Earliest => ("earliest", None),
            Position::Latest => ("latest", None),
            Position::Offset(offset) => ("offset", Some(offset.to_string())),
            Position::At(instant) => ("time", Some(instant.to_rfc3339())),
            Position::Ago(span) => ("ago", Some(format!("{} microseconds", span.as_micros()))),
        }
    }
}

impl FromStr for Position {
    type Err = String;

    /// `earliest`, `latest`, an offset, an instant (RFC 3339, or a date, which is its midnight in UTC).
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(offset) = text.parse() {
            return Ok(Position::Offset(offset));
        }
        if let Ok(instant) = DateTime::parse_from_rfc3339(text) {
            return Ok(Position::At(instant.to_utc()));
        }
        if let Some(midnight) = text
            .parse::<NaiveDate>()
            .ok()
            .and_then(|date| date.and_hms_opt(0, 0, 0))
        {
            return Ok(Position::At(midnight.and_utc()));
        }
        match text {
            "earliest" => Ok(Position::Earliest),
            "latest" => Ok(Position::Latest),
            _ => Err(
                "a position is earliest, latest, an offset, or an instant such as 2026-11-22T08:00:00Z"
                    .to_owned(),
            ),
        }
    }
}

/// What an operator says of a limit or a window; it counts before what the handlers say in code.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Override<T> {
    /// Nothing: what the code says holds, which is no limit and no window unless a handler has one.
    Default,
    /// No limit or window, whatever the code says.
    Off,
    /// This one.
    To(T),
}

impl<T> Override<T> {
    /// As it is stored.
    fn to_sql(&self, off: T) -> Option<T>
    where
        T: Clone,
    {
        match self {
            Override::Default => None,
            Override::Off => Some(off),
            Override::To(value) => Some(value.clone()),
        }
    }

    fn map<U>(&self, change: impl Fn(&T) -> U) -> Override<U> {
        match self {
            Override::Default => Override::Default,
            Override::Off => Override::Off,
            Override::To(value) => Override::To(change(value)),
        }
    }
}

/// A setting of subscriptions.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Change {
    /// Whether no message is started.
    Paused(bool),
    /// Most messages started a second by all instances together.
    RateLimit(Override<f64>),
    /// Most messages started a second by each instance.
    InstanceRateLimit(Override<f64>),
    /// When messages are started.
    DrainWindow(Override<DailyWindow>),
}

const PAUSED: &str =
    "UPDATE postbox.subscription SET paused = $3 WHERE group_name = $1 AND topic = coalesce($2, topic)";
const RATE_LIMIT: &str =
    "UPDATE postbox.subscription SET rate_limit = $3 WHERE group_name = $1 AND topic = coalesce($2, topic)";
const INSTANCE_RATE_LIMIT: &str = "UPDATE postbox.subscription SET instance_rate_limit = $3 WHERE group_name = $1 AND topic = coalesce($2, topic)";
const DRAIN_WINDOW: &str =
    "UPDATE postbox.subscription SET drain_window = $3 WHERE group_name = $1 AND topic = coalesce($2, topic)";

/// Without a word it makes every consumer look at its subscriptions at once.
const TELL: &str = "SELECT pg_notify('postbox_segment', '')";

/// Changes a setting of a group's subscription to a topic, or to all its topics; returns how many subscriptions it has there. Running
/// consumers follow at once, and within half a second if the notification is lost.
pub async fn change(
    pool: &PgPool,
    group: &str,
    topic: Option<&str>,
    change: &Change,
) -> Result<u64, postbox::Error> {
    let mut tx = pool.begin().await?;
    let query = match change {
        Change::Paused(paused) => sqlx::query(PAUSED).bind(group).bind(topic).bind(*paused),
        Change::RateLimit(rate) => sqlx::query(RATE_LIMIT)
            .bind(group)
            .bind(topic)
            .bind(rate.to_sql(f64::INFINITY)),
        Change::InstanceRateLimit(rate) => sqlx::query(INSTANCE_RATE_LIMIT)
            .bind(group)
            .bind(topic)
            .bind(rate.to_sql(f64::INFINITY)),
        Change::DrainWindow(window) => sqlx::query(DRAIN_WINDOW)
            .bind(group)
            .bind(topic)
            .bind(window.map(DailyWindow::to_string).to_sql("always".to_owned())),
    };
    let changed = query.execute(&mut *tx).await?.rows_affected();
    sqlx::query(TELL).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(changed)
}

/// The subscription of a group to a topic.
///
/// **Errors.** There is none (`PB002`).
pub async fn find(pool: &PgPool, group: &str, topic: &str) -> Result<i32, postbox::Error> {
    Ok(sqlx::query_scalar("SELECT postbox.subscription_id($1, $2)")
        .bind(group)
        .bind(topic)
        .fetch_one(pool)
        .await?)
}

/// Which offset of a topic a position is now.
pub async fn resolve(pool: &PgPool, topic: &str, position: Position) -> Result<i64, postbox::Error> {
    let (start, value) = position.to_sql();
    Ok(sqlx::query_scalar("SELECT postbox.start_offset($1, $2, $3)")
        .bind(topic)
        .bind(start)
        .bind(value)
        .fetch_one(pool)
        .await?)
}

/// Moves a subscription: from the position on every message is delivered, again or for the first time. Returns its offset.
///
/// Running consumers stop what they run of it and go on from there, within a second. Messages that failed before the position stay where
/// they are; those that failed after it come again from the log. Dead letters stay.
pub async fn seek(pool: &PgPool, subscription: i32, to: Position) -> Result<i64, postbox::Error> {
    let (start, value) = to.to_sql();
    let mut connection = pool.acquire().await?;
    let mut tx =
        sqlx::Connection::begin_with(&mut *connection, "BEGIN ISOLATION LEVEL READ COMMITTED").await?;
    let offset = sqlx::query_scalar("SELECT postbox.seek($1, $2, $3)")
        .bind(subscription)
        .bind(start)
        .bind(value)
        .fetch_one(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(offset)
}

/// Has settled messages from offset `from` to before `to` run again without moving the subscription, at most `at_most` of them; returns where
/// to go on, and how many there were. They have a header `postbox-replayed`.
///
/// Each is copied, so take a part, wait until it has run, and take the next.
pub async fn replay(
    pool: &PgPool,
    subscription: i32,
    from: i64,
    to: i64,
    at_most: u16,
) -> Result<(i64, i64), postbox::Error> {
    Ok(
        sqlx::query_as("SELECT next_offset, replayed FROM postbox.replay($1, $2, $3, $4)")
            .bind(subscription)
            .bind(from)
            .bind(to)
            .bind(i32::from(at_most))
            .fetch_one(pool)
            .await?,
    )
}

/// How many messages wait in redelivery because an operator wants them run again.
pub async fn replaying(pool: &PgPool, subscription: i32) -> Result<i64, postbox::Error> {
    Ok(sqlx::query_scalar(
        "SELECT count(*) FROM postbox.redelivery WHERE subscription_id = $1 AND state = 'redriven'",
    )
    .bind(subscription)
    .fetch_one(pool)
    .await?)
}

/// Forgets a subscription: its position, its failed messages, its dead letters.
///
/// **Errors.** It has a live consumer (`PB003`).
pub async fn drop(pool: &PgPool, subscription: i32) -> Result<(), postbox::Error> {
    sqlx::query("SELECT postbox.drop_subscription($1)")
        .bind(subscription)
        .execute(pool)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_a_word_an_offset_or_an_instant() {
        assert_eq!("earliest".parse(), Ok(Position::Earliest));
        assert_eq!("latest".parse(), Ok(Position::Latest));
        assert_eq!("42".parse(), Ok(Position::Offset(42)));
        let noon = "2026-11-22T12:00:00Z";
        let expected = DateTime::parse_from_rfc3339(noon).expect("an instant").to_utc();
        assert_eq!(noon.parse(), Ok(Position::At(expected)));
        assert_eq!("2026-11-22T13:00:00+01:00".parse(), Ok(Position::At(expected)));
        assert!(matches!("2026-11-22".parse(), Ok(Position::At(_))));
        for wrong in ["", "newest", "12h", "2026-13-01"] {
            assert!(wrong.parse::<Position>().is_err(), "{wrong:?}");
        }
    }
}
