//! What a session tells an executor, and what it is told.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use postbox::MessageId;
use tokio::sync::mpsc;

use crate::ids::{ConsumerId, Epoch, Lane, SubscriptionId};
use crate::lane::OwnedLane;
use crate::log::seen::SeenTail;
use crate::protocol::progress::{Lease, Progress, Snapshot};
use crate::protocol::redelivery::{Held, ParkedKey};
use crate::protocol::standing::Standing;

/// From the session to an executor.
pub(crate) enum Command {
    /// Lanes that were just claimed.
    Claimed(Claim),
    /// Give these up once nothing of them runs.
    Release(Vec<Lane>),
    /// These belong to somebody else: stop at once.
    Revoke(Vec<Lane>),
    /// What was reported up to this number is in the database.
    Recorded(u64),
    /// What operators decided of messages, some perhaps in lanes of others.
    Decided(Vec<Held>),
    /// These types no live instance handles, of those that this one does not.
    Orphans {
        types: HashSet<String>,
        /// Those of them that need not be read, since they are settled, by their hashes.
        unread: HashMap<i32, String>,
    },
    /// No row of these lanes waits for an instance that handles one of these types any more.
    Served {
        lanes: Vec<(Lane, Epoch)>,
        types: Vec<String>,
    },
    /// Whether messages may start, and how fast.
    Pace(Pace),
    /// The database's clock was moved on by so much.
    Advance(Duration),
    /// Say how things stand, once nothing can be done but wait.
    Tell(mpsc::UnboundedSender<Standing>),
    /// Look whether offsets were given anew (broadcast from memory).
    Resync,
    /// Take nothing in any more, let finish what runs for at most this long, and end.
    Stop(Duration),
}

/// Whether messages may start, and how fast.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pace {
    /// Whether messages may start at all.
    pub(crate) open: bool,
    /// Most messages a second in this instance; `None`: no limit.
    pub(crate) rate: Option<f64>,
}

/// Lanes that were claimed, with what their former owners left behind.
#[derive(Default)]
pub(crate) struct Claim {
    pub(crate) lanes: Vec<(Lane, OwnedLane)>,
    pub(crate) held: Vec<Held>,
    pub(crate) parked: Vec<ParkedKey>,
    /// For a broadcast from memory: the last message before the first that it is to see.
    pub(crate) anchor: Option<(i64, MessageId)>,
}

/// From an executor to the session.
pub(crate) enum Event {
    /// Nothing of these lanes runs here any more; the snapshot is where they stand.
    Released {
        subscription: SubscriptionId,
        snapshot: Snapshot,
    },
    /// A lane turned out to have another owner.
    Stale,
    /// A message has a type that this instance has no handler for.
    Unknown {
        subscription: SubscriptionId,
        message_type: String,
    },
    /// The executor was told which types nobody handles, and leaves none of them to others any more.
    Orphaned { subscription: SubscriptionId },
    /// The executor panicked and is no more.
    Broken {
        subscription: SubscriptionId,
        why: String,
    },
}

/// What ties an executor to the database: its absence makes it a broadcast from memory.
#[derive(Clone)]
pub(crate) struct Membership {
    pub(crate) consumer: ConsumerId,
    pub(crate) subscription: SubscriptionId,
    pub(crate) lease: Arc<Lease>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) events: mpsc::UnboundedSender<Event>,
}

/// What is left of an executor that panicked.
pub(crate) struct Broken {
    pub(crate) why: String,
    /// All before it is settled; only for who has one lane.
    pub(crate) resume_at: i64,
    /// What a broadcast from memory has seen.
    pub(crate) seen: Option<SeenTail>,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
}
