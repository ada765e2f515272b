//! What no handler here takes: by its filter, and then it is settled; or by its type. Messages of such types are left to an instance of the group
//! which handles them, and what waits for it is told.
//!
//! When the turn of such a message comes, it waits: parked with its key, or in a row of its own if it has none. Its type goes to what the lane *needs*,
//! by the same report, and a lane goes to who handles what it needs (`session/claims.rs`). See docs/internals/ownership.md.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Event, Executor, Job};
use crate::executor::lanes::Plain;
use crate::handler::MessageOrder;
use crate::handler::UnknownType;
use crate::handler::router::Handler;
use crate::ids::{Epoch, Lane};
use crate::log::block::{Block, Entry, Record};
use crate::protocol::journal::{self, Disposition, Needs};
use crate::protocol::progress::Counters;

/// An owner that can do some of what a lane needs keeps it for so long, or until there is nothing that it can do, before it lets it go for the rest.
const HOLDS: Duration = Duration::from_secs(1);
/// And no longer than this, if nothing of it moves.
const HOLDS_AT_MOST: Duration = Duration::from_secs(30);
/// Once nothing waits for it any more, it keeps the lane for so long, since what came once is likely to come again.
const STAYS: Duration = Duration::from_secs(10);
/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What became of a message whose turn has come.
pub(super) enum Turn {
    Run(Job),
    /// It waits for another instance, and its key with it.
    Left,
    /// Its key goes on.
    Settled,
}

/// The type of a message; that of an untyped one is empty.
fn type_of(record: &Record) -> &str {
    record.message().message_type.as_deref().unwrap_or_default()
}

/// Types that no handler here takes.
#[derive(Default)]
pub(super) struct Types {
    /// Those that no live instance handles, where that is not merely waited for.
    orphans: HashSet<String>,
    /// Those of them that are settled without being read, in the order of their hashes: nobody handles another type with one of these.
    unread: Vec<Unread>,
    /// Those of which there was a message.
    met: HashSet<String>,
    /// When to see which needs of lanes are met. `None`: no lane needs another instance.
    needs_at: Option<Instant>,
}

/// A type whose messages are settled without being read.
struct Unread {
    hash: i32,
    name: String,
    /// How many, since they were last counted.
    settled: u64,
}

impl Types {
    /// A lane needs another instance.
    pub(super) fn look_now(&mut self) {
        self.needs_at = Some(Instant::now());
    }

    /// Something has changed, if a lane needs another instance.
    pub(super) fn look_again(&mut self) {
        self.needs_at = self.needs_at.map(|_| Instant::now());
    }

    pub(super) fn look_at(&self) -> Option<Instant> {
        self.needs_at
    }

    /// The number of the type that is settled unread and has this hash.
    fn unread_number(&self, hash: i32) -> Option<usize> {
        self.unread.binary_search_by_key(&hash, |of| of.hash).ok()
    }
}

impl Executor {
    /// Whether it is known already that nobody handles this message, and that it is to be settled then; if so, it is counted.
    pub(super) fn settles_unknown(&self, record: &Record) -> bool {
        // A broadcast from memory has nowhere to let it wait, and nobody to leave it to.
        let settles = self.session.membership.is_none()
            || (self.plan.unknown_types == UnknownType::Settle
                && self.types.orphans.contains(type_of(record)));
        if settles {
            self.plan.counters.settled_unknown(&self.plan, type_of(record), 1);
        }
        settles
    }

    /// Whether a message is settled because its handler's filter does not want it; if so, it is counted, unless it was before.
    pub(super) fn passes(&self, handler: &Handler, record: &Record, counts: bool) -> bool {
        let passes = handler.refuses(record.message());
        if passes && counts {
            self.plan.counters.settled_filtered(&self.plan, handler, record);
        }
        passes
    }

    /// Whether a message that was not read is one that nobody handles and that is to be settled; if so, it will be counted.
    pub(super) fn settles_unread(&mut self, of_type: Option<i32>) -> bool {
        let known = of_type.and_then(|hash| self.types.unread_number(hash));
        if let Some(number) = known {
            self.types.unread[number].settled += 1;
        }
        known.is_some()
    }

