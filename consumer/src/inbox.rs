//! The inbox: which messages a group has handled, kept beside effects that are in another database.

use std::time::Duration;

use postbox::MessageId;
use sqlx::{PgPool, Postgres, Transaction};

use crate::extract::Delivery;

/// Remembers in another database which messages were handled there, so that a handler with its effects in that database has
/// them once.
///
/// Where the effects are in Postbox's own database, take a [`Tx`](crate::Tx) instead: it needs no table. An inbox is for a
/// handler that writes to a *different* PostgreSQL: the row that says "handled" commits in the same transaction as the effect, so
/// a message that comes again, because the instance died before it could acknowledge or because the answer to a commit
/// was lost, is recognised.
///
/// ```
/// use postbox::Message;
/// use postbox_consumer::{Delivery, HandlerError, Inbox, State, handler};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize, Message)]
/// #[message(topic = "orders", type = "order.placed", key = order_id)]
/// struct OrderPlaced { order_id: i64 }
///
/// /// The pool of the other database; `Inbox::create` was called with it at start.
/// #[derive(Clone)]
/// struct Ledger(sqlx::PgPool);
///
/// #[handler(group = "ledger")]
/// async fn book(order: OrderPlaced, delivery: Delivery, State(ledger): State<Ledger>) -> Result<(), HandlerError> {
///     let inbox = Inbox::new("ledger");
///     let mut tx = ledger.0.begin().await?;
///     if inbox.first(&mut tx, &delivery).await? {
///         sqlx::query("INSERT INTO booking (order_id) VALUES ($1)").bind(order.order_id).execute(&mut *tx).await?;
///         tx.commit().await?;
///     }
///     // Handled before: settled without effect.
///     Ok(())
/// }
/// ```
///
/// # Redriven and replayed messages
///
/// A message keeps its id for its life, whatever brings it back, and the inbox goes by nothing else. So:
/// - A dead letter that is **redriven**, with its payload or an edited one, runs: what failed rolled its row back with its effect. If
///   the effect had committed after all, it is settled without a second one.
/// - A **replay** of messages that were handled, by a subscription that was set back, has no effect: the inbox makes it safe.
/// - To have the effect again **on purpose**, [`forget`](Self::forget) the messages, or take an inbox of another name for the replay,
///   such as `ledger/2026-11`: each name remembers for itself.
///
/// # How long
///
/// A row is needed for as long as its message may come again: [`expire`](Self::expire) with a span that is longer than the time for which
/// messages are retained and retried, else what comes back after it counts as new.
#[derive(Clone, Debug)]
pub struct Inbox {
    group: Box<str>,
}

/// With a lock, because two `CREATE TABLE IF NOT EXISTS` at once can fail with a duplicate key. The table is only created where it is
/// missing, so that a role without the right to create one can be used later.
const LOCK: &str = "SELECT pg_advisory_xact_lock(1347571761, 4)";
const EXISTS: &str = "SELECT to_regclass('postbox_inbox') IS NOT NULL";
const CREATE: &str = "
    CREATE TABLE postbox_inbox (
        group_name text        NOT NULL,
        message_id uuid        NOT NULL,
        handled_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (group_name, message_id)
    );
    CREATE INDEX postbox_inbox_handled_at ON postbox_inbox (group_name, handled_at);
    COMMENT ON TABLE postbox_inbox IS
        'One row is a message of another database''s Postbox that a group has handled here. Written in the transaction of its effect, deleted when it is old (postbox_consumer::Inbox).';
    COMMENT ON COLUMN postbox_inbox.group_name IS 'Name of the inbox, as a rule the consumer group.';
    COMMENT ON COLUMN postbox_inbox.message_id IS 'Message id.';
    COMMENT ON COLUMN postbox_inbox.handled_at IS 'When the transaction of its effect noted it.';
";

/// A duplicate that is in flight is waited for: if it commits, this one inserts nothing; if it rolls back, this one is the first.
const NOTE: &str =
    "INSERT INTO postbox_inbox (group_name, message_id) VALUES ($1, $2) ON CONFLICT DO NOTHING";

