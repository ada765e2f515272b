//! A session: one connection by which this instance is alive, owns lanes, and records how far it came.
//!
//! Everything that depends on being the owner goes through this connection or is checked against its lock, so what is not known to
//! be lost is still true: if the server restarted, the connection is gone. See ARCHITECTURE.md, "Ownership".

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use postbox::log::StoredMessage;
use serde::Deserialize;
use sqlx::PgPool;
use sqlx::postgres::PgListener;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::error::Error;
use crate::executor::{Claim, Command, Event, Executor, Membership};
use crate::lane::{Claims, LaneRow, OwnedLane, plan};
use crate::link;
use crate::news::{self, Desk, News};
use crate::pace::{PaceSettings, Pacer};
use crate::process::Process;
use crate::progress::{Dirty, Lease, Progress, Snapshot};
use crate::record::Columns;
use crate::redelivery;
use crate::subscription::Kind;

/// How often members and lanes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// When to look again where a look did not find everything.
const LOOK_SOON: Duration = Duration::from_millis(50);
/// For how long the lock of an instance must be seen missing before its lanes are taken: an instance that lost its connection stops its
/// handlers within this time, so no key runs in two places.
const GRACE_WITHOUT_LOCK: Duration = Duration::from_secs(1);
/// The answer to a step comes right after the notification that it sends.
const A_MOMENT: Duration = Duration::from_millis(2);
/// Every how many looks the topics' heads are read, in case a notification was lost.
const HEADS_EVERY: u32 = 2;
/// Least time between two checkpoints.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(20);
/// A statement of the session that takes longer means that the connection is dead.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(4);
const LEAST_PATIENCE: Duration = Duration::from_millis(100);

pub(crate) struct Session {
    id: i32,
    /// Of the instance.
    name: String,
    /// Holds the session's one connection; closing it ends the session.
    pool: PgPool,
    listener: PgListener,
    /// From a dispatcher in this process, for as long as the desk is kept.
    news: broadcast::Receiver<Arc<News>>,
    desk: Desk,
    lease: Arc<Lease>,
    lease_span: Duration,
    heartbeat_at: Instant,
    /// The number of the last one.
    heartbeat: Option<i32>,
    services: Vec<Service>,
    dirty: Arc<Dirty>,
    events: mpsc::UnboundedReceiver<Event>,
    unlocked_since: HashMap<i32, Instant>,
    looks: u32,
    checkpointed: Instant,
    former: HashSet<i32>,
}

/// A subscription with its executor.
struct Service {
    id: i32,
    lanes: u16,
    commands: mpsc::UnboundedSender<Command>,
    progress: Arc<Progress>,
    task: JoinHandle<()>,
    claims: Claims,
    pacer: Pacer,
}

pub(crate) enum Ended {
    /// As it was told to.
    Stopped,
    /// The connection, the lease or the registration was lost.
    Lost(String),
}

const REGISTER: &str = "INSERT INTO postbox.consumer (name, pid, subscriptions, lease) \
     VALUES ($1, $2, $3, make_interval(secs => $4)) RETURNING id";

/// Exclusive on the instance's own lock: it is alive. Shared on the bell: it wants to be woken.
const LOCK: &str = "SELECT pg_advisory_lock(1347571763, $1), pg_advisory_lock_shared(1347571761, 3)";

/// Finds the subscription or makes it, and notes what the code says of its pace.
const SUBSCRIBE: &str = "SELECT s.id, s.lanes, s.order_mode FROM postbox.subscribe($1, $2, $3, $4, $5, $6, $7) s, \
     postbox.pace_in_code(s.id, $8, $9, $10)";

const HEARTBEAT: &str = "SELECT postbox.heartbeat($1, $2, $3)";

