//! The pure parts of consuming, for the micro-benchmarks in `benches/`: they need no database. Not part of the API.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use postbox::log::{Segment, StoredMessage};
use postbox::{MessageId, Offset};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::sync::{Notify, mpsc};

use crate::clock::DatabaseClock;
use crate::executor::{Claim, Command, Executor, Plan};
use crate::handler::UnknownType;
use crate::handler::filter::FiltersOfTopics;
use crate::handler::{HandlerDefinition, MessageOrder};
use crate::ids::{Epoch, Lane};
use crate::lane::OwnedLane;
use crate::log::readers::Readers;
use crate::log::topic_log::TopicLog;
use crate::settings::Settings;
use crate::state::States;
use crate::subscription::plan_all;

/// So many fit into what a process keeps of a topic in memory, so that nothing is read.
const BLOCK: i64 = 1024;
const BLOCKS: i64 = 16;

/// The lane of a message.
pub fn lane_of(offset: i64, key_hash: Option<i32>, lanes: u16) -> usize {
    crate::lane::lane_of(offset, key_hash, lanes).index()
}

/// A topic in memory and an executor that has not begun to handle it.
pub struct Pipeline {
    executor: Executor,
    commands: mpsc::UnboundedSender<Command>,
    handled: Arc<Handled>,
}

#[derive(Default)]
struct Handled {
    count: AtomicUsize,
    all: Notify,
}

impl Pipeline {
    /// How many messages it has.
    pub const MESSAGES: usize = (BLOCK * BLOCKS) as usize;

    /// With so many keys, for a handler that finishes at its first poll, or only at its second. In a runtime.
    pub fn new(keys: i32, waits: bool) -> Self {
        let handled = Arc::new(Handled::default());
        let plan = plan(&handled, waits);
        let log = Arc::new(TopicLog::new(
            plan.topic.clone(),
            Arc::default(),
            Arc::new(Readers::new(PgConnectOptions::new())),
        ));
        for base in (0..BLOCKS).map(|n| n * BLOCK) {
            let messages: Vec<StoredMessage> = (base..base + BLOCK).map(|n| message(n, keys)).collect();
            log.learn(base + BLOCK, segment(base, &messages), Some(&messages));
        }
        let (commands, receiver) = mpsc::unbounded_channel();
        let claim = Claim {
            lanes: vec![(Lane::of(0, 1), OwnedLane::new(Epoch(0), 0))],
            ..Claim::default()
        };
        // The receiver is right here.
        let _ = commands.send(Command::Claimed(claim));
        Self {
            executor: Executor::new(plan, 1, log, None, receiver),
            commands,
            handled,
        }
    }

    /// Handles all.
    pub async fn run(self) {
        let executor = tokio::spawn(self.executor.run());
        self.handled.all.notified().await;
        let _ = self.commands.send(Command::Stop(Duration::ZERO));
        let _ = executor.await;
    }
}

fn nowhere() -> sqlx::PgPool {
    PgPoolOptions::new().connect_lazy_with(PgConnectOptions::new())
}

fn plan(handled: &Arc<Handled>, waits: bool) -> Arc<Plan> {
    let handled = handled.clone();
    let handler = HandlerDefinition::new("micro")
        .broadcast()
        .topic("micro")
        .order(MessageOrder::Key)
        .call(move |_| {
            let handled = handled.clone();
            Box::pin(async move {
                if waits {
                    tokio::task::yield_now().await;
                }
                if handled.count.fetch_add(1, Ordering::Relaxed) + 1 == Pipeline::MESSAGES {
                    handled.all.notify_one();
                }
                Ok(())
            })
        });
    let settings = Settings {
        name: String::new(),
        node: String::new(),
        lease: Duration::from_secs(10),
        grace: Duration::ZERO,
        window: 1024,
        max_failing: 1000,
        unknown_types: UnknownType::Settle,
        tx_pool: None,
    };
    let states = Arc::new(States::default());
    let clock = Arc::new(DatabaseClock::default());
    let subscriptions = plan_all(
        &[handler],
        &settings,
        &states,
        (&nowhere(), &nowhere()),
        &clock,
        &FiltersOfTopics::default(),
    );
    subscriptions.expect("it is a valid handler")[0].plan.clone()
}

fn message(n: i64, keys: i32) -> StoredMessage {
    let key = n as i32 % keys;
    StoredMessage {
        id: MessageId::new(),
        offset: Offset::new(n),
        seq: n,
        message_type: None,
        key: Some(key.to_string().into()),
        key_hash: Some(key),
        headers: None,
        content_type: None,
        payload: br#"{"order_id":42,"total_cents":1999}"#.as_slice().into(),
        published_at: chrono::Utc::now(),
        expires_at: None,
        refused_by: Box::default(),
        unreadable: None,
    }
}

fn segment(base: i64, messages: &[StoredMessage]) -> Option<Segment> {
    let list = |of: &dyn Fn(&StoredMessage) -> String| messages.iter().map(of).collect::<Vec<_>>().join(",");
    let place = [
        "0".to_owned(),
        "1000".to_owned(),
        list(&|_| "1".to_owned()),
        list(&|message| message.seq.to_string()),
        list(&|message| message.key_hash.unwrap_or_default().to_string()),
        list(&|_| "-".to_owned()),
    ];
    Segment::parse(base + messages.len() as i64, &place.join(":"))
}
