//! Who owns which lanes: the claims that a session holds, and how lanes are divided among instances.

use std::collections::{HashMap, HashSet};

use crate::handler::router::Takes;
use crate::ids::{ConsumerId, Epoch, Lane};

/// What is known of a lane at a look at the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LaneRow {
    pub(crate) lane: Lane,
    pub(crate) epoch: Epoch,
    /// `None`: free.
    pub(crate) owner: Option<ConsumerId>,
    /// As [`OwnedLane::needs`].
    pub(crate) needs: Vec<String>,
}

/// The claims that a session holds of one subscription's lanes, with their epochs.
///
/// The executor has no lane that is not here: it is told of a claim after it was added, and one leaves either with the command that revokes it, or
/// when the executor says that it gave this very claim up. What it says of an earlier one may come after the next was made, and means nothing.
#[derive(Debug, Default)]
pub(crate) struct Claims(HashMap<Lane, Epoch>);

impl Claims {
    pub(crate) fn lanes(&self) -> impl Iterator<Item = Lane> {
        self.0.keys().copied()
    }

    pub(crate) fn holds(&self, lane: Lane) -> bool {
        self.0.contains_key(&lane)
    }

    pub(crate) fn epoch(&self, lane: Lane) -> Option<Epoch> {
        self.0.get(&lane).copied()
    }

    pub(crate) fn add(&mut self, lane: Lane, epoch: Epoch) {
        self.0.insert(lane, epoch);
    }

    /// Removes and returns those that are void: the lane has another owner, or another epoch.
    pub(crate) fn lose(&mut self, me: ConsumerId, rows: &[LaneRow]) -> Vec<Lane> {
        let lost = |row: &&LaneRow| {
            self.0
                .get(&row.lane)
                .is_some_and(|epoch| (row.owner, row.epoch) != (Some(me), *epoch))
        };
        let lost: Vec<Lane> = rows.iter().filter(lost).map(|row| row.lane).collect();
        for lane in &lost {
            self.0.remove(lane);
        }
        lost
    }

    /// The executor is done with this claim.
    pub(crate) fn give_up(&mut self, lane: Lane, epoch: Epoch) {
        if self.0.get(&lane) == Some(&epoch) {
            self.0.remove(&lane);
        }
    }
}

/// What an instance should do about the lanes of one subscription.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Free lanes, and lanes of dead owners, to claim.
    pub(crate) claim: Vec<LaneRow>,
    /// Lanes to give up once nothing of them runs.
    pub(crate) release: Vec<Lane>,
}

/// Lanes that only some live members are to own, with these members by id: those that handle the first type the lane needs which anybody handles. A
/// lane that needs what nobody handles is like any other.
pub(crate) fn bind(rows: &[LaneRow], takes: &HashMap<ConsumerId, Takes>) -> HashMap<Lane, Vec<ConsumerId>> {
    let able = |needed: &String| {
        let able = takes.iter().filter(|(_, takes)| takes.has(needed));
        let mut able: Vec<ConsumerId> = able.map(|(member, _)| *member).collect();
        able.sort_unstable();
        (!able.is_empty()).then_some(able)
    };
    rows.iter()
        .filter_map(|row| Some((row.lane, row.needs.iter().find_map(able)?)))
        .collect()
}