/// One statement, so that lanes and members are of one moment.
const LOOK: &str = "SELECT json_build_object(
        'members', (SELECT coalesce(json_agg(json_build_object('id', c.id, 'subscriptions', c.subscriptions,
                'locked', s.consumer_id IS NOT NULL, 'expired', NOT coalesce(s.in_time, true))), '[]')
            FROM postbox.consumer c LEFT JOIN postbox.sessions() s ON s.consumer_id = c.id),
        'lanes', (SELECT coalesce(json_agg(json_build_object('subscription', l.subscription_id, 'lane', l.lane,
                'epoch', l.epoch, 'owner', l.consumer_id) ORDER BY l.subscription_id, l.lane), '[]')
            FROM postbox.lane l WHERE l.subscription_id = ANY ($1)),
        'heads', (SELECT coalesce(json_object_agg(t, postbox.next_offset(t)), '{}') FROM unnest($2::text[]) t),
        'decided', (SELECT coalesce(json_agg(DISTINCT r.subscription_id), '[]') FROM postbox.redelivery r
            WHERE r.subscription_id = ANY ($1) AND r.state IN ('redriven', 'released')),
        'paces', (SELECT coalesce(json_agg(json_build_object('id', s, 'paused', p.paused, 'rate_limit', p.rate_limit,
                'instance_rate_limit', p.instance_rate_limit, 'drain_window', p.drain_window)), '[]')
            FROM unnest($1::integer[]) s CROSS JOIN LATERAL postbox.pace(s) p),
        'now', postbox.clock())";

/// Lane, epoch, position, pending, done and crashes, as `postbox.claim` returns them.
type ClaimedRow = (i16, i32, i64, Vec<i64>, Vec<i64>, i32);

#[derive(Deserialize)]
struct Look {
    members: Vec<Member>,
    lanes: Vec<LaneOf>,
    heads: HashMap<String, i64>,
    /// Subscriptions of which operators decided something.
    decided: Vec<i32>,
    paces: Vec<PaceSettings>,
    /// By the database's clock.
    now: DateTime<Utc>,
}

#[derive(Deserialize)]
struct Member {
    id: i32,
    subscriptions: Vec<i32>,
    locked: bool,
    /// Its lock is held, but it has not been heard of for its lease.
    expired: bool,
}

#[derive(Deserialize)]
struct LaneOf {
    subscription: i32,
    lane: u16,
    epoch: i32,
    owner: Option<i32>,
}

impl Session {
    /// Connects, registers subscriptions and instance, and starts the executors, which own nothing yet.
    pub(crate) async fn open(process: &mut Process) -> Result<Self, Error> {
        let (mut listener, pool) = link::open(
            (*process.pool.connect_options()).clone(),
            &["postbox_segment"],
            Duration::from_secs(10),
        )
        .await?;

        let mut registered = Vec::new();
        for (n, subscription) in process.subscriptions.iter().enumerate() {
            if subscription.kind == Kind::Memory {
                continue;
            }
            let plan = &subscription.plan;
            let node = match &subscription.kind {
                Kind::Durable { node } => Some(node.as_str()),
                Kind::Group | Kind::Memory => None,
            };
            let (start, value) = subscription.start.to_sql();
            let (id, lanes, stored): (i32, i16, String) = sqlx::query_as(SUBSCRIBE)
                .bind(plan.group.as_ref())
                .bind(plan.topic.as_ref())
                .bind(plan.lanes as i16)
                .bind(plan.order.as_str())
                .bind(node)
                .bind(start)
                .bind(value)
                .bind(subscription.pace.rate)
                .bind(subscription.pace.instance_rate)
                .bind(subscription.pace.window.as_ref().map(ToString::to_string))
                .fetch_one(&mut listener)
                .await?;
            if stored != plan.order.as_str() {
                return Err(Error::OrderChanged {
                    group: plan.group.to_string(),
                    topic: plan.topic.to_string(),
                    stored,
                    wanted: plan.order.as_str(),
                });
            }
            registered.push((n, id, lanes as u16));
        }

        let heartbeat_at = Instant::now();
        let lease_span = process.settings.lease;
        let id: i32 = sqlx::query_scalar(REGISTER)
            .bind(&process.settings.name)
            .bind(std::process::id() as i32)
            .bind(registered.iter().map(|(_, id, _)| *id).collect::<Vec<i32>>())
            .bind(lease_span.as_secs_f64())
            .fetch_one(&mut listener)
            .await?;
        sqlx::query(LOCK).bind(id).execute(&mut listener).await?;

        for log in process.logs.values() {
            log.reset();
        }
        let lease = Arc::new(Lease::until(heartbeat_at + own_lease(lease_span)));
        let dirty = Arc::new(Dirty::default());
        let (event_sender, events) = mpsc::unbounded_channel();
        let services = registered
            .into_iter()
            .map(|(n, subscription, lanes)| {
                let plan = process.subscriptions[n].plan.clone();
                let (commands, receiver) = mpsc::unbounded_channel();
                let progress = Arc::new(Progress::new(dirty.clone()));
                let membership = Membership {
                    consumer: id,
                    subscription,
                    lease: lease.clone(),
                    progress: progress.clone(),
                    events: event_sender.clone(),
                };
                let log = process.logs[&plan.topic].clone();
                let executor = Executor::new(plan, lanes, log, Some(membership), receiver);
                Service {
                    id: subscription,
                    lanes,
                    commands,
                    progress,
                    task: tokio::spawn(executor.run()),
                    claims: Claims::default(),
                    pacer: Pacer::default(),
                }
            })
            .collect();
        let desk = Desk::of(&mut listener).await?;
        let former = process.former.clone();
        process.former.insert(id);
        debug!(consumer = id, "session opened");
        Ok(Self {
            id,
            name: process.settings.name.clone(),
            pool,
            news: desk.listen(),
            desk,
            listener,
            lease,
            lease_span,
            heartbeat_at,
            heartbeat: None,
            services,
            dirty,
            events,
            unlocked_since: HashMap::new(),
            looks: 0,
            checkpointed: Instant::now(),
            former,
        })
    }

