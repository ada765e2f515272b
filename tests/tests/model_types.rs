//! A model of one lane whose owners handle different types, checked exhaustively: each leaves to the other what it does not handle, and crashes at any
//! moment. (`consumer/src/executor/unknown.rs`, `bind` and `plan` in `consumer/src/session/claims.rs`, `postbox.record` in `migrations/functions/failure.sql`.) Zombies
//! are for `model_lane.rs`, failures for `model_parking.rs`.
//!
//! Beside what must always hold it is checked that nothing is stranded: from every state that can be reached all messages can still come to be handled.
//! Each broken variant must be caught, or the model proves nothing.

use std::collections::{BTreeSet, HashMap};

use stateright::{Model, Property};

mod checking;
use checking::{assert_sound, broken};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Type {
    Placed,
    Refunded,
}
use Type::{Placed, Refunded};

/// The messages of a key, which alternate, then one without a key.
const TYPES: [Type; 4] = [Placed, Refunded, Placed, Refunded];
const KEYED: u8 = 3;
const MESSAGES: u8 = TYPES.len() as u8;
const CRASHES: u8 = 1;

fn type_of(message: u8) -> Type {
    TYPES[usize::from(message)]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    /// As it is.
    Sound,
    /// Broken: an owner settles what it does not handle.
    Settled,
    /// Broken: what comes after it in its key runs.
    KeyGoesOn,
    /// Broken: what the lane needs is recorded by itself, after what waits for it.
    NeedsApart,
    /// Broken: a claim begins without what the lane needed.
    NeedsForgotten,
    /// Broken: what the owner handles is no need any more, before it has taken up what waits for it.
    NeedsDroppedEarly,
    /// Broken: what the owner handles stays first.
    NeverSecond,
    /// Broken: the lane is released without recording what is parked.
    ParkedUnrecorded,
}

/// What the database has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Recorded {
    position: u8,
    pending: BTreeSet<u8>,
    /// From where on the key is parked.
    parked: Option<u8>,
    /// Rows of messages without a key that wait.
    waiting: BTreeSet<u8>,
    needs: Vec<Type>,
}

impl Recorded {
    /// Whether an owner who reads this would come to the message.
    fn has(&self, message: u8) -> bool {
        message >= self.position
            || self.pending.contains(&message)
            || self.waiting.contains(&message)
            || (message < KEYED && self.parked.is_some_and(|first| first <= message))
    }
}

/// The lane as its owner has it in memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct View {
    owner: usize,
    /// The next to take in.
    next: u8,
    cut: u8,
    unread: BTreeSet<u8>,
    /// Of the key, in order.
    queue: BTreeSet<u8>,
    /// Without a key, and to run.
    loose: BTreeSet<u8>,
    running: Option<u8>,
    parked: Option<u8>,
    /// The first parked one is left to the other.
    waits: bool,
    waiting: BTreeSet<u8>,
    needs: Vec<Type>,
}

impl View {
    fn recorded(&self) -> Recorded {
        let mut pending: BTreeSet<u8> = self
            .queue
            .iter()
            .chain(&self.loose)
            .chain(&self.unread)
            .copied()
            .collect();
        pending.extend(self.running);
        Recorded {
            position: self.next.max(self.cut),
            // What has a row is in one place.
            pending: pending.difference(&self.waiting).copied().collect(),
            parked: self.parked,
            waiting: self.waiting.clone(),
            needs: self.needs.clone(),
        }
    }

    fn need(&mut self, needed: Type) {
        if !self.needs.contains(&needed) {
            self.needs.push(needed);
        }
    }

