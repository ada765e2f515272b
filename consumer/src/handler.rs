//! What a handler is: which messages it takes and how it is run.

pub(crate) mod failures;
pub(crate) mod filter;
mod hook;
mod options;
pub(crate) mod retry;
pub(crate) mod router;
mod schedule;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use postbox::Position;
use postbox::cron::Missed;

pub use self::hook::DeadLetterHook;
pub(crate) use self::hook::{HOOKS_AT_ONCE, Hook, Hooks, Telling};
pub(crate) use self::options::Audience;
pub use self::options::{Breaker, Expired, MessageOrder, Undecodable, UnknownType};
use self::schedule::CronDefinition;
use crate::extract::{self, BesideBatch, Extract, Invocation, Needs};
use crate::handler::retry::Retry;
use crate::layer::Run;
use crate::outcome::{BoxFuture, Outcome};

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
    /// As an option says it.
    pub(crate) topic: Option<String>,
    pub(crate) types: Vec<String>,
    /// A condition in SQL/JSON path.
    pub(crate) filter: Option<String>,
    /// Of which group's dead letters it is.
    pub(crate) dead_letters_of: Option<String>,
    pub(crate) concurrency: Option<usize>,
    pub(crate) order: Option<MessageOrder>,
    pub(crate) start: Option<Position>,
    pub(crate) lanes: Option<u16>,
    pub(crate) rate: Option<f64>,
    pub(crate) instance_rate: Option<f64>,
    pub(crate) window: Option<String>,
    pub(crate) timeout: Duration,
    pub(crate) retry: Retry,
    pub(crate) expired: Expired,
    pub(crate) unknown: Option<UnknownType>,
    pub(crate) undecodable: Undecodable,
    pub(crate) breaker: Option<Breaker>,
    pub(crate) connections: Option<usize>,
    pub(crate) batch: Option<usize>,
    pub(crate) batch_wait: Duration,
    /// Of each argument.
    pub(crate) needs: Vec<Needs>,
    pub(crate) on_dead_letter: Option<Hook>,
    pub(crate) cron: Option<CronDefinition>,
    pub(crate) missed: Option<Missed>,
    pub(crate) run: Option<Run>,
}

impl HandlerDefinition {
    /// A handler of this name, to be completed by the methods below. Most are made by `#[handler]`.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            audience: None,
            topic: None,
            types: Vec::new(),
            filter: None,
            dead_letters_of: None,
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
            unknown: None,
            undecodable: Undecodable::default(),
            breaker: None,
            connections: None,
            batch: None,
            batch_wait: Duration::ZERO,
            needs: Vec::new(),
            on_dead_letter: None,
            cron: None,
            missed: None,
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