    /// Runs until the token is cancelled or the session is lost; the executors have ended when it returns.
    pub(crate) async fn run(mut self, process: &mut Process, token: &CancellationToken) -> Ended {
        let ended = match self.serve(process, token).await {
            Ok(()) => match self.stop(process).await {
                Ok(()) => Ended::Stopped,
                Err(error) => {
                    warn!(%error, "could not record the last progress; some messages are delivered again");
                    Ended::Stopped
                }
            },
            Err(error) => Ended::Lost(error.to_string()),
        };
        for service in self.services {
            // Without commands an executor cancels its handlers and ends.
            drop(service.commands);
            if let Err(error) = service.task.await {
                warn!(%error, "an executor ended unexpectedly");
            }
        }
        drop(self.listener);
        // Bounded: the connection may hang.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.pool.close()).await;
        ended
    }

    async fn serve(&mut self, process: &mut Process, token: &CancellationToken) -> Result<(), Lost> {
        let mut next_look = Instant::now();
        let mut checkpoint_due = false;
        loop {
            let checkpoint_at = self.checkpointed + CHECKPOINT_EVERY;
            tokio::select! {
                biased;
                () = token.cancelled() => return Ok(()),
                notification = self.listener.try_recv() => match notification? {
                    Some(notification) => {
                        // The same with the messages, if it is about to come from this process: then they need not be read.
                        if self.desk.expects_news()
                            && let Ok(Ok(news)) = tokio::time::timeout(A_MOMENT, self.news.recv()).await
                        {
                            tell(process, &news.text, news.messages.as_deref());
                        }
                        if !tell(process, notification.payload(), None) {
                            self.looks = 0;
                            next_look = Instant::now();
                        }
                    }
                    None => return Err(Lost("the connection was closed".to_owned())),
                },
                told = self.news.recv() => {
                    // It comes from the server, too.
                    if let Ok(news) = told {
                        tell(process, &news.text, news.messages.as_deref());
                    }
                }
                Some(event) = self.events.recv() => {
                    if let Event::Released { subscription, snapshot } = event {
                        // What became of their messages goes first.
                        self.checkpoint().await?;
                        self.release(subscription, snapshot).await?;
                    }
                    next_look = Instant::now();
                }
                () = tokio::time::sleep_until(checkpoint_at.into()), if checkpoint_due => {
                    checkpoint_due = false;
                    if !self.checkpoint().await? {
                        next_look = Instant::now();
                    }
                }
                () = self.dirty.at_once.notified() => {
                    checkpoint_due = false;
                    if !self.checkpoint().await? {
                        next_look = Instant::now();
                    }
                }
                () = self.dirty.soon.notified(), if !checkpoint_due => checkpoint_due = true,
                () = tokio::time::sleep_until(next_look.into()) => {
                    self.heartbeat(process).await?;
                    next_look = self.look(process).await?;
                }
            }
        }
    }