    /// Nothing that this owner could do is left.
    fn is_idle(&self, model: &Lane) -> bool {
        let rows = self
            .waiting
            .iter()
            .any(|message| model.takes(self.owner, type_of(*message)));
        let reads_on = self.parked.is_some() && !self.waits;
        self.next >= MESSAGES
            && self.running.is_none()
            && self.queue.is_empty()
            && self.loose.is_empty()
            && !rows
            && !reads_on
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    owner: Option<View>,
    recorded: Recorded,
    handled: BTreeSet<u8>,
    by_the_unable: bool,
    out_of_order: bool,
    crashes: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Claim(usize),
    TakeIn,
    /// The key reads on.
    TakeUp,
    /// What waits in a row and is this owner's.
    TakeRow(u8),
    /// The turn of the first of the key.
    Turn,
    StartLoose(u8),
    Return,
    /// What is first among the needs changes.
    SeeNeeds,
    Record,
    RecordNeeds,
    Release,
    Crash,
}

#[derive(Clone, Copy)]
struct Lane {
    variant: Variant,
    /// What each instance handles.
    takes: [&'static [Type]; 2],
}

impl Lane {
    fn takes(&self, instance: usize, wanted: Type) -> bool {
        self.takes[instance].contains(&wanted)
    }

    /// Who may own a lane that needs this: those who handle the first that anybody does.
    fn may_own(&self, instance: usize, needs: &[Type]) -> bool {
        let able = |needed: &Type| (0..self.takes.len()).any(|other| self.takes(other, *needed));
        let first = needs.iter().find(|needed| able(needed));
        first.is_none_or(|first| self.takes(instance, *first))
    }

    fn claim(&self, state: &State, n: usize) -> View {
        let recorded = &state.recorded;
        let least = recorded.pending.first().copied().unwrap_or(recorded.position);
        View {
            owner: n,
            next: least.min(recorded.position),
            cut: recorded.position,
            unread: recorded.pending.clone(),
            queue: BTreeSet::new(),
            loose: BTreeSet::new(),
            running: None,
            parked: recorded.parked,
            waits: false,
            waiting: recorded.waiting.clone(),
            needs: match self.variant {
                Variant::NeedsForgotten => Vec::new(),
                _ => recorded.needs.clone(),
            },
        }
    }

    /// The first of the key is left to the other, with what is behind it.
    fn leave(&self, lane: &mut View, message: u8) {
        lane.need(type_of(message));
        if self.variant == Variant::KeyGoesOn {
            lane.waiting.insert(message);
            return;
        }
        lane.queue.clear();
        lane.parked = Some(message);
        lane.waits = true;
    }

