//! What a handler is: which messages it takes, how it is run, and what its return value means.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use postbox::cron::Missed;

use crate::cron::CronDefinition;
use crate::dead_letter::DeadLetter;
use crate::extract::{BesideBatch, Extract, Invocation};
use crate::retry::Retry;
use crate::state::StateType;

/// What became of one run of a handler.
pub type Outcome = Result<(), HandlerError>;

/// A boxed future, as handlers return it.
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Implemented by `#[handler]` beside the function it is on.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler",
    note = "put `#[handler(group = \"…\")]` on the async function"
)]
pub trait DefineHandler {
    /// The handler with its options.
    fn define() -> HandlerDefinition;
}

/// A handler with its options, as `#[handler]` makes it and [`Consumer::handlers`](crate::Consumer::handlers) takes it.
#[derive(Clone)]
pub struct HandlerDefinition {
    pub(crate) name: &'static str,
    pub(crate) audience: Option<Audience>,
    pub(crate) topic: Option<String>,
    pub(crate) types: Vec<String>,
    pub(crate) concurrency: Option<usize>,
    pub(crate) order: Option<Order>,
    pub(crate) start: Option<Start>,
    pub(crate) lanes: Option<u16>,
    pub(crate) rate: Option<f64>,
    pub(crate) instance_rate: Option<f64>,
    pub(crate) window: Option<String>,
    pub(crate) timeout: Duration,
    pub(crate) retry: Retry,
    pub(crate) expired: Expired,
    pub(crate) transactional: bool,
    pub(crate) batch: Option<usize>,
    pub(crate) batch_wait: Duration,
    /// Whether an argument is a [`Batch`](crate::Batch).
    pub(crate) takes_batches: bool,
    pub(crate) states: Vec<StateType>,
    pub(crate) on_dead_letter: Option<DeadLetterHook>,
    pub(crate) cron: Option<CronDefinition>,
    pub(crate) run: Option<Arc<dyn Fn(Invocation) -> BoxFuture<Outcome> + Send + Sync>>,
}

/// What runs when a message was given up.
pub(crate) type DeadLetterHook = Arc<dyn Fn(DeadLetter) -> BoxFuture<Outcome> + Send + Sync>;

/// Who gets each message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// One instance of the group.
    Group(String),
    /// Every instance, from a cursor in its memory.
    Broadcast,
    /// Every node, from a cursor in the database.
    DurableBroadcast,
}

