//! Connections for transactional handlers: how many of the pool each subscription may have, and who has them for how long.
//!
//! **Nobody is starved.** Of the `B` connections that handlers may have, every subscription has some to itself: half of its equal share, rounded up.
//! What is left is common: whoever is busy takes of it. What is one's own nobody else can hold, however many handlers hang, so a subscription
//! always goes on with at least that. The application's own queries have the rest of the pool, a tenth and at least two, for the same reason.
//! Where there are more subscriptions than connections each has one at a time, and they take turns in the order in which they asked.

mod checkout;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::{self, Either};
use sqlx::{Error, PgPool};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::warn;

pub(crate) use self::checkout::{Checkout, Committed, MARKED, ROUND_TRIP, Statements};

/// Who waits longer asks who has them.
const PATIENCE: Duration = Duration::from_secs(1);
/// Least time between two answers.
const ANSWER_EVERY: Duration = Duration::from_secs(60);

/// The pool, and who has what of it.
struct Ledger {
    pool: PgPool,
    /// Most that handlers have at once.
    most: usize,
    held: Mutex<HashMap<u64, Held>>,
    next: AtomicU64,
    answered: Mutex<Option<Instant>>,
}

/// A connection that a subscription has.
struct Held {
    who: Arc<str>,
    since: Instant,
}

/// What a subscription may have.
pub(crate) struct Share {
    ledger: Arc<Ledger>,
    /// Group and topic, for people.
    who: Arc<str>,
    own: Arc<Semaphore>,
    common: Arc<Semaphore>,
    /// Of all that handlers have.
    total: Arc<Semaphore>,
    /// Most at once.
    most: usize,
    /// Since when those wait who have waited for long.
    waiting: Mutex<BTreeSet<(Instant, u64)>>,
}

/// The right to a connection. Dropped, it is somebody else's.
pub(crate) struct Seat {
    number: u64,
    ledger: Arc<Ledger>,
    _permits: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

/// How connections are divided.
#[derive(Debug, PartialEq, Eq)]
struct Division {
    /// For handlers in all.
    budget: usize,
    /// Of each subscription that does not say how many it wants.
    own: usize,
    common: usize,
}

impl Division {
    /// `wanted` are the numbers that subscriptions say; `others` say none.
    fn of(connections: usize, reserve: usize, wanted: usize, others: usize) -> Self {
        let budget = connections.saturating_sub(reserve).max(1);
        let rest = budget.saturating_sub(wanted);
        let share = rest.checked_div(others).unwrap_or_default();
        let own = share.div_ceil(2).max(1);
        Self {
            budget,
            own,
            common: rest.saturating_sub(own * others),
        }
    }

    /// Not every subscription can have its own at the same time.
    fn is_overbooked(&self, wanted: usize, others: usize) -> bool {
        wanted + self.own * others > self.budget
    }
}

/// Connections that are left to the application's own queries.
fn reserve_of(connections: usize) -> usize {
    (connections / 10).max(2)
}

/// Divides a pool among subscriptions, given by group, topic and how many connections each says it wants. `shared` with the application.
pub(crate) fn divide(
    pool: &PgPool,
    shared: bool,
    subscriptions: &[(&str, &str, Option<usize>)],
) -> Vec<Share> {
    let connections = pool.options().get_max_connections() as usize;
    let reserve = if shared { reserve_of(connections) } else { 0 };
    let wanted: usize = subscriptions.iter().filter_map(|(_, _, wanted)| *wanted).sum();
    let others = subscriptions
        .iter()
        .filter(|(_, _, wanted)| wanted.is_none())
        .count();
    let division = Division::of(connections, reserve, wanted, others);
    if division.is_overbooked(wanted, others) {
        warn!(
            connections,
            for_handlers = division.budget,
            subscriptions = subscriptions.len(),
            "the pool has fewer connections than its transactional subscriptions should have, so they take turns: give it more, or them a pool of their own (Consumer::tx_pool)"
        );
    }
    let ledger = Arc::new(Ledger {
        pool: pool.clone(),
        most: division.budget,
        held: Mutex::default(),
        next: AtomicU64::new(0),
        answered: Mutex::default(),
    });
    let common = Arc::new(Semaphore::new(division.common));
    let nothing = Arc::new(Semaphore::new(0));
    let total = Arc::new(Semaphore::new(division.budget));
    subscriptions
        .iter()
        .map(|(group, topic, wanted)| Share {
            ledger: ledger.clone(),
            who: format!("{group} on {topic}").into(),
            own: Arc::new(Semaphore::new(wanted.unwrap_or(division.own))),
            common: if wanted.is_some() {
                nothing.clone()
            } else {
                common.clone()
            },
            total: total.clone(),
            most: wanted
                .unwrap_or(division.own + division.common)
                .min(division.budget),
            waiting: Mutex::default(),
        })
        .collect()
}

impl Share {
    /// Most connections at once.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// A transaction on a connection of the pool, when it is this subscription's turn.
    pub(crate) async fn begin(&self, statements: Arc<Statements>) -> Result<Checkout, Error> {
        let begun = async {
            let seat = self.seat().await;
            Checkout::begin(&self.ledger.pool, statements, seat).await
        };
        tokio::pin!(begun);
        let since = Instant::now();
        match tokio::time::timeout(PATIENCE, &mut begun).await {
            Ok(begun) => begun,
            Err(_) => {
                self.ledger.say_who_has_them(&self.who);
                let _waiting = Waiting::since(since, self);
                begun.await
            }
        }
    }

