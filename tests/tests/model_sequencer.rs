//! A model of the sequencer's step (`postbox.step` in `outbox/migrations/functions/sequencer.sql`), checked exhaustively: transactions take their id
//! early or late, insert, commit and abort in any order; two dispatchers step in between; the server crashes and takes the last steps back.
//!
//! Each broken variant must be caught, or the model proves nothing.

use std::collections::BTreeSet;

use stateright::{Model, Property};

mod checking;
use checking::{assert_sound, broken};

/// How many rows each transaction may insert.
const ROWS: [u8; 3] = [2, 1, 1];
const DISPATCHERS: usize = 2;

/// How a step finds and numbers what is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    /// As it is: what became visible between the last tick's snapshot and one that is taken under the lock, by `seq`.
    SnapshotDifference,
    /// Broken: whatever has a greater `seq` than the last that was found.
    SeqAfterTheLast,
    /// Broken: only what is not below the last snapshot's `xmax`, forgetting those that were running then.
    WithoutTheRunning,
    /// Broken: numbered by `xid`.
    ByXid,
    /// Broken: the snapshot is older than the lock, as in REPEATABLE READ.
    SnapshotBeforeTheLock,
    /// As it is: a step that knows up to which number all are dealt with looks in one slot, and counts.
    Lean,
    /// Broken: it does not count.
    LeanWithoutCounting,
    /// Broken: as they are in the index.
    LeanByXid,
    /// Broken: numbers count as dealt with if the snapshot lists nobody as running.
    LeanForgettingTheNewest,
}

impl Variant {
    fn is_lean(self) -> bool {
        matches!(
            self,
            Self::Lean | Self::LeanWithoutCounting | Self::LeanByXid | Self::LeanForgettingTheNewest
        )
    }
}

/// Where a lean step does not look: the slot of the last transaction's rows.
const ELSEWHERE: usize = ROWS.len() - 1;

/// What a dispatcher passes back to the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Known {
    /// How many steps there were.
    ticks: usize,
    /// All smaller numbers are dealt with.
    seq: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Status {
    Open,
    Committed,
    Aborted,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Transaction {
    xid: Option<u8>,
    status: Status,
    /// The `seq` of its rows.
    rows: Vec<u8>,
}

/// As PostgreSQL takes it: what is running at or above `xmax` is not listed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Snapshot {
    xmax: u8,
    xip: BTreeSet<u8>,
}

impl Snapshot {
    fn sees(&self, xid: u8) -> bool {
        xid < self.xmax && !self.xip.contains(&xid)
    }
}

