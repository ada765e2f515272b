//! Which instance handles which types: what this one registers, what it learns of the others when a lane needs somebody, and what it makes of it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use sqlx::types::Json;
use tracing::{info, warn};

use super::{Look, Lost, Session, in_time};
use crate::executor::Command;
use crate::handler::UnknownType;
use crate::handler::router::Takes;
use crate::ids::{ConsumerId, Epoch, Lane, SubscriptionId};
use crate::protocol::redelivery;
use crate::session::Process;

/// The types that an instance handles, by subscription.
type TypesOf = HashMap<String, Vec<String>>;

/// Those who are about to leave claim nothing more.
const TYPES: &str = "SELECT id, types FROM postbox.consumer WHERE subscriptions && $1 AND NOT leaving";

/// The hashes of types that nobody handles and that are settled: messages that have one of these need not be read. Without those that a type which
/// is handled has too; an untyped message has none.
const UNREAD: &str = "SELECT postbox.key_hash(u.name), u.name FROM unnest($1::text[]) AS u (name) \
     WHERE u.name <> '' AND postbox.key_hash(u.name) <> ALL (ARRAY(SELECT postbox.key_hash(h.name) FROM unnest($2::text[]) AS h (name)))";

/// Of one subscription: what there was of types that this instance does not handle.
#[derive(Default)]
pub(super) struct Elsewhere {
    /// Types that its executor met.
    met: BTreeSet<String>,
    /// Those of them that were told of in the log, by whether somebody handles them.
    told: HashMap<String, bool>,
    /// As the executor knows them.
    orphans: HashSet<String>,
    /// What the live instances handled then.
    handled: BTreeSet<String>,
    /// How often the executor was told, and how often it has obeyed.
    told_orphans: u64,
    obeyed: u64,
    /// Which lanes under which epochs have no row that waits for which types.
    served: HashMap<(Lane, Epoch), BTreeSet<String>>,
}

/// The types that this instance takes, by subscription.
pub(super) fn registered(
    process: &Process,
    registered: &[(usize, SubscriptionId, u16)],
) -> Json<BTreeMap<String, Vec<String>>> {
    let types = registered.iter().map(|(n, subscription, _)| {
        let takes = process.subscriptions[*n].plan.router.takes();
        let types = takes.types().into_iter().map(ToOwned::to_owned).collect();
        (subscription.to_string(), types)
    });
    Json(types.collect())
}

impl Session {
    /// An executor met a message of a type that it has no handler for.
    pub(super) fn ask(&mut self, subscription: SubscriptionId, message_type: String) {
        if let Some(service) = self
            .services
            .iter_mut()
            .find(|service| service.id == subscription)
        {
            service.elsewhere.met.insert(message_type);
        }
    }

    /// An executor leaves none of the types to others any more that nobody handles, and what it left is recorded.
    pub(super) fn orphans_are_known(&mut self, subscription: SubscriptionId) {
        let mut services = self.services.iter_mut();
        if let Some(service) = services.find(|service| service.id == subscription) {
            service.elsewhere.obeyed += 1;
        }
    }

    /// What the live members take, of subscriptions where it matters.
    pub(super) async fn who_takes_what(
        &mut self,
        look: &Look,
        dead: &HashSet<ConsumerId>,
    ) -> Result<HashMap<SubscriptionId, HashMap<ConsumerId, Takes>>, Lost> {
        let needy: HashSet<SubscriptionId> = (look.lanes.iter())
            .filter(|lane| !lane.4.is_empty())
            .map(|lane| lane.0)
            .collect();
        let asks = |elsewhere: &Elsewhere, policy| {
            elsewhere
                .met
                .iter()
                .any(|name| !elsewhere.told.contains_key(name))
                || (policy != UnknownType::Wait && !elsewhere.met.is_empty())
        };
        let ids: Vec<SubscriptionId> = (self.services.iter())
            .filter(|service| {
                needy.contains(&service.id) || asks(&service.elsewhere, service.plan.unknown_types)
            })
            .map(|service| service.id)
            .collect();
        if ids.is_empty() {
            return Ok(HashMap::new());
        }
        let query = sqlx::query_as(TYPES).bind(&ids).fetch_all(&mut self.listener);
        let members: Vec<(ConsumerId, Json<TypesOf>)> = in_time(&self.lease, query).await?;
        let of = |subscription: SubscriptionId| {
            let takes = members.iter().filter_map(|(member, Json(types))| {
                let types = types.get(&subscription.to_string())?;
                Some((*member, types.iter().cloned().collect()))
            });
            takes.filter(|(member, _)| !dead.contains(member)).collect()
        };
        Ok(ids.into_iter().map(|id| (id, of(id))).collect())
    }