    /// Settles what need not be read from an offset on, as far as that is all there is; returns the first offset of something else. Where little is
    /// wanted this is most of what is done, so the lanes are looked up beforehand.
    pub(super) fn settle_unread(&mut self, n: usize, block: &Block, from: i64, end: i64) -> i64 {
        let is_unread = |offset: i64| matches!(block.entry((offset - block.base) as usize), Entry::Unread(_));
        if self.types.unread.is_empty() || from >= end || !is_unread(from) {
            return from;
        }
        let lanes = self.lanes.plain_from(from, |lane| self.reader.reads(n, lane));
        let mut next = from;
        while next < end {
            let Entry::Unread(hashes) = block.entry((next - block.base) as usize) else {
                break;
            };
            let Some(number) = hashes.of_type.and_then(|hash| self.types.unread_number(hash)) else {
                break;
            };
            match lanes[self.lanes.of(next, hashes.key).index()] {
                Plain::Elsewhere => {}
                Plain::Due => self.types.unread[number].settled += 1,
                Plain::Perhaps => break,
            }
            next += 1;
        }
        next
    }

    /// Counts what was settled without being read.
    pub(super) fn count_unread(&mut self) {
        for of in self.types.unread.iter_mut().filter(|of| of.settled > 0) {
            let settled = std::mem::take(&mut of.settled);
            self.plan.counters.settled_unknown(&self.plan, &of.name, settled);
        }
    }

    /// The message, if it may run now.
    pub(super) fn if_its_turn(&mut self, job: Job) -> Option<Job> {
        if !job.unknown {
            return Some(job);
        }
        let key = job.key;
        match self.turn(job) {
            Turn::Run(job) => return Some(job),
            Turn::Left => {}
            Turn::Settled => key.into_iter().for_each(|key| self.release_key(key)),
        }
        None
    }

    /// Nothing of its key is before it.
    pub(super) fn turn(&mut self, job: Job) -> Turn {
        if !job.unknown {
            return Turn::Run(job);
        }
        if !self.types.orphans.contains(type_of(&job.record)) {
            self.leave(job);
            return Turn::Left;
        }
        if self.settles_unknown(&job.record) {
            self.is_settled(&job);
            return Turn::Settled;
        }
        Turn::Run(job)
    }

    /// To an instance that handles it.
    fn leave(&mut self, mut job: Job) {
        let message_type = type_of(&job.record).to_owned();
        self.need(job.lane, &message_type);
        self.has_moved(job.lane);
        let has_row = job.stored && self.failing.remove(job.offset);
        match job.key {
            // By reference: its key falls behind its lane, from it on.
            Some(key) if self.plan.order == MessageOrder::Key && !has_row => {
                self.lanes.let_go(job.offset);
                let successors = self.keys.of(key);
                successors.headless = false;
                successors.failing = false;
                successors.catching_up = false;
                successors.waits_for = Some(message_type);
                self.park_queue(key);
                if !job.stored {
                    return self.park_from(key, job.offset);
                }
                // A copy of what was parked stays one.
                if let Some(successors) = self.keys.get_mut(key) {
                    let parked = successors.parked.get_or_insert_default();
                    parked.copies = parked.copies.into_iter().chain([job.offset]).min();
                    if parked.log.is_some() {
                        self.note_parked(key);
                    }
                }
            }
            Some(key) => {
                match has_row {
                    true => self.note_waiting(&mut job),
                    // The cursor waits.
                    false => {
                        self.lanes.hold(job.offset, job.lane);
                    }
                }
                self.hold_key(&job);
                self.queue.leave(job);
                self.head_fails(key, None);
            }
            None => {
                self.lanes.let_go(job.offset);
                self.note_waiting(&mut job);
            }
        }
    }