    /// Says that it is alive, in time before the lease ends.
    async fn heartbeat(&mut self, process: &Process) -> Result<(), Lost> {
        if self.heartbeat_at.elapsed() > own_lease(self.lease_span) {
            return Err(Lost(
                "this instance did not run for longer than its lease".to_owned(),
            ));
        }
        if self.heartbeat_at.elapsed() < self.lease_span / 4 {
            return Ok(());
        }
        let sent = Instant::now();
        let query = sqlx::query_scalar(HEARTBEAT)
            .bind(self.id)
            .bind(report(process))
            .bind(self.heartbeat)
            .fetch_one(&mut self.listener);
        self.heartbeat = in_time(&self.lease, query).await?;
        if self.heartbeat.is_none() {
            return Err(Lost("this instance's registration is gone".to_owned()));
        }
        self.heartbeat_at = sent;
        self.lease.extend(sent + own_lease(self.lease_span));
        Ok(())
    }

    /// Looks at members and lanes and does what is due; returns when to look again.
    async fn look(&mut self, process: &Process) -> Result<Instant, Lost> {
        let ids: Vec<i32> = self.services.iter().map(|service| service.id).collect();
        let topics: Vec<&str> = match self.looks % HEADS_EVERY {
            0 => process.logs.keys().map(AsRef::as_ref).collect(),
            _ => Vec::new(),
        };
        self.looks = self.looks.wrapping_add(1);
        let query = sqlx::query_scalar(LOOK)
            .bind(ids)
            .bind(topics)
            .fetch_one(&mut self.listener);
        let sqlx::types::Json(look): sqlx::types::Json<Look> = in_time(&self.lease, query).await?;
        if let Some(moved) = process.clock.learn(look.now) {
            info!(?moved, "the database's clock was moved on");
            for service in &self.services {
                service.command(Command::Advance(moved));
            }
        }
        for (topic, head) in &look.heads {
            if let Some(log) = process.logs.get(topic.as_str()) {
                log.set_head(*head);
            }
        }
        if !look.members.iter().any(|member| member.id == self.id) {
            return Err(Lost("this instance's registration is gone".to_owned()));
        }
        let (dead, mut again) = self.find_dead(&look);
        for n in 0..self.services.len() {
            self.arrange(n, &look, &dead).await?;
        }
        for service in &mut self.services {
            service.keep_pace(&look);
        }
        for service in self.services.iter().filter(|s| look.decided.contains(&s.id)) {
            let lanes: Vec<i16> = service.claims.lanes().map(|lane| lane as i16).collect();
            let held = in_time(
                &self.lease,
                redelivery::of_operators(&mut self.listener, service.id, &lanes),
            )
            .await?;
            if held.len() as i64 == redelivery::DECIDED {
                // There are more.
                again = again.min(Instant::now() + LOOK_SOON);
            }
            service.command(Command::Decided(held));
        }
        Ok(again)
    }

    /// Which owners of lanes are dead: their lease ended, their lock has been missing for the grace, or they are no longer registered.
    fn find_dead(&mut self, look: &Look) -> (HashSet<i32>, Instant) {
        let now = Instant::now();
        let mut again = now + LOOK_EVERY;
        let registered: HashSet<i32> = look.members.iter().map(|member| member.id).collect();
        self.unlocked_since.retain(|id, _| registered.contains(id));
        let mut dead: HashSet<i32> = look
            .lanes
            .iter()
            .filter_map(|lane| lane.owner)
            .filter(|owner| !registered.contains(owner))
            .collect();
        dead.extend(&self.former);
        for member in look.members.iter().filter(|member| member.id != self.id) {
            if member.expired {
                dead.insert(member.id);
            }
            if member.locked {
                self.unlocked_since.remove(&member.id);
                continue;
            }
            let takeover_at = *self.unlocked_since.entry(member.id).or_insert(now) + GRACE_WITHOUT_LOCK;
            if takeover_at <= now {
                dead.insert(member.id);
            } else {
                again = again.min(takeover_at);
            }
        }
        (dead, again)
    }