    fn start(&self, state: &mut State, message: u8) {
        let able = state
            .owner
            .as_ref()
            .is_some_and(|lane| self.takes(lane.owner, type_of(message)));
        state.by_the_unable |= !able;
        state.out_of_order |=
            message < KEYED && (0..message).any(|earlier| !state.handled.contains(&earlier));
    }
}

impl Model for Lane {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            owner: None,
            recorded: Recorded::default(),
            handled: BTreeSet::new(),
            by_the_unable: false,
            out_of_order: false,
            crashes: 0,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let Some(lane) = &state.owner else {
            let able = (0..self.takes.len()).filter(|n| self.may_own(*n, &state.recorded.needs));
            actions.extend(able.map(Action::Claim));
            return;
        };
        if state.crashes < CRASHES {
            actions.push(Action::Crash);
        }
        if lane.next < MESSAGES {
            actions.push(Action::TakeIn);
        }
        if lane.parked.is_some() && !lane.waits && lane.next >= lane.cut {
            actions.push(Action::TakeUp);
        }
        for message in &lane.waiting {
            // One that is running, or is to, has its row still.
            let is_new = lane.running != Some(*message) && !lane.loose.contains(message);
            if is_new && self.takes(lane.owner, type_of(*message)) {
                actions.push(Action::TakeRow(*message));
            }
        }
        match lane.running {
            Some(_) => actions.push(Action::Return),
            None => {
                actions.push(Action::Turn);
                actions.extend(lane.loose.iter().map(|message| Action::StartLoose(*message)));
                if !self.may_own(lane.owner, &state.recorded.needs) {
                    actions.push(Action::Release);
                }
            }
        }
        actions.push(Action::SeeNeeds);
        actions.push(Action::Record);
        if self.variant == Variant::NeedsApart {
            actions.push(Action::RecordNeeds);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let lane = state.owner.as_mut();
        match action {
            Action::Claim(n) => state.owner = Some(self.claim(last, n)),
            Action::TakeIn => {
                let lane = lane?;
                let message = lane.next;
                lane.next += 1;
                let due = message >= lane.cut || lane.unread.remove(&message);
                if !due {
                    // Not its.
                } else if message < KEYED {
                    // It stays parked, or is behind its key.
                    if lane.parked.is_none_or(|first| first > message) {
                        lane.queue.insert(message);
                    }
                } else if self.takes(lane.owner, type_of(message)) {
                    lane.loose.insert(message);
                } else if self.variant == Variant::Settled {
                    state.handled.insert(message);
                    state.by_the_unable = true;
                } else {
                    lane.waiting.insert(message);
                    lane.need(type_of(message));
                }
            }
            Action::TakeUp => {
                let lane = lane?;
                let message = lane.parked?;
                let to = lane.next.max(lane.cut).min(KEYED);
                if message < to {
                    lane.queue.insert(message);
                }
                lane.parked = Some(message + 1).filter(|first| *first < to);
            }
            Action::TakeRow(message) => {
                let lane = lane?;
                lane.loose.insert(message);
            }
            Action::Turn => {
                let lane = lane?;
                let message = *lane.queue.first()?;
                lane.queue.remove(&message);
                if self.takes(lane.owner, type_of(message)) {
                    lane.running = Some(message);
                    self.start(&mut state, message);
                } else if self.variant == Variant::Settled {
                    state.handled.insert(message);
                    state.by_the_unable = true;
                } else {
                    self.leave(lane, message);
                }
            }
            Action::StartLoose(message) => {
                let lane = lane?;
                lane.loose.remove(&message);
                lane.running = Some(message);
                self.start(&mut state, message);
            }
            Action::Return => {
                let lane = lane?;
                let message = lane.running.take()?;
                lane.waiting.remove(&message);
                state.handled.insert(message);
            }
            Action::SeeNeeds => {
                let lane = lane?;
                let owner = lane.owner;
                let is_first = lane.needs.first().is_some_and(|first| self.takes(owner, *first));
                let (here, elsewhere): (Vec<Type>, Vec<Type>) =
                    lane.needs.iter().partition(|needed| self.takes(owner, **needed));
                let has_row = |needed: &Type| lane.waiting.iter().any(|message| type_of(*message) == *needed);
                let here: Vec<Type> = match self.variant {
                    Variant::NeedsDroppedEarly => Vec::new(),
                    _ => here.into_iter().filter(has_row).collect(),
                };
                // It holds it until there is nothing that it can do, or for a while.
                if is_first && !elsewhere.is_empty() && self.variant == Variant::NeverSecond {
                    return None;
                }
                lane.needs = elsewhere.into_iter().chain(here).collect();
            }
            Action::Record => {
                let lane = lane?;
                let needs = std::mem::take(&mut state.recorded.needs);
                state.recorded = lane.recorded();
                if self.variant == Variant::NeedsApart {
                    state.recorded.needs = needs;
                }
            }
            Action::RecordNeeds => state.recorded.needs = lane?.needs.clone(),
            Action::Release => {
                let lane = state.owner.take()?;
                let parked = state.recorded.parked;
                let needs = std::mem::take(&mut state.recorded.needs);
                state.recorded = lane.recorded();
                match self.variant {
                    Variant::ParkedUnrecorded => state.recorded.parked = parked,
                    Variant::NeedsApart => state.recorded.needs = needs,
                    _ => {}
                }
            }
            Action::Crash => {
                state.owner = None;
                state.crashes += 1;
            }
        }
        if state == *last { None } else { Some(state) }
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(NOTHING_LOST, |_, state: &State| {
                (0..MESSAGES).all(|message| state.handled.contains(&message) || state.recorded.has(message))
            }),
            Property::always(IN_ORDER, |_, state: &State| !state.out_of_order),
            Property::always(BY_THE_ABLE, |_, state: &State| !state.by_the_unable),
            Property::always(WORD_OF_IT, |_, state: &State| {
                let unhandled = state.recorded.waiting.difference(&state.handled);
                unhandled
                    .into_iter()
                    .all(|message| state.recorded.needs.contains(&type_of(*message)))
            }),
            Property::sometimes("all is handled, and nothing is left of it", |_, state: &State| {
                state.handled.len() == usize::from(MESSAGES)
                    && (0..MESSAGES).all(|message| !state.recorded.has(message))
                    && state.recorded.needs.is_empty()
            }),
            Property::sometimes(
                "an owner has nothing to do but to let go",
                |model, state: &State| {
                    state
                        .owner
                        .as_ref()
                        .is_some_and(|lane| lane.is_idle(model) && lane.parked.is_some())
                },
            ),
        ]
    }
}

/// I1.
const NOTHING_LOST: &str = "what was not handled is where the next owner finds it";
/// I4.
const IN_ORDER: &str = "no message of the key begins before its predecessor was handled";
const BY_THE_ABLE: &str = "only who handles its type handles a message";
const WORD_OF_IT: &str = "what waits in a row is among what its lane needs";
const NOT_STRANDED: &str = "all messages can still come to be handled";

const DISJOINT: [&[Type]; 2] = [&[Placed], &[Refunded]];
const DEPLOY: [&[Type]; 2] = [&[Placed], &[Placed, Refunded]];

/// States from which no way leads to all messages being handled.
fn stranded(lane: Lane) -> usize {
    let mut numbers: HashMap<State, usize> = HashMap::new();
    let mut states = lane.init_states();
    let mut before: Vec<Vec<usize>> = vec![Vec::new()];
    numbers.insert(states[0].clone(), 0);
    let mut n = 0;
    while n < states.len() {
        let mut actions = Vec::new();
        lane.actions(&states[n], &mut actions);
        for action in actions {
            let Some(next) = lane.next_state(&states[n], action) else {
                continue;
            };
            let number = *numbers.entry(next.clone()).or_insert_with(|| {
                states.push(next);
                before.push(Vec::new());
                states.len() - 1
            });
            before[number].push(n);
        }
        n += 1;
    }
    let is_done = |state: &State| state.handled.len() == usize::from(MESSAGES);
    let mut open: Vec<usize> = (0..states.len()).filter(|n| is_done(&states[*n])).collect();
    let mut reaches = vec![false; states.len()];
    open.iter().for_each(|n| reaches[*n] = true);
    while let Some(n) = open.pop() {
        for earlier in &before[n] {
            if !std::mem::replace(&mut reaches[*earlier], true) {
                open.push(*earlier);
            }
        }
    }
    println!("{} states", states.len());
    reaches.iter().filter(|reaches| !**reaches).count()
}

fn broken_by(variant: Variant) -> Vec<&'static str> {
    let lane = Lane {
        variant,
        takes: DISJOINT,
    };
    let mut broken = broken(lane, variant, &[NOTHING_LOST, IN_ORDER, BY_THE_ABLE, WORD_OF_IT]);
    if stranded(lane) > 0 {
        broken.push(NOT_STRANDED);
    }
    broken
}