/// A step that was committed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Tick {
    snapshot: Snapshot,
    /// How long the log was then.
    head: usize,
    /// The rows that were committed when its snapshot was taken.
    committed: BTreeSet<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Dispatcher {
    Idle,
    /// Has the lock.
    Locked,
    /// Has looked: the rows it found in their order, with the tick that it will append.
    Looked {
        has_lock: bool,
        rows: Vec<u8>,
        snapshot: Snapshot,
        committed: BTreeSet<u8>,
        /// How many numbers had been given.
        given: u8,
        is_lean: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    next_xid: u8,
    latest_completed: u8,
    next_seq: u8,
    transactions: Vec<Transaction>,
    /// For each `seq`, the rows that were committed before it was inserted.
    before: Vec<BTreeSet<u8>>,
    /// Rows by their offsets.
    log: Vec<u8>,
    ticks: Vec<Tick>,
    dispatchers: Vec<Dispatcher>,
    known: Vec<Option<Known>>,
    crashed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    TakeXid(usize),
    Insert(usize),
    Commit(usize),
    Abort(usize),
    Lock(usize),
    Look(usize),
    Append(usize),
    /// The server crashes; so many of the last steps, which commit asynchronously, are lost.
    Crash {
        steps_lost: usize,
    },
}

struct Sequencing {
    variant: Variant,
}

/// The rows of these transactions that the snapshot sees: `xid` and `seq`.
fn seen<'a>(transactions: &'a [Transaction], snapshot: &'a Snapshot) -> impl Iterator<Item = (u8, u8)> + 'a {
    transactions
        .iter()
        .filter(|transaction| transaction.status == Status::Committed)
        .filter_map(|transaction| Some((transaction.xid?, &transaction.rows)))
        .filter(|(xid, _)| snapshot.sees(*xid))
        .flat_map(|(xid, rows)| rows.iter().map(move |seq| (xid, *seq)))
}

impl State {
    fn committed(&self) -> BTreeSet<u8> {
        self.transactions
            .iter()
            .filter(|transaction| transaction.status == Status::Committed)
            .flat_map(|transaction| transaction.rows.iter().copied())
            .collect()
    }

    fn snapshot(&self) -> Snapshot {
        let xmax = self.latest_completed + 1;
        let running = self
            .transactions
            .iter()
            .filter(|transaction| transaction.status == Status::Open);
        Snapshot {
            xmax,
            xip: running
                .filter_map(|transaction| transaction.xid)
                .filter(|xid| *xid < xmax)
                .collect(),
        }
    }

    fn take_xid(&mut self, n: usize) {
        if self.transactions[n].xid.is_none() {
            self.transactions[n].xid = Some(self.next_xid);
            self.next_xid += 1;
        }
    }

    fn complete(&mut self, n: usize, status: Status) {
        let transaction = &mut self.transactions[n];
        transaction.status = status;
        if let Some(xid) = transaction.xid {
            self.latest_completed = self.latest_completed.max(xid);
        }
    }

    fn is_locked(&self) -> bool {
        self.dispatchers.iter().any(|dispatcher| {
            matches!(
                dispatcher,
                Dispatcher::Locked | Dispatcher::Looked { has_lock: true, .. }
            )
        })
    }

    /// What a lean step with this snapshot finds new, if that is all there is.
    fn lean(&self, variant: Variant, snapshot: &Snapshot, known: Option<Known>) -> Option<Vec<u8>> {
        let known = known.filter(|known| known.ticks == self.ticks.len())?.seq;
        let last = &self.ticks.last()?.snapshot;
        let mut rows: Vec<(u8, u8)> = seen(&self.transactions[..ELSEWHERE], snapshot)
            .filter(|(xid, _)| *xid >= last.xmax)
            .collect();
        // The index.
        rows.sort_unstable();
        let rows: Vec<u8> = rows.into_iter().map(|(_, seq)| seq).collect();
        let are_new = rows.iter().all(|seq| *seq >= known);
        let are_all = rows.len() == usize::from(self.next_seq - known);
        let are_in_order = rows.is_sorted();
        match variant {
            Variant::LeanWithoutCounting => are_new && are_in_order,
            Variant::LeanByXid => are_new && are_all,
            _ => are_new && are_all && are_in_order,
        }
        .then_some(rows)
    }

    /// What a step with this snapshot finds new, in the order of the offsets.
    fn fresh(&self, variant: Variant, snapshot: &Snapshot) -> Vec<u8> {
        let last = self.ticks.last().map(|tick| &tick.snapshot);
        let last_seq = self.log.iter().max();
        let mut rows: Vec<(u8, u8)> = seen(&self.transactions, snapshot)
            .filter(|(xid, _)| match (variant, last) {
                (_, None) | (Variant::SeqAfterTheLast, _) => true,
                (Variant::WithoutTheRunning, Some(last)) => *xid >= last.xmax,
                (_, Some(last)) => *xid >= last.xmax || last.xip.contains(xid),
            })
            .filter(|(_, seq)| variant != Variant::SeqAfterTheLast || last_seq.is_none_or(|last| seq > last))
            .collect();
        rows.sort_by_key(|(xid, seq)| {
            if variant == Variant::ByXid {
                (*xid, *seq)
            } else {
                (*seq, 0)
            }
        });
        rows.into_iter().map(|(_, seq)| seq).collect()
    }
}

impl Model for Sequencing {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            next_xid: 1,
            latest_completed: 0,
            next_seq: 0,
            transactions: ROWS
                .map(|_| Transaction {
                    xid: None,
                    status: Status::Open,
                    rows: Vec::new(),
                })
                .to_vec(),
            before: Vec::new(),
            log: Vec::new(),
            ticks: Vec::new(),
            dispatchers: vec![Dispatcher::Idle; DISPATCHERS],
            known: vec![None; DISPATCHERS],
            crashed: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for (n, transaction) in state.transactions.iter().enumerate() {
            if transaction.status != Status::Open {
                continue;
            }
            if transaction.xid.is_none() {
                actions.push(Action::TakeXid(n));
            }
            if transaction.rows.len() < usize::from(ROWS[n]) {
                actions.push(Action::Insert(n));
            }
            if !transaction.rows.is_empty() {
                actions.extend([Action::Commit(n), Action::Abort(n)]);
            }
        }
        for (n, dispatcher) in state.dispatchers.iter().enumerate() {
            match dispatcher {
                Dispatcher::Idle if self.variant == Variant::SnapshotBeforeTheLock => {
                    actions.push(Action::Look(n));
                }
                Dispatcher::Idle if !state.is_locked() => actions.push(Action::Lock(n)),
                Dispatcher::Idle => {}
                Dispatcher::Locked => actions.push(Action::Look(n)),
                Dispatcher::Looked { .. } => actions.push(Action::Append(n)),
            }
        }
        if !state.crashed {
            actions.extend((0..=state.ticks.len()).map(|steps_lost| Action::Crash { steps_lost }));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::TakeXid(n) => state.take_xid(n),
            Action::Insert(n) => {
                state.take_xid(n);
                state.before.push(last.committed());
                state.transactions[n].rows.push(state.next_seq);
                state.next_seq += 1;
            }
            Action::Commit(n) => state.complete(n, Status::Committed),
            Action::Abort(n) => state.complete(n, Status::Aborted),
            Action::Lock(n) => state.dispatchers[n] = Dispatcher::Locked,
            Action::Look(n) => {
                let snapshot = last.snapshot();
                let lean = match self.variant.is_lean() {
                    true => last.lean(self.variant, &snapshot, last.known[n]),
                    false => None,
                };
                let is_lean = lean.is_some();
                let rows = lean.unwrap_or_else(|| last.fresh(self.variant, &snapshot));
                let has_lock = last.dispatchers[n] == Dispatcher::Locked;
                if rows.is_empty() {
                    // Nothing is written.
                    state.dispatchers[n] = Dispatcher::Idle;
                    state.known[n] = last.known[n].filter(|_| is_lean);
                } else {
                    state.dispatchers[n] = Dispatcher::Looked {
                        has_lock,
                        rows,
                        snapshot,
                        committed: last.committed(),
                        given: last.next_seq,
                        is_lean,
                    };
                }
            }
            Action::Append(n) => {
                let looked = std::mem::replace(&mut state.dispatchers[n], Dispatcher::Idle);
                let Dispatcher::Looked {
                    rows,
                    snapshot,
                    committed,
                    given,
                    is_lean,
                    ..
                } = looked
                else {
                    return None;
                };
                state.log.extend(rows);
                let nobody_was_open = snapshot.xip.is_empty()
                    && (last.next_xid == snapshot.xmax || self.variant == Variant::LeanForgettingTheNewest);
                state.known[n] = (self.variant.is_lean() && (is_lean || nobody_was_open)).then_some(Known {
                    ticks: state.ticks.len() + 1,
                    seq: given,
                });
                state.ticks.push(Tick {
                    snapshot,
                    head: state.log.len(),
                    committed,
                });
            }
            Action::Crash { steps_lost } => {
                state.crashed = true;
                state.ticks.truncate(last.ticks.len() - steps_lost);
                state.log.truncate(state.ticks.last().map_or(0, |tick| tick.head));
                state.dispatchers.fill(Dispatcher::Idle);
                state.known.fill(None);
                for n in 0..state.transactions.len() {
                    if state.transactions[n].status == Status::Open {
                        state.complete(n, Status::Aborted);
                    }
                }
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONLY_COMMITTED, |_, state: &State| {
                let committed = state.committed();
                state.log.iter().all(|row| committed.contains(row))
            }),
            Property::always(ONCE, |_, state: &State| {
                state.log.iter().collect::<BTreeSet<_>>().len() == state.log.len()
            }),
            Property::always(COMPLETE, |_, state: &State| {
                // What a step could see is in the log after it.
                state.ticks.iter().all(|tick| {
                    tick.committed
                        .iter()
                        .all(|row| state.log[..tick.head].contains(row))
                })
            }),
            Property::always(CAUSAL, |_, state: &State| {
                state.log.iter().enumerate().all(|(offset, row)| {
                    state.before[usize::from(*row)]
                        .iter()
                        .all(|earlier| state.log[..offset].contains(earlier))
                })
            }),
            Property::sometimes(
                "a message is overtaken by one that was inserted later",
                |_, state: &State| state.log.windows(2).any(|pair| pair[0] > pair[1]),
            ),
            Property::sometimes("everything is in order", |_, state: &State| {
                state.log.len() == ROWS.iter().map(|rows| usize::from(*rows)).sum::<usize>()
            }),
            Property::sometimes(
                "a crash takes a step back and it is taken again",
                |_, state: &State| state.crashed && state.ticks.len() > 1,
            ),
        ]
    }
}

