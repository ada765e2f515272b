//! A model of one lane with one key: ownership, checkpoints and the fence, checked exhaustively. Instances crash, freeze, wake up and go on as
//! if nothing had happened; others take over. (`postbox.claim`, `postbox.settle` and `postbox.checkpoint` in `outbox/migrations/functions/ownership.sql`;
//! `consumer/src/executor/settlement.rs`, `consumer/src/executor.rs`.)
//!
//! A woken instance is modelled as badly as can be: it does not look at its lease. So what holds here holds by the fence and the epochs, not by
//! clocks. Each broken variant must be caught, or the model proves nothing.

use std::collections::BTreeSet;

use stateright::{Model, Property};

mod checking;
use checking::{assert_sound, broken};

const MESSAGES: u8 = 3;
const INSTANCES: usize = 2;
/// Claims at most, which bounds the epochs; crashes, freezes and failures of a handler at most.
const CLAIMS: u8 = 3;
const CRASHES: u8 = 1;
const FREEZES: u8 = 2;
const FAILURES: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    /// As it is.
    Sound,
    /// Broken: a transaction commits without looking at the epoch.
    NoEpochCheck,
    /// Broken: it looks, but holds no lock from there to the commit.
    NoLaneLock,
    /// Broken: a checkpoint counts a message whose handler has not returned.
    CheckpointBeforeTheReturn,
    /// Broken: the newest checkpoint counts, whoever wrote it.
    AnyCheckpoint,
    /// Broken: where the owner's newest checkpoint leaves the lane out, because it is about to be released, the claim's own position counts.
    CheckpointThatLeavesItOut,
    /// Broken: a failed message lets its key go before its next attempt.
    KeyReleasedBeforeTheRetry,
    /// Broken: a claim does not look at what transactions have settled since the checkpoint.
    SettlementsForgotten,
}

/// A session of an instance: a woken instance keeps its own, a restarted one gets another.
type SessionId = u8;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Instance {
    session: SessionId,
    life: Life,
    /// What it believes to own; `None`: nothing.
    lane: Option<View>,
    /// Has been frozen in this life.
    was_frozen: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Life {
    Up,
    Frozen,
    Dead,
}

/// A lane as an instance that owns it, or owned it, sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct View {
    epoch: u8,
    /// All below it are settled as far as this instance knows.
    settled: u8,
    /// Settled beyond it, by transactions before the claim.
    done: BTreeSet<u8>,
    running: Option<u8>,
    /// Failed, and waiting for its next attempt.
    failed: Option<u8>,
}

impl View {
    /// What runs next.
    fn next(&self, variant: Variant) -> Option<u8> {
        if let Some(failed) = self.failed
            && variant != Variant::KeyReleasedBeforeTheRetry
        {
            return Some(failed);
        }
        let due = |message: &u8| !self.done.contains(message) && self.failed != Some(*message);
        (self.settled..MESSAGES).find(due).or(self.failed)
    }

    fn settle(&mut self, message: u8) {
        self.running = None;
        self.done.insert(message);
        while self.done.remove(&self.settled) {
            self.settled += 1;
        }
    }

    /// How far a checkpoint says that it came.
    fn checkpoint(&self, variant: Variant) -> u8 {
        match self.running {
            Some(message) if variant == Variant::CheckpointBeforeTheReturn => self.settled.max(message + 1),
            _ => self.settled,
        }
    }
}

/// A transaction between its fence and its commit: the two are one message, so the server goes on whatever becomes of the instance.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Commit {
    instance: usize,
    session: SessionId,
    message: u8,
    epoch: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    instances: Vec<Instance>,
    sessions: SessionId,
    // The row of the lane.
    owner: Option<SessionId>,
    epoch: u8,
    position: u8,
    /// The newest checkpoint of the owner under its epoch. Others are there and never read; so they are left out here.
    checkpoint: Option<u8>,
    /// The newest of all; only where it is read.
    any_checkpoint: Option<u8>,
    settlements: BTreeSet<u8>,
    commits: Vec<Commit>,
    // What became of the messages.
    handled: BTreeSet<u8>,
    begun: BTreeSet<u8>,
    effects: [u8; MESSAGES as usize],
    /// The furthest that the lane stood.
    reached: u8,
    out_of_order: bool,
    crashes: u8,
    freezes: u8,
    failures: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Claim(usize),
    Start(usize),
    /// The handler returned an error.
    Fail(usize),
    /// The handler returned well; a transactional one goes on to its fence.
    Return(usize),
    /// The server commits, and answers.
    Commit(usize),
    /// The server commits, and the answer is lost: the instance gives the lane up, to claim it again.
    CommitUnheard(usize),
    /// The connection broke before the server read the message.
    CommitLost(usize),
    Checkpoint(usize),
    /// A checkpoint of the owner that leaves the lane out.
    CheckpointWithout(usize),
    Release(usize),
    Crash(usize),
    Restart(usize),
    Freeze(usize),
    Wake(usize),
}