#[test]
fn no_crash_and_no_handover_loses_reorders_or_strands_what_an_owner_does_not_handle() {
    for takes in [DISJOINT, DEPLOY] {
        let lane = Lane {
            variant: Variant::Sound,
            takes,
        };
        assert_sound(lane);
        assert_eq!(stranded(lane), 0, "{NOT_STRANDED}");
    }
}

#[test]
fn settling_what_the_owner_does_not_handle_is_caught() {
    assert!(broken_by(Variant::Settled).contains(&BY_THE_ABLE));
}

#[test]
fn a_key_that_goes_on_is_caught() {
    assert!(broken_by(Variant::KeyGoesOn).contains(&IN_ORDER));
}

#[test]
fn recording_what_a_lane_needs_apart_from_what_waits_is_caught() {
    assert!(broken_by(Variant::NeedsApart).contains(&WORD_OF_IT));
}

#[test]
fn forgetting_at_a_claim_what_the_lane_needs_is_caught() {
    assert!(broken_by(Variant::NeedsForgotten).contains(&WORD_OF_IT));
}

#[test]
fn dropping_a_need_before_what_waits_is_taken_up_is_caught() {
    assert!(broken_by(Variant::NeedsDroppedEarly).contains(&WORD_OF_IT));
}

#[test]
fn an_owner_that_never_lets_go_is_caught() {
    assert!(broken_by(Variant::NeverSecond).contains(&NOT_STRANDED));
}

#[test]
fn releasing_without_recording_what_is_parked_is_caught() {
    assert!(broken_by(Variant::ParkedUnrecorded).contains(&NOTHING_LOST));
}
