//! What a client is to do in a transaction, and what it says to that.

use std::future::Future;

use chrono::{DateTime, Utc};
use postbox::cron::Cron;
use postbox::{Error, MessageId, Outgoing, Publish, Result, blocking};
use tokio::sync::oneshot;

#[expect(clippy::large_enum_variant, reason = "a script has few")]
pub(crate) enum Step {
    Publish(Outgoing),
    PublishAll(Vec<Outgoing>),
    Cancel(MessageId),
    Reschedule(MessageId, DateTime<Utc>),
    Register(Cron),
    /// By the client's own means.
    Sql(&'static str),
    /// Without one in it.
    Savepoint(Vec<Step>, End),
    Pause(Pause),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Commit,
    Rollback,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    Id(MessageId),
    Ids(Vec<MessageId>),
    Whether(bool),
    Due(Option<DateTime<Utc>>),
    Nothing,
}

/// What was said, and how the transaction ended.
pub(crate) struct Ran {
    pub(crate) said: Vec<Result<Said>>,
    pub(crate) ended: Result<()>,
}

/// The client's part of a pause.
pub(crate) struct Pause {
    reached: oneshot::Sender<()>,
    go: oneshot::Receiver<()>,
}

/// The test's part of it.
pub(crate) struct Paused {
    reached: oneshot::Receiver<()>,
    go: oneshot::Sender<()>,
}

pub(crate) fn pause() -> (Pause, Paused) {
    let ((reached, is_reached), (go, may_go)) = (oneshot::channel(), oneshot::channel());
    let pause = Pause { reached, go: may_go };
    (
        pause,
        Paused {
            reached: is_reached,
            go,
        },
    )
}

impl Paused {
    pub(crate) async fn reached(&mut self) {
        (&mut self.reached).await.expect("the client gets there");
    }

    pub(crate) fn go(self) {
        self.go.send(()).expect("the client waits");
    }
}

/// A client with a connection, or a pool of them.
pub(crate) trait Client: Sized + Send + 'static {
    /// Whether its errors have every code of the server.
    const TELLS_ALL_CODES: bool = true;

    fn connect(url: &str) -> impl Future<Output = Self> + Send;

    /// Does these in a transaction.
    fn run(&mut self, steps: Vec<Step>, end: End) -> impl Future<Output = Ran> + Send;
}

/// A transaction, by the client's own means.
pub(crate) trait Transaction: Publish {
    fn sql(&mut self, sql: &'static str) -> impl Future<Output = Result<()>> + Send;
    fn savepoint(&mut self, steps: Vec<Step>, end: End) -> impl Future<Output = Vec<Result<Said>>> + Send;
}

/// The same without `async`.
pub(crate) trait BlockingTransaction: blocking::Publish {
    fn sql(&mut self, sql: &'static str) -> Result<()>;
    fn savepoint(&mut self, steps: Vec<Step>, end: End) -> Vec<Result<Said>>;
}

/// What a method answers.
macro_rules! told {
    ($tx:ident, $step:expr $(, $await:tt)?) => {
        match $step {
            Step::Publish(message) => $tx.publish(message)$(.$await)?.map(Said::Id),
            Step::PublishAll(messages) => $tx.publish_all(messages)$(.$await)?.map(Said::Ids),
            Step::Cancel(id) => $tx.cancel(id)$(.$await)?.map(Said::Whether),
            Step::Reschedule(id, at) => $tx.reschedule(id, at)$(.$await)?.map(Said::Whether),
            Step::Register(cron) => $tx.register(cron)$(.$await)?.map(Said::Due),
            Step::Sql(_) | Step::Savepoint(..) | Step::Pause(_) => unreachable!("no method"),
        }
    };
}
pub(crate) use told;

pub(crate) async fn play<T: Transaction>(tx: &mut T, steps: Vec<Step>) -> Vec<Result<Said>> {
    let mut said = Vec::new();
    for step in steps {
        match step {
            Step::Savepoint(steps, end) => said.extend(tx.savepoint(steps, end).await),
            step => said.push(one(tx, step).await),
        }
    }
    said
}

/// In a savepoint.
pub(crate) async fn play_inside<T: Transaction>(tx: &mut T, steps: Vec<Step>) -> Vec<Result<Said>> {
    let mut said = Vec::new();
    for step in steps {
        said.push(one(tx, step).await);
    }
    said
}

async fn one<T: Transaction>(tx: &mut T, step: Step) -> Result<Said> {
    match step {
        Step::Sql(sql) => tx.sql(sql).await.map(|()| Said::Nothing),
        Step::Pause(pause) => {
            pause.reached.send(()).expect("the test waits");
            pause.go.await.expect("the test goes on");
            Ok(Said::Nothing)
        }
        step => told!(tx, step, await),
    }
}

pub(crate) fn play_blocking<T: BlockingTransaction>(tx: &mut T, steps: Vec<Step>) -> Vec<Result<Said>> {
    let mut said = Vec::new();
    for step in steps {
        match step {
            Step::Savepoint(steps, end) => said.extend(tx.savepoint(steps, end)),
            Step::Sql(sql) => said.push(tx.sql(sql).map(|()| Said::Nothing)),
            Step::Pause(pause) => said.push(pause_blocking(pause)),
            step => said.push(told!(tx, step)),
        }
    }
    said
}

pub(crate) fn pause_blocking(pause: Pause) -> Result<Said> {
    pause.reached.send(()).expect("the test waits");
    pause.go.blocking_recv().expect("the test goes on");
    Ok(Said::Nothing)
}

/// A client that blocks: it works, and is dropped, where that is allowed.
pub(crate) struct Blocking<C: Send + 'static>(Option<C>);

impl<C: Send + 'static> Blocking<C> {
    pub(crate) async fn connect(connect: impl FnOnce() -> C + Send + 'static) -> Self {
        Self(Some(
            tokio::task::spawn_blocking(connect).await.expect("connected"),
        ))
    }

