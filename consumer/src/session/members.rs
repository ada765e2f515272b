//! Who is alive, as one session sees it: by what changes between two of its looks, and by its own clock, which nobody sets.
//!
//! A heartbeat is a number that changes. Whoever's number stays the same for its lease is dead, and whoever's lock is missing for the grace. The time
//! between two looks is counted from when the answer of the first came to when the second was asked for, so it is never more than passed between
//! what they show, however long an answer was on its way, or this process did not run.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tracing::warn;

use crate::ids::{ConsumerId, SubscriptionId};

/// For how long the lock of an instance must be seen missing before its lanes are taken: an instance that lost its connection stops its
/// handlers within this time, so no key runs in two places.
const GRACE_WITHOUT_LOCK: Duration = Duration::from_secs(1);

/// An instance at a look.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Member {
    pub(crate) id: ConsumerId,
    pub(crate) name: String,
    pub(crate) subscriptions: Vec<SubscriptionId>,
    /// The number of its last heartbeat; `None`: its lock is not held.
    pub(crate) beat: Option<i32>,
    /// In seconds.
    pub(crate) lease: f64,
    /// It shuts down, and claims nothing more.
    #[serde(default)]
    pub(crate) leaving: bool,
}

/// What was seen last of an instance, and since when.
struct Sight {
    beat: Option<i32>,
    since: Instant,
    is_said: bool,
}

/// When a look was asked for, and when it was answered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) asked: Instant,
    pub(crate) told: Instant,
}

#[derive(Default)]
pub(crate) struct Members(HashMap<ConsumerId, Sight>);

impl Members {
    /// Which of these are dead, and when the next may be if nothing changes.
    pub(crate) fn dead(
        &mut self,
        members: &[Member],
        me: ConsumerId,
        at: Moment,
    ) -> (HashSet<ConsumerId>, Option<Instant>) {
        let there: HashSet<ConsumerId> = members.iter().map(|member| member.id).collect();
        self.0.retain(|id, _| there.contains(id));
        let mut dead = HashSet::new();
        let mut next: Option<Instant> = None;
        for member in members.iter().filter(|member| member.id != me) {
            let sight = self.0.entry(member.id).or_insert(Sight {
                beat: member.beat,
                since: at.told,
                is_said: false,
            });
            if sight.beat != member.beat {
                *sight = Sight {
                    beat: member.beat,
                    since: at.told,
                    is_said: false,
                };
            }
            let patience = match member.beat {
                Some(_) => Duration::try_from_secs_f64(member.lease).unwrap_or(Duration::MAX),
                None => GRACE_WITHOUT_LOCK,
            };
            if at.asked.saturating_duration_since(sight.since) >= patience {
                if member.beat.is_some() && !std::mem::replace(&mut sight.is_said, true) {
                    warn!(
                        consumer = %member.id,
                        name = member.name,
                        "an instance holds its connection and has not been heard of for its lease: others take its lanes"
                    );
                }
                dead.insert(member.id);
            } else if member.beat.is_none() {
                let due = sight.since + patience;
                next = Some(next.map_or(due, |next| next.min(due)));
            }
        }
        (dead, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn member(id: i32, beat: Option<i32>) -> Member {
        Member {
            id: ConsumerId(id),
            name: String::new(),
            subscriptions: Vec::new(),
            beat,
            lease: 10.0,
            leaving: false,
        }
    }

    fn at(start: Instant, asked: u32, told: u32) -> Moment {
        Moment {
            asked: start + SECOND * asked,
            told: start + SECOND * told,
        }
    }

    #[test]
    fn only_whose_number_stays_the_same_for_its_lease_is_dead() {
        let (start, mut members) = (Instant::now(), Members::default());
        for second in 0..60 {
            let all = [
                member(1, Some(9)),
                member(2, Some(second as i32 / 3)),
                member(3, Some(5)),
            ];
            let (dead, _) = members.dead(&all, ConsumerId(1), at(start, second, second));
            assert_eq!(dead.contains(&ConsumerId(3)), second >= 10, "at {second}");
            assert!(!dead.contains(&ConsumerId(1)) && !dead.contains(&ConsumerId(2)));
        }
        let (dead, _) = members.dead(&[member(3, Some(6))], ConsumerId(1), at(start, 60, 60));
        assert!(dead.is_empty(), "it is heard of again");
    }

    #[test]
    fn an_answer_that_was_long_on_its_way_counts_from_when_it_was_asked_for() {
        let (start, mut members) = (Instant::now(), Members::default());
        members.dead(&[member(2, Some(1))], ConsumerId(1), at(start, 0, 4));
        // Asked for two seconds after that, and answered when the observer ran again.
        let (dead, _) = members.dead(&[member(2, Some(1))], ConsumerId(1), at(start, 6, 60));
        assert!(dead.is_empty());
    }

    #[test]
    fn a_lock_must_be_missing_for_the_grace() {
        let (start, mut members) = (Instant::now(), Members::default());
        let (dead, next) = members.dead(&[member(2, None)], ConsumerId(1), at(start, 0, 0));
        assert!(dead.is_empty());
        assert_eq!(next, Some(start + SECOND));
        let (dead, _) = members.dead(&[member(2, None)], ConsumerId(1), at(start, 1, 1));
        assert!(dead.contains(&ConsumerId(2)));
        let (dead, _) = members.dead(&[member(2, Some(7))], ConsumerId(1), at(start, 2, 2));
        assert!(dead.is_empty());
    }
}
