//! Lanes: how the keys of a subscription are divided among instances, and who should own which.

use std::collections::{HashMap, HashSet};

/// The lane of a message: by the hash of its key, or spread by its offset if it has none.
pub(crate) fn lane_of(offset: i64, key_hash: Option<i32>, lanes: u16) -> u16 {
    let number = key_hash.map_or(offset, i64::from);
    number.rem_euclid(i64::from(lanes)) as u16
}

/// The lane of a key.
pub(crate) fn lane_of_key(key_hash: i32, lanes: u16) -> u16 {
    lane_of(0, Some(key_hash), lanes)
}

/// A lane that this instance owns, as its executor sees it.
#[derive(Debug)]
pub(crate) struct OwnedLane {
    /// Raised by every claim.
    pub(crate) epoch: i32,
    /// Below it, what is not in `pending` was settled before this claim.
    pub(crate) cut: i64,
    /// Not settled and not yet taken in, below `cut`.
    pub(crate) pending: HashSet<i64>,
    /// Settled by transactional handlers after the last checkpoint before this claim.
    pub(crate) done: HashSet<i64>,
    /// How many of its messages are running.
    pub(crate) running: usize,
    /// How many owners in a row died before it got past what they were doing.
    pub(crate) crashes: i32,
    /// Up to where that may have been; the executor's to know.
    pub(crate) suspect_below: i64,
}

impl OwnedLane {
    /// A lane that begins at `cut`, with nothing behind it.
    pub(crate) fn new(epoch: i32, cut: i64) -> Self {
        Self {
            epoch,
            cut,
            pending: HashSet::new(),
            done: HashSet::new(),
            running: 0,
            crashes: 0,
            suspect_below: i64::MIN,
        }
    }
}

/// What is known of a lane at a look at the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaneRow {
    pub(crate) lane: u16,
    pub(crate) epoch: i32,
    /// `None`: free.
    pub(crate) owner: Option<i32>,
}

/// The claims that a session holds of one subscription's lanes, with their epochs.
///
/// The executor has no lane that is not here: it is told of a claim after it was added, and one leaves either with the command that revokes it, or
/// when the executor says that it gave this very claim up. What it says of an earlier one may come after the next was made, and means nothing.
#[derive(Debug, Default)]
pub(crate) struct Claims(HashMap<u16, i32>);

impl Claims {
    pub(crate) fn lanes(&self) -> impl Iterator<Item = u16> {
        self.0.keys().copied()
    }

    pub(crate) fn holds(&self, lane: u16) -> bool {
        self.0.contains_key(&lane)
    }

    pub(crate) fn add(&mut self, lane: u16, epoch: i32) {
        self.0.insert(lane, epoch);
    }

    /// Removes and returns those that are void: the lane has another owner, or another epoch.
    pub(crate) fn lose(&mut self, me: i32, rows: &[LaneRow]) -> Vec<u16> {
        let lost = |row: &&LaneRow| {
            self.0
                .get(&row.lane)
                .is_some_and(|epoch| (row.owner, row.epoch) != (Some(me), *epoch))
        };
        let lost: Vec<u16> = rows.iter().filter(lost).map(|row| row.lane).collect();
        for lane in &lost {
            self.0.remove(lane);
        }
        lost
    }

    /// The executor is done with this claim.
    pub(crate) fn give_up(&mut self, lane: u16, epoch: i32) {
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
    pub(crate) release: Vec<u16>,
}

/// Divides `rows` fairly: every live member, in the order of its id, is due ⌊n/m⌋ or ⌈n/m⌉ lanes. Whoever has more gives up the excess,
/// whoever has less claims what is free: so as few lanes as possible move.
pub(crate) fn plan(me: i32, members: &[i32], dead: &HashSet<i32>, rows: &[LaneRow]) -> Plan {
    let mut members = members.to_vec();
    members.sort_unstable();
    members.dedup();
    let Some(rank) = members.iter().position(|member| *member == me) else {
        return Plan::default();
    };
    let share = rows.len() / members.len() + usize::from(rank < rows.len() % members.len());
    let mine: Vec<u16> = rows
        .iter()
        .filter(|row| row.owner == Some(me))
        .map(|row| row.lane)
        .collect();
    if mine.len() > share {
        return Plan {
            claim: Vec::new(),
            release: mine[share..].to_vec(),
        };
    }
    // An owner that is neither a member nor dead may be an instance that no longer serves the subscription and is about to release.
    let claim = rows
        .iter()
        .filter(|row| row.owner.is_none_or(|owner| dead.contains(&owner)))
        .take(share - mine.len())
        .copied()
        .collect();
    Plan {
        claim,
        release: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(owners: &[Option<i32>]) -> Vec<LaneRow> {
        owners
            .iter()
            .enumerate()
            .map(|(n, owner)| LaneRow {
                lane: n as u16,
                epoch: 1,
                owner: *owner,
            })
            .collect()
    }

    /// Lets every member act once in turn until nobody does anything; returns the owners and how many lanes moved.
    fn settle(mut rows: Vec<LaneRow>, members: &[i32], dead: &HashSet<i32>) -> (Vec<LaneRow>, usize) {
        let mut moved = 0;
        loop {
            let before = rows.clone();
            for me in members {
                let plan = plan(*me, members, dead, &rows);
                for lane in plan.release {
                    rows[usize::from(lane)].owner = None;
                    moved += 1;
                }
                for row in plan.claim {
                    rows[usize::from(row.lane)].owner = Some(*me);
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
                let ids: Vec<i32> = (1..=members).collect();
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
        let (two, _) = settle(rows(&[None; 32]), &[1, 2], &HashSet::new());
        let (three, moved) = settle(two, &[1, 2, 3], &HashSet::new());
        assert_eq!(moved, 10);
        assert_eq!(three.iter().filter(|row| row.owner == Some(3)).count(), 10);
    }

    #[test]
    fn lanes_of_the_dead_are_claimed_and_lanes_of_the_unknown_are_not() {
        let rows = rows(&[Some(8), Some(9), None, Some(1)]);
        let plan = plan(1, &[1], &HashSet::from([8]), &rows);
        assert_eq!(plan.claim.iter().map(|row| row.lane).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn an_earlier_claim_that_is_given_up_late_does_not_take_the_next_with_it() {
        let mut claims = Claims::default();
        claims.add(0, 1);
        claims.add(1, 1);
        let mut rows = rows(&[Some(9), Some(1)]);
        assert_eq!(claims.lose(1, &rows), [0]);
        claims.add(0, 3);
        claims.give_up(0, 1);
        assert!(claims.holds(0));
        claims.give_up(1, 1);
        assert_eq!(claims.lanes().collect::<Vec<_>>(), [0]);
        rows[0] = LaneRow {
            lane: 0,
            epoch: 5,
            owner: Some(1),
        };
        assert_eq!(claims.lose(1, &rows), [0], "claimed once more without knowing");
    }

    #[test]
    fn a_key_decides_its_lane_and_keyless_messages_are_spread() {
        assert_eq!(lane_of(7, Some(5), 4), lane_of(8, Some(5), 4));
        let spread: HashSet<u16> = (0..8).map(|offset| lane_of(offset, None, 8)).collect();
        assert_eq!(spread.len(), 8);
    }
}