    /// Tells of types that nobody handles, and has the executor take up what waits for this instance without a key. `true`: there is more.
    pub(super) async fn serve_needs(
        &mut self,
        n: usize,
        look: &Look,
        takes: &HashMap<ConsumerId, Takes>,
    ) -> Result<bool, Lost> {
        let mine = self.services[n].plan.router.takes();
        let service = &mut self.services[n];
        let claims = &service.claims;
        let lanes: Vec<_> = (look.lanes.iter())
            .filter(|lane| lane.0 == service.id && !lane.4.is_empty())
            .filter_map(|lane| Some((lane.1, claims.epoch(lane.1)?, &lane.4)))
            .collect();
        let needed = lanes.iter().flat_map(|(.., needs)| needs.iter().cloned());
        let foreign: BTreeSet<String> = (needed.chain(service.elsewhere.met.iter().cloned()))
            .filter(|name| !mine.has(name))
            .collect();
        let policy = service.plan.unknown_types;
        let mut orphans = HashSet::new();
        for name in foreign {
            let is_handled = takes.values().any(|takes| takes.has(&name));
            if service.elsewhere.told.insert(name.clone(), is_handled) != Some(is_handled) {
                tell(&service.plan, &name, is_handled);
            }
            if !is_handled {
                orphans.insert(name);
            }
        }
        // A type that is handled from now on may have the hash of one that is not.
        let handled = takes.values().chain([&mine]).flat_map(Takes::types);
        let handled: BTreeSet<String> = handled.map(ToOwned::to_owned).collect();
        let known = (&service.elsewhere.orphans, &service.elsewhere.handled);
        if policy != UnknownType::Wait && known != (&orphans, &handled) {
            let mut unread = HashMap::new();
            if policy == UnknownType::Settle {
                let names: Vec<&String> = orphans.iter().collect();
                let taken: Vec<&String> = handled.iter().collect();
                let query = sqlx::query_as(UNREAD).bind(names).bind(taken);
                let hashes: Vec<(i32, String)> =
                    in_time(&self.lease, query.fetch_all(&mut self.listener)).await?;
                unread = hashes.into_iter().collect();
            }
            service.elsewhere.handled = handled;
            service.elsewhere.told_orphans += 1;
            service.elsewhere.orphans.clone_from(&orphans);
            let types = orphans;
            service.command(Command::Orphans { types, unread });
        }

        // What waits and is this instance's to handle, or to treat as the policy says: once no more of it is left to others, so that none is
        // written after it was looked for.
        let are_known = service.elsewhere.obeyed >= service.elsewhere.told_orphans;
        let is_ours =
            |name: &String| mine.has(name) || (are_known && service.elsewhere.orphans.contains(name));
        let served = &service.elsewhere.served;
        let wanted = lanes.iter().filter_map(|(lane, epoch, needs)| {
            let served = served.get(&(*lane, *epoch));
            let is_open = |name: &&String| is_ours(name) && served.is_none_or(|of| !of.contains(*name));
            let types: Vec<String> = needs.iter().filter(is_open).cloned().collect();
            (!types.is_empty()).then_some((*lane, *epoch, types))
        });
        let wanted: Vec<(Lane, Epoch, Vec<String>)> = wanted.collect();
        if wanted.is_empty() {
            return Ok(false);
        }
        if service.plan.counters.retrying() >= service.plan.window as u64 {
            return Ok(true);
        }
        let types: BTreeSet<String> = wanted
            .iter()
            .flat_map(|(.., types)| types.iter().cloned())
            .collect();
        let types: Vec<String> = types.into_iter().collect();
        let numbers: Vec<Lane> = wanted.iter().map(|(lane, ..)| *lane).collect();
        let waiting = redelivery::waiting(
            &mut self.listener,
            service.id,
            &service.plan.filters,
            &numbers,
            &types,
            service.plan.order.as_str(),
        );
        let held = in_time(&self.lease, waiting).await?;
        let there_are_more = held.len() as i64 == redelivery::DECIDED;
        if !held.is_empty() {
            service.command(Command::Decided(held));
        }
        if !there_are_more {
            let lanes: Vec<(Lane, Epoch)> = wanted.iter().map(|(lane, epoch, _)| (*lane, *epoch)).collect();
            let claims = &service.claims;
            let served = &mut service.elsewhere.served;
            served.retain(|(lane, epoch), _| claims.epoch(*lane) == Some(*epoch));
            for lane in &lanes {
                served.entry(*lane).or_default().extend(types.iter().cloned());
            }
            service.command(Command::Served { lanes, types });
        }
        Ok(there_are_more)
    }
}

fn tell(plan: &crate::executor::Plan, message_type: &str, is_handled: bool) {
    let (group, topic) = (plan.group.as_ref(), plan.topic.as_ref());
    if is_handled {
        info!(
            group,
            topic, message_type, "messages of this type are left to instances that handle it"
        );
        return;
    }
    match plan.unknown_types {
        UnknownType::Wait => warn!(
            group,
            topic,
            message_type,
            "no live instance handles messages of this type: they wait, and their keys with them; start one that does, or let the group's handlers say unknown = \"settle\""
        ),
        UnknownType::Fail => warn!(
            group,
            topic, message_type, "no live instance handles messages of this type: they fail"
        ),
        UnknownType::DeadLetter => warn!(
            group,
            topic,
            message_type,
            "no live instance handles messages of this type: they go to the dead letters"
        ),
        // The first that is settled says so.
        UnknownType::Settle => {}
    }
}