/// Divides `rows` fairly: every live member, in the order of its id, is due ⌊n/m⌋ or ⌈n/m⌉ lanes. Whoever has more gives up the excess,
/// whoever has less claims what is free: so as few lanes as possible move. A lane that is bound goes to a member that it is bound to, whatever that one's
/// share; of what is not bound this one then has less, and the others' shares are enough for the rest.
pub(crate) fn plan(
    me: ConsumerId,
    members: &[ConsumerId],
    dead: &HashSet<ConsumerId>,
    rows: &[LaneRow],
    bound: &HashMap<Lane, Vec<ConsumerId>>,
) -> Plan {
    let mut members = members.to_vec();
    members.sort_unstable();
    members.dedup();
    let Some(rank) = members.iter().position(|member| *member == me) else {
        return Plan::default();
    };
    let share = rows.len() / members.len() + usize::from(rank < rows.len() % members.len());
    let mut plan = Plan::default();
    // An owner that is neither a member nor dead may be an instance that no longer serves the subscription and is about to release.
    let is_free = |row: &LaneRow| row.owner.is_none_or(|owner| dead.contains(&owner));
    let mut due = 0;
    let (mut mine, mut free) = (Vec::new(), Vec::new());
    for row in rows {
        let is_mine = row.owner == Some(me);
        match bound.get(&row.lane) {
            None if is_mine => mine.push(row.lane),
            None if is_free(row) => free.push(row),
            None => {}
            Some(able) => {
                // Of several one, the same for everybody who looks.
                let keeps = row.owner.filter(|owner| able.contains(owner) && !is_free(row));
                let goes_to = keeps.unwrap_or(able[row.lane.index() % able.len()]);
                due += usize::from(goes_to == me);
                if is_mine && goes_to != me {
                    plan.release.push(row.lane);
                } else if goes_to == me && is_free(row) {
                    plan.claim.push(row.clone());
                }
            }
        }
    }
    let room = share.saturating_sub(due);
    if mine.len() > room {
        plan.release.extend_from_slice(&mine[room..]);
    } else {
        let free = free.into_iter().take(room - mine.len());
        plan.claim.extend(free.cloned());
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(number: i64) -> Lane {
        Lane::of(number, 1024)
    }

    fn ids(ids: impl IntoIterator<Item = i32>) -> Vec<ConsumerId> {
        ids.into_iter().map(ConsumerId).collect()
    }

    fn rows(owners: &[Option<i32>]) -> Vec<LaneRow> {
        owners
            .iter()
            .enumerate()
            .map(|(n, owner)| LaneRow {
                lane: lane(n as i64),
                epoch: Epoch(1),
                owner: owner.map(ConsumerId),
                needs: Vec::new(),
            })
            .collect()
    }

    /// Lets every member act once in turn until nobody does anything; returns the owners and how many lanes moved.
    fn settle(
        rows: Vec<LaneRow>,
        members: &[ConsumerId],
        dead: &HashSet<ConsumerId>,
    ) -> (Vec<LaneRow>, usize) {
        settle_bound(rows, members, dead, &HashMap::new())
    }

    fn settle_bound(
        mut rows: Vec<LaneRow>,
        members: &[ConsumerId],
        dead: &HashSet<ConsumerId>,
        bound: &HashMap<Lane, Vec<ConsumerId>>,
    ) -> (Vec<LaneRow>, usize) {
        let mut moved = 0;
        loop {
            let before = rows.clone();
            for me in members {
                let plan = plan(*me, members, dead, &rows, bound);
                for lane in plan.release {
                    rows[lane.index()].owner = None;
                    moved += 1;
                }
                for row in plan.claim {
                    rows[row.lane.index()].owner = Some(*me);
                }
            }
            if rows == before {
                return (rows, moved);
            }
        }
    }

    #[test]
    fn every_lane_has_an_owner_and_shares_are_fair() {
        for members in 1..9_i32 {
            for lanes in [1, 2, 7, 32] {
                let ids = ids(1..=members);
                let (rows, _) = settle(rows(&vec![None; lanes]), &ids, &HashSet::new());
                assert!(rows.iter().all(|row| row.owner.is_some()));
                let counts: Vec<usize> = ids
                    .iter()
                    .map(|id| rows.iter().filter(|row| row.owner == Some(*id)).count())
                    .collect();
                let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
                assert!(most - least <= 1, "{counts:?}");
            }
        }
    }

    #[test]
    fn a_join_moves_only_the_newcomers_share() {
        let (two, _) = settle(rows(&[None; 32]), &ids([1, 2]), &HashSet::new());
        let (three, moved) = settle(two, &ids([1, 2, 3]), &HashSet::new());
        assert_eq!(moved, 10);
        assert_eq!(
            three
                .iter()
                .filter(|row| row.owner == Some(ConsumerId(3)))
                .count(),
            10
        );
    }

    #[test]
    fn lanes_of_the_dead_are_claimed_and_lanes_of_the_unknown_are_not() {
        let rows = rows(&[Some(8), Some(9), None, Some(1)]);
        let plan = plan(
            ConsumerId(1),
            &ids([1]),
            &HashSet::from([ConsumerId(8)]),
            &rows,
            &HashMap::new(),
        );
        assert_eq!(
            plan.claim.iter().map(|row| row.lane.index()).collect::<Vec<_>>(),
            [0, 2]
        );
    }

    #[test]
    fn a_bound_lane_goes_where_it_is_bound_and_every_other_has_an_owner() {
        for members in 1..6_i32 {
            for lanes in [1_u16, 7, 32] {
                for bound_lanes in 0..=lanes {
                    let ids = ids(1..=members);
                    let able: Vec<ConsumerId> = ids.iter().copied().filter(|id| id.0 % 2 == 1).collect();
                    let bound = (0..bound_lanes).map(|n| (lane(n.into()), able.clone())).collect();
                    let (shared, _) = settle(rows(&vec![None; usize::from(lanes)]), &ids, &HashSet::new());
                    let (rows, moved) = settle_bound(shared, &ids, &HashSet::new(), &bound);
                    for row in &rows {
                        let owner = row.owner.expect("an owner");
                        assert!(
                            row.lane.index() >= usize::from(bound_lanes) || able.contains(&owner),
                            "{rows:?}"
                        );
                    }
                    assert!(moved <= usize::from(lanes), "{moved} moves of {lanes} lanes");
                }
            }
        }
    }

    #[test]
    fn a_lane_is_bound_by_the_first_of_its_needs_that_somebody_handles() {
        let row = |number, needs: &[&str]| LaneRow {
            lane: lane(number),
            epoch: Epoch(1),
            owner: None,
            needs: needs.iter().map(ToString::to_string).collect(),
        };
        let takes = HashMap::from([
            (ConsumerId(1), Takes::from_iter(["placed"])),
            (ConsumerId(2), Takes::from_iter(["refunded", ""])),
            (ConsumerId(3), Takes::from_iter(["*"])),
        ]);
        let rows = [
            row(0, &[]),
            row(1, &["refunded", "placed"]),
            row(2, &[""]),
            row(3, &["placed"]),
        ];
        let expected = HashMap::from([
            (lane(1), ids([2, 3])),
            (lane(2), ids([2, 3])),
            (lane(3), ids([1, 3])),
        ]);
        assert_eq!(bind(&rows, &takes), expected);
        let two = HashMap::from([(ConsumerId(2), takes[&ConsumerId(2)].clone())]);
        assert_eq!(
            bind(&[row(0, &["gone", "refunded"]), row(1, &["gone"])], &two),
            HashMap::from([(lane(0), ids([2]))])
        );
    }

    #[test]
    fn an_earlier_claim_that_is_given_up_late_does_not_take_the_next_with_it() {
        let mut claims = Claims::default();
        claims.add(lane(0), Epoch(1));
        claims.add(lane(1), Epoch(1));
        let mut rows = rows(&[Some(9), Some(1)]);
        assert_eq!(claims.lose(ConsumerId(1), &rows), [lane(0)]);
        claims.add(lane(0), Epoch(3));
        claims.give_up(lane(0), Epoch(1));
        assert!(claims.holds(lane(0)));
        claims.give_up(lane(1), Epoch(1));
        assert_eq!(claims.lanes().collect::<Vec<_>>(), [lane(0)]);
        rows[0] = LaneRow {
            lane: lane(0),
            epoch: Epoch(5),
            owner: Some(ConsumerId(1)),
            needs: Vec::new(),
        };
        assert_eq!(
            claims.lose(ConsumerId(1), &rows),
            [lane(0)],
            "claimed once more without knowing"
        );
    }
}
