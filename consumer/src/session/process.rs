//! A consumer process: sessions one after another, and what outlives them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use postbox::log::Filters;
use postbox::{MessageId, Offset, Position, log};
use postbox_core::restarts::{Restarts, say};
use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{Ended, Session};
use crate::clock::DatabaseClock;
use crate::error::Error;
use crate::executor::{Claim, Command, Executor, Plan};
use crate::ids::ConsumerId;
use crate::ids::{Epoch, Lane};
use crate::lane::OwnedLane;
use crate::log::readers::Readers;
use crate::log::topic_log::TopicLog;
use crate::protocol::standing::Standing;
use crate::settings::Settings;
use crate::subscription::log_subscription;
use crate::subscription::{Kind, Subscription};
use postbox_core::link::{self, Reconnect, in_time};

const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct Process {
    pub(crate) pool: PgPool,
    pub(crate) readers: Arc<Readers>,
    pub(crate) settings: Settings,
    pub(crate) clock: Arc<DatabaseClock>,
    pub(crate) subscriptions: Arc<Vec<Subscription>>,
    pub(crate) logs: HashMap<Arc<str>, Arc<TopicLog>>,
    /// Ids of this process's earlier sessions: their handlers have ended, so their lanes can be had at once.
    pub(crate) former: HashSet<ConsumerId>,
    broadcasts: Vec<(mpsc::UnboundedSender<Command>, JoinHandle<()>)>,
    /// Of a test.
    pub(super) asks: mpsc::UnboundedReceiver<Ask>,
}

/// What a test asks of a process.
pub(crate) enum Ask {
    /// To follow the database's clock now, which was moved by so much since the process was asked first.
    Follow {
        moved: Duration,
        followed: oneshot::Sender<()>,
    },
    /// To have each executor say how things stand.
    Tell(mpsc::UnboundedSender<Standing>),
}

impl Process {
    pub(crate) fn new(
        pool: PgPool,
        settings: Settings,
        clock: Arc<DatabaseClock>,
        subscriptions: Arc<Vec<Subscription>>,
        asks: mpsc::UnboundedReceiver<Ask>,
    ) -> Self {
        let readers = Arc::new(Readers::new((*pool.connect_options()).clone()));
        let mut logs = HashMap::new();
        for subscription in subscriptions.iter() {
            let (topic, filters) = (&subscription.plan.topic, &subscription.plan.filters);
            logs.entry(topic.clone())
                .or_insert_with(|| Arc::new(TopicLog::new(topic.clone(), filters.clone(), readers.clone())));
        }
        Self {
            pool,
            readers,
            settings,
            clock,
            subscriptions,
            logs,
            former: HashSet::new(),
            broadcasts: Vec::new(),
            asks,
        }
    }

    /// To the executors of broadcasts from memory.
    pub(super) fn command_broadcasts(&self, command: impl Fn() -> Command) {
        for (commands, _) in &self.broadcasts {
            // One that ended is noticed when the process ends.
            let _ = commands.send(command());
        }
    }

    /// Runs until the token is cancelled. `started` is told when everything is registered.
    pub(crate) async fn run(
        mut self,
        token: CancellationToken,
        started: oneshot::Sender<()>,
    ) -> Result<(), Error> {
        // The first session's errors are the caller's; later ones are the network's.
        let mut session = Session::open(&mut self).await?;
        // Cancelled from within, too: by what makes it no use to go on.
        let token = token.child_token();
        let broken = Arc::new(OnceLock::new());
        self.start_broadcasts(&token, &broken).await?;
        self.subscriptions.iter().for_each(log_subscription);
        // Whoever started it may have gone.
        let _ = started.send(());
        let (mut restarts, mut waits) = (Restarts::new(), Reconnect::new());
        loop {
            match session.run(&mut self, &token).await {
                Ended::Stopped => break,
                Ended::Lost(reason) => warn!(reason, "lost the session; connecting again"),
                Ended::Broken(why) => {
                    let _ = broken.set(why);
                    break;
                }
                Ended::Panicked(why) => match restarts.next_wait() {
                    Some(wait) => {
                        say(|| error!(why, ?wait, "the session panicked; opening another one"));
                        tokio::time::sleep(wait).await;
                    }
                    None => {
                        let _ = broken.set(format!(
                            "the session panics again and again, the last time with: {why}"
                        ));
                        break;
                    }
                },
            }
            self.readers.close();
            match self.reopen(&mut waits, &token).await {
                Some(next) => session = next,
                None => break,
            }
        }
        self.readers.end();
        for (commands, task) in self.broadcasts.drain(..) {
            // It may have ended already.
            let _ = commands.send(Command::Stop(self.settings.grace));
            let _ = task.await;
        }
        link::close(&self.pool).await;
        match broken.get() {
            Some(why) => {
                say(|| error!(why, "the consumer ends"));
                Err(Error::Ended(why.clone()))
            }
            None => Ok(()),
        }
    }