impl HandlerDefinition {
    /// A handler of this name, to be completed by the methods below. Most are made by `#[handler]`.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            audience: None,
            topic: None,
            types: Vec::new(),
            concurrency: None,
            order: None,
            start: None,
            lanes: None,
            rate: None,
            instance_rate: None,
            window: None,
            timeout: DEFAULT_TIMEOUT,
            retry: Retry::default(),
            expired: Expired::default(),
            transactional: false,
            batch: None,
            batch_wait: Duration::ZERO,
            takes_batches: false,
            states: Vec::new(),
            on_dead_letter: None,
            cron: None,
            run: None,
        }
    }

    /// Every message goes to one instance of this group.
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.audience = Some(Audience::Group(group.into()));
        self
    }

    /// Every message goes to every instance that is up, from a cursor in its memory.
    pub fn broadcast(mut self) -> Self {
        self.audience = Some(Audience::Broadcast);
        self
    }

    /// Every message goes to every node; a node's cursor is kept under its name ([`Consumer::node`](crate::Consumer::node)) and this
    /// handler's.
    pub fn durable_broadcast(mut self) -> Self {
        self.audience = Some(Audience::DurableBroadcast);
        self
    }

    /// Topic, where no argument says it.
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.topic = Some(topic.into());
        self
    }

    /// A message type that it takes, where no argument says it. Without any it takes every type of the topic, and untyped messages.
    pub fn message_type(mut self, message_type: impl Into<String>) -> Self {
        self.types.push(message_type.into());
        self
    }

    /// Most messages of one run of a handler that takes a [`Batch`](crate::Batch).
    pub fn batch(mut self, messages: usize) -> Self {
        self.batch = Some(messages);
        self
    }

    /// How long a batch that is not full waits for more messages (default: not at all).
    pub fn batch_wait(mut self, wait: Duration) -> Self {
        self.batch_wait = wait;
        self
    }

    /// How many messages, or batches, run at once in an instance (default 32; 4 where all handlers take batches). Handlers of one group on one
    /// topic share the largest.
    pub fn concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = Some(concurrency);
        self
    }

    /// What runs one after another (default [`Order::Key`]). All handlers of a group on a topic must agree.
    pub fn order(mut self, order: Order) -> Self {
        self.order = Some(order);
        self
    }

    /// Where the group begins when it subscribes for the first time (default [`Start::Earliest`]; broadcasts: [`Start::Latest`]).
    pub fn start(mut self, start: Start) -> Self {
        self.start = Some(start);
        self
    }

    /// Into how many lanes the keys are divided (default 32, at most 1,024): the most instances that can share the work.
    /// Fixed when the group subscribes for the first time.
    pub fn lanes(mut self, lanes: u16) -> Self {
        self.lanes = Some(lanes);
        self
    }

    /// Most messages of the group on the topic that all instances together start in a second (default: no limit). All handlers of a group on a
    /// topic must agree. An operator's limit (`postbox subscriptions limit`) counts before it.
    pub fn rate(mut self, messages: f64) -> Self {
        self.rate = Some(messages);
        self
    }

    /// As [`rate`](Self::rate), for each instance.
    pub fn instance_rate(mut self, messages: f64) -> Self {
        self.instance_rate = Some(messages);
        self
    }

    /// When messages are started (default: always), as a [`DailyWindow`](crate::DailyWindow) is written: `22:00-06:00 Europe/Berlin`. All handlers of a
    /// group on a topic must agree. An operator's window (`postbox subscriptions window`) counts before it.
    pub fn window(mut self, window: impl Into<String>) -> Self {
        self.window = Some(window.into());
        self
    }

    /// How long one run may take (default 60 s); then it is cancelled and has failed.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// When a failed message runs again, and when it is given up.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// What becomes of messages that expired before they were handled (default [`Expired::Settle`]).
    pub fn expired(mut self, expired: Expired) -> Self {
        self.expired = expired;
        self
    }

    /// What runs once a message of this handler is among the dead letters; see [`DeadLetter`] for its guarantee.
    pub fn on_dead_letter(
        mut self,
        hook: impl Fn(DeadLetter) -> BoxFuture<Outcome> + Send + Sync + 'static,
    ) -> Self {
        self.on_dead_letter = Some(Arc::new(hook));
        self
    }

    /// Handles the firings of a schedule, which the consumer registers under this name at its start; most are made by `#[cron]`. Sets the
    /// group `cron` (unless [`group`](Self::group) says another), the topic `cron/NAME` and [`Order::Topic`]. The expression and the time zone are as in
    /// [`postbox::cron`].
    pub fn cron(
        mut self,
        name: impl Into<String>,
        expression: impl Into<String>,
        time_zone: impl Into<String>,
    ) -> Self {
        let cron = CronDefinition::new(name.into(), expression.into(), time_zone.into());
        self.audience.get_or_insert(Audience::Group("cron".to_owned()));
        self.topic = Some(cron.topic());
        self.order = Some(Order::Topic);
        self.cron = Some(cron);
        self
    }

    /// What becomes of due times that passed while no dispatcher ran (default [`Missed::Once`]); no effect without [`cron`](Self::cron).
    pub fn missed(mut self, missed: Missed) -> Self {
        if let Some(cron) = &mut self.cron {
            cron.missed = missed;
        }
        self
    }

    /// Declares an argument of the function, so that it is known at start what the handler needs.
    pub fn argument<E: Extract>(mut self) -> Self {
        E::declare(&mut self);
        self
    }

    /// Declares an argument that stands beside a [`Batch`](crate::Batch).
    pub fn argument_beside_batch<E: Extract + BesideBatch>(self) -> Self {
        self.argument::<E>()
    }

    /// What runs.
    pub fn call(mut self, run: impl Fn(Invocation) -> BoxFuture<Outcome> + Send + Sync + 'static) -> Self {
        self.run = Some(Arc::new(run));
        self
    }

    /// The function's own name, without its path.
    pub(crate) fn short_name(&self) -> &'static str {
        self.name.rsplit("::").next().unwrap_or(self.name)
    }
}

impl fmt::Debug for HandlerDefinition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerDefinition")
            .field("name", &self.name)
            .field("audience", &self.audience)
            .field("topic", &self.topic)
            .field("types", &self.types)
            .finish_non_exhaustive()
    }
}

/// How long one run of a handler may take unless it says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// What runs one after another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Order {
    /// Messages of one key, in their order; different keys and messages without a key run beside each other.
    #[default]
    Key,
    /// All messages of the topic, strictly by offset. The subscription has one lane, so one instance does the work.
    Topic,
    /// Nothing: any message may run beside any other.
    None,
}

impl Order {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Order::Key => "key",
            Order::Topic => "topic",
            Order::None => "none",
        }
    }
}