struct Lane {
    variant: Variant,
    transactional: bool,
}

impl State {
    fn instance_of(&self, session: SessionId) -> Option<&Instance> {
        self.instances
            .iter()
            .find(|instance| instance.session == session && instance.life != Life::Dead)
    }

    /// Where the lane stands, as a claim reads it.
    fn position(&self, variant: Variant) -> u8 {
        let checkpoint = match variant {
            Variant::AnyCheckpoint => self.any_checkpoint,
            _ => self.checkpoint,
        };
        checkpoint.unwrap_or(self.position)
    }

    fn owns(&self, session: SessionId, epoch: u8) -> bool {
        self.owner == Some(session) && self.epoch == epoch
    }
}

impl Lane {
    fn may_claim(&self, state: &State, n: usize) -> bool {
        let me = &state.instances[n];
        let may_have_it = match state.owner {
            None => true,
            // It gave the lane up because of an answer that was lost.
            Some(owner) if owner == me.session => me.lane.is_none(),
            // The lock is gone, or the lease may have ended: a frozen one's, or that of one which was.
            Some(owner) => state
                .instance_of(owner)
                .is_none_or(|instance| instance.life == Life::Frozen || instance.was_frozen),
        };
        // Exclusively locked: nobody is between its fence and its commit.
        let is_free = state.commits.is_empty() || self.variant == Variant::NoLaneLock;
        may_have_it && is_free && me.lane.is_none() && state.epoch < CLAIMS
    }

    fn end_commit(&self, state: &mut State, index: usize, is_done: bool) -> Commit {
        let commit = state.commits.remove(index);
        if is_done {
            state.effects[usize::from(commit.message)] += 1;
            state.handled.insert(commit.message);
            state.settlements.insert(commit.message);
        }
        commit
    }
}

