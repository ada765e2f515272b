//! How things stand in the database, and whether that and what the executors say comes to "settled".
//!
//! The executors are asked first, and the database after that, in one snapshot. Each answers once it can do nothing but wait, with how far it has taken
//! in its topic. If then, in that snapshot, nothing committed lacks its offset, nothing is due, and no topic goes further than what was taken in, nothing has
//! come since they answered: so they still wait. See docs/internals/testing.md.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chrono::{DateTime, TimeDelta, Utc};
use postbox_consumer::__testkit::Standing;
use postbox_consumer::DailyWindow;
use serde::Deserialize;
use sqlx::PgPool;
use sqlx::types::Json;

/// The heads of topics ($1), what is due, and of each subscription what only the database knows. Those of $2 are all in this kit's executors, so that
/// these say how far they are; of the others it is asked, which costs more.
const LOOK: &str = "WITH n AS MATERIALIZED (SELECT postbox.clock() AS now) SELECT json_build_object( \
    'now', n.now, \
    'unsequenced', (SELECT u.messages FROM postbox.unsequenced(10000) u), \
    'scheduled', (SELECT count(*) FROM postbox.scheduled s WHERE s.deliver_at <= n.now), \
    'crons', (SELECT coalesce(json_agg(c.name), '[]') FROM postbox.cron c WHERE NOT c.paused AND c.next_at <= n.now), \
    'heads', (SELECT coalesce(json_object_agg(t, postbox.next_offset(t)), '{}') FROM unnest($1::text[]) t), \
    'handled', (SELECT coalesce(json_agg(c.types), '[]') FROM postbox.consumer c WHERE NOT c.leaving AND postbox.is_live(c.id)), \
    'subscriptions', (SELECT coalesce(json_agg(json_build_object('id', s.id, 'group', s.group_name, 'topic', s.topic, \
            'paused', p.paused, 'window', p.drain_window, \
            'decided', (SELECT count(*) FROM postbox.redelivery r WHERE r.subscription_id = s.id AND r.state IN ('redriven', 'released')), \
            'waits_for', (SELECT coalesce(json_agg(w.type), '[]') FROM ( \
                SELECT coalesce(r.type, '') AS type FROM postbox.redelivery r WHERE r.subscription_id = s.id AND r.state = 'waiting' \
                UNION SELECT k.waits_for FROM postbox.parked_key k WHERE k.subscription_id = s.id AND k.waits_for IS NOT NULL) w), \
            'is_served', EXISTS (SELECT FROM postbox.consumer c WHERE s.id = ANY (c.subscriptions) AND postbox.is_live(c.id)), \
            'backlog', CASE WHEN s.id <> ALL ($2) THEN (postbox.backlog(s.id)).messages END, \
            'due', CASE WHEN s.id <> ALL ($2) THEN (SELECT count(*) FROM postbox.redelivery r \
                WHERE r.subscription_id = s.id AND (r.state = 'trying' OR r.state = 'retry' AND r.due_at <= n.now)) END, \
            'parked', CASE WHEN s.id <> ALL ($2) THEN (SELECT count(*) FROM postbox.parked_key k \
                WHERE k.subscription_id = s.id AND k.waits_for IS NULL AND NOT EXISTS (SELECT FROM postbox.redelivery r \
                    WHERE r.subscription_id = s.id AND r.key_hash = k.key_hash AND r.state IN ('retry', 'waiting', 'halted'))) END)), '[]') \
        FROM postbox.subscription s CROSS JOIN LATERAL postbox.pace(s.id) p)) FROM n";

/// What fails, for the message.
const FAILING: &str = "SELECT format('group %s on topic %s: message %s%s %s after %s attempts, last error: %s', s.group_name, s.topic, r.id, \
        CASE WHEN r.key IS NULL THEN '' ELSE format(' of key %s', to_json(r.key)) END, \
        CASE r.state WHEN 'retry' THEN format('runs again in %s s', greatest(round(extract(epoch FROM r.due_at - postbox.clock())), 0)) \
            WHEN 'waiting' THEN 'waits for a handler of its type' WHEN 'halted' THEN 'waits for an operator' ELSE r.state END, \
        r.attempt, coalesce(r.errors -> -1 ->> 'error', 'none')) \
     FROM postbox.redelivery r JOIN postbox.subscription s ON s.id = r.subscription_id \
     WHERE r.state <> 'parked' ORDER BY r.due_at, r.\"offset\" LIMIT 20";

#[derive(Deserialize)]
pub(super) struct Look {
    now: DateTime<Utc>,
    unsequenced: i64,
    scheduled: i64,
    crons: Vec<String>,
    heads: HashMap<String, i64>,
    /// What live consumers handle, by subscription.
    handled: Vec<HashMap<String, Vec<String>>>,
    subscriptions: Vec<Subscription>,
}

#[derive(Deserialize)]
struct Subscription {
    id: i32,
    group: String,
    topic: String,
    paused: bool,
    window: Option<String>,
    decided: i64,
    waits_for: Vec<String>,
    is_served: bool,
    backlog: Option<i64>,
    due: Option<i64>,
    parked: Option<i64>,
}

/// The subscriptions all of whose lanes these executors have.
fn whole(standings: &[Standing]) -> BTreeSet<i32> {
    let mut lanes: BTreeMap<i32, (usize, usize)> = BTreeMap::new();
    for standing in standings {
        if let Some(subscription) = standing.subscription {
            let (owned, all) = lanes.entry(subscription).or_default();
            *owned += standing.lanes;
            *all = standing.all_lanes;
        }
    }
    let whole = lanes.into_iter().filter(|(_, (owned, all))| owned == all);
    whole.map(|(subscription, _)| subscription).collect()
}

