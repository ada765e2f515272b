//! From handler definitions to subscriptions.

use std::sync::Arc;
use std::time::Duration;

use postbox::is_name;
use sqlx::PgPool;
use tokio::sync::Semaphore;

use crate::clock::DatabaseClock;
use crate::consumer::{Settings, UnknownType};
use crate::error::Error;
use crate::executor::Plan;
use crate::handler::{Audience, HandlerDefinition, HandlerError, Order, Start};
use crate::progress::Counters;
use crate::retry::Retry;
use crate::router::{Handler, Router};
use crate::state::States;

const DEFAULT_CONCURRENCY: usize = 32;
const DEFAULT_LANES: u16 = 32;
/// Where all handlers take batches.
const DEFAULT_BATCHES: usize = 4;
const MAX_BATCH: usize = 10_000;
const MAX_LANES: u16 = 1024;

/// A subscription that this process serves.
pub(crate) struct Subscription {
    pub(crate) plan: Arc<Plan>,
    pub(crate) kind: Kind,
    pub(crate) start: Start,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Lanes shared by the instances of a group.
    Group,
    /// A node's own cursor in the database.
    Durable { node: String },
    /// A cursor in memory.
    Memory,
}

/// Handlers that share a subscription.
struct Family<'a> {
    audience: &'a Audience,
    group: String,
    topic: String,
    members: Vec<&'a HandlerDefinition>,
}

pub(crate) fn plan_all(
    definitions: &[HandlerDefinition],
    settings: &Settings,
    states: &Arc<States>,
    pool: &PgPool,
    clock: &Arc<DatabaseClock>,
) -> Result<Vec<Subscription>, Error> {
    let mut families: Vec<Family<'_>> = Vec::new();
    for definition in definitions {
        let (audience, topic) = check(definition, states)?;
        // Broadcasts of one process are independent of each other.
        let group = match audience {
            Audience::Group(group) => group.clone(),
            Audience::Broadcast => format!("broadcast/{}", definition.short_name()),
            Audience::DurableBroadcast => format!("node/{}/{}", settings.node, definition.short_name()),
        };
        if !is_name(&group) {
            return Err(Error::InvalidName {
                handler: definition.name,
                what: "group",
                name: group,
            });
        }
        match families
            .iter_mut()
            .find(|family| family.group == group && family.topic == topic)
        {
            Some(family) => family.members.push(definition),
            None => families.push(Family {
                audience,
                group,
                topic: topic.to_owned(),
                members: vec![definition],
            }),
        }
    }
    if families.is_empty() {
        return Err(Error::NoHandlers);
    }
    let trial = Arc::new(Semaphore::new(1));
    families
        .into_iter()
        .map(|family| family.plan(settings, states, pool, &trial, clock))
        .collect()
}

fn check<'a>(definition: &'a HandlerDefinition, states: &States) -> Result<(&'a Audience, &'a str), Error> {
    let handler = definition.name;
    let audience = definition.audience.as_ref().ok_or(Error::NoGroup { handler })?;
    let topic = definition.topic.as_deref().ok_or(Error::NoTopic { handler })?;
    let invalid = |what, name: &str| Error::InvalidName {
        handler,
        what,
        name: name.to_owned(),
    };
    if !is_name(topic) {
        return Err(invalid("topic", topic));
    }
    if let Some(name) = definition.types.iter().find(|name| !is_name(name)) {
        return Err(invalid("type", name));
    }
    if let Some(state) = definition.states.iter().find(|state| !states.has(**state)) {
        return Err(Error::MissingState {
            handler,
            state: state.name,
        });
    }
    if *audience == Audience::Broadcast && definition.transactional {
        return Err(Error::BroadcastTx { handler });
    }
    let out_of_range = |option, value: String, range| Error::OutOfRange {
        handler,
        option,
        value,
        range,
    };
    if definition.concurrency == Some(0) {
        return Err(out_of_range("concurrency", "0".to_owned(), "it is at least 1"));
    }
    if let Some(lanes) = definition.lanes.filter(|lanes| !(1..=MAX_LANES).contains(lanes)) {
        return Err(out_of_range("lanes", lanes.to_string(), "it is 1 to 1024"));
    }
    if definition.batch.is_some() != definition.takes_batches {
        return Err(Error::Batch { handler });
    }
    if let Some(batch) = definition.batch.filter(|batch| !(1..=MAX_BATCH).contains(batch)) {
        return Err(out_of_range("batch", batch.to_string(), "it is 1 to 10,000"));
    }
    if definition.timeout.is_zero() {
        return Err(out_of_range("timeout", "0".to_owned(), "it is more than zero"));
    }
    Ok((audience, topic))
}

