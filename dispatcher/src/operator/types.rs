//! What groups handle and what is published: types and topics that one side has and the other has not, as findings.

use postbox::__private::dead_letters::TOPIC_PREFIX;
use std::collections::{BTreeMap, BTreeSet};

use sqlx::PgPool;

use super::finding::{Finding, Severity};
use super::status::SubscriptionStatus;

/// So many of a topic's messages are looked at for their types.
const RECENT: i32 = 4096;

const RECENT_TYPES: &str = "SELECT coalesce(type, '') FROM postbox.recent_types($1, $2)";

/// Topics that have had a message.
const TOPICS: &str = "SELECT name FROM postbox.topic ORDER BY name";

/// Their first message comes when it is due.
const SCHEDULED_TOPICS: &str = "SELECT topic FROM postbox.cron";

/// Pauses for which there is no subscription.
const PAUSES_AHEAD: &str = "SELECT p.group_name, p.topic FROM postbox.pause p WHERE NOT EXISTS ( \
         SELECT FROM postbox.subscription s WHERE s.group_name = p.group_name AND p.topic IN ('', s.topic)) ORDER BY 1, 2";

/// Live instances of a subscription, and what each handles.
const INSTANCES: &str = "SELECT c.name, ARRAY(SELECT t.type FROM postbox.live_types(s.id) t WHERE t.consumer_id = c.id) \
     FROM postbox.subscription s CROSS JOIN LATERAL (SELECT DISTINCT t.consumer_id FROM postbox.live_types(s.id) t) l \
     JOIN postbox.consumer c ON c.id = l.consumer_id WHERE s.group_name = $1 AND s.topic = $2 ORDER BY c.id";

/// What the live instances of a subscription have handled, and the filters of each.
const FILTERED: &str = "SELECT f.errors, f.handled, ARRAY(SELECT coalesce(e, '{}') FROM unnest(f.filters) e), f.instances \
     FROM postbox.subscription s CROSS JOIN LATERAL postbox.filtered(s.id) f WHERE s.group_name = $1 AND s.topic = $2";

/// Filters by message type.
type ByType = BTreeMap<String, Option<String>>;

/// All types, as an instance registers it.
const ALL: &str = "*";

pub(super) async fn examine(
    pool: &PgPool,
    subscriptions: &[SubscriptionStatus],
) -> Result<Vec<Finding>, sqlx::Error> {
    let topics: Vec<String> = sqlx::query_scalar(TOPICS).fetch_all(pool).await?;
    let scheduled: Vec<String> = sqlx::query_scalar(SCHEDULED_TOPICS).fetch_all(pool).await?;
    let mut published: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let mut findings = Vec::new();
    for subscription in subscriptions {
        let topic = subscription.topic.as_str();
        findings.extend(waiting(subscription));
        findings.extend(unknown(subscription));
        let instances: Vec<(String, Vec<String>)> = sqlx::query_as(INSTANCES)
            .bind(&subscription.group_name)
            .bind(topic)
            .fetch_all(pool)
            .await?;
        findings.extend(divided(subscription, &instances));
        let (errors, handled, filters, names): (i64, i64, Vec<sqlx::types::Json<ByType>>, Vec<String>) =
            sqlx::query_as(FILTERED)
                .bind(&subscription.group_name)
                .bind(topic)
                .fetch_one(pool)
                .await?;
        findings.extend(filtered(subscription, handled));
        if errors > 0 {
            findings.push(cannot_be_evaluated(subscription, errors));
        }
        findings.extend(filter_differently(subscription, &filters, &names));
        if let Some(of_group) = topic.strip_prefix(TOPIC_PREFIX) {
            findings.extend(without_group(subscription, of_group, subscriptions));
            continue;
        }
        if !topics.iter().any(|name| name == topic) {
            if !scheduled.iter().any(|name| name == topic) {
                findings.push(without_messages(subscription, &topics));
            }
            continue;
        }
        if !published.contains_key(topic) {
            let types: Vec<String> = sqlx::query_scalar(RECENT_TYPES)
                .bind(topic)
                .bind(RECENT)
                .fetch_all(pool)
                .await?;
            published.insert(topic, types.into_iter().collect());
        }
        findings.extend(never_published(subscription, &published[topic]));
    }
    let pauses: Vec<(String, String)> = sqlx::query_as(PAUSES_AHEAD).fetch_all(pool).await?;
    findings.extend(
        pauses
            .iter()
            .map(|(group, topic)| pause_ahead(group, topic, subscriptions)),
    );
    Ok(findings)
}

/// A handler of the dead letters of a group that is not there.
fn without_group(
    subscription: &SubscriptionStatus,
    group: &str,
    all: &[SubscriptionStatus],
) -> Option<Finding> {
    if all.iter().any(|one| one.group_name == group) {
        return None;
    }
    let what = format!(
        "{} handles the dead letters of group {group}, which there is not",
        subscription.group_name
    );
    let near = nearest(group, all.iter().map(|one| one.group_name.as_str()));
    Some(match near {
        Some(near) => Finding::new(
            Severity::Warning,
            "no-such-group",
            format!("{what}; there is a group {near}"),
            format!("if {near} is meant, name it in the handler: dead_letters_of = \"{near}\""),
        ),
        None => Finding::new(
            Severity::Note,
            "no-such-group",
            what,
            "nothing is to be done if it is still to come; `postbox subscriptions list` shows those there are",
        ),
    })
}

