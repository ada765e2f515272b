//! A session begins: connected, registered, subscribed.

use std::sync::Arc;
use std::time::Instant;

use postbox_core::announcements::Announcements;
use postbox_core::clock::ClockWatch;
use postbox_core::link;
use postbox_core::locks::Complaints;
use postbox_core::restarts::Restarts;
use postbox_core::seal::Seal;
use sqlx::types::Json;
use tokio::sync::mpsc;
use tracing::{debug, info};

use super::lost::within;
use super::process::Process;
use super::types::{self, Elsewhere};
use super::{REGISTER, SUBSCRIBE, Service, Session, own_lease, start};
use crate::error::Error;
use crate::executor::Membership;
use crate::ids::{ConsumerId, SubscriptionId};
use crate::protocol::progress::{Dirty, Lease, Progress};
use crate::session::claims::Claims;
use crate::session::hearing::Hearing;
use crate::session::members::Members;
use crate::session::node;
use crate::session::pace::Pacer;
use crate::session::watch::Watch;
use crate::subscription::Kind;

impl Session {
    /// Connects, registers subscriptions and instance, and starts the executors, which own nothing yet.
    pub(crate) async fn open(process: &mut Process) -> Result<Self, Error> {
        let options = (*process.pool.connect_options()).clone();
        let (mut listener, pool) = link::open(
            options.application_name("postbox consumer"),
            &["postbox_segment"],
            "",
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
            let subscribe = sqlx::query_as(SUBSCRIBE)
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
                // Once a process: who connects again while another version is deployed has nothing to say of it.
                .bind(process.former.is_empty().then(|| Json(plan.router.filters())))
                .bind(&process.settings.name)
                .fetch_one(&mut listener);
            let (id, lanes, stored, filters_from): (SubscriptionId, i16, String, Option<i64>) =
                within("subscribing", subscribe).await?;
            if let Some(from) = filters_from {
                info!(
                    group = %plan.group, topic = %plan.topic, from,
                    "the filters of this group are others than before; they apply from here on, where this instance handles its messages"
                );
            }
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

        let lease_span = process.settings.lease;
        let of_node: Vec<SubscriptionId> = registered
            .iter()
            .filter(|(n, ..)| matches!(process.subscriptions[*n].kind, Kind::Durable { .. }))
            .map(|(_, id, _)| *id)
            .collect();
        let mut gone = Vec::new();
        if !of_node.is_empty() {
            let node = &process.settings.node;
            gone = node::until_free(&mut listener, node, &of_node, &process.former, lease_span).await?;
        }
        let heartbeat_at = Instant::now();
        let register = sqlx::query_scalar(REGISTER)
            .bind(&process.settings.name)
            .bind(std::process::id() as i32)
            .bind(
                registered
                    .iter()
                    .map(|(_, id, _)| *id)
                    .collect::<Vec<SubscriptionId>>(),
            )
            .bind(lease_span.as_secs_f64())
            .bind(process.former.iter().copied().collect::<Vec<ConsumerId>>())
            .bind(types::registered(process, &registered))
            .fetch_one(&mut listener);
        let id: ConsumerId = match within("registering this instance", register).await {
            Err(error) if link::is_locked_out(&error) => {
                Complaints::default()
                    .complain("a session of a consumer", &mut listener)
                    .await?;
                return Err(error.into());
            }
            registered => registered?,
        };
        let seal = within("looking where this is", Seal::of(&mut listener)).await?;
        if !of_node.is_empty() {
            let node = &process.settings.node;
            node::check_first(&mut listener, node, &of_node, gone, id).await?;
        }

        for log in process.logs.values() {
            log.reset();
        }
        process.readers.open(seal.key());
        let lease = Arc::new(Lease::until(heartbeat_at + own_lease(lease_span)));
        let dirty = Arc::new(Dirty::default());
        let (event_sender, events) = mpsc::unbounded_channel();
        let services = registered
            .into_iter()
            .map(|(n, subscription, lanes)| {
                let progress = Arc::new(Progress::new(dirty.clone()));
                let membership = Membership {
                    consumer: id,
                    subscription,
                    lease: lease.clone(),
                    progress: progress.clone(),
                    events: event_sender.clone(),
                };
                let (commands, task) = start(process, n, lanes, membership);
                Service {
                    id: subscription,
                    lanes,
                    commands,
                    progress,
                    task,
                    claims: Claims::default(),
                    pacer: Pacer::default(),
                    plan: process.subscriptions[n].plan.clone(),
                    elsewhere: Elsewhere::default(),
                    n,
                    restarts: Restarts::new(),
                    rests_until: None,
                }
            })
            .collect();
        let announcements = Announcements::of(seal.key());
        let former = process.former.clone();
        process.former.insert(id);
        debug!(consumer = %id, "session opened");
        Ok(Self {
            id,
            name: process.settings.name.clone(),
            pool,
            announced: announcements.listen(),
            announcements,
            listener,
            lease,
            lease_span,
            heartbeat_at,
            heartbeat: None,
            services,
            dirty,
            events,
            event_sender,
            broken: None,
            members: Members::default(),
            hearing: Hearing::new(seal),
            clock: ClockWatch::default(),
            far_clock_said: None,
            looks: 0,
            watch: Watch::default(),
            checkpointed: Instant::now(),
            former,
        })
    }
}