impl Model for Lane {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let instance = |session| Instance {
            session,
            life: Life::Up,
            lane: None,
            was_frozen: false,
        };
        vec![State {
            instances: (0..INSTANCES as SessionId).map(instance).collect(),
            sessions: INSTANCES as SessionId,
            owner: None,
            epoch: 0,
            position: 0,
            checkpoint: None,
            any_checkpoint: None,
            settlements: BTreeSet::new(),
            commits: Vec::new(),
            handled: BTreeSet::new(),
            begun: BTreeSet::new(),
            effects: [0; MESSAGES as usize],
            reached: 0,
            out_of_order: false,
            crashes: 0,
            freezes: 0,
            failures: 0,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for index in 0..state.commits.len() {
            actions.extend([
                Action::Commit(index),
                Action::CommitUnheard(index),
                Action::CommitLost(index),
            ]);
        }
        for (n, instance) in state.instances.iter().enumerate() {
            match instance.life {
                Life::Dead => {
                    actions.push(Action::Restart(n));
                    continue;
                }
                Life::Frozen => {
                    actions.push(Action::Wake(n));
                    continue;
                }
                Life::Up => {}
            }
            if state.crashes < CRASHES {
                actions.push(Action::Crash(n));
            }
            if state.freezes < FREEZES {
                actions.push(Action::Freeze(n));
            }
            if self.may_claim(state, n) {
                actions.push(Action::Claim(n));
            }
            let Some(lane) = &instance.lane else { continue };
            let commits = state
                .commits
                .iter()
                .any(|commit| commit.instance == n && commit.session == instance.session);
            match lane.running {
                Some(_) if commits => {}
                Some(_) => {
                    actions.push(Action::Return(n));
                    if state.failures < FAILURES {
                        actions.push(Action::Fail(n));
                    }
                }
                None => {
                    if lane.next(self.variant).is_some() {
                        actions.push(Action::Start(n));
                    }
                    actions.push(Action::Release(n));
                }
            }
            actions.push(Action::Checkpoint(n));
            actions.push(Action::CheckpointWithout(n));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Claim(n) => {
                let position = last.position(self.variant);
                state.epoch += 1;
                state.owner = Some(last.instances[n].session);
                state.position = position;
                state.checkpoint = None;
                let done = match self.variant {
                    Variant::SettlementsForgotten => BTreeSet::new(),
                    _ => last
                        .settlements
                        .iter()
                        .copied()
                        .filter(|m| *m >= position)
                        .collect(),
                };
                let mut view = View {
                    epoch: state.epoch,
                    settled: position,
                    done,
                    running: None,
                    failed: None,
                };
                while view.done.remove(&view.settled) {
                    view.settled += 1;
                }
                state.instances[n].lane = Some(view);
            }
            Action::Start(n) => {
                let lane = state.instances[n].lane.as_mut()?;
                let message = lane.next(self.variant)?;
                lane.running = Some(message);
                if lane.failed == Some(message) {
                    lane.failed = None;
                }
                if state.begun.insert(message) {
                    state.out_of_order |= (0..message).any(|earlier| !last.handled.contains(&earlier));
                }
            }
            Action::Fail(n) => {
                let lane = state.instances[n].lane.as_mut()?;
                lane.failed = lane.running.take();
                state.failures += 1;
            }
            Action::Return(n) => {
                let session = last.instances[n].session;
                let lane = state.instances[n].lane.as_mut()?;
                let message = lane.running?;
                if !self.transactional {
                    lane.settle(message);
                    state.handled.insert(message);
                } else if last.owns(session, lane.epoch) || self.variant == Variant::NoEpochCheck {
                    state.commits.push(Commit {
                        instance: n,
                        session,
                        message,
                        epoch: lane.epoch,
                    });
                } else {
                    // PB001: rolled back, and the instance knows now.
                    state.instances[n].lane = None;
                }
            }
            Action::Commit(index) => {
                let commit = self.end_commit(&mut state, index, true);
                let instance = &mut state.instances[commit.instance];
                // A frozen one reads the answer when it wakes.
                if instance.session == commit.session
                    && let Some(lane) = instance.lane.as_mut().filter(|lane| lane.epoch == commit.epoch)
                {
                    lane.settle(commit.message);
                }
            }
            Action::CommitUnheard(index) | Action::CommitLost(index) => {
                let is_done = matches!(action, Action::CommitUnheard(_));
                let commit = self.end_commit(&mut state, index, is_done);
                let instance = &mut state.instances[commit.instance];
                if instance.session == commit.session {
                    instance.lane = None;
                }
            }
            Action::Checkpoint(n) => {
                let instance = &last.instances[n];
                let lane = instance.lane.as_ref()?;
                let checkpoint = Some(lane.checkpoint(self.variant));
                // One whose epoch is stale is refused, or, if that happened between the check and the insert, not read.
                if last.owns(instance.session, lane.epoch) {
                    state.checkpoint = checkpoint;
                }
                if self.variant == Variant::AnyCheckpoint {
                    state.any_checkpoint = checkpoint;
                }
            }
            // The newest counts that has the lane.
            Action::CheckpointWithout(n) => {
                let instance = &last.instances[n];
                let lane = instance.lane.as_ref()?;
                let counts = self.variant == Variant::CheckpointThatLeavesItOut;
                if counts && last.owns(instance.session, lane.epoch) {
                    state.checkpoint = None;
                }
            }
            Action::Release(n) => {
                let lane = state.instances[n].lane.take()?;
                if last.owns(last.instances[n].session, lane.epoch) {
                    state.owner = None;
                    state.position = lane.settled;
                    state.checkpoint = None;
                    state.any_checkpoint = None;
                }
            }
            Action::Crash(n) => {
                let instance = &mut state.instances[n];
                instance.life = Life::Dead;
                instance.lane = None;
                state.crashes += 1;
            }
            Action::Restart(n) => {
                state.instances[n] = Instance {
                    session: last.sessions,
                    life: Life::Up,
                    lane: None,
                    was_frozen: false,
                };
                state.sessions += 1;
            }
            Action::Freeze(n) => {
                state.instances[n].life = Life::Frozen;
                state.freezes += 1;
            }
            Action::Wake(n) => {
                state.instances[n].life = Life::Up;
                state.instances[n].was_frozen = true;
            }
        }
        state.reached = state.reached.max(last.position(self.variant));
        if state == *last { None } else { Some(state) }
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONCE, |_, state: &State| {
                state.effects.iter().all(|times| *times <= 1)
            }),
            Property::always(NOTHING_LOST, |model: &Self, state: &State| {
                (0..state.position(model.variant)).all(|message| state.handled.contains(&message))
            }),
            Property::always(NEVER_BACK, |model: &Self, state: &State| {
                state.position(model.variant) >= state.reached
            }),
            Property::always(IN_ORDER, |_, state: &State| !state.out_of_order),
            Property::always(ALONE, |_, state: &State| {
                // Only one that was frozen runs beside its successor.
                let running = state.instances.iter().filter(|instance| {
                    instance.life == Life::Up
                        && !instance.was_frozen
                        && instance.lane.as_ref().is_some_and(|lane| lane.running.is_some())
                });
                running.count() <= 1
            }),
            Property::sometimes(
                "everything is handled and recorded",
                |model: &Self, state: &State| state.position(model.variant) == MESSAGES,
            ),
            Property::sometimes("a zombie runs beside its successor", |_, state: &State| {
                state
                    .instances
                    .iter()
                    .all(|instance| instance.lane.as_ref().is_some_and(|lane| lane.running.is_some()))
            }),
            Property::sometimes(
                "a lane is taken over after a crash and goes on",
                |_, state: &State| {
                    state.epoch > 1 && state.crashes > 0 && state.handled.len() == usize::from(MESSAGES)
                },
            ),
        ]
    }
}