/// A pause of a group that is still to come, or of none at all.
fn pause_ahead(group: &str, topic: &str, all: &[SubscriptionStatus]) -> Finding {
    let of = match topic {
        "" => group.to_owned(),
        topic => format!("{group} on {topic}"),
    };
    let near = nearest(group, all.iter().map(|one| one.group_name.as_str()));
    let near = near.map_or(String::new(), |near| format!("; there is a group {near}"));
    Finding::new(
        Severity::Note,
        "paused-ahead",
        format!("{of} is paused, and there is no such subscription: it will begin paused{near}"),
        format!(
            "`postbox subscriptions resume {}` takes that back",
            of.replace(" on ", " ")
        ),
    )
}

/// Messages that nobody handles wait.
fn waiting(subscription: &SubscriptionStatus) -> Option<Finding> {
    if subscription.waiting_types.is_empty() {
        return None;
    }
    let types: Vec<String> = subscription
        .waiting_types
        .iter()
        .map(|name| quoted(name))
        .collect();
    let near = (subscription.waiting_types.iter())
        .find_map(|name| nearest(name, subscription.types.iter().map(String::as_str)))
        .map_or_else(String::new, |name| format!(" (they handle {})", quoted(name)));
    Some(Finding::new(
        Severity::Error,
        "unhandled-type",
        format!(
            "messages of {} on {} wait, with their keys, since no live instance handles their type: {}{near}",
            subscription.group_name,
            subscription.topic,
            types.join(", ")
        ),
        "start instances that have a handler for it; where the group is not interested in it, let its handlers say unknown = \"settle\"",
    ))
}

/// Messages that nobody handles are settled.
fn unknown(subscription: &SubscriptionStatus) -> Option<Finding> {
    if subscription.unknown == 0 {
        return None;
    }
    let types: Vec<String> = (subscription.unknown_types.0.iter())
        .map(|(name, count)| format!("{count} of type {}", quoted(name)))
        .collect();
    // A broadcast is one handler, which is there for its types.
    let severity = match subscription.group_name.starts_with("node/") {
        true => Severity::Note,
        false => Severity::Warning,
    };
    Some(Finding::new(
        severity,
        "unknown-type-settled",
        format!(
            "{} on {} has settled {} messages without handling them: {}",
            subscription.group_name,
            subscription.topic,
            subscription.unknown,
            types.join(", ")
        ),
        "that is what unknown = \"settle\" says; if they should be handled, add a handler and `postbox subscriptions replay` them",
    ))
}

/// Messages are passed by a filter. If that is so of all, it may have a slip.
fn filtered(subscription: &SubscriptionStatus, handled: i64) -> Option<Finding> {
    if subscription.filtered == 0 {
        return None;
    }
    let filters = subscription.filters.0.iter().filter_map(|(name, filter)| {
        let filter = filter.as_ref()?;
        Some(match name.as_str() {
            ALL => filter.clone(),
            name => format!("{} {filter}", quoted(name)),
        })
    });
    let filters: BTreeSet<String> = filters.collect();
    let what = format!(
        "{} on {} has passed {} messages that its filters do not want: {}",
        subscription.group_name,
        subscription.topic,
        subscription.filtered,
        filters.into_iter().collect::<Vec<_>>().join("; ")
    );
    Some(match handled {
        0 => Finding::new(
            Severity::Warning,
            "filtered-all",
            format!("{what}. No message was handled"),
            "compare the filter with a message (`postbox messages show ID`): names are case sensitive, and of a payload that is no JSON nothing is true",
        ),
        _ => Finding::new(
            Severity::Note,
            "filtered",
            what,
            "that is what filter = \"…\" says; what is to be handled after all, `postbox subscriptions replay` brings once the filter wants it",
        ),
    })
}

/// Messages of which a filter can say nothing.
fn cannot_be_evaluated(subscription: &SubscriptionStatus, messages: i64) -> Finding {
    Finding::new(
        Severity::Warning,
        "filter-errors",
        format!(
            "a filter of {} on {} cannot be evaluated of {messages} messages, which were passed without being handled",
            subscription.group_name, subscription.topic
        ),
        "the log names the first of them; SELECT jsonb_path_match_tz(…) of its document says what is wrong",
    )
}

/// Instances with other filters: which one counts is a lane's owner's.
fn filter_differently(
    subscription: &SubscriptionStatus,
    filters: &[sqlx::types::Json<ByType>],
    names: &[String],
) -> Option<Finding> {
    let first = filters.first()?;
    let other = filters.iter().position(|other| other.0 != first.0)?;
    Some(Finding::new(
        Severity::Warning,
        "filters-differ",
        format!(
            "instances {} and {} of {} on {} have different filters: which messages are handled goes by who owns their lane",
            names[0], names[other], subscription.group_name, subscription.topic
        ),
        "unless a deployment is under way, start all of them in the same version",
    ))
}

