//! From handler definitions to subscriptions.

use std::sync::Arc;
use std::time::Duration;

use postbox::log::Filters;
use postbox::{Position, is_name};
use sqlx::PgPool;
use tokio::sync::Semaphore;
use tracing::info;

use crate::clock::DatabaseClock;
use crate::connections::Statements;
use crate::connections::{self, Share};
use crate::error::Error;
use crate::executor::{Plan, Transactions};
use crate::handler::UnknownType;
use crate::handler::filter::FiltersOfTopics;
use crate::handler::retry::Retry;
use crate::handler::router::{Handler, Router};
use crate::handler::{Audience, HandlerDefinition, MessageOrder};
use crate::handler::{HOOKS_AT_ONCE, Hooks};
use crate::outcome::HandlerError;
use crate::protocol::progress::Counters;
use crate::settings::Settings;
use crate::state::States;
use postbox_core::DailyWindow;

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
    pub(crate) start: Position,
    pub(crate) pace: PaceInCode,
}

/// How fast it may go, where no operator says it.
#[derive(Debug, Default)]
pub(crate) struct PaceInCode {
    pub(crate) rate: Option<f64>,
    pub(crate) instance_rate: Option<f64>,
    pub(crate) window: Option<DailyWindow>,
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
    /// With which the topic is read.
    filters: Arc<Filters>,
}

pub(crate) fn plan_all(
    definitions: &[HandlerDefinition],
    settings: &Settings,
    states: &Arc<States>,
    (pool, upkeep): (&PgPool, &PgPool),
    clock: &Arc<DatabaseClock>,
    filters: &FiltersOfTopics,
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
                filters: filters.of(&topic),
                topic,
                members: vec![definition],
            }),
        }
    }
    if families.is_empty() {
        return Err(Error::NoHandlers);
    }
    let quarantine = Arc::new(Semaphore::new(1));
    let hooks_pool = settings.tx_pool.as_ref().unwrap_or(pool);
    let mut shares = shares(&families, settings, pool)?;
    families
        .into_iter()
        .zip(&mut shares)
        .map(|(family, share)| {
            family.plan(
                settings,
                states,
                share.take(),
                (hooks_pool, upkeep),
                &quarantine,
                clock,
            )
        })
        .collect()
}

