//! A session: one connection by which this instance is alive, owns lanes, and records how far it came.
//!
//! Everything that depends on being the owner goes through this connection or is checked against its lock, so what is not known to
//! be lost is still true: if the server restarted, the connection is gone. See docs/internals/ownership.md.

mod arrange;
mod claims;
pub(crate) mod hearing;
mod lost;
pub(crate) mod members;
pub(crate) mod node;
mod oddities;
mod open;
pub(crate) mod pace;
mod process;
mod progress;
pub(crate) mod record;
mod types;
pub(crate) mod watch;

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::FutureExt;
use postbox::log::StoredMessage;
use postbox_core::restarts::{Restarts, say};
use serde::Deserialize;
use sqlx::PgPool;
use sqlx::postgres::PgListener;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use self::lost::{Lost, in_time};
pub(crate) use self::process::{Ask, Process};
use crate::executor::{Broken, Command, Event, Executor, Membership, Plan};
use crate::ids::{ConsumerId, Epoch, Lane, SubscriptionId};
use crate::protocol::progress::{Dirty, Lease, Progress};
use crate::session::claims::{Claims, LaneRow};
use crate::session::hearing::{Hearing, Said};
use crate::session::members::{Member, Members};
use crate::session::pace::{PaceSettings, Pacer};
use crate::session::watch::Watch;
use crate::subscription::Kind;
use postbox_core::announcements::{self, Announcement, Announcements};
use postbox_core::clock::ClockWatch;
use postbox_core::link;
use types::Elsewhere;

/// How often members and lanes are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// When to look again where a look did not find everything.
const LOOK_SOON: Duration = Duration::from_millis(50);
/// The answer to a step comes right after the notification that it sends.
const A_MOMENT: Duration = Duration::from_millis(2);
/// Every how many looks the topics' heads are read, in case a notification was lost.
const HEADS_EVERY: u32 = 2;
/// Least time between two checkpoints.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(20);
/// A statement of the session that takes longer means that the connection is dead.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(4);
/// Bytes that the database takes in a second, if it is slow.
const SLOWEST: usize = 8 * 1024 * 1024;
const LEAST_PATIENCE: Duration = Duration::from_millis(100);

pub(crate) struct Session {
    id: ConsumerId,
    /// Of the instance.
    name: String,
    /// Holds the session's one connection; closing it ends the session.
    pool: PgPool,
    listener: PgListener,
    /// From a dispatcher in this process, for as long as `announcements` is kept.
    announced: broadcast::Receiver<Arc<Announcement>>,
    announcements: Announcements,
    lease: Arc<Lease>,
    lease_span: Duration,
    heartbeat_at: Instant,
    /// The number of the last one.
    heartbeat: Option<i32>,
    services: Vec<Service>,
    dirty: Arc<Dirty>,
    events: mpsc::UnboundedReceiver<Event>,
    event_sender: mpsc::UnboundedSender<Event>,
    /// Why it is no use to go on.
    broken: Option<String>,
    members: Members,
    hearing: Hearing,
    /// Whether the database's clock is set.
    clock: ClockWatch,
    far_clock_said: Option<Instant>,
    looks: u32,
    watch: Watch,
    checkpointed: Instant,
    former: HashSet<ConsumerId>,
}

/// A subscription with its executor.
struct Service {
    id: SubscriptionId,
    lanes: u16,
    commands: mpsc::UnboundedSender<Command>,
    progress: Arc<Progress>,
    task: JoinHandle<()>,
    claims: Claims,
    pacer: Pacer,
    plan: Arc<Plan>,
    elsewhere: Elsewhere,
    /// Which of the process's subscriptions it is.
    n: usize,
    restarts: Restarts,
    /// After a panic: nothing is claimed before.
    rests_until: Option<Instant>,
}

pub(crate) enum Ended {
    /// As it was told to.
    Stopped,
    /// The connection, the lease or the registration was lost.
    Lost(String),
    /// It panicked.
    Panicked(String),
    /// An executor panics again and again.
    Broken(String),
}

/// With the instance's own lock, exclusively: it is alive. And with that of the bell, shared: it wants to be woken.
const REGISTER: &str = "SELECT postbox.register($1, $2, $3, make_interval(secs => $4), $5, $6)";

/// From now on it claims nothing more.
const LEAVE: &str = "UPDATE postbox.consumer SET leaving = true WHERE id = $1";

/// Finds the subscription or makes it, and notes what the code says of its pace and its filters.
const SUBSCRIBE: &str = "SELECT s.id, s.lanes, s.order_mode, f.changed_at \
     FROM postbox.subscribe($1, $2, $3, $4, $5, $6, $7) s, postbox.pace_in_code(s.id, $8, $9, $10), \
         postbox.filters_in_code(s.id, $11, $12) AS f (changed_at)";