/// Instances of which neither handles all that the other does: two services, perhaps, that share a name by mistake.
fn divided(subscription: &SubscriptionStatus, instances: &[(String, Vec<String>)]) -> Option<Finding> {
    let lacks = |some: &[String], other: &[String]| {
        !other.iter().any(|name| name == ALL) && some.iter().any(|name| !other.contains(name))
    };
    let pair = instances.iter().enumerate().find_map(|(n, (first, some))| {
        let (second, _) =
            (instances[n + 1..].iter()).find(|(_, other)| lacks(some, other) && lacks(other, some))?;
        Some((first, second))
    });
    let (first, second) = pair?;
    Some(Finding::new(
        Severity::Warning,
        "divided-group",
        format!(
            "instances {first} and {second} of {} on {} handle different types, neither all that the other does: lanes go to and fro between them",
            subscription.group_name, subscription.topic
        ),
        "give each service a group name of its own, unless a deployment is under way",
    ))
}

/// A topic that never had a message.
fn without_messages(subscription: &SubscriptionStatus, topics: &[String]) -> Finding {
    let near = nearest(&subscription.topic, topics.iter().map(String::as_str));
    let what = format!(
        "{} is subscribed to topic {}, which has never had a message",
        subscription.group_name, subscription.topic
    );
    match near {
        Some(near) => Finding::new(
            Severity::Warning,
            "topic-without-messages",
            format!("{what}; there is a topic {near}"),
            format!(
                "if {near} is meant, name it in the handlers and `postbox subscriptions drop {} {}`",
                subscription.group_name, subscription.topic
            ),
        ),
        None => Finding::new(
            Severity::Note,
            "topic-without-messages",
            what,
            "`postbox topics` shows those that have messages",
        ),
    }
}

/// Types that are handled and did not come lately.
fn never_published(subscription: &SubscriptionStatus, published: &BTreeSet<String>) -> Vec<Finding> {
    if published.is_empty() {
        return Vec::new();
    }
    let handled = subscription
        .types
        .iter()
        .filter(|name| !name.is_empty() && *name != ALL);
    let missing = handled.filter(|name| !published.contains(*name));
    missing
        .map(|name| {
            let others = published.iter().map(String::as_str);
            let near = nearest(
                name,
                others.filter(|other| !subscription.types.iter().any(|own| own == other)),
            );
            let what = format!(
                "{} handles type {name} on {}, which none of the topic's last {RECENT} messages has",
                subscription.group_name, subscription.topic
            );
            match near {
                Some(near) => Finding::new(
                    Severity::Warning,
                    "type-without-messages",
                    format!("{what}; there are messages of type {near}"),
                    format!("if {near} is meant, name it in the handler"),
                ),
                None => Finding::new(
                    Severity::Note,
                    "type-without-messages",
                    what,
                    "nothing is to be done if it is rare; else compare it with what publishers write",
                ),
            }
        })
        .collect()
}

fn quoted(message_type: &str) -> String {
    match message_type {
        "" => "(untyped)".to_owned(),
        name => name.to_owned(),
    }
}

/// The name that may have been meant: it differs by a few characters, only by its case or separators, or by what is in front.
fn nearest<'a>(name: &str, others: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |name: &str| -> Vec<char> {
        let letters = name.chars().filter(|letter| letter.is_ascii_alphanumeric());
        letters.map(|letter| letter.to_ascii_lowercase()).collect()
    };
    let wanted = plain(name);
    let most = (wanted.len() / 4).clamp(1, 4).min(wanted.len().saturating_sub(2));
    let away = |other: &[char]| {
        let (long, short) = if other.len() > wanted.len() {
            (other, &*wanted)
        } else {
            (&*wanted, other)
        };
        match short.len() >= 4 && long.ends_with(short) {
            true => most,
            false => distance(&wanted, other),
        }
    };
    others
        .filter(|other| *other != name && !other.is_empty())
        .map(|other| (away(&plain(other)), other))
        .filter(|(distance, _)| *distance <= most)
        .min()
        .map(|(_, other)| other)
}

/// How many characters are to be added, removed or replaced.
fn distance(from: &[char], to: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (n, left) in from.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = n + 1;
        for (m, right) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(left != right);
            diagonal = row[m + 1];
            row[m + 1] = replaced.min(row[m] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_a_slip_away_or_there_is_none() {
        let near = |name: &str, others: &[&'static str]| nearest(name, others.iter().copied());
        assert_eq!(near("order", &["customers", "orders"]), Some("orders"));
        assert_eq!(near("OrderPlaced", &["order.placed"]), Some("order.placed"));
        assert_eq!(
            near("order.palced", &["order.paid", "order.placed"]),
            Some("order.placed")
        );
        assert_eq!(near("orders", &["orders"]), None);
        assert_eq!(near("orders", &["invoices", "x", ""]), None);
        assert_eq!(near("a", &["b"]), None);
        assert_eq!(near("placed", &["order.placed"]), Some("order.placed"));
    }
}