    /// Topic, instead of the one that an argument says.
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.topic = Some(topic.into());
        self
    }

    /// Takes the dead letters of a group, from now on, as messages: what the group gives up comes to it as it was published, with a
    /// [`DeadLetter`](crate::DeadLetter) that says why. It needs no topic. A dead letter that this handler gives up itself is no message again.
    pub fn dead_letters_of(mut self, group: impl Into<String>) -> Self {
        self.dead_letters_of = Some(group.into());
        self
    }

    /// A message type that it takes, instead of those that an argument says. Without any it takes every type of the topic, and untyped messages.
    pub fn message_type(mut self, message_type: impl Into<String>) -> Self {
        self.types.push(message_type.into());
        self
    }

    /// Which messages it wants of those that it takes (default: all): a condition in PostgreSQL's [SQL/JSON path language] over a document with `headers`,
    /// `payload` (where it is JSON), `key` and `type`, such as `$.headers.region == "EU" && $.payload.total > 100`. The server compares messages with
    /// it as they are read. What it does not say true of is passed without being run, and counted (`filtered`). It is in code as the handler is: it
    /// applies from where the group stands when an instance with another one owns the lane; what has failed before runs again all the same.
    ///
    /// A condition that cannot be read is an error of [`Consumer::start`](crate::Consumer::start), with its position.
    ///
    /// [SQL/JSON path language]: https://www.postgresql.org/docs/current/functions-json.html#FUNCTIONS-SQLJSON-PATH
    pub fn filter(mut self, condition: impl Into<String>) -> Self {
        self.filter = Some(condition.into());
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

    /// What runs one after another (default [`MessageOrder::Key`]). All handlers of a group on a topic must agree.
    pub fn order(mut self, order: MessageOrder) -> Self {
        self.order = Some(order);
        self
    }

    /// Where the group begins when it subscribes for the first time (default [`Position::Earliest`]; broadcasts: [`Position::Latest`]).
    pub fn start(mut self, start: Position) -> Self {
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

    /// What becomes of messages of the group on the topic of a type that no live instance handles (default: as
    /// [`Consumer::unknown_types`](crate::Consumer::unknown_types) says). All handlers of a group on a topic must agree.
    pub fn unknown(mut self, policy: UnknownType) -> Self {
        self.unknown = Some(policy);
        self
    }

    /// What becomes of messages whose payload the handler's type cannot be made from (default [`Undecodable::DeadLetter`]).
    pub fn undecodable(mut self, undecodable: Undecodable) -> Self {
        self.undecodable = undecodable;
        self
    }

    /// Whether the group's breaker on the topic opens when everything fails (default [`Breaker::On`]). All handlers of a group on a topic must
    /// agree.
    pub fn breaker(mut self, breaker: Breaker) -> Self {
        self.breaker = Some(breaker);
        self
    }

    /// Connections that the group's transactional handlers on the topic have for themselves, and the most that they take at once (default: a fair
    /// share of the pool; see [`Consumer::new`](crate::Consumer::new)). All handlers of a group on a topic must agree.
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = Some(connections);
        self
    }

    /// What runs once a message of this handler is among the dead letters; see [`DeadLetter`](crate::DeadLetter) for its guarantee.
    pub fn on_dead_letter<A>(mut self, hook: impl DeadLetterHook<A>) -> Self {
        self.on_dead_letter = Some(Hook::new(hook));
        self
    }

    /// Handles the firings of a schedule, which the consumer registers under this name at its start; most are made by `#[cron]`. Sets the
    /// group `cron` (unless [`group`](Self::group) says another), the topic `cron/NAME` and [`MessageOrder::Topic`]. The expression and the time zone are as in
    /// [`postbox::cron`].
    pub fn cron(
        mut self,
        name: impl Into<String>,
        expression: impl Into<String>,
        time_zone: impl Into<String>,
    ) -> Self {
        let cron = CronDefinition::new(name.into(), expression.into(), time_zone.into());
        self.audience.get_or_insert(Audience::Group("cron".to_owned()));
        self.order.get_or_insert(MessageOrder::Topic);
        self.cron = Some(cron);
        self
    }

    /// What becomes of due times that passed while no dispatcher ran (default [`Missed::Once`]); no effect without [`cron`](Self::cron).
    pub fn missed(mut self, missed: Missed) -> Self {
        self.missed = Some(missed);
        self
    }

    /// Declares an argument of the function, so that it is known at start what the handler needs.
    pub fn argument<E: Extract>(mut self) -> Self {
        self.needs.push(E::NEEDS);
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

    /// Its topic, by its options, its schedule or its arguments. It need not be a name.
    pub(crate) fn topic_name(&self) -> Option<String> {
        let of_letters = self.dead_letters_of.as_deref().map(extract::dead_letter_topic);
        let of_firings = self.cron.as_ref().map(CronDefinition::topic);
        let of_argument = || self.needs.iter().find_map(|needs| needs.topic).map(str::to_owned);
        self.topic
            .clone()
            .or(of_letters)
            .or(of_firings)
            .or_else(of_argument)
    }

    /// The types that it takes, by its options or its arguments; none: all.
    pub(crate) fn type_names(&self) -> Vec<String> {
        if !self.types.is_empty() {
            return self.types.clone();
        }
        let of_argument = self.needs.iter().find(|needs| needs.topic.is_some());
        of_argument.map_or_else(Vec::new, |needs| {
            needs.types.iter().map(|name| (*name).to_owned()).collect()
        })
    }

    /// Whether an argument is its transaction.
    pub(crate) fn is_transactional(&self) -> bool {
        self.needs.iter().any(|needs| needs.transaction)
    }

    /// Whether an argument is the right to settle in a transaction of its own.
    pub(crate) fn settles(&self) -> bool {
        self.needs.iter().any(|needs| needs.settlement)
    }

    /// Whether an argument is a [`Batch`](crate::Batch).
    pub(crate) fn takes_batches(&self) -> bool {
        self.needs.iter().any(|needs| needs.batch)
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