const FORGET: &str = "DELETE FROM postbox_inbox WHERE group_name = $1 AND message_id = ANY ($2)";

/// In batches, so that none is a long transaction. Whoever meets another one at it deletes less, and leaves the rest to them.
const EXPIRE: &str = "DELETE FROM postbox_inbox WHERE ctid = ANY (ARRAY( \
     SELECT ctid FROM postbox_inbox WHERE group_name = $1 AND handled_at < clock_timestamp() - make_interval(secs => $2) \
     ORDER BY handled_at LIMIT 5000))";
const BATCH: u64 = 5000;

impl Inbox {
    /// The inbox of this name, as a rule the consumer group. Inboxes of different names know nothing of each other.
    pub fn new(group: impl Into<String>) -> Self {
        Self {
            group: group.into().into_boxed_str(),
        }
    }

    /// Creates the table `postbox_inbox` in the database of `pool`, in the first schema of its search path, unless it is there. All inboxes of
    /// a database share it. Any number of processes may call it at once, at every start.
    ///
    /// # Errors
    ///
    /// The database's; the role needs `CREATE` on the schema the first time, and later `SELECT`, `INSERT` and `DELETE` on
    /// the table.
    pub async fn create(pool: &PgPool) -> Result<(), sqlx::Error> {
        let mut tx =
            postbox::__private::Transaction::begin(pool, "BEGIN ISOLATION LEVEL READ COMMITTED").await?;
        sqlx::query(LOCK).execute(&mut *tx).await?;
        if !sqlx::query_scalar::<_, bool>(EXISTS).fetch_one(&mut *tx).await? {
            sqlx::raw_sql(CREATE).execute(&mut *tx).await?;
        }
        tx.commit().await
    }

    /// Whether the message is to be handled now: notes it in `tx`. `false`: it was handled before, by a transaction that
    /// committed, so have no effect and return `Ok`.
    ///
    /// Call it before the effect, in the effect's own transaction. If two runs of a message meet, the second waits here until the first has
    /// committed (then it gets `false`) or rolled back (then `true`). If `tx` is rolled back, the message was never noted.
    ///
    /// # Errors
    ///
    /// The database's; return them, and the message is tried again. Above READ COMMITTED a duplicate that committed meanwhile is
    /// a serialization failure.
    ///
    /// # Cancellation safety
    ///
    /// What was not committed was not noted.
    pub async fn first(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        delivery: &Delivery,
    ) -> Result<bool, sqlx::Error> {
        let noted = sqlx::query(NOTE)
            .bind(&*self.group)
            .bind(delivery.id.as_uuid())
            .execute(&mut **tx)
            .await?;
        Ok(noted.rows_affected() == 1)
    }

    /// Forgets messages, so that they are handled again when they come again: for a replay that is to have its effect. Returns how many of
    /// them were noted. Commits with `tx`.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn forget(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        messages: &[MessageId],
    ) -> Result<u64, sqlx::Error> {
        let ids: Vec<_> = messages.iter().map(MessageId::as_uuid).collect();
        let forgotten = sqlx::query(FORGET)
            .bind(&*self.group)
            .bind(ids)
            .execute(&mut **tx)
            .await?;
        Ok(forgotten.rows_affected())
    }

    /// Deletes what was noted longer ago than `older_than`, in transactions of up to 5,000 rows; returns how many there were. For a daily
    /// task. See *How long* [above](Self).
    ///
    /// # Errors
    ///
    /// The database's; what was deleted until then stays deleted.
    pub async fn expire(&self, pool: &PgPool, older_than: Duration) -> Result<u64, sqlx::Error> {
        let mut expired = 0;
        loop {
            let batch = sqlx::query(EXPIRE)
                .bind(&*self.group)
                .bind(older_than.as_secs_f64())
                .execute(pool)
                .await?
                .rows_affected();
            expired += batch;
            if batch < BATCH {
                return Ok(expired);
            }
        }
    }
}