impl Family<'_> {
    fn plan(
        self,
        settings: &Settings,
        states: &Arc<States>,
        pool: &PgPool,
        trial: &Arc<Semaphore>,
        clock: &Arc<DatabaseClock>,
    ) -> Result<Subscription, Error> {
        let kind = match self.audience {
            Audience::Group(_) => Kind::Group,
            Audience::Broadcast => Kind::Memory,
            Audience::DurableBroadcast => Kind::Durable {
                node: settings.node.clone(),
            },
        };
        let order = self
            .agreed("order", |definition| definition.order)?
            .unwrap_or_default();
        let default_start = if kind == Kind::Group {
            Start::Earliest
        } else {
            Start::Latest
        };
        let start = self
            .agreed("start", |definition| definition.start)?
            .unwrap_or(default_start);
        let lanes = self
            .agreed("lanes", |definition| definition.lanes)?
            .unwrap_or(DEFAULT_LANES);
        let one_lane = kind != Kind::Group || order == Order::Topic;
        let mut concurrency = self
            .members
            .iter()
            .filter_map(|definition| definition.concurrency)
            .max()
            .unwrap_or(
                match self.members.iter().all(|definition| definition.takes_batches) {
                    true => DEFAULT_BATCHES,
                    false => DEFAULT_CONCURRENCY,
                },
            );
        let batch = (self.members.iter())
            .filter_map(|definition| definition.batch)
            .max()
            .unwrap_or(1);
        if self.members.iter().any(|definition| definition.transactional) {
            // More would only wait for a connection.
            concurrency = concurrency.min(pool.options().get_max_connections() as usize);
        }

        let mut router = Router::new();
        for definition in &self.members {
            let handler = Arc::new(Handler::new(definition).ok_or(Error::NoCall {
                handler: definition.name,
            })?);
            router
                .add(&definition.types, handler)
                .map_err(|(first, message_type)| Error::DuplicateHandler {
                    first,
                    second: definition.name,
                    group: self.group.clone(),
                    message_type,
                })?;
        }
        let plan = Plan {
            group: self.group.into(),
            topic: self.topic.into(),
            order,
            lanes: if one_lane { 1 } else { lanes },
            concurrency,
            // A batch fills while the one before it runs.
            window: (concurrency * 8)
                .max(concurrency * batch * 2)
                .max(settings.window),
            batch,
            router,
            unknown: (settings.unknown_types == UnknownType::Fail).then(|| Arc::new(refuse_unknown())),
            max_failing: settings.max_failing,
            trial: trial.clone(),
            clock: clock.clone(),
            states: states.clone(),
            pool: pool.clone(),
            counters: Counters::default(),
        };
        Ok(Subscription {
            plan: Arc::new(plan),
            kind,
            start,
        })
    }

    fn agreed<T: PartialEq>(
        &self,
        option: &'static str,
        of: impl Fn(&HandlerDefinition) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let mut said = self.members.iter().filter_map(|definition| of(definition));
        let first = said.next();
        if said.all(|other| Some(other) == first) {
            return Ok(first);
        }
        Err(Error::Disagreement {
            group: self.group.clone(),
            topic: self.topic.clone(),
            option,
        })
    }
}

/// Runs for messages of an unknown type where that is an error: they fail until a handler for them is deployed.
fn refuse_unknown() -> Handler {
    let definition = HandlerDefinition::new("unknown type")
        .retry(Retry::exponential(Duration::from_secs(1), Duration::from_secs(60)).unlimited())
        .call(|invocation| {
            Box::pin(async move {
                let message_type = invocation
                    .record
                    .message()
                    .message_type
                    .as_deref()
                    .unwrap_or("(none)");
                Err(HandlerError::retry(format!(
                    "no handler of group {} takes type {message_type:?}",
                    invocation.group
                )))
            })
        });
    Handler::new(&definition).expect("the definition has a function to call")
}