/// The connections of those that are transactional.
fn shares(families: &[Family<'_>], settings: &Settings, pool: &PgPool) -> Result<Vec<Option<Share>>, Error> {
    let mut wanted = Vec::new();
    for family in families.iter().filter(|family| family.is_transactional()) {
        let connections = family.agreed("connections", |definition| definition.connections)?;
        wanted.push((family.group.as_str(), family.topic.as_str(), connections));
    }
    let mut shares = match &settings.tx_pool {
        Some(of_their_own) => connections::divide(of_their_own, false, &wanted),
        None => connections::divide(pool, true, &wanted),
    }
    .into_iter();
    let of = |family: &Family<'_>| family.is_transactional().then(|| shares.next()).flatten();
    Ok(families.iter().map(of).collect())
}

fn check<'a>(definition: &'a HandlerDefinition, states: &States) -> Result<(&'a Audience, String), Error> {
    let handler = definition.name;
    let audience = definition.audience.as_ref().ok_or(Error::NoGroup { handler })?;
    let topic = definition.topic_name().ok_or(Error::NoTopic { handler })?;
    if definition.topic.is_some() && definition.dead_letters_of.is_some() {
        return Err(Error::TwoTopics {
            handler,
            option: "dead_letters_of",
        });
    }
    if (definition.topic.is_some() || definition.dead_letters_of.is_some()) && definition.cron.is_some() {
        return Err(Error::TwoTopics {
            handler,
            option: "cron",
        });
    }
    if definition.missed.is_some() && definition.cron.is_none() {
        return Err(Error::MissedWithoutCron { handler });
    }
    let invalid = |what, name: &str| Error::InvalidName {
        handler,
        what,
        name: name.to_owned(),
    };
    if !is_name(&topic) {
        return Err(invalid("topic", &topic));
    }
    if let Some(name) = definition.types.iter().find(|name| !is_name(name)) {
        return Err(invalid("type", name));
    }
    let needs = definition.needs.iter();
    let hook = definition.on_dead_letter.as_ref();
    let mut asked_for = (needs.clone().chain(hook.map(|hook| &hook.needs)))
        .flat_map(|needs| needs.states.iter().flatten())
        .map(|state| state());
    if let Some(state) = asked_for.find(|state| !states.has(*state)) {
        return Err(Error::MissingState {
            handler,
            state: state.name,
        });
    }
    if definition.dead_letters_of.is_none() && needs.clone().any(|needs| needs.dead_letter) {
        return Err(Error::NoDeadLetters { handler });
    }
    if *audience == Audience::Broadcast && (definition.is_transactional() || definition.settles()) {
        return Err(Error::BroadcastTx { handler });
    }
    if hook.is_some_and(|hook| hook.needs.settlement) {
        return Err(Error::Settlement {
            handler,
            why: "its hook for dead letters takes one, and there is nothing that a hook could settle",
        });
    }
    if definition.settles() && definition.is_transactional() {
        return Err(Error::Settlement {
            handler,
            why: "it takes a Tx too, which settles the message by itself",
        });
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
    if definition.batch.is_some() != definition.takes_batches() {
        return Err(Error::Batch { handler });
    }
    if let Some(batch) = definition.batch.filter(|batch| !(1..=MAX_BATCH).contains(batch)) {
        return Err(out_of_range("batch", batch.to_string(), "it is 1 to 10,000"));
    }
    let rates = [
        ("rate", definition.rate),
        ("instance_rate", definition.instance_rate),
    ];
    for (option, rate) in rates {
        if let Some(rate) = rate.filter(|rate| !(*rate > 0.0 && *rate < 1e9)) {
            return Err(out_of_range(
                option,
                rate.to_string(),
                "it is above 0 and below a billion messages a second",
            ));
        }
    }
    if *audience == Audience::Broadcast
        && (rates.iter().any(|(_, rate)| rate.is_some()) || definition.window.is_some())
    {
        return Err(Error::BroadcastPace { handler });
    }
    if definition.connections == Some(0) {
        return Err(out_of_range("connections", "0".to_owned(), "it is at least 1"));
    }
    if definition.timeout.is_zero() {
        return Err(out_of_range("timeout", "0".to_owned(), "it is more than zero"));
    }
    Ok((audience, topic))
}

impl Family<'_> {
    fn is_transactional(&self) -> bool {
        self.members
            .iter()
            .any(|definition| definition.is_transactional())
    }

    fn plan(
        self,
        settings: &Settings,
        states: &Arc<States>,
        share: Option<Share>,
        (hooks_pool, upkeep): (&PgPool, &PgPool),
        quarantine: &Arc<Semaphore>,
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
            Position::Earliest
        } else {
            Position::Latest
        };
        let start = self
            .agreed("start", |definition| definition.start)?
            .unwrap_or(default_start);
        let lanes = self
            .agreed("lanes", |definition| definition.lanes)?
            .unwrap_or(DEFAULT_LANES);
        let breaker = self
            .agreed("breaker", |definition| definition.breaker)?
            .unwrap_or_default();
        let pace = PaceInCode {
            rate: self.agreed("rate", |definition| definition.rate)?,
            instance_rate: self.agreed("instance_rate", |definition| definition.instance_rate)?,
            window: self.window()?,
        };
        let unknown_types = self
            .agreed("unknown", |definition| definition.unknown)?
            .unwrap_or(settings.unknown_types);
        let one_lane = kind != Kind::Group || order == MessageOrder::Topic;
        let mut concurrency = self
            .members
            .iter()
            .filter_map(|definition| definition.concurrency)
            .max()
            .unwrap_or(
                match self.members.iter().all(|definition| definition.takes_batches()) {
                    true => DEFAULT_BATCHES,
                    false => DEFAULT_CONCURRENCY,
                },
            );
        let batch = (self.members.iter())
            .filter_map(|definition| definition.batch)
            .max()
            .unwrap_or(1);
        if let Some(share) = share.as_ref().filter(|_| {
            self.members
                .iter()
                .all(|definition| definition.is_transactional())
        }) {
            // More would only wait for a connection.
            concurrency = concurrency.min(share.most());
        }
        let transactional = self
            .members
            .iter()
            .filter(|definition| definition.is_transactional());
        let timeout = transactional.map(|definition| definition.timeout).max();
        let transactions = share.map(|share| Transactions {
            share: Arc::new(share),
            statements: Arc::new(Statements::within(timeout.unwrap_or_default())),
        });

        let mut hooks = self
            .members
            .iter()
            .filter_map(|definition| definition.on_dead_letter.as_ref());
        let hooks_at_once = if hooks.any(|hook| hook.needs.transaction) {
            1
        } else {
            HOOKS_AT_ONCE
        };

        let filters = self.filters.clone();
        let mut router = Router::new();
        for definition in &self.members {
            let handler = Arc::new(Handler::new(definition, &filters).ok_or(Error::NoCall {
                handler: definition.name,
            })?);
            router
                .add(&definition.type_names(), handler)
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
            filters,
            unknown_types,
            unknown: Arc::new(refuse_unknown(unknown_types)),
            breaker,
            max_failing: settings.max_failing,
            quarantine: quarantine.clone(),
            clock: clock.clone(),
            states: states.clone(),
            pool: upkeep.clone(),
            hooks: Arc::new(Hooks::new(hooks_pool.clone(), hooks_at_once)),
            transactions,
            counters: Counters::default(),
        };
        Ok(Subscription {
            plan: Arc::new(plan),
            kind,
            start,
            pace,
        })
    }

    fn window(&self) -> Result<Option<DailyWindow>, Error> {
        let windows = self
            .members
            .iter()
            .map(|definition| {
                let window = definition.window.as_deref().map(str::parse).transpose();
                window.map_err(|source| Error::Window {
                    handler: definition.name,
                    source,
                })
            })
            .collect::<Result<Vec<Option<DailyWindow>>, _>>()?;
        self.agreed_on("window", windows.into_iter().flatten())
    }

    fn agreed<T: PartialEq>(
        &self,
        option: &'static str,
        of: impl Fn(&HandlerDefinition) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        self.agreed_on(
            option,
            self.members.iter().filter_map(|definition| of(definition)),
        )
    }

    fn agreed_on<T: PartialEq>(
        &self,
        option: &'static str,
        mut said: impl Iterator<Item = T>,
    ) -> Result<Option<T>, Error> {
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

/// Runs for messages of a type that no live instance handles, where that is an error: they fail until one does, or are given up.
fn refuse_unknown(policy: UnknownType) -> Handler {
    let definition = HandlerDefinition::new("unknown type")
        .retry(Retry::exponential(Duration::from_secs(1), Duration::from_secs(60)).unlimited())
        .call(move |invocation| {
            Box::pin(async move {
                let message_type = invocation
                    .record
                    .message()
                    .message_type
                    .as_deref()
                    .unwrap_or("(none)");
                let reason = format!(
                    "no live instance of group {} has a handler for type {message_type:?}",
                    invocation.group
                );
                Err(match policy {
                    UnknownType::DeadLetter => HandlerError::dead_letter(reason),
                    _ => HandlerError::retry(reason),
                })
            })
        });
    Handler::new(&definition, &Filters::NONE).expect("the definition has a function to call")
}

pub(crate) fn log_subscription(subscription: &Subscription) {
    let plan = &subscription.plan;
    let handlers: Vec<&str> = plan.router.handlers().map(|handler| handler.name).collect();
    info!(
        group = %plan.group, topic = %plan.topic, order = plan.order.as_str(), lanes = plan.lanes,
        concurrency = plan.concurrency, handlers = handlers.join(" "), "subscribed"
    );
}