const HEARTBEAT: &str = "SELECT postbox.heartbeat($1, $2, $3)";

/// One statement, so that lanes and members are of one moment.
const LOOK: &str = "SELECT json_build_object(
        'members', (SELECT coalesce(json_agg(json_build_object('id', c.id, 'name', c.name, 'subscriptions', c.subscriptions,
                'beat', s.beat, 'lease', extract(epoch FROM c.lease), 'leaving', c.leaving)), '[]')
            FROM postbox.consumer c LEFT JOIN postbox.sessions() s ON s.consumer_id = c.id),
        'lanes', (SELECT coalesce(json_agg(json_build_array(l.subscription_id, l.lane, l.epoch, l.consumer_id, l.needs)
                ORDER BY l.subscription_id, l.lane), '[]')
            FROM postbox.lane l WHERE l.subscription_id = ANY ($1)),
        'heads', (SELECT coalesce(json_object_agg(t, postbox.next_offset(t)), '{}') FROM unnest($2::text[]) t),
        'decided', (SELECT coalesce(json_agg(DISTINCT r.subscription_id), '[]') FROM postbox.redelivery r
            WHERE r.subscription_id = ANY ($1) AND r.state IN ('redriven', 'released')),
        'paces', (SELECT coalesce(json_agg(json_build_object('id', s, 'paused', p.paused, 'rate_limit', p.rate_limit,
                'instance_rate_limit', p.instance_rate_limit, 'drain_window', p.drain_window)), '[]')
            FROM unnest($1::integer[]) s CROSS JOIN LATERAL postbox.pace(s) p),
        'now', postbox.clock(), 'wall', clock_timestamp())";

/// Lane, epoch, position, pending, done, crashes and needs, as `postbox.claim` returns them.
type ClaimedRow = (Lane, Epoch, i64, Vec<i64>, Vec<i64>, i32, Vec<String>);

#[derive(Deserialize)]
struct Look {
    members: Vec<Member>,
    lanes: Vec<LaneOf>,
    heads: HashMap<String, i64>,
    /// Subscriptions of which operators decided something.
    decided: Vec<SubscriptionId>,
    paces: Vec<PaceSettings>,
    /// By the clock that everything goes by.
    now: DateTime<Utc>,
    /// By the server's.
    wall: DateTime<Utc>,
}

/// Subscription, lane, epoch, owner and needs. An array, since every look has all of them.
#[derive(Deserialize)]
struct LaneOf(SubscriptionId, Lane, Epoch, Option<ConsumerId>, Vec<String>);

impl LaneOf {
    fn row(&self) -> LaneRow {
        LaneRow {
            lane: self.1,
            epoch: self.2,
            owner: self.3,
            needs: self.4.clone(),
        }
    }
}