/// I6, and the exactly-once effect.
const ONCE: &str = "no transactional effect is there twice";
/// I1.
const NOTHING_LOST: &str = "what a lane has passed was handled";
/// I6.
const NEVER_BACK: &str = "no stale owner moves a cursor";
/// I4.
const IN_ORDER: &str = "no message is first run before its predecessor was handled";
const ALONE: &str = "no two instances that were not frozen run the key at once";

fn broken_by(variant: Variant, transactional: bool) -> Vec<&'static str> {
    let lane = Lane {
        variant,
        transactional,
    };
    broken(lane, variant, &[ONCE, NOTHING_LOST, NEVER_BACK, IN_ORDER, ALONE])
}

#[test]
fn no_crash_freeze_or_takeover_loses_reorders_or_doubles_a_transactional_message() {
    let lane = Lane {
        variant: Variant::Sound,
        transactional: true,
    };
    assert_sound(lane);
}

#[test]
fn no_crash_freeze_or_takeover_loses_or_reorders_a_plain_message() {
    let lane = Lane {
        variant: Variant::Sound,
        transactional: false,
    };
    assert_sound(lane);
}

#[test]
fn committing_without_the_epoch_is_caught() {
    assert!(broken_by(Variant::NoEpochCheck, true).contains(&ONCE));
}

#[test]
fn checking_the_epoch_without_holding_the_lane_is_caught() {
    assert!(broken_by(Variant::NoLaneLock, true).contains(&ONCE));
}

#[test]
fn going_back_to_the_claim_where_a_checkpoint_leaves_the_lane_out_is_caught() {
    assert!(broken_by(Variant::CheckpointThatLeavesItOut, false).contains(&NEVER_BACK));
}

#[test]
fn claiming_without_the_settlements_is_caught() {
    assert!(broken_by(Variant::SettlementsForgotten, true).contains(&ONCE));
}

#[test]
fn a_checkpoint_before_the_handler_returns_is_caught() {
    for transactional in [false, true] {
        assert!(broken_by(Variant::CheckpointBeforeTheReturn, transactional).contains(&NOTHING_LOST));
    }
}

#[test]
fn a_stale_checkpoint_that_counts_is_caught() {
    assert!(broken_by(Variant::AnyCheckpoint, false).contains(&NEVER_BACK));
}

#[test]
fn a_key_released_before_its_retry_is_caught() {
    for transactional in [false, true] {
        assert!(broken_by(Variant::KeyReleasedBeforeTheRetry, transactional).contains(&IN_ORDER));
    }
}
