//! A test of a service that uses Postbox: its database, its consumers, and what is asked of them.

mod consumer;
mod faults;
mod published;
mod run;
mod settled;
mod span;
mod standing;

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use postbox::{MessageId, Outgoing, Publish};
use postbox_consumer::{__testkit as consumers, ConsumerHandle, HandlerDefinition};
use postbox_dispatcher::dead_letters::{self, DeadLetter, Filter};
use postbox_dispatcher::{Dispatcher, DispatcherHandle};
use sqlx::PgPool;
use sqlx::migrate::Migrator;

pub use consumer::{KitConsumer, RunningConsumer};
pub use faults::HandlerName;
pub use published::PublishedMessage;
pub use run::{Options, run};
pub use span::Span;

use crate::{Error, TestDatabase};
use faults::Faults;

/// How long [`Kit::settled`] waits unless [`Kit::patience`] says otherwise.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);

/// More dead letters than a test makes.
const MOST_LETTERS: i64 = 10_000;

/// A database with a dispatcher, for one test; consumers are added to it. [`#[postbox_testkit::test]`](macro@crate::test) makes one for each test.
///
/// Clones are handles of the same kit. What it started is stopped, and the database is dropped, when the test ends; made by [`new`](Self::new), with the
/// last handle.
///
/// Methods panic where something fails that is not what the test is about, such as the database; the message says what.
///
/// ```test_harness
/// use postbox::{Message, Publish};
/// use postbox_consumer::{HandlerError, Tx, handler, handlers};
/// use postbox_testkit::{Kit, Span};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize, Message)]
/// #[message(topic = "orders", type = "order.paid", key = order_id)]
/// struct OrderPaid { order_id: i64 }
///
/// #[derive(Serialize, Deserialize, Message, Debug, PartialEq)]
/// #[message(topic = "shipments", type = "order.shipped", key = order_id)]
/// struct OrderShipped { order_id: i64 }
///
/// #[handler(group = "shipping")]
/// async fn ship(order: OrderPaid, mut tx: Tx) -> Result<(), HandlerError> {
///     tx.publish(&OrderShipped { order_id: order.order_id }).await?;
///     Ok(())
/// }
///
/// #[postbox_testkit::test]
/// async fn a_paid_order_is_shipped_once_although_shipping_fails_at_first(kit: Kit) {
///     kit.consumer(handlers![ship]).start().await;
///     kit.fail_once(ship);
///     kit.publish(&OrderPaid { order_id: 42 }).await;
///     kit.settled().await;
///     assert_eq!(kit.published::<OrderShipped>().await, []);
///     kit.advance(1.hours()).await;
///     kit.settled().await;
///     assert_eq!(kit.published::<OrderShipped>().await, [OrderShipped { order_id: 42 }]);
/// }
/// ```
#[derive(Clone)]
pub struct Kit(Arc<Inner>);

/// In this order on drop: what runs is told to stop, then the database goes.
struct Inner {
    consumers: Mutex<Consumers>,
    dispatcher: Mutex<Option<DispatcherHandle>>,
    faults: Arc<Faults>,
    /// What the test itself published.
    own: Mutex<HashSet<MessageId>>,
    /// By how much the clock was moved.
    moved: Mutex<Duration>,
    patience: Mutex<Duration>,
    db: TestDatabase,
}

/// Those that run, with their numbers.
#[derive(Default)]
struct Consumers {
    made: usize,
    running: Vec<(usize, Started)>,
}