    /// Claims, releases and revokes lanes of one subscription.
    async fn arrange(&mut self, n: usize, look: &Look, dead: &HashSet<i32>) -> Result<(), Lost> {
        let me = self.id;
        let service = &mut self.services[n];
        let members: Vec<i32> = look
            .members
            .iter()
            .filter(|member| !dead.contains(&member.id) && member.subscriptions.contains(&service.id))
            .map(|member| member.id)
            .collect();
        let mut rows: Vec<LaneRow> = look
            .lanes
            .iter()
            .filter(|lane| lane.subscription == service.id)
            .map(|lane| LaneRow {
                lane: lane.lane,
                epoch: lane.epoch,
                owner: lane.owner,
            })
            .collect();
        let lost = service.claims.lose(me, &rows);
        if !lost.is_empty() {
            warn!(subscription = service.id, lanes = ?lost, "lanes have another owner now");
            service.command(Command::Revoke(lost));
        }
        // A lane that was claimed without the answer arriving, or that an operator moved, is claimed again. More than the share, too: nobody
        // else may have it, and what is too much is released in order.
        let mut strays = Vec::new();
        for row in rows
            .iter_mut()
            .filter(|row| row.owner == Some(me) && !service.claims.holds(row.lane))
        {
            row.owner = None;
            strays.push(*row);
        }
        let mut plan = plan(me, &members, dead, &rows);
        strays.retain(|stray| !plan.claim.contains(stray));
        plan.claim.extend(strays);
        if !plan.release.is_empty() {
            service.command(Command::Release(plan.release));
        }
        if plan.claim.is_empty() {
            return Ok(());
        }
        let lanes: Vec<i16> = plan.claim.iter().map(|row| row.lane as i16).collect();
        let epochs: Vec<i32> = plan.claim.iter().map(|row| row.epoch).collect();
        // This process's own earlier sessions lost their connection, not their life.
        let died: Vec<bool> = plan
            .claim
            .iter()
            .map(|row| row.owner.is_some_and(|owner| !self.former.contains(&owner)))
            .collect();
        let query = sqlx::query_as(
            "SELECT lane, epoch, position, pending, done, crashes FROM postbox.claim($1, $2, $3, $4, $5)",
        )
        .bind(me)
        .bind(service.id)
        .bind(lanes)
        .bind(epochs)
        .bind(died)
        .fetch_all(&mut self.listener);
        let claimed: Vec<ClaimedRow> = in_time(&self.lease, query).await?;
        if claimed.is_empty() {
            return Ok(());
        }
        info!(
            consumer = me,
            subscription = service.id,
            lanes = claimed.len(),
            of = service.lanes,
            "claimed lanes"
        );
        let numbers: Vec<i16> = claimed.iter().map(|(lane, ..)| *lane).collect();
        let lanes = claimed
            .into_iter()
            .map(|(lane, epoch, cut, pending, done, crashes)| {
                service.claims.add(lane as u16, epoch);
                let lane_state = OwnedLane {
                    pending: pending.into_iter().filter(|offset| *offset < cut).collect(),
                    done: done.into_iter().collect(),
                    crashes,
                    ..OwnedLane::new(epoch, cut)
                };
                (lane as u16, lane_state)
            })
            .collect();
        // Only the owner writes them, so they are as they will be when the executor gets them.
        let held = in_time(
            &self.lease,
            redelivery::of_lanes(&mut self.listener, service.id, &numbers),
        )
        .await?;
        let parked = in_time(
            &self.lease,
            redelivery::parked_keys(&mut self.listener, service.id, &numbers),
        )
        .await?;
        service.command(Command::Claimed(Claim { lanes, held, parked }));
        Ok(())
    }

    /// Writes what the executors reported; `false` if some lane turned out to have another owner.
    async fn checkpoint(&mut self) -> Result<bool, Lost> {
        self.write_reports(|_, _| ()).await
    }

    async fn write_reports(&mut self, mut seen: impl FnMut(i32, &Snapshot)) -> Result<bool, Lost> {
        self.checkpointed = Instant::now();
        let mut columns = Columns::default();
        let mut written = Vec::new();
        for (n, service) in self.services.iter().enumerate() {
            if let Some(unwritten) = service.progress.take() {
                if let Some(snapshot) = &unwritten.snapshot {
                    seen(service.id, snapshot);
                }
                written.push((n, unwritten.number));
                columns.push(service.id, unwritten);
            }
        }
        if columns.is_empty() {
            return Ok(true);
        }
        let complete = in_time(
            &self.lease,
            columns.write(&mut self.listener, self.id, &self.name),
        )
        .await?;
        for (n, number) in written {
            self.services[n].command(Command::Recorded(number));
        }
        Ok(complete)
    }

