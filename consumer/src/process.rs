//! A consumer process: sessions one after another, and what outlives them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::consumer::{Settings, log_subscription};
use crate::error::Error;
use crate::executor::{Claim, Command, Executor};
use crate::handler::Start;
use crate::lane::OwnedLane;
use crate::link::Reconnect;
use crate::session::{Ended, Session};
use crate::subscription::{Kind, Subscription};
use crate::topic_log::TopicLog;

pub(crate) struct Process {
    pub(crate) pool: PgPool,
    readers: PgPool,
    pub(crate) settings: Settings,
    pub(crate) subscriptions: Arc<Vec<Subscription>>,
    pub(crate) logs: HashMap<Arc<str>, Arc<TopicLog>>,
    /// Ids of this process's earlier sessions: their handlers have ended, so their lanes can be had at once.
    pub(crate) former: HashSet<i32>,
    broadcasts: Vec<(mpsc::UnboundedSender<Command>, JoinHandle<()>)>,
}

impl Process {
    pub(crate) fn new(
        pool: PgPool,
        readers: PgPool,
        settings: Settings,
        subscriptions: Arc<Vec<Subscription>>,
    ) -> Self {
        let mut logs = HashMap::new();
        for subscription in subscriptions.iter() {
            let topic = &subscription.plan.topic;
            logs.entry(topic.clone())
                .or_insert_with(|| Arc::new(TopicLog::new(topic.clone(), readers.clone())));
        }
        Self {
            pool,
            readers,
            settings,
            subscriptions,
            logs,
            former: HashSet::new(),
            broadcasts: Vec::new(),
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
        self.start_broadcasts().await?;
        self.subscriptions.iter().for_each(log_subscription);
        // Whoever started it may have gone.
        let _ = started.send(());
        loop {
            match session.run(&mut self, &token).await {
                Ended::Stopped => break,
                Ended::Lost(reason) => warn!(reason, "lost the session; connecting again"),
            }
            match self.reopen(&token).await {
                Some(next) => session = next,
                None => break,
            }
        }
        for (commands, task) in self.broadcasts.drain(..) {
            // It may have ended already.
            let _ = commands.send(Command::Stop(self.settings.grace));
            let _ = task.await;
        }
        self.readers.close().await;
        Ok(())
    }

    async fn reopen(&mut self, token: &CancellationToken) -> Option<Session> {
        let mut reconnect = Reconnect::new();
        loop {
            let open = async {
                reconnect.wait().await;
                Session::open(self).await
            };
            let opened = tokio::select! {
                () = token.cancelled() => return None,
                opened = open => opened,
            };
            match opened {
                Ok(session) => {
                    info!("connected again");
                    for (commands, _) in &self.broadcasts {
                        let _ = commands.send(Command::Resync);
                    }
                    return Some(session);
                }
                Err(error) => warn!(%error, "cannot connect; trying again"),
            }
        }
    }

    /// Broadcasts from memory outlive sessions: a node that stays up sees every message once.
    async fn start_broadcasts(&mut self) -> Result<(), Error> {
        for subscription in self
            .subscriptions
            .iter()
            .filter(|subscription| subscription.kind == Kind::Memory)
        {
            let log = self.logs[&subscription.plan.topic].clone();
            let position = start_offset(&self.pool, &subscription.plan.topic, subscription.start).await?;
            let (commands, receiver) = mpsc::unbounded_channel();
            let claim = Claim {
                lanes: vec![(0, OwnedLane::new(0, position))],
                ..Claim::default()
            };
            // The receiver is right here.
            let _ = commands.send(Command::Claimed(claim));
            let executor = Executor::new(subscription.plan.clone(), 1, log, None, receiver);
            self.broadcasts.push((commands, tokio::spawn(executor.run())));
        }
        Ok(())
    }
}

async fn start_offset(pool: &PgPool, topic: &str, start: Start) -> Result<i64, Error> {
    let (kind, value) = start.to_sql();
    Ok(sqlx::query_scalar("SELECT postbox.start_offset($1, $2, $3)")
        .bind(topic)
        .bind(kind)
        .bind(value)
        .fetch_one(pool)
        .await?)
}