/// A consumer that runs.
#[derive(Clone)]
struct Started {
    handle: Arc<ConsumerHandle>,
    /// By how much the clock had been moved by then.
    moved: Duration,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kit {
    /// A fresh database with a dispatcher, for who has a test harness of his own. The runtime should have more than one thread.
    ///
    /// # Errors
    /// Where no server can be had, with all that was tried; where the dispatcher cannot start.
    pub async fn new() -> Result<Self, Error> {
        Self::on(TestDatabase::new().await?).await
    }

    /// The same with the service's own migrations.
    ///
    /// # Errors
    /// As [`new`](Self::new); and where a migration fails.
    pub async fn migrated(migrator: &Migrator) -> Result<Self, Error> {
        Self::on(TestDatabase::migrated(migrator).await?).await
    }

    /// The same on this database, which has Postbox's schema.
    ///
    /// # Errors
    /// Where the dispatcher cannot start.
    pub async fn on(db: TestDatabase) -> Result<Self, Error> {
        // What we have started ourselves has no pooler before it, and to look for one would cost two connections each time.
        if db.server().is_shared() {
            consumers::is_direct(&db.pool().connect_options());
        }
        let dispatcher = Dispatcher::new(db.pool().clone()).start().await;
        let dispatcher = dispatcher.map_err(|source| Error::Dispatcher {
            source: Box::new(source),
        })?;
        Ok(Self(Arc::new(Inner {
            consumers: Mutex::default(),
            dispatcher: Mutex::new(Some(dispatcher)),
            faults: Arc::default(),
            own: Mutex::default(),
            moved: Mutex::default(),
            patience: Mutex::new(DEFAULT_PATIENCE),
            db,
        })))
    }

    /// A pool of up to ten connections, which the consumers use too.
    pub fn pool(&self) -> &PgPool {
        self.0.db.pool()
    }

    /// The database.
    pub fn database(&self) -> &TestDatabase {
        &self.0.db
    }

    /// The database's URL, for clients that connect by themselves.
    pub fn url(&self) -> &str {
        self.0.db.url()
    }

    /// A consumer with these handlers, to be started by [`KitConsumer::start`]. Any number may run at once, of the same groups and of others.
    pub fn consumer(&self, handlers: impl IntoIterator<Item = HandlerDefinition>) -> KitConsumer {
        let number = {
            let mut consumers = locked(&self.0.consumers);
            consumers.made += 1;
            consumers.made
        };
        KitConsumer::new(self.clone(), number, handlers.into_iter().collect())
    }

    /// Publishes a message in a transaction of its own, and commits; returns the message's id. It takes what [`Publish::publish`] takes: `&message`, or
    /// [`postbox::message`]`(&message).delay(…)`.
    ///
    /// # Panics
    /// The message is refused, or the database fails.
    pub async fn publish(&self, message: impl Into<Outgoing>) -> MessageId {
        let message = message.into();
        // One with a deduplication key that is known gets the id of the first, which may be the service's.
        locked(&self.0.own).insert(message.id());
        let mut tx = self.pool().begin().await.expect("a transaction begins");
        let id = match tx.publish(message).await {
            Ok(id) => id,
            Err(error) => panic!("the message is not published: {error}"),
        };
        tx.commit().await.expect("the transaction commits");
        id
    }

    /// Publishes messages in one transaction, in their order; returns their ids in the same order.
    ///
    /// # Panics
    /// A message is refused, or the database fails.
    pub async fn publish_all<I>(&self, messages: I) -> Vec<MessageId>
    where
        I: IntoIterator,
        I::Item: Into<Outgoing>,
    {
        let messages: Vec<Outgoing> = messages.into_iter().map(Into::into).collect();
        locked(&self.0.own).extend(messages.iter().map(Outgoing::id));
        let mut tx = self.pool().begin().await.expect("a transaction begins");
        let ids = match tx.publish_all(messages).await {
            Ok(ids) => ids,
            Err(error) => panic!("the messages are not published: {error}"),
        };
        tx.commit().await.expect("the transaction commits");
        ids
    }

    /// Moves the clock on: from now on everything that Postbox does by the time of day is done by it. Messages that were scheduled, retries, the firings of
    /// cron schedules, probes of a breaker, windows, lifetimes of messages and the ages of retries all come as if so much time had passed. It returns when
    /// the consumers have noticed; [`settled`](Self::settled) waits for what became due.
    ///
    /// What is a span of a process's own time does not move: the time-out of a handler, the wait of a batch for more messages, leases. Of a rate limit one
    /// message becomes free. `now()` of the database and the clock of the machine stay, so a service that computes with time should ask the database for
    /// `postbox.clock()`.
    ///
    /// # Panics
    /// The database fails.
    pub async fn advance(&self, by: Duration) {
        let moved = {
            let mut moved = locked(&self.0.moved);
            *moved = moved.saturating_add(by);
            *moved
        };
        if let Err(error) = self.0.db.advance(by).await {
            panic!("the clock does not move: {error}");
        }
        for started in self.started() {
            let follow = consumers::follow(&started.handle, moved.saturating_sub(started.moved));
            // One that is cut off follows when it is connected again, and settled() waits for that.
            let _ = tokio::time::timeout(self.patience_now(), follow).await;
        }
    }

    /// From now on [`settled`](Self::settled) waits for so long (default [`DEFAULT_PATIENCE`]).
    pub fn patience(&self, patience: Duration) {
        *locked(&self.0.patience) = patience;
    }

    fn patience_now(&self) -> Duration {
        *locked(&self.0.patience)
    }

    /// The next run of this handler fails before the function is called, as if it had returned an error that is retried. Of a handler with a `Tx` nothing is
    /// committed; of a batch all messages fail.
    ///
    /// The handler is the function, or its name as a text; it was given to [`consumer`](Self::consumer) before.
    ///
    /// # Panics
    /// No consumer of this kit has such a handler, or two have one of this name; the message says which there are.
    pub fn fail_once<M>(&self, handler: impl HandlerName<M>) {
        self.fail_times(handler, 1);
    }

    /// As [`fail_once`](Self::fail_once), the next so many runs.
    ///
    /// # Panics
    /// As [`fail_once`](Self::fail_once).
    pub fn fail_times<M>(&self, handler: impl HandlerName<M>, runs: usize) {
        self.0.faults.fail(&handler.name(), runs);
    }

    /// All dead letters, in the order in which they were given up, with their payloads and the history of their errors.
    ///
    /// # Panics
    /// The database fails.
    pub async fn dead_letters(&self) -> Vec<DeadLetter> {
        self.letters(Filter::default()).await
    }

    /// Those of a group.
    ///
    /// # Panics
    /// The database fails.
    pub async fn dead_letters_of(&self, group: &str) -> Vec<DeadLetter> {
        let mut filter = Filter::default();
        filter.group = Some(group.to_owned());
        self.letters(filter).await
    }

    async fn letters(&self, filter: Filter) -> Vec<DeadLetter> {
        let letters = dead_letters::whole(self.pool(), &filter, 0, i64::MAX, MOST_LETTERS).await;
        letters.expect("the dead letters are read")
    }

    fn started(&self) -> Vec<Started> {
        let consumers = locked(&self.0.consumers);
        consumers
            .running
            .iter()
            .map(|(_, started)| started.clone())
            .collect()
    }

    /// Has all that runs stop, without waiting for it.
    fn stop(&self) {
        locked(&self.0.consumers).running.clear();
        locked(&self.0.dispatcher).take();
    }
}

impl fmt::Debug for Kit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kit")
            .field("database", &self.0.db.name())
            .field("consumers", &locked(&self.0.consumers).running.len())
            .finish_non_exhaustive()
    }
}
