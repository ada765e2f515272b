//! A model of one lane with one key whose messages fail, are parked and are taken up again, checked exhaustively: whoever owns the lane crashes at any
//! moment, and the next owner finds what was recorded. (`consumer/src/executor/keys.rs` and `catch_up.rs`; `postbox.record` in
//! `outbox/migrations/functions/failure.sql`.) Zombies are for `model_lane.rs`: what comes from a stale epoch is refused here as there.
//!
//! Each broken variant must be caught, or the model proves nothing.

use std::collections::BTreeSet;

use stateright::{Model, Property};

mod checking;
use checking::{assert_sound, broken};

const MESSAGES: u8 = 4;
const CRASHES: u8 = 2;
const FAILURES: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    /// As it is.
    Sound,
    /// Broken: the queue of the key is forgotten, and only the newcomer is parked.
    OnlyTheNewcomer,
    /// Broken: what was taken up runs before it is recorded that it is not parked any more.
    RunBeforeRecorded,
    /// Broken: a new owner takes up what is parked before it has taken in what is pending.
    ParkedBeforePending,
    /// Broken: the lane takes in what comes of a key with parked messages.
    NewcomersPass,
    /// Broken: what is parked is recorded by itself, and the rest afterwards.
    RecordedApart,
}

/// What the database has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Recorded {
    position: u8,
    pending: BTreeSet<u8>,
    /// In `redelivery`.
    row: Option<u8>,
    /// From where on messages are parked.
    parked: Option<u8>,
}

impl Recorded {
    /// Whether an owner who reads this would run the message.
    fn has(&self, message: u8) -> bool {
        message >= self.position
            || self.pending.contains(&message)
            || self.row == Some(message)
            || self.parked.is_some_and(|first| first <= message)
    }
}

/// The lane as its owner has it in memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct View {
    /// The next to take in.
    next: u8,
    cut: u8,
    /// Pending below the cut when it was claimed, and not yet taken in.
    unread: BTreeSet<u8>,
    /// Settled by transactions beyond what was recorded.
    done: BTreeSet<u8>,
    queue: BTreeSet<u8>,
    running: Option<u8>,
    /// The running one has a row.
    stored: bool,
    /// Waits for its next attempt.
    failed: Option<u8>,
    parked: Option<u8>,
    /// Taken up, and still parked as far as the database knows.
    unrecorded: BTreeSet<u8>,
}

impl View {
    fn recorded(&self) -> Recorded {
        let mut pending: BTreeSet<u8> = self.queue.union(&self.unread).copied().collect();
        pending.extend(self.running.filter(|_| !self.stored));
        Recorded {
            position: self.next.max(self.cut),
            pending,
            row: self.failed.or(self.running.filter(|_| self.stored)),
            parked: self.parked,
        }
    }