/// I1.
const ONLY_COMMITTED: &str = "only committed messages have offsets";
/// I2.
const ONCE: &str = "no message has two offsets";
const COMPLETE: &str = "no message that a step could see is left out";
/// I3.
const CAUSAL: &str = "what was committed before a message was inserted precedes it";

/// The property that a variant breaks.
fn broken_by(variant: Variant) -> Vec<&'static str> {
    broken(
        Sequencing { variant },
        variant,
        &[ONLY_COMMITTED, ONCE, COMPLETE, CAUSAL],
    )
}

#[test]
fn every_commit_order_gives_every_message_one_offset_in_causal_order() {
    assert_sound(Sequencing {
        variant: Variant::SnapshotDifference,
    });
}

#[test]
fn a_lean_step_leaves_nothing_out() {
    assert_sound(Sequencing {
        variant: Variant::Lean,
    });
}

#[test]
fn a_lean_step_that_does_not_count_is_caught() {
    assert!(broken_by(Variant::LeanWithoutCounting).contains(&COMPLETE));
}

#[test]
fn a_lean_step_in_the_order_of_the_index_is_caught() {
    assert!(broken_by(Variant::LeanByXid).contains(&CAUSAL));
}

#[test]
fn numbers_of_transactions_that_the_snapshot_does_not_know_are_not_dealt_with() {
    assert!(broken_by(Variant::LeanForgettingTheNewest).contains(&COMPLETE));
}

#[test]
fn sequencing_by_seq_after_the_last_is_caught() {
    assert!(broken_by(Variant::SeqAfterTheLast).contains(&COMPLETE));
}

#[test]
fn forgetting_transactions_that_were_running_is_caught() {
    assert!(broken_by(Variant::WithoutTheRunning).contains(&COMPLETE));
}

#[test]
fn numbering_by_xid_is_caught() {
    assert!(broken_by(Variant::ByXid).contains(&CAUSAL));
}

#[test]
fn a_snapshot_older_than_the_lock_is_caught() {
    assert!(broken_by(Variant::SnapshotBeforeTheLock).contains(&ONCE));
}