    /// In a row of its own. That of an attempt which a process may have died of stays: whoever runs it next counts it.
    fn note_waiting(&mut self, job: &mut Job) {
        let Some(epoch) = self.lanes.epoch(job.lane).filter(|_| !job.suspect) else {
            return;
        };
        let mut entry = journal::Entry::new(job.lane, epoch, Disposition::Waiting, job.attempt - 1);
        entry.record = (!job.stored).then(|| job.record.clone());
        self.reporter.note(job.offset, entry);
        job.stored = true;
    }

    /// A message of this type waits in the lane.
    fn need(&mut self, number: Lane, message_type: &str) {
        if let Some(membership) = &self.session.membership
            && self.types.met.insert(message_type.to_owned())
        {
            // The session outlives its executors.
            let _ = membership.events.send(Event::Unknown {
                subscription: membership.subscription,
                message_type: message_type.to_owned(),
            });
        }
        let Some(lane) = self.lanes.get_mut(number) else {
            return;
        };
        if !lane.needs.iter().any(|needed| needed == message_type) {
            let mut needs = lane.needs.clone();
            needs.push(message_type.to_owned());
            self.note_needs(number, needs);
        }
    }

    fn note_needs(&mut self, number: Lane, types: Vec<String>) {
        let Some(lane) = self.lanes.get_mut(number).filter(|lane| lane.needs != types) else {
            return;
        };
        let epoch = lane.epoch;
        lane.needs.clone_from(&types);
        self.reporter.needs(number, Needs { epoch, types });
        self.types.look_now();
    }

    /// These types no live instance handles, of those that this one does not: the policy decides.
    pub(super) fn orphaned(&mut self, types: HashSet<String>, unread: HashMap<i32, String>) {
        self.reader.pass_types(unread.keys().copied().collect());
        let unread = unread.into_iter().map(|(hash, name)| Unread {
            hash,
            name,
            settled: 0,
        });
        self.types.unread = unread.collect();
        self.types.unread.sort_unstable_by_key(|of| of.hash);
        let before = std::mem::replace(&mut self.types.orphans, types);
        let now = |name: &str| self.types.orphans.contains(name) && !before.contains(name);
        let waiting = self.keys.iter().filter_map(|(key, successors)| {
            let waits_for = successors.waits_for.as_deref()?;
            now(waits_for).then_some(key)
        });
        let keys: Vec<i32> = waiting.collect();
        let left = self.queue.take_left(|job| now(type_of(&job.record)));
        keys.into_iter().for_each(|key| self.release_key(key));
        for job in left {
            if job.stored {
                self.failing.insert(job.offset, job.lane);
            }
            if let Some(job) = self.if_its_turn(job) {
                self.queue.push(job);
            }
        }
        self.types.look_again();
    }

    /// From now on none of them is left to another instance, and what was is in the last report.
    pub(super) fn tell_orphaned(&mut self) {
        self.put_report();
        if let Some(membership) = &self.session.membership {
            // The session outlives its executors.
            let _ = membership.events.send(Event::Orphaned {
                subscription: membership.subscription,
            });
        }
    }

    /// No row of these lanes waits for these types any more, under these epochs.
    pub(super) fn served(&mut self, lanes: &[(Lane, Epoch)], types: &[String]) {
        for (number, epoch) in lanes {
            if let Some(lane) = self.lanes.get_mut(*number).filter(|lane| lane.epoch == *epoch) {
                lane.served.extend(types.iter().cloned());
            }
        }
        self.types.look_again();
    }

    /// Something of the lane was done.
    pub(super) fn has_moved(&mut self, number: Lane) {
        if self.types.needs_at.is_some()
            && let Some(lane) = self.lanes.get_mut(number)
        {
            lane.has_moved = true;
        }
    }

