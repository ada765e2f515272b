//! Header names that begin with `postbox-`, which only Postbox adds, and what it adds them for.

/// Of a cron schedule's message: its due time, in RFC 3339.
pub const SCHEDULED_AT: &str = "postbox-scheduled-at";
/// Of a cron schedule's message: the name of its schedule.
pub const CRON: &str = "postbox-cron";
/// Of a message that an operator has had put back.
pub const REDRIVEN: &str = "postbox-redriven";
/// Of a message that is replayed.
pub const REPLAYED: &str = "postbox-replayed";

/// A group's dead letters as messages of their own, as the function `postbox.publish_dead_letters` writes them.
pub mod dead_letters {
    /// What the topic of a group's dead letters begins with; the group follows.
    pub const TOPIC_PREFIX: &str = "dead/";
    /// What these headers begin with.
    pub const HEADER_PREFIX: &str = "postbox-dead-";
    /// The group that gave the message up.
    pub const GROUP: &str = "postbox-dead-group";
    /// The topic it was on.
    pub const TOPIC: &str = "postbox-dead-topic";
    /// Its id.
    pub const ID: &str = "postbox-dead-id";
    /// Its offset there.
    pub const OFFSET: &str = "postbox-dead-offset";
    /// When it was published.
    pub const PUBLISHED_AT: &str = "postbox-dead-published-at";
    /// How many attempts were made.
    pub const ATTEMPTS: &str = "postbox-dead-attempts";
    /// Why it was given up.
    pub const REASON: &str = "postbox-dead-reason";
    /// Whether its key waits for an operator.
    pub const HALTED: &str = "postbox-dead-halted";
}
