//! What the options of a handler may be.

/// What becomes of a message of a type that no live instance of its group has a handler for.
///
/// What another instance handles is left to that one, whatever is said here: in a rolling deploy messages of new types go to the new instances.
/// Untyped messages are a type of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnknownType {
    /// It waits, and its key with it, until an instance that handles it joins. Other keys go on. It is logged once a type, and shown by `postbox status`
    /// and `postbox doctor` for as long as it lasts.
    #[default]
    Wait,
    /// It is settled without being handled: for a group that is not interested in all types of its topic. It is logged once a type, and counted
    /// (`unknown`).
    Settle,
    /// It fails, and holds its key, until an instance that handles it joins: as [`Wait`](Self::Wait), with an error at each attempt.
    Fail,
    /// It goes to the dead letters at once.
    DeadLetter,
}

/// What runs one after another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MessageOrder {
    /// Messages of one key, in their order; different keys and messages without a key run beside each other.
    #[default]
    Key,
    /// All messages of the topic, strictly by offset. The subscription has one lane, so one instance does the work.
    Topic,
    /// Nothing: any message may run beside any other.
    None,
}

impl MessageOrder {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            MessageOrder::Key => "key",
            MessageOrder::Topic => "topic",
            MessageOrder::None => "none",
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

/// What becomes of a message whose payload its handler's type cannot be made from, which no further attempt can change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Undecodable {
    /// It goes to the dead letters at once. Its key goes on, or waits, as the handler's [`Retry`](crate::Retry) says.
    #[default]
    DeadLetter,
    /// It is retried by the handler's policy, and holds its key meanwhile: for a type that may be mended by a deployment.
    Retry,
}

/// Whether a group takes in no more when everything fails.
///
/// An outage downstream would otherwise make every message of a backlog fail, and give each a row of its own. While the breaker is open, messages
/// that failed already have their further attempts when they are due, by their policy; of those that have not run yet, one runs as a probe
/// after 1, 2, 4, … 30 s. The first success closes it. So what would come through does, and what exhausts its attempts is given up when it would be without
/// a breaker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Breaker {
    /// It opens after twenty first attempts in a row that failed.
    #[default]
    On,
    /// It never opens. [`Consumer::max_failing`](crate::Consumer::max_failing) still bounds how many fail at once.
    Off,
}

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
