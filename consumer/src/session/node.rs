//! The name of a node, under which durable broadcasts keep their cursors: one live instance has it at a time.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use sqlx::postgres::PgListener;
use tracing::warn;

use crate::error::Error;
use crate::ids::{ConsumerId, SubscriptionId};

const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Well within a lease. Who goes looks once, and closes its connection.
const GOES_WITHIN: Duration = Duration::from_secs(3);

/// Other live instances with one of these subscriptions, the longest there first.
const OTHERS: &str = "SELECT c.id, c.name, c.pid, s.beat FROM postbox.sessions() s JOIN postbox.consumer c ON c.id = s.consumer_id \
     WHERE c.subscriptions && $1 AND c.id <> ALL ($2) ORDER BY c.id LIMIT 1";

/// An instance that has the node's name, or seems to.
type Other = (ConsumerId, String, i32, i32);

/// Waits for as long as an instance that just stopped, or vanished, may seem to live; then the node is taken. One whose heartbeat does not change for
/// a lease is frozen, or its host is gone: these are returned, with the process's own `former` ones.
pub(crate) async fn until_free(
    listener: &mut PgListener,
    node: &str,
    subscriptions: &[SubscriptionId],
    former: &HashSet<ConsumerId>,
    lease: Duration,
) -> Result<Vec<ConsumerId>, Error> {
    let began = Instant::now();
    let mut gone: Vec<ConsumerId> = former.iter().copied().collect();
    let mut told = false;
    let mut seen = None;
    while let Some((other, instance, pid, beat)) = find(listener, subscriptions, &gone).await? {
        match seen {
            Some((same, unchanged, since)) if (same, unchanged) == (other, beat) => {
                if Instant::elapsed(&since) > lease {
                    gone.push(other);
                    continue;
                }
            }
            _ => seen = Some((other, beat, Instant::now())),
        }
        if began.elapsed() > lease + Duration::from_secs(1) {
            return Err(taken(node, instance, pid));
        }
        if !told {
            warn!(
                node,
                instance, pid, "another instance has this node's name; waiting whether it goes"
            );
            told = true;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(gone)
}

/// Once registered and locked. Of two that see each other here the one with the greater number goes, at once; the other waits for that. One that was here
/// before does not go, so who comes after it does, whatever their numbers, which are given at random.
pub(crate) async fn check_first(
    listener: &mut PgListener,
    node: &str,
    subscriptions: &[SubscriptionId],
    mut gone: Vec<ConsumerId>,
    id: ConsumerId,
) -> Result<(), Error> {
    gone.push(id);
    let began = Instant::now();
    while let Some((other, instance, pid, _)) = find(listener, subscriptions, &gone).await? {
        if other < id || began.elapsed() > GOES_WITHIN {
            return Err(taken(node, instance, pid));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

async fn find(
    listener: &mut PgListener,
    subscriptions: &[SubscriptionId],
    gone: &[ConsumerId],
) -> Result<Option<Other>, sqlx::Error> {
    sqlx::query_as(OTHERS)
        .bind(subscriptions)
        .bind(gone)
        .fetch_optional(listener)
        .await
}

fn taken(node: &str, instance: String, pid: i32) -> Error {
    Error::NodeTaken {
        node: node.to_owned(),
        instance,
        pid,
    }
}