    /// For how long a message has waited for a connection, if for long.
    pub(crate) fn longest_wait(&self) -> Option<Duration> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.first().map(|(since, _)| since.elapsed())
    }

    async fn seat(&self) -> Seat {
        // The semaphores are never closed. Nobody who has one of all waits for another, so there is no circle.
        let mine = match self.own.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let own = std::pin::pin!(self.own.clone().acquire_owned());
                let common = std::pin::pin!(self.common.clone().acquire_owned());
                match future::select(own, common).await {
                    Either::Left((permit, _)) | Either::Right((permit, _)) => permit.expect(NEVER_CLOSED),
                }
            }
        };
        let of_all = self.total.clone().acquire_owned().await.expect(NEVER_CLOSED);
        let number = self.ledger.next.fetch_add(1, Ordering::Relaxed);
        let held = Held {
            who: self.who.clone(),
            since: Instant::now(),
        };
        self.ledger.held().insert(number, held);
        Seat {
            number,
            ledger: self.ledger.clone(),
            _permits: (mine, of_all),
        }
    }
}

const NEVER_CLOSED: &str = "these semaphores are never closed";

impl Seat {
    /// Another message has the connection from now on.
    pub(crate) fn passes_on(&self) {
        if let Some(held) = self.ledger.held().get_mut(&self.number) {
            held.since = Instant::now();
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.ledger.held().remove(&self.number);
    }
}

/// A message that waits for a connection.
struct Waiting<'a> {
    share: &'a Share,
    entry: (Instant, u64),
}

impl<'a> Waiting<'a> {
    fn since(since: Instant, share: &'a Share) -> Self {
        let entry = (since, share.ledger.next.fetch_add(1, Ordering::Relaxed));
        share
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(entry);
        Self { share, entry }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waiting = self.share.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(&self.entry);
    }
}

impl Ledger {
    fn held(&self) -> MutexGuard<'_, HashMap<u64, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Once, and again only after a while.
    fn say_who_has_them(&self, waiting: &str) {
        let now = Instant::now();
        {
            let mut answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner);
            if answered.is_some_and(|at| now - at < ANSWER_EVERY) {
                return;
            }
            *answered = Some(now);
        }
        let holders = holders(self.held().values(), now);
        let (size, idle) = (self.pool.size() as usize, self.pool.num_idle());
        let others = size.saturating_sub(idle).saturating_sub(self.held().len());
        warn!(
            waiting,
            holders,
            for_handlers = self.most,
            held_by_others = others,
            "a message has waited for a connection for {PATIENCE:?}: give the pool more, a group fewer (connections = n), or handlers a pool of their own (Consumer::tx_pool)"
        );
    }
}

/// Who has how many, and for how long the longest.
fn holders<'a>(held: impl Iterator<Item = &'a Held>, now: Instant) -> String {
    let mut by_holder: HashMap<&str, (usize, Duration)> = HashMap::new();
    for held in held {
        let (count, longest) = by_holder.entry(&held.who).or_default();
        *count += 1;
        *longest = (*longest).max(now.saturating_duration_since(held.since));
    }
    let mut holders: Vec<_> = by_holder.into_iter().collect();
    holders.sort_by_key(|(who, (_, longest))| (std::cmp::Reverse(*longest), *who));
    let lines = holders
        .iter()
        .map(|(who, (count, longest))| format!("{who}: {count}, for up to {:.1} s", longest.as_secs_f64()));
    lines.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever hangs, each has its own, and all together have no more than the pool without its reserve.
    #[test]
    fn what_is_divided_is_never_more_than_there_is() {
        for connections in 1..200 {
            for others in 0..40 {
                for wanted in [0, 1, 5, 50] {
                    let reserve = reserve_of(connections);
                    let division = Division::of(connections, reserve, wanted, others);
                    let Division { budget, own, common } = division;
                    assert!(own >= 1 && budget >= 1 && budget <= connections);
                    assert!(budget + reserve <= connections || budget == 1);
                    match division.is_overbooked(wanted, others) {
                        // Then the budget itself is what they take turns with.
                        true => assert!(
                            common == 0 || others == 0,
                            "{connections} {others} {wanted}: {division:?}"
                        ),
                        false => assert!(wanted + own * others + common <= budget, "{division:?}"),
                    }
                }
            }
        }
    }

    #[test]
    fn one_subscription_has_it_all_and_many_have_one_each() {
        let of = |connections, others| Division::of(connections, reserve_of(connections), 0, others);
        let all = of(20, 1);
        assert_eq!((all.own + all.common, all.budget), (18, 18));
        assert_eq!(
            of(20, 3),
            Division {
                budget: 18,
                own: 3,
                common: 9
            }
        );
        assert_eq!(
            of(20, 30),
            Division {
                budget: 18,
                own: 1,
                common: 0
            }
        );
        assert_eq!(
            of(100, 30),
            Division {
                budget: 90,
                own: 2,
                common: 30
            }
        );
    }

    #[test]
    fn the_answer_names_who_has_them_for_how_long() {
        let now = Instant::now();
        let held = |who: &str, ago| Held {
            who: who.into(),
            since: now - Duration::from_secs(ago),
        };
        let all = [held("a on t", 1), held("b on t", 30), held("b on t", 2)];
        assert_eq!(
            holders(all.iter(), now),
            "b on t: 2, for up to 30.0 s; a on t: 1, for up to 1.0 s"
        );
    }
}
