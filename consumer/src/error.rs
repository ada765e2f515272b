//! Why a consumer cannot start.

/// Why a consumer cannot start. What happens later (a lost connection, a failing handler) is logged and tried again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The schema or the database.
    #[error(transparent)]
    Postbox(#[from] postbox::Error),
    /// A database URL that cannot be used.
    #[error("the database URL is not of the form postgres://user:password@host:5432/name: {0}")]
    Url(String),
    /// No handler was registered.
    #[error("the consumer has no handlers: register them with Consumer::handlers(handlers![…])")]
    NoHandlers,
    /// A handler is in no group and no broadcast.
    #[error("handler {handler} has no group: add group = \"…\" or broadcast")]
    NoGroup {
        /// The handler.
        handler: &'static str,
    },
    /// Nothing says which topic a handler is for.
    #[error("handler {handler} has no topic: take a message type with derive(Message), or add topic = \"…\"")]
    NoTopic {
        /// The handler.
        handler: &'static str,
    },
    /// A handler was defined without anything to call.
    #[error("handler {handler} has nothing to call: complete its definition with HandlerDefinition::call")]
    NoCall {
        /// The handler.
        handler: &'static str,
    },
    /// A topic, type, group or node name is not allowed.
    #[error(
        "{what} {name:?} of handler {handler} is not allowed: it is 1 to 255 characters of A-Z a-z 0-9 . _ - : /"
    )]
    InvalidName {
        /// The handler.
        handler: &'static str,
        /// What is named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Something says the topic beside the option `topic`.
    #[error("handler {handler} has both {option} and another topic: leave one of them out")]
    TwoTopics {
        /// The handler.
        handler: &'static str,
        /// What says it as well.
        option: &'static str,
    },
    /// `missed` is for schedules.
    #[error(
        "handler {handler} says what becomes of missed times, and has no schedule: add HandlerDefinition::cron"
    )]
    MissedWithoutCron {
        /// The handler.
        handler: &'static str,
    },
    /// A handler of ordinary messages takes a dead letter.
    #[error(
        "handler {handler} takes a DeadLetter and is not of dead letters: add dead_letters_of = \"…\", or take it in a function for on_dead_letter"
    )]
    NoDeadLetters {
        /// The handler.
        handler: &'static str,
    },
    /// A handler asks for a state that was not given.
    #[error("handler {handler} asks for State<{state}>: give it with Consumer::state")]
    MissingState {
        /// The handler.
        handler: &'static str,
        /// Its type.
        state: &'static str,
    },
    /// A handler's schedule is wrong, or could not be registered.
    #[error("handler {handler}: {source}")]
    Cron {
        /// The handler.
        handler: &'static str,
        /// What is wrong.
        source: postbox::Error,
    },
    /// A handler's filter cannot be read, or is no condition.
    #[error("handler {handler}: filter {filter:?}: {why}")]
    Filter {
        /// The handler.
        handler: &'static str,
        /// Its filter.
        filter: String,
        /// What is wrong, and where.
        why: String,
    },
    /// Two handlers of one group take the same messages.
    #[error("handlers {first} and {second} of group {group:?} both take {}", match message_type { Some(name) => format!("type {name:?}"), None => "every type".to_owned() })]
    DuplicateHandler {
        /// One.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// Their group.
        group: String,
        /// What both take.
        message_type: Option<String>,
    },
    /// Handlers of one group on one topic disagree on an option that they share.
    #[error(
        "the handlers of group {group:?} on topic {topic:?} disagree on {option}: they share one subscription, so say it once or the same"
    )]
    Disagreement {
        /// Their group.
        group: String,
        /// Their topic.
        topic: String,
        /// The option.
        option: &'static str,
    },
    /// A broadcast from memory has no acknowledgement that a transaction could commit.
    #[error(
        "handler {handler} is a broadcast and takes a Tx or a Settlement: only group handlers and broadcast = \"durable\" can"
    )]
    BroadcastTx {
        /// The handler.
        handler: &'static str,
    },
    /// A handler takes a `Settlement` where there is none.
    #[error("handler {handler} cannot have a Settlement: {why}")]
    Settlement {
        /// The handler.
        handler: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// A handler takes a batch without saying how large, or says it and takes single messages.
    #[error("handler {handler}: `batch` and an argument `Batch<…>` go together")]
    Batch {
        /// The handler.
        handler: &'static str,
    },
    /// A broadcast from memory has no subscription in the database, which says how fast it may go.
    #[error(
        "handler {handler} is a broadcast and has a rate or a window: only group handlers and broadcast = \"durable\" can"
    )]
    BroadcastPace {
        /// The handler.
        handler: &'static str,
    },
    /// A window cannot be understood.
    #[error("window of handler {handler}: {source}")]
    Window {
        /// The handler.
        handler: &'static str,
        /// Why.
        source: crate::WindowError,
    },
    /// An option is outside its range.
    #[error("{option} of handler {handler} is {value}: {range}")]
    OutOfRange {
        /// The handler.
        handler: &'static str,
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        range: &'static str,
    },
    /// A setting of the consumer is outside its range.
    #[error("{setting} of the consumer is {value}: {range}")]
    Setting {
        /// The setting: the method of [`Consumer`](crate::Consumer) that sets it.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        range: &'static str,
    },
    /// The subscription exists with an order that cannot be changed to this one.
    #[error(
        "group {group:?} subscribed to {topic:?} with order {stored:?} and this program says {wanted:?}: use another group name; a subscription cannot change to or from \"topic\""
    )]
    OrderChanged {
        /// The group.
        group: String,
        /// The topic.
        topic: String,
        /// Its order in the database.
        stored: String,
        /// The order in this program.
        wanted: &'static str,
    },
    /// Another live instance has this node's durable broadcasts.
    #[error(
        "node {node:?} lives already: instance {instance:?} (process {pid}) gets its durable broadcasts, so this one would get none of them; give every instance a name of its own with Consumer::node"
    )]
    NodeTaken {
        /// The node.
        node: String,
        /// The instance that has it.
        instance: String,
        /// Its process, on its host.
        pid: i32,
    },
    /// The consumer's task was cancelled or panicked.
    #[error("the consumer ended unexpectedly: {0}")]
    Ended(String),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Error::Postbox(error.into())
    }
}