/// How things stand in the database; asked after these have answered.
pub(super) async fn look(pool: &PgPool, standings: &[Standing]) -> Result<Look, sqlx::Error> {
    let topics: Vec<&str> = standings.iter().map(|standing| &*standing.topic).collect();
    let whole: Vec<i32> = whole(standings).into_iter().collect();
    let Json(look) = sqlx::query_scalar(LOOK)
        .bind(topics)
        .bind(whole)
        .fetch_one(pool)
        .await?;
    Ok(look)
}

/// What fails and waits, in words.
pub(super) async fn failing(pool: &PgPool) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(FAILING).fetch_all(pool).await
}

/// What has something to do now, in words.
pub(super) fn busy(standings: &[Standing]) -> Vec<String> {
    let busy = standings.iter().filter(|standing| standing.busy);
    busy.map(|standing| {
        let Standing {
            running,
            ready,
            telling,
            ..
        } = standing;
        let what = match (running, ready, telling) {
            (0, 0, 0) => "something is being recorded".to_owned(),
            (0, 0, telling) => format!("{telling} are being told of dead letters"),
            (running, ready, _) => format!("{running} run, {ready} more are ready"),
        };
        format!("{}: {what}", of(standing))
    })
    .collect()
}

fn of(standing: &Standing) -> String {
    format!("group {} on topic {}", standing.group, standing.topic)
}

impl Look {
    /// What is not settled, in words, although these executors can do nothing but wait.
    pub(super) fn unsettled(&self, standings: &[Standing]) -> Vec<String> {
        let mut found = Vec::new();
        if self.unsequenced > 0 {
            found.push(format!(
                "{} messages have no place in their topics yet",
                self.unsequenced
            ));
        }
        if self.scheduled > 0 {
            found.push(format!("{} scheduled messages are due", self.scheduled));
        }
        if !self.crons.is_empty() {
            found.push(format!("cron schedules are due: {}", self.crons.join(", ")));
        }
        let whole = whole(standings);
        for standing in standings {
            let is_whole = standing
                .subscription
                .is_none_or(|subscription| whole.contains(&subscription));
            let what = is_whole.then(|| self.of_executor(standing)).flatten();
            found.extend(what.map(|what| format!("{}: {what}", of(standing))));
        }
        for subscription in &self.subscriptions {
            let what = self.of_subscription(subscription, standings);
            found.extend(what.map(|what| {
                format!(
                    "group {} on topic {}: {what}",
                    subscription.group, subscription.topic
                )
            }));
        }
        found
    }

    /// Of one whose lanes are all there.
    fn of_executor(&self, standing: &Standing) -> Option<String> {
        let subscription = self
            .subscriptions
            .iter()
            .find(|each| Some(each.id) == standing.subscription);
        if let Some(open) = subscription.and_then(|subscription| subscription.is_open(self.now))
            && open != standing.open
        {
            return Some(
                if open {
                    "it is about to go on"
                } else {
                    "it is about to pause"
                }
                .to_owned(),
            );
        }
        let head = self.heads.get(&*standing.topic).copied().unwrap_or_default();
        if !standing.held_up && standing.next < head {
            return Some(format!("{} messages are not taken in yet", head - standing.next));
        }
        if !standing.open {
            return None;
        }
        // What it does not know yet of the clock counts, too.
        let behind = (self.now - standing.clock)
            .max(TimeDelta::zero())
            .to_std()
            .unwrap_or_default();
        if standing.retry_in.is_some_and(|wait| wait <= behind) {
            return Some("a message is due to run again".to_owned());
        }
        let probe_in = standing
            .probe_in
            .filter(|_| standing.ready > 0 || standing.next < head);
        probe_in
            .is_some_and(|wait| wait <= behind)
            .then(|| "the breaker is open, and a probe is due".to_owned())
    }

    fn of_subscription(&self, subscription: &Subscription, standings: &[Standing]) -> Option<String> {
        // Nobody would do it.
        if !subscription.is_served || subscription.is_open(self.now) == Some(false) {
            return None;
        }
        if subscription.decided > 0 {
            return Some(format!(
                "{} messages are about to run again by an operator's word",
                subscription.decided
            ));
        }
        if let Some(message_type) = self.awaited_type(subscription, standings) {
            return Some(format!(
                "messages of type {message_type:?} are on their way to who handles them, or to their policy"
            ));
        }
        let count = [subscription.backlog, subscription.due, subscription.parked];
        let count: i64 = count.into_iter().flatten().sum();
        (count > 0)
            .then(|| format!("{count} messages wait; its lanes are not all with consumers of this kit"))
    }

    /// A type of which messages wait although a live consumer handles it, or the policy is another than to wait.
    fn awaited_type<'a>(&self, subscription: &'a Subscription, standings: &[Standing]) -> Option<&'a String> {
        let mut of_it = standings
            .iter()
            .filter(|standing| standing.subscription == Some(subscription.id));
        let waits = of_it.all(|standing| standing.unknown_waits);
        subscription
            .waits_for
            .iter()
            .find(|message_type| !waits || self.handles(subscription.id, message_type))
    }

    fn handles(&self, subscription: i32, message_type: &str) -> bool {
        let mut types = self
            .handled
            .iter()
            .filter_map(|by| by.get(&subscription.to_string()));
        types.any(|types| types.iter().any(|known| known == "*" || known == message_type))
    }
}

impl Subscription {
    /// `None`: its window cannot be understood, so what it was before holds.
    fn is_open(&self, now: DateTime<Utc>) -> Option<bool> {
        if self.paused {
            return Some(false);
        }
        match &self.window {
            None => Some(true),
            Some(window) => Some(window.parse::<DailyWindow>().ok()?.is_open(now)),
        }
    }
}