    /// What waits behind the one that fails is forgotten.
    fn park(&mut self, newcomer: Option<u8>, variant: Variant) {
        let queue = std::mem::take(&mut self.queue);
        self.unrecorded.clear();
        let first = queue
            .first()
            .copied()
            .filter(|_| variant != Variant::OnlyTheNewcomer);
        self.parked = self.parked.into_iter().chain(first).chain(newcomer).min();
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    owner: Option<View>,
    recorded: Recorded,
    settlements: BTreeSet<u8>,
    handled: BTreeSet<u8>,
    begun: BTreeSet<u8>,
    effects: [u8; MESSAGES as usize],
    out_of_order: bool,
    crashes: u8,
    failures: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Claim,
    TakeIn {
        memory_is_short: bool,
    },
    TakeUp,
    Start,
    Retry,
    Fail {
        memory_is_short: bool,
    },
    /// The handler has done its work, and committed, where it is transactional.
    Return,
    Record,
    RecordParked,
    Crash,
}

struct Lane {
    variant: Variant,
    transactional: bool,
}

impl Model for Lane {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            owner: None,
            recorded: Recorded::default(),
            settlements: BTreeSet::new(),
            handled: BTreeSet::new(),
            begun: BTreeSet::new(),
            effects: [0; MESSAGES as usize],
            out_of_order: false,
            crashes: 0,
            failures: 0,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let Some(lane) = &state.owner else {
            actions.push(Action::Claim);
            return;
        };
        if state.crashes < CRASHES {
            actions.push(Action::Crash);
        }
        if lane.next < MESSAGES {
            actions.push(Action::TakeIn {
                memory_is_short: false,
            });
            if lane.failed.is_some() {
                actions.push(Action::TakeIn {
                    memory_is_short: true,
                });
            }
        }
        let pending_first = lane.next >= lane.cut || self.variant == Variant::ParkedBeforePending;
        if lane.failed.is_none() && lane.parked.is_some() && pending_first {
            actions.push(Action::TakeUp);
        }
        match (lane.running, lane.failed) {
            (Some(_), _) => {
                actions.push(Action::Return);
                if state.failures < FAILURES {
                    actions.push(Action::Fail {
                        memory_is_short: false,
                    });
                    actions.push(Action::Fail {
                        memory_is_short: true,
                    });
                }
            }
            (None, Some(_)) => actions.push(Action::Retry),
            (None, None) => actions.push(Action::Start),
        }
        if self.variant == Variant::RecordedApart {
            actions.push(Action::RecordParked);
        }
        actions.push(Action::Record);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let lane = state.owner.as_mut();
        match action {
            Action::Claim => {
                let recorded = &mut state.recorded;
                // Its handler committed, but the owner died before it took the row away.
                recorded.row = recorded.row.filter(|row| !last.settlements.contains(row));
                let asked =
                    |message: &u8| *message >= recorded.position || recorded.pending.contains(message);
                state.owner = Some(View {
                    next: recorded
                        .pending
                        .first()
                        .copied()
                        .unwrap_or(recorded.position)
                        .min(recorded.position),
                    cut: recorded.position,
                    unread: recorded.pending.clone(),
                    done: last.settlements.iter().copied().filter(asked).collect(),
                    queue: BTreeSet::new(),
                    running: None,
                    stored: false,
                    failed: recorded.row,
                    parked: recorded.parked,
                    unrecorded: BTreeSet::new(),
                });
            }
            Action::TakeIn { memory_is_short } => {
                let lane = lane?;
                let message = lane.next;
                lane.next += 1;
                let due = message >= lane.cut || lane.unread.remove(&message);
                if !due || lane.done.contains(&message) {
                    // Not its.
                } else if lane.parked.is_some_and(|first| first <= message)
                    && self.variant != Variant::NewcomersPass
                {
                    // It stays parked.
                } else if memory_is_short {
                    lane.park(Some(message), self.variant);
                } else {
                    lane.queue.insert(message);
                }
            }
            Action::TakeUp => {
                let lane = lane?;
                let message = lane.parked?;
                let to = lane.next.max(lane.cut);
                if message < to && !lane.done.contains(&message) {
                    lane.queue.insert(message);
                    if self.transactional {
                        lane.unrecorded.insert(message);
                    }
                }
                lane.parked = Some(message + 1).filter(|first| *first < to);
            }
            Action::Start => {
                let lane = lane?;
                let message = *lane.queue.first()?;
                if lane.unrecorded.contains(&message) && self.variant != Variant::RunBeforeRecorded {
                    return None;
                }
                lane.queue.remove(&message);
                lane.running = Some(message);
                lane.stored = false;
                if state.begun.insert(message) {
                    state.out_of_order |= (0..message).any(|earlier| !last.handled.contains(&earlier));
                }
            }
            Action::Retry => {
                let lane = lane?;
                lane.running = lane.failed.take();
                lane.stored = true;
            }
            Action::Fail { memory_is_short } => {
                let lane = lane?;
                lane.failed = lane.running.take();
                state.failures += 1;
                if memory_is_short {
                    lane.park(None, self.variant);
                }
            }
            Action::Return => {
                let lane = lane?;
                let message = lane.running.take()?;
                state.handled.insert(message);
                if self.transactional {
                    state.effects[usize::from(message)] += 1;
                    state.settlements.insert(message);
                    state.recorded.row = state.recorded.row.filter(|row| *row != message);
                }
            }
            Action::Record => {
                let lane = lane?;
                lane.unrecorded.clear();
                state.recorded = lane.recorded();
            }
            Action::RecordParked => state.recorded.parked = lane?.parked,
            Action::Crash => {
                state.owner = None;
                state.crashes += 1;
            }
        }
        if state == *last { None } else { Some(state) }
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONCE, |_, state: &State| {
                state.effects.iter().all(|times| *times <= 1)
            }),
            Property::always(NOTHING_LOST, |_, state: &State| {
                (0..MESSAGES).all(|message| state.handled.contains(&message) || state.recorded.has(message))
            }),
            Property::always(IN_ORDER, |_, state: &State| !state.out_of_order),
            Property::sometimes("a key with parked messages catches up", |_, state: &State| {
                let recorded = &state.recorded;
                state.handled.len() == usize::from(MESSAGES)
                    && recorded.position == MESSAGES
                    && (0..MESSAGES).all(|message| !recorded.has(message))
                    && state.failures > 0
            }),
            Property::sometimes(
                "a new owner finds some pending and some parked",
                |_, state: &State| {
                    let recorded = &state.recorded;
                    state.owner.is_none() && recorded.parked.is_some() && !recorded.pending.is_empty()
                },
            ),
        ]
    }
}

/// The exactly-once effect.
const ONCE: &str = "no transactional effect is there twice";
/// I1.
const NOTHING_LOST: &str = "what was not handled is where the next owner finds it";
/// I4.
const IN_ORDER: &str = "no message is first run before its predecessor was handled";

fn broken_by(variant: Variant, transactional: bool) -> Vec<&'static str> {
    let lane = Lane {
        variant,
        transactional,
    };
    broken(lane, variant, &[ONCE, NOTHING_LOST, IN_ORDER])
}

#[test]
fn no_failure_and_no_crash_loses_reorders_or_doubles_a_parked_message() {
    for transactional in [false, true] {
        let lane = Lane {
            variant: Variant::Sound,
            transactional,
        };
        assert_sound(lane);
    }
}

#[test]
fn parking_only_the_newcomer_is_caught() {
    for transactional in [false, true] {
        assert!(broken_by(Variant::OnlyTheNewcomer, transactional).contains(&NOTHING_LOST));
    }
}

#[test]
fn running_what_was_parked_before_that_is_recorded_is_caught() {
    assert!(broken_by(Variant::RunBeforeRecorded, true).contains(&ONCE));
}

#[test]
fn taking_up_what_is_parked_before_what_is_pending_is_caught() {
    for transactional in [false, true] {
        assert!(broken_by(Variant::ParkedBeforePending, transactional).contains(&IN_ORDER));
    }
}

#[test]
fn a_newcomer_that_passes_what_is_parked_is_caught() {
    for transactional in [false, true] {
        assert!(broken_by(Variant::NewcomersPass, transactional).contains(&IN_ORDER));
    }
}

#[test]
fn recording_what_is_parked_apart_from_the_rest_is_caught() {
    for transactional in [false, true] {
        assert!(broken_by(Variant::RecordedApart, transactional).contains(&NOTHING_LOST));
    }
}