    /// What is first among a lane's needs says who is to own it. So when this instance has done what it can, what it cannot comes first.
    pub(super) fn see_needs(&mut self) {
        let now = Instant::now();
        if self.types.needs_at.is_none_or(|at| at > now) {
            return;
        }
        let needy: Vec<Lane> = (self.lanes.iter())
            .filter(|(number, lane)| !lane.needs.is_empty() && !self.lanes.is_draining(*number))
            .map(|(number, _)| number)
            .collect();
        self.types.needs_at = None;
        // While it is paused, nobody else would do more.
        let is_open = self.admission.is_open();
        let next: Vec<Instant> = (needy.iter().filter(|_| is_open))
            .filter_map(|number| self.see_needs_of(*number, now))
            .collect();
        if !needy.is_empty() {
            let least = now + LOOK_EVERY;
            let next = next.into_iter().min().unwrap_or(now + STAYS);
            self.types.needs_at = Some(next.max(least));
        }
    }

    /// Returns when to look again.
    fn see_needs_of(&mut self, number: Lane, now: Instant) -> Option<Instant> {
        let lane = self.lanes.get(number)?;
        let (here, elsewhere): (Vec<String>, Vec<String>) =
            lane.needs.iter().cloned().partition(|name| self.takes(name));
        let held = now.saturating_duration_since(lane.claimed_at);
        let is_first = lane.needs.first().is_some_and(|first| self.takes(first));
        // What the policy decides on is not likely to be handled here again.
        let is_done = held >= STAYS
            || here
                .iter()
                .all(|name| self.types.orphans.contains(name) && lane.served.contains(name));
        let lets_go = match elsewhere.is_empty() || !is_first {
            true => is_done,
            false => {
                held >= HOLDS_AT_MOST || (held >= HOLDS && lane.has_moved) || self.is_idle(number, &here)
            }
        };
        if !lets_go {
            return Some(match elsewhere.is_empty() || !is_first {
                true => lane.claimed_at + STAYS,
                false => now + LOOK_EVERY,
            });
        }
        let unserved = here.into_iter().filter(|name| !lane.served.contains(name));
        let needs: Vec<String> = elsewhere.into_iter().chain(unserved).collect();
        self.note_needs(number, needs);
        None
    }

    /// Whether this instance does something about messages of this type.
    fn takes(&self, message_type: &str) -> bool {
        let typed = Some(message_type).filter(|name| !name.is_empty());
        self.plan.router.find(typed).is_some() || self.types.orphans.contains(message_type)
    }

    /// There is nothing in the lane that this instance could do now.
    fn is_idle(&self, number: Lane, here: &[String]) -> bool {
        self.reader.is_lane_at_head(number)
            && self.lanes.get(number).is_some_and(|lane| {
                lane.running == 0 && here.iter().all(|needed| lane.served.contains(needed))
            })
            && self.lanes.is_settled_below(number, i64::MAX)
            && !self.queue.any(|job| job.lane == number)
            && !(self.keys.iter()).any(|(key, of)| of.catching_up && self.lanes.of_key(key) == number)
    }
}

impl Counters {
    /// A message that a filter does not want was settled; the first is told of.
    fn settled_filtered(&self, plan: &super::Plan, handler: &Handler, record: &Record) {
        let filter = handler.filter.as_ref().map(|filter| filter.text.as_str());
        if handler.cannot_tell(record.message()) && self.filter_errors.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(
                group = %plan.group, topic = %plan.topic, handler = handler.name, filter, id = %record.message().id,
                "this filter cannot be evaluated of a message, which is passed without being handled; such messages are counted as filtered"
            );
        }
        if self.filtered.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::info!(
                group = %plan.group, topic = %plan.topic, handler = handler.name, filter,
                "messages that this filter does not want are passed without being handled; they are counted as filtered"
            );
        }
    }

    /// Messages that nobody handles were settled; the first of a type is told of.
    fn settled_unknown(&self, plan: &super::Plan, message_type: &str, count: u64) {
        self.unknown.fetch_add(count, Ordering::Relaxed);
        if !self.first_unknown(message_type, count) {
            return;
        }
        tracing::warn!(
            group = %plan.group, topic = %plan.topic, message_type,
            "messages of this type are settled without being handled, since no handler takes it and the policy for unknown types is to settle; they are counted as unknown"
        );
    }
}