    pub(crate) async fn with<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut C) -> R + Send + 'static,
    ) -> R {
        let mut client = self.0.take().expect("it is there between two runs");
        let worked = tokio::task::spawn_blocking(move || (work(&mut client), client));
        let (result, client) = worked.await.expect("no panic");
        self.0 = Some(client);
        result
    }
}

impl<C: Send + 'static> Drop for Blocking<C> {
    fn drop(&mut self) {
        let client = self.0.take();
        let _ = std::thread::spawn(move || drop(client)).join();
    }
}

/// One test for each property.
macro_rules! suite {
    ($client:ty) => {
        crate::script::suite! { $client:
            what_is_committed_is_there_and_what_is_rolled_back_is_not,
            each_kind_of_message_is_written_as_sqlx_writes_it,
            a_batch_of_hostile_messages_arrives_whole_and_in_its_order,
            a_batch_with_special_messages_is_written_as_sqlx_writes_it,
            a_batch_of_any_size_arrives_whole,
            what_the_database_and_the_role_default_to_changes_nothing,
            what_breaks_a_limit_is_refused_and_the_transaction_goes_on,
            a_refused_batch_says_which_and_publishes_none,
            what_waits_can_be_cancelled_once,
            what_waits_can_be_rescheduled_to_the_microsecond,
            a_deduplicated_message_has_the_id_of_the_first,
            who_publishes_to_an_ordered_key_second_waits_for_the_first,
            a_recurring_message_is_registered_as_sqlx_registers_it,
            a_wrong_recurring_message_is_refused_and_the_transaction_goes_on,
            an_error_of_the_server_has_its_code_and_words,
            a_broken_connection_is_an_error_and_nothing_is_written,
        }
    };
    ($client:ty: $($property:ident),* $(,)?) => {
        $(#[tokio::test]
        async fn $property() {
            crate::suite::$property::<$client>().await;
        })*
    };
}
pub(crate) use suite;

/// Whether it ended as it was to.
pub(crate) fn is_rolled_back(end: End, ended: Result<()>) -> Result<()> {
    match ended {
        Err(Error::Database(error))
            if end == End::Rollback
                && matches!(
                    error.downcast_ref(),
                    Some(::diesel::result::Error::RollbackTransaction)
                ) =>
        {
            Ok(())
        }
        ended => ended,
    }
}
