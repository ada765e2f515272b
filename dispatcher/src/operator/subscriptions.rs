//! What an operator may do to subscriptions: move them, replay, pause, limit, drop.

use postbox::__private::Transaction;
pub use postbox::Position;
use postbox_core::DailyWindow;
use sqlx::PgPool;

/// What an operator says of a limit or a window; it counts before what the handlers say in code.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
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
    /// Whether no message is started. It holds for subscriptions of the group that come later, too: a group may be paused before it exists.
    Paused(bool),
    /// Most messages started a second by all instances together.
    RateLimit(Override<f64>),
    /// Most messages started a second by each instance.
    InstanceRateLimit(Override<f64>),
    /// When messages are started.
    DrainWindow(Override<DailyWindow>),
}

const RATE_LIMIT: &str =
    "UPDATE postbox.subscription SET rate_limit = $3 WHERE group_name = $1 AND topic = coalesce($2, topic)";
const INSTANCE_RATE_LIMIT: &str = "UPDATE postbox.subscription SET instance_rate_limit = $3 WHERE group_name = $1 AND topic = coalesce($2, topic)";
const DRAIN_WINDOW: &str =
    "UPDATE postbox.subscription SET drain_window = $3 WHERE group_name = $1 AND topic = coalesce($2, topic)";

/// Whatever the database defaults to.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

/// Without a word it makes every consumer look at its subscriptions at once.
const TELL: &str = "SELECT pg_notify('postbox_segment', '')";

/// Changes a setting of a group's subscription to a topic, or to all its topics; returns how many subscriptions it has there. Running
/// consumers follow at once, and within half a second if the notification is lost.
///
/// # Errors
///
/// The database's; then nothing has changed.
pub async fn change(
    pool: &PgPool,
    group: &str,
    topic: Option<&str>,
    change: &Change,
) -> Result<u64, postbox::Error> {
    let mut tx = Transaction::begin(pool, BEGIN).await?;
    let query = match change {
        Change::Paused(paused) => {
            let subscriptions: i64 = sqlx::query_scalar("SELECT postbox.pause($1, $2, $3)")
                .bind(group)
                .bind(topic)
                .bind(*paused)
                .fetch_one(&mut *tx)
                .await?;
            sqlx::query(TELL).execute(&mut *tx).await?;
            tx.commit().await?;
            return Ok(subscriptions as u64);
        }
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
/// # Errors
///
/// There is none (`PB004`); else the database's.
pub async fn find(pool: &PgPool, group: &str, topic: &str) -> Result<i32, postbox::Error> {
    Ok(sqlx::query_scalar("SELECT postbox.subscription_id($1, $2)")
        .bind(group)
        .bind(topic)
        .fetch_one(pool)
        .await?)
}

/// Which offset of a topic a position is now.
///
/// # Errors
///
/// The database's.
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
///
/// # Errors
///
/// There is no such subscription (`PB004`); or messages from there on were redriven with another payload, and would come as they were published
/// (`PB007`): [`seek_with_original_payloads`] does that, [`replay`] does not. Else the database's. Then nothing has changed.
pub async fn seek(pool: &PgPool, subscription: i32, to: Position) -> Result<i64, postbox::Error> {
    move_to(pool, subscription, to, false).await
}

/// As [`seek`], also where messages were redriven with another payload: they come as they were published.
///
/// # Errors
///
/// There is no such subscription (`PB004`); else the database's. Then nothing has changed.
pub async fn seek_with_original_payloads(
    pool: &PgPool,
    subscription: i32,
    to: Position,
) -> Result<i64, postbox::Error> {
    move_to(pool, subscription, to, true).await
}

async fn move_to(
    pool: &PgPool,
    subscription: i32,
    to: Position,
    original_payloads: bool,
) -> Result<i64, postbox::Error> {
    let (start, value) = to.to_sql();
    let mut tx = Transaction::begin(pool, BEGIN).await?;
    let offset = sqlx::query_scalar("SELECT postbox.seek($1, $2, $3, $4)")
        .bind(subscription)
        .bind(start)
        .bind(value)
        .bind(original_payloads)
        .fetch_one(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(offset)
}

/// Has settled messages from offset `from` to before `to` run again without moving the subscription, at most `at_most` of them; returns where
/// to go on, and how many there were. They have a header `postbox-replayed`.
///
/// Each is copied, so take a part, wait until it has run, and take the next.
///
/// # Errors
///
/// There is no such subscription (`PB004`); else the database's. Then nothing was copied.
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

/// How many messages of a subscription from an offset on were redriven with another payload, and are retained.
///
/// # Errors
///
/// The database's.
pub async fn edited(pool: &PgPool, subscription: i32, from: i64) -> Result<i64, postbox::Error> {
    Ok(sqlx::query_scalar(
        "SELECT count(*) FROM postbox.edit WHERE subscription_id = $1 AND \"offset\" >= $2",
    )
    .bind(subscription)
    .bind(from)
    .fetch_one(pool)
    .await?)
}

/// How many messages wait in redelivery because an operator wants them run again.
///
/// # Errors
///
/// The database's.
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
/// # Errors
///
/// There is none (`PB004`), or it has a live consumer (`PB005`); else the database's. Then nothing has changed.
pub async fn forget(pool: &PgPool, subscription: i32) -> Result<(), postbox::Error> {
    sqlx::query("SELECT postbox.drop_subscription($1)")
        .bind(subscription)
        .execute(pool)
        .await?;
    Ok(())
}