    async fn reopen(&mut self, waits: &mut Reconnect, token: &CancellationToken) -> Option<Session> {
        waits.lost();
        loop {
            let open = async {
                waits.wait().await;
                Session::open(self).await
            };
            let opened = tokio::select! {
                () = token.cancelled() => return None,
                opened = open => opened,
            };
            match opened {
                Ok(session) => {
                    waits.connected();
                    info!("connected again");
                    self.command_broadcasts(|| Command::Resync);
                    return Some(session);
                }
                Err(error) => warn!(%error, "cannot connect; trying again"),
            }
        }
    }

    /// Broadcasts from memory outlive sessions: a node that stays up sees every message once.
    async fn start_broadcasts(
        &mut self,
        token: &CancellationToken,
        broken: &Arc<OnceLock<String>>,
    ) -> Result<(), Error> {
        for subscription in self
            .subscriptions
            .iter()
            .filter(|subscription| subscription.kind == Kind::Memory)
        {
            let log = self.logs[&subscription.plan.topic].clone();
            let position = start_offset(&self.pool, &subscription.plan.topic, subscription.start).await?;
            let anchor = before(&self.pool, &subscription.plan.topic, position);
            let anchor = in_time(STATEMENT_TIMEOUT, "looking where a broadcast starts", anchor).await?;
            let (commands, receiver) = mpsc::unbounded_channel();
            let (plan, token, broken) = (subscription.plan.clone(), token.clone(), broken.clone());
            let task = tokio::spawn(async move {
                if let Some(why) = broadcast(plan, log, (position, anchor), receiver).await {
                    let _ = broken.set(why);
                    token.cancel();
                }
            });
            self.broadcasts.push((commands, task));
        }
        Ok(())
    }
}

/// Runs a broadcast from memory, again after each panic from where it stood, until it is told to stop, or says why it is no use to go on.
async fn broadcast(
    plan: Arc<Plan>,
    log: Arc<TopicLog>,
    (mut position, anchor): (i64, Option<(i64, MessageId)>),
    mut commands: mpsc::UnboundedReceiver<Command>,
) -> Option<String> {
    let mut restarts = Restarts::new();
    let mut seen = None;
    loop {
        let mut executor = Executor::new(plan.clone(), 1, log.clone(), None, commands);
        executor.claimed(Claim {
            lanes: vec![(Lane::of(0, 1), OwnedLane::new(Epoch(0), position))],
            anchor,
            ..Claim::default()
        });
        if let Some(seen) = seen {
            executor.remember(seen);
        }
        let Err(left) = executor.run().await else {
            return None;
        };
        let (group, topic, why) = (&plan.group, &plan.topic, left.why);
        let Some(wait) = restarts.next_wait() else {
            return Some(format!(
                "the executor of {group} on topic {topic} panics again and again, the last time with: {why}"
            ));
        };
        say(
            || error!(%group, %topic, why, ?wait, "the executor panicked: its handlers were cancelled; starting another one"),
        );
        tokio::time::sleep(wait).await;
        (position, seen, commands) = (left.resume_at, left.seen, left.commands);
    }
}

async fn start_offset(pool: &PgPool, topic: &str, start: Position) -> Result<i64, Error> {
    let (kind, value) = start.to_sql();
    let offset = sqlx::query_scalar("SELECT postbox.start_offset($1, $2, $3)")
        .bind(topic)
        .bind(kind)
        .bind(value)
        .fetch_one(pool);
    Ok(in_time(STATEMENT_TIMEOUT, "looking where a broadcast starts", offset).await?)
}

/// The message before an offset, if it is there.
async fn before(pool: &PgPool, topic: &str, position: i64) -> Result<Option<(i64, MessageId)>, Error> {
    if position == 0 {
        return Ok(None);
    }
    let (from, to) = (Offset::new(position - 1), Offset::new(position));
    let mut connection = pool.acquire().await?;
    let segments = log::segments(&mut connection, topic, from, 1).await?;
    if segments.first().is_none_or(|segment| segment.base() > from) {
        return Ok(None);
    }
    let found = log::messages(
        &mut connection,
        topic,
        &segments,
        from,
        to,
        &Filters::NONE,
        |_, _| true,
    )
    .await?;
    Ok(found.into_iter().next().map(|message| (from.get(), message.id)))
}