    async fn release(&mut self, subscription: i32, snapshot: Snapshot) -> Result<(), Lost> {
        let Some(service) = self
            .services
            .iter_mut()
            .find(|service| service.id == subscription)
        else {
            return Ok(());
        };
        let mut columns = Columns::default();
        columns.push_snapshot(service.id, snapshot);
        for (lane, epoch) in columns.lanes.iter().zip(&columns.epochs) {
            service.claims.give_up(*lane as u16, *epoch);
        }
        let query = sqlx::query("SELECT postbox.release($1, $2, $3, $4, $5, $6, $7)")
            .bind(self.id)
            .bind(subscription)
            .bind(columns.lanes)
            .bind(columns.epochs)
            .bind(columns.positions)
            .bind(columns.pending)
            .bind(columns.lanes_of_pending)
            .execute(&mut self.listener);
        in_time(&self.lease, query).await?;
        Ok(())
    }

    /// Lets the handlers finish, records how far it came, gives the lanes away and signs off.
    async fn stop(&mut self, process: &Process) -> Result<(), Lost> {
        let grace = process.settings.grace;
        for service in &self.services {
            service.command(Command::Stop(grace));
        }
        // Handlers may need longer than the lease, and some runs wait for their attempt to be recorded.
        let mut last = HashMap::new();
        loop {
            let ended = self.services.iter().all(|service| service.task.is_finished());
            self.heartbeat(process).await?;
            self.write_reports(|subscription, snapshot| {
                last.insert(subscription, snapshot.clone());
            })
            .await?;
            if ended {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        while let Ok(event) = self.events.try_recv() {
            if let Event::Released {
                subscription,
                snapshot,
            } = event
            {
                self.release(subscription, snapshot).await?;
            }
        }
        for (subscription, snapshot) in last {
            self.release(subscription, snapshot).await?;
        }
        let query = sqlx::query("DELETE FROM postbox.consumer WHERE id = $1")
            .bind(self.id)
            .execute(&mut self.listener);
        in_time(&self.lease, query).await?;
        Ok(())
    }
}

impl Service {
    /// Tells the executor how fast it may go, if that has changed.
    fn keep_pace(&mut self, look: &Look) {
        let Some(settings) = look.paces.iter().find(|settings| settings.id == self.id) else {
            return;
        };
        let (owned, all) = (self.claims.lanes().count(), usize::from(self.lanes));
        if let Some(pace) = self.pacer.change(settings, look.now, owned, all) {
            self.command(Command::Pace(pace));
        }
    }

    fn command(&self, command: Command) {
        // An executor that ended is noticed when the session ends.
        let _ = self.commands.send(command);
    }
}

/// Others take over when the lease ends; this instance stops well before, on its own clock.
fn own_lease(lease: Duration) -> Duration {
    lease.mul_f64(0.7)
}

/// Passes the sequencer's news on; `false` if it does not say what is new.
fn tell(process: &Process, text: &str, messages: Option<&[StoredMessage]>) -> bool {
    for (topic, head, segment) in news::topics(text) {
        if let Some(log) = process.logs.get(topic) {
            log.learn(head, segment, messages);
        }
    }
    !text.is_empty()
}

/// What this instance says of itself.
fn report(process: &Process) -> serde_json::Value {
    let subscriptions: Vec<serde_json::Value> = process
        .subscriptions
        .iter()
        .map(|subscription| {
            let plan = &subscription.plan;
            serde_json::json!({
                "group": plan.group.as_ref(),
                "topic": plan.topic.as_ref(),
                "memory": subscription.kind == Kind::Memory,
                "position": plan.counters.position.load(Ordering::Relaxed),
                "handled": plan.counters.handled.load(Ordering::Relaxed),
                "failed": plan.counters.failed.load(Ordering::Relaxed),
                "retrying": plan.counters.retrying.load(Ordering::Relaxed),
                "expired": plan.counters.expired.load(Ordering::Relaxed),
                "dead": plan.counters.dead.load(Ordering::Relaxed),
                "halted": plan.counters.halted.load(Ordering::Relaxed),
                "breaker": plan.counters.intake().as_str(),
            })
        })
        .collect();
    serde_json::Value::Array(subscriptions)
}

/// Why a session is over.
struct Lost(String);

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<sqlx::Error> for Lost {
    fn from(error: sqlx::Error) -> Self {
        Lost(error.to_string())
    }
}

/// Not beyond the end of the own lease, so that handlers are cancelled before others take over.
async fn in_time<T>(
    lease: &Lease,
    statement: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Lost> {
    let limit = lease.left().clamp(LEAST_PATIENCE, STATEMENT_TIMEOUT);
    Ok(link::in_time(limit, statement).await?)
}