impl Session {
    /// Runs until the token is cancelled or the session is lost; the executors have ended when it returns.
    pub(crate) async fn run(mut self, process: &mut Process, token: &CancellationToken) -> Ended {
        let served = AssertUnwindSafe(self.serve(process, token)).catch_unwind().await;
        let ended = match served.unwrap_or_else(|panic| Err(Lost::by_panic(panic.as_ref()))) {
            Ok(()) => match self.stop(process).await {
                Ok(()) => Ended::Stopped,
                Err(error) => {
                    warn!(%error, "could not record the last progress; some messages are delivered again");
                    Ended::Stopped
                }
            },
            Err(lost) => match self.broken.take() {
                Some(why) => Ended::Broken(why),
                None if lost.panicked => Ended::Panicked(lost.why),
                None => Ended::Lost(lost.why),
            },
        };
        for service in self.services {
            // Without commands an executor cancels its handlers and ends.
            drop(service.commands);
            if let Err(error) = service.task.await {
                warn!(%error, "an executor ended unexpectedly");
            }
        }
        drop(self.listener);
        link::close(&self.pool).await;
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
                notification = self.listener.try_recv(), if !self.hearing.is_tired() => match notification? {
                    Some(notification) => match self.hearing.hear(notification.payload()) {
                        Said::Announcement(text) => {
                            // The same with the messages, if it is about to come from this process: then they need not be read.
                            if self.announcements.expects_announcements()
                                && let Ok(Ok(announcement)) = tokio::time::timeout(A_MOMENT, self.announced.recv()).await
                            {
                                tell(process, &announcement.text, announcement.messages.as_deref());
                            }
                            if !tell(process, text, None) {
                                self.looks = 0;
                                next_look = Instant::now();
                            }
                        }
                        Said::Look(due) => {
                            self.looks = 0;
                            next_look = next_look.min(due);
                        }
                        Said::Nothing => {}
                    },
                    None => return Err(Lost::from("the connection was closed".to_owned())),
                },
                announced = self.announced.recv() => {
                    // It comes from the server, too.
                    if let Ok(announcement) = announced {
                        tell(process, &announcement.text, announcement.messages.as_deref());
                    }
                }
                Some(event) = self.events.recv() => {
                    match event {
                        Event::Released { subscription, snapshot } => {
                            // What became of their messages goes first.
                            self.checkpoint().await?;
                            self.release(subscription, snapshot).await?;
                        }
                        Event::Unknown { subscription, message_type } => self.ask(subscription, message_type),
                        Event::Orphaned { subscription } => {
                            self.checkpoint().await?;
                            self.orphans_are_known(subscription);
                        }
                        Event::Stale => {}
                        Event::Broken { subscription, why } => self.restart(process, subscription, &why)?,
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
                    self.complain().await?;
                    in_time(&self.lease, self.watch.look(&mut self.listener)).await?;
                }
                Some(ask) = process.asks.recv() => match ask {
                    Ask::Follow { moved, followed } => {
                        next_look = self.look(process).await?;
                        if let Some(missing) = process.clock.catch_up(moved) {
                            self.advance(process, missing);
                        }
                        // Whoever asked may have given up.
                        let _ = followed.send(());
                    }
                    Ask::Tell(asker) => self.command_all(process, || Command::Tell(asker.clone())),
                },
                // Nothing else was due.
                () = std::future::ready(()), if self.hearing.is_tired() => self.hearing.rest(),
            }
        }
    }

    /// To all executors of the process.
    fn command_all(&self, process: &Process, command: impl Fn() -> Command) {
        self.services
            .iter()
            .for_each(|service| service.command(command()));
        process.command_broadcasts(command);
    }

    /// The database's clock was moved on.
    fn advance(&self, process: &Process, span: Duration) {
        self.command_all(process, || Command::Advance(span));
    }

    /// Starts another executor in the place of one that panicked. Its lanes stay this instance's; they are claimed again, as after a claim whose answer
    /// was lost, and go on from their last checkpoint.
    fn restart(&mut self, process: &Process, subscription: SubscriptionId, why: &str) -> Result<(), Lost> {
        let Some(service) = self
            .services
            .iter_mut()
            .find(|service| service.id == subscription)
        else {
            return Ok(());
        };
        let plan = &process.subscriptions[service.n].plan;
        let Some(wait) = service.restarts.next_wait() else {
            say(|| {
                error!(group = %plan.group, topic = %plan.topic, why, "the executor panics again and again: the consumer ends");
            });
            let why = format!(
                "the executor of group {} on topic {} panics again and again, the last time with: {why}",
                plan.group, plan.topic
            );
            self.broken = Some(why.clone());
            return Err(Lost::from(why));
        };
        say(|| {
            error!(
                group = %plan.group, topic = %plan.topic, why, ?wait,
                "the executor panicked: its handlers were cancelled; starting another one"
            );
        });
        let membership = Membership {
            consumer: self.id,
            subscription,
            lease: self.lease.clone(),
            progress: service.progress.clone(),
            events: self.event_sender.clone(),
        };
        (service.commands, service.task) = start(process, service.n, service.lanes, membership);
        service.claims = Claims::default();
        service.pacer = Pacer::default();
        service.elsewhere = Elsewhere::default();
        service.rests_until = Some(Instant::now() + wait);
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

/// Passes the sequencer's announcement on; `false` if it does not say what is new.
fn tell(process: &Process, text: &str, messages: Option<&[StoredMessage]>) -> bool {
    for (topic, head, segment) in announcements::topics(text) {
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
                "filtered": plan.counters.filtered.load(Ordering::Relaxed),
                "filter_errors": plan.counters.filter_errors.load(Ordering::Relaxed),
                "filters": plan.router.filters(),
                "unknown": plan.counters.unknown.load(Ordering::Relaxed),
                "unknown_types": plan.counters.unknown_types(),
                "breaker": plan.counters.intake().as_str(),
                "connection_wait": plan.connection_wait().map(|wait| wait.as_secs_f64()),
            })
        })
        .collect();
    serde_json::Value::Array(subscriptions)
}

/// Starts an executor.
fn start(
    process: &Process,
    n: usize,
    lanes: u16,
    membership: Membership,
) -> (mpsc::UnboundedSender<Command>, JoinHandle<()>) {
    let plan = process.subscriptions[n].plan.clone();
    let (commands, receiver) = mpsc::unbounded_channel();
    let (subscription, events) = (membership.subscription, membership.events.clone());
    let log = process.logs[&plan.topic].clone();
    let executor = Executor::new(plan, lanes, log, Some(membership), receiver);
    let task = tokio::spawn(async move {
        if let Err(Broken { why, .. }) = executor.run().await {
            // The session may be over.
            let _ = events.send(Event::Broken { subscription, why });
        }
    });
    (commands, task)
}