/// What becomes of a message that expired (`expires_at`, `expires_in`) before it was handled, by the database's clock. It never runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Expired {
    /// It is settled and counted.
    #[default]
    Settle,
    /// It goes to the dead letters. An operator may redrive it; then it does not expire again.
    DeadLetter,
}

/// Where a new subscription begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Start {
    /// At the earliest message that is retained.
    Earliest,
    /// After the newest message that is in order when the subscription is made.
    Latest,
    /// At an offset, or the nearest one there is.
    Offset(i64),
    /// At the first message published at or after an instant.
    Time(DateTime<Utc>),
    /// At the first message published at most so long ago.
    Ago(Duration),
}

impl Start {
    /// As `postbox.start_offset` takes it.
    pub(crate) fn to_sql(self) -> (&'static str, Option<String>) {
        match self {
            Start::Earliest => ("earliest", None),
            Start::Latest => ("latest", None),
            Start::Offset(offset) => ("offset", Some(offset.to_string())),
            Start::Time(time) => ("time", Some(time.to_rfc3339())),
            Start::Ago(span) => ("ago", Some(format!("{} milliseconds", span.as_millis()))),
        }
    }
}

/// Why a handler failed, and what is to be done with the message.
///
/// Any error becomes one with `?` and is retried by the handler's policy. It has no `std::error::Error` of its own, as
/// `anyhow::Error` has none, so that it can be made from every error.
pub struct HandlerError {
    pub(crate) decision: Decision,
    pub(crate) reason: String,
}

#[derive(Debug)]
pub(crate) enum Decision {
    /// By the handler's policy.
    Retry,
    /// After this span, whatever the policy's backoff says.
    RetryIn(Duration),
    /// Not again: it is settled and counted.
    Discard,
    /// Not again: to the dead letters, however many attempts are left.
    DeadLetter,
    /// After this span, as if it had not run.
    Postpone(Duration),
    /// Of a batch: these messages failed, by offset, and the others did not.
    OfEach(BTreeMap<i64, HandlerError>),
}

impl HandlerError {
    /// Retried by the handler's policy.
    pub fn retry(why: impl fmt::Display) -> Self {
        Self {
            decision: Decision::Retry,
            reason: why.to_string(),
        }
    }

    /// Retried after a span, whatever the policy's backoff says.
    pub fn retry_in(span: Duration, why: impl fmt::Display) -> Self {
        Self {
            decision: Decision::RetryIn(span),
            reason: why.to_string(),
        }
    }

    /// Not a failure: the message runs again after a span as if it had not run, so nothing is counted or logged and the attempt keeps its
    /// number. Its key waits for it. For a handler that cannot do its work now through no fault of the message.
    pub fn postpone(span: Duration, why: impl fmt::Display) -> Self {
        Self {
            decision: Decision::Postpone(span),
            reason: why.to_string(),
        }
    }

    /// Not retried: the message goes to the dead letters at once, for an operator to look at. Its key goes on or waits as the handler's
    /// [`Retry`] says.
    pub fn dead_letter(why: impl fmt::Display) -> Self {
        Self {
            decision: Decision::DeadLetter,
            reason: why.to_string(),
        }
    }

    /// Not retried: the message is settled, counted and logged.
    pub fn discard(why: impl fmt::Display) -> Self {
        Self {
            decision: Decision::Discard,
            reason: why.to_string(),
        }
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.decision, self.reason)
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> From<E> for HandlerError {
    fn from(error: E) -> Self {
        let error = error.into();
        let mut reason = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            // Many errors already say their source.
            if !reason.contains(&cause_text) {
                reason.push_str(": ");
                reason.push_str(&cause_text);
            }
            source = cause.source();
        }
        Self {
            decision: Decision::Retry,
            reason,
        }
    }
}

/// What a handler may return: nothing, or a result with an error that [`HandlerError`] can be made from.
#[diagnostic::on_unimplemented(
    message = "a handler cannot return `{Self}`",
    label = "return `()` or `Result<(), HandlerError>`",
    note = "the error may be any type that converts into `HandlerError` with `?`, such as `anyhow::Error`; a handler of batches may also return `BatchResult`"
)]
pub trait IntoOutcome {
    /// As an outcome.
    fn into_outcome(self) -> Outcome;
}

impl IntoOutcome for () {
    fn into_outcome(self) -> Outcome {
        Ok(())
    }
}

impl<E: Into<HandlerError>> IntoOutcome for Result<(), E> {
    fn into_outcome(self) -> Outcome {
        self.map_err(Into::into)
    }
}
