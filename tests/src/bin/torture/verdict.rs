//! What the evidence says about the guarantees.

use std::collections::{BTreeMap, HashMap, HashSet};

use uuid::Uuid;

use crate::clock::MILLISECOND;
use crate::evidence::{CutBack, Evidence, Run};
use crate::history::Outcome;
use crate::message::{EFFECTS, NODES, PLAIN, STRICT, topic_of};
use crate::plan::{LEASE, PAST_LEASE};

/// Which groups there are.
const GROUPS: [&str; 3] = [PLAIN, EFFECTS, STRICT];

/// A woken instance may write down the start of a run that it had decided upon before it froze.
const WAKING: u64 = 300 * MILLISECOND;

/// The end of a connection is noticed sooner.
const NOTICING: u64 = 500 * MILLISECOND;

/// A key was run here so shortly before a kill: it was at home here.
const RECENTLY: u64 = 3_000 * MILLISECOND;

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) published: u64,
    pub(crate) committed: u64,
    /// Pairs of group and message.
    pub(crate) delivered: u64,
    pub(crate) lost: u64,
    pub(crate) phantom: u64,
    pub(crate) reordered: u64,
    pub(crate) concurrent: u64,
    pub(crate) zombie_overlaps: u64,
    pub(crate) effect_duplicates: u64,
    pub(crate) duplicates: u64,
    pub(crate) dead: u64,
    /// Acknowledged, and gone with a database that was ended.
    pub(crate) taken_back: u64,
    pub(crate) faults: BTreeMap<String, u64>,
    /// From each kill of a consumer to the first run of one of its keys elsewhere, in milliseconds, ascending; without those during which the
    /// server was down.
    pub(crate) takeovers_ms: Vec<u64>,
    /// What is wrong, one by one; the first of them.
    pub(crate) findings: Vec<String>,
}

const MOST_FINDINGS: usize = 100;

impl Verdict {
    pub(crate) fn is_clean(&self) -> bool {
        self.lost + self.phantom + self.reordered + self.concurrent + self.effect_duplicates == 0
    }

    fn find(&mut self, finding: String) {
        if self.findings.len() < MOST_FINDINGS {
            self.findings.push(finding);
        }
    }
}

/// Judges a run that came to rest.
pub(crate) fn judge(evidence: &Evidence) -> Verdict {
    let mut verdict = Verdict {
        published: evidence.published,
        committed: evidence.committed.len() as u64,
        dead: evidence.dead.len() as u64,
        faults: evidence.faults.clone(),
        takeovers_ms: takeovers(evidence),
        ..Verdict::default()
    };
    commits(evidence, &mut verdict);
    deliveries(evidence, &mut verdict);
    effects(evidence, &mut verdict);
    let committed: HashSet<Uuid> = evidence.committed.iter().map(|message| message.id).collect();
    for ((group, key), runs) in by_key(evidence) {
        // What went with a database that was ended left its numbers to others.
        let of_this: Vec<&Run> = runs
            .iter()
            .copied()
            .filter(|run| committed.contains(&run.id))
            .collect();
        order(evidence, group, key, &of_this, &mut verdict);
        for cut in &evidence.cuts {
            // And once more for what came after it: whatever was not settled there begins again, in order. Without what was run by somebody who may not
            // have known yet.
            let (doubtful, after): (Vec<&Run>, Vec<&Run>) = of_this
                .iter()
                .copied()
                .filter(|run| run.start >= cut.to)
                .partition(|run| run.start <= forgotten_by(evidence, cut, &run.instance));
            let doubtful: HashSet<Uuid> = doubtful.iter().map(|run| run.id).collect();
            let after: Vec<&Run> = after
                .into_iter()
                .filter(|run| !doubtful.contains(&run.id))
                .collect();
            order(evidence, group, key, &after, &mut verdict);
        }
        overlaps(evidence, group, key, &runs, &mut verdict);
    }
    nodes(evidence, &mut verdict);
    verdict
}

/// What was acknowledged is there, and what was aborted is not: else the server, or this program, is wrong.
fn commits(evidence: &Evidence, verdict: &mut Verdict) {
    let committed: HashSet<Uuid> = evidence.committed.iter().map(|message| message.id).collect();
    for id in evidence.acknowledged.difference(&committed) {
        if evidence.was_taken_back(id) {
            verdict.taken_back += 1;
            continue;
        }
        verdict.lost += 1;
        verdict.find(format!(
            "lost: {id} was acknowledged and is not in the business table"
        ));
    }
    for id in evidence
        .cuts
        .iter()
        .flat_map(|cut| cut.kept.difference(&committed))
    {
        verdict.lost += 1;
        verdict.find(format!(
            "lost: {id} was in the business table when the database had gone back, and is not any more"
        ));
    }
    for id in evidence.aborted.intersection(&committed) {
        // Rolled back after it was prepared, and the rollback was taken back.
        if evidence.was_taken_back(id) {
            continue;
        }
        verdict.phantom += 1;
        verdict.find(format!("phantom: {id} was aborted and is in the business table"));
    }
}

/// I1: delivered to every group iff committed.
fn deliveries(evidence: &Evidence, verdict: &mut Verdict) {
    let committed: HashSet<Uuid> = evidence.committed.iter().map(|message| message.id).collect();
    let mut ok: HashMap<(&str, Uuid), u64> = HashMap::new();
    let mut phantoms = HashSet::new();
    for run in &evidence.runs {
        if !committed.contains(&run.id) && !is_of_an_ended_database(evidence, run) && phantoms.insert(run.id)
        {
            verdict.phantom += 1;
            verdict.find(format!(
                "phantom: {} was never committed, and was run: {run:?}",
                run.id
            ));
        }
        if run.how == Some(Outcome::Ok) {
            *ok.entry((&run.group, run.id)).or_default() += 1;
        }
    }
    let affected: HashSet<Uuid> = evidence.effects.iter().map(|effect| effect.id).collect();
    for group in GROUPS {
        for message in evidence
            .committed
            .iter()
            .filter(|message| message.topic == topic_of(group))
        {
            let times = ok.get(&(group, message.id)).copied().unwrap_or_default();
            let arrived = times > 0 && (group != EFFECTS || affected.contains(&message.id));
            if arrived {
                verdict.delivered += 1;
            } else if !evidence.dead.contains(&(group.to_owned(), message.id)) {
                verdict.lost += 1;
                verdict.find(format!("lost: {message:?} did not arrive in group {group}"));
            }
            if group != EFFECTS {
                verdict.duplicates += times.saturating_sub(1);
            }
        }
    }
}

/// A message that went with a database that was ended, run while that was up, or before this instance could know of its end.
fn is_of_an_ended_database(evidence: &Evidence, run: &Run) -> bool {
    !evidence.aborted.contains(&run.id)
        && evidence.cuts.iter().any(|cut| {
            let known = forgotten_by(evidence, cut, &run.instance).max(cut.to + LEASE.as_nanos() as u64);
            evidence.went_with(cut, &run.id) && run.start <= known
        })
}

/// When an instance had forgotten at last what it knew of the database that was ended.
fn forgotten_by(evidence: &Evidence, cut: &CutBack, instance: &str) -> u64 {
    let out_of_reach = evidence.freezes.iter().chain(&evidence.blind);
    out_of_reach
        .filter(|span| span.instance == instance && span.from < cut.to && cut.from < span.to)
        .map(|span| span.to)
        .fold(cut.to, u64::max)
        + NOTICING
}

/// I6: the effects of a key are there once, and in its order.
fn effects(evidence: &Evidence, verdict: &mut Verdict) {
    let committed: HashSet<Uuid> = evidence.committed.iter().map(|message| message.id).collect();
    let mut seen = HashSet::new();
    let mut reached: HashMap<&str, i64> = HashMap::new();
    for effect in &evidence.effects {
        if !committed.contains(&effect.id) {
            verdict.phantom += 1;
            verdict.find(format!(
                "phantom: {effect:?} of a message that was never committed"
            ));
        }
        if !seen.insert(effect.id) {
            verdict.effect_duplicates += 1;
            verdict.find(format!("effect_duplicates: {effect:?} again"));
            continue;
        }
        if let Some(before) = reached.insert(&effect.key, effect.n)
            && before > effect.n
        {
            verdict.reordered += 1;
            verdict.find(format!("reordered: {effect:?} after that of number {before}"));
        }
    }
}

type ByKey<'a> = BTreeMap<(&'a str, &'a str), Vec<&'a Run>>;

/// The runs of groups by group and key, in the order in which they began.
fn by_key(evidence: &Evidence) -> ByKey<'_> {
    let mut keys = ByKey::new();
    for run in evidence.runs.iter().filter(|run| run.group != NODES) {
        keys.entry((run.group.as_str(), run.key.as_str()))
            .or_default()
            .push(run);
    }
    for runs in keys.values_mut() {
        runs.sort_by_key(|run| run.start);
    }
    keys
}

/// I4: no message is first run before its predecessor, nor before that was done with.
fn order(evidence: &Evidence, group: &str, key: &str, runs: &[&Run], verdict: &mut Verdict) {
    let mut first: BTreeMap<i64, &Run> = BTreeMap::new();
    let mut done: HashMap<i64, u64> = HashMap::new();
    for run in runs {
        first.entry(run.n).or_insert(run);
        if run.how == Some(Outcome::Ok) {
            let done = done.entry(run.n).or_insert(run.end);
            *done = run.end.min(*done);
        }
    }
    for ((n, run), (next, successor)) in first.iter().zip(first.iter().skip(1)) {
        let letter = (group.to_owned(), run.id);
        let dead = evidence.dead.contains(&letter) || evidence.dead_before.contains(&letter);
        let settled = done.get(n).is_some_and(|end| *end <= successor.start);
        if successor.start < run.start || !(settled || dead) {
            verdict.reordered += 1;
            verdict.find(format!(
                "reordered: number {next} of {key} in {group} began at {} in {}; number {n} had begun at {} in {} and ended at {:?}",
                successor.start, successor.instance, run.start, run.instance, done.get(n)
            ));
        }
    }
}

/// I4: no two runs of a key at the same time.
fn overlaps(evidence: &Evidence, group: &str, key: &str, runs: &[&Run], verdict: &mut Verdict) {
    let mut going_on: Vec<&Run> = Vec::new();
    for run in runs {
        going_on.retain(|other| other.end > run.start);
        for other in &going_on {
            if is_zombie(evidence, run) || is_zombie(evidence, other) {
                verdict.zombie_overlaps += 1;
            } else {
                verdict.concurrent += 1;
                verdict.find(format!(
                    "concurrent: in {group}, key {key}: {other:?} and {run:?}"
                ));
            }
        }
        going_on.push(run);
    }
}

/// Whether its instance was frozen past its lease while it went on; or frozen or out of reach while the database went back, which may know nothing
/// of that lease.
fn is_zombie(evidence: &Evidence, run: &Run) -> bool {
    let past_lease = evidence
        .freezes
        .iter()
        .filter(|freeze| freeze.to - freeze.from >= PAST_LEASE.as_nanos() as u64);
    let out_of_reach = evidence.freezes.iter().chain(&evidence.blind).filter(|span| {
        evidence
            .cuts
            .iter()
            .any(|cut| span.from < cut.to && cut.from < span.to)
    });
    past_lease
        .chain(out_of_reach)
        .any(|span| span.instance == run.instance && run.start <= span.to + WAKING && span.from <= run.end)
}

/// I10: a node that is up sees every message once, in order.
fn nodes(evidence: &Evidence, verdict: &mut Verdict) {
    for (instance, keys) in by_node(evidence) {
        for (key, numbers) in keys {
            for pair in numbers.windows(2) {
                if pair[1] > pair[0] + 1 {
                    verdict.lost += 1;
                } else if pair[1] <= pair[0] {
                    verdict.reordered += 1;
                } else {
                    continue;
                }
                verdict.find(format!(
                    "node {instance} saw of {key} number {} after {}",
                    pair[1], pair[0]
                ));
            }
        }
    }
    for finding in nodes_behind(evidence) {
        verdict.lost += 1;
        verdict.find(finding);
    }
}

/// Of the nodes that are up at the end: what they have not seen yet.
pub(crate) fn nodes_behind(evidence: &Evidence) -> Vec<String> {
    let mut newest: HashMap<&str, i64> = HashMap::new();
    for message in &evidence.committed {
        let n = newest.entry(&message.key).or_default();
        *n = message.n.max(*n);
    }
    let mut behind = Vec::new();
    for (instance, keys) in by_node(evidence) {
        if !evidence.alive.contains(instance) {
            continue;
        }
        for (key, numbers) in keys {
            let (seen, last) = (numbers.last(), newest.get(key));
            if seen < last {
                behind.push(format!(
                    "node {instance} saw of {key} number {seen:?} last, not {last:?}"
                ));
            }
        }
    }
    behind
}

/// What each node has seen of each key, in the order in which it was done.
///
/// Without what went with a database that was ended, whose numbers are others' now.
fn by_node(evidence: &Evidence) -> BTreeMap<&str, BTreeMap<&str, Vec<i64>>> {
    let committed: HashSet<Uuid> = match evidence.cuts.is_empty() {
        true => HashSet::new(),
        false => evidence.committed.iter().map(|message| message.id).collect(),
    };
    let mut runs: Vec<&Run> = evidence
        .runs
        .iter()
        .filter(|run| run.group == NODES && run.how == Some(Outcome::Ok))
        .filter(|run| committed.is_empty() || committed.contains(&run.id))
        .collect();
    runs.sort_by_key(|run| run.end);
    let mut nodes: BTreeMap<&str, BTreeMap<&str, Vec<i64>>> = BTreeMap::new();
    for run in runs {
        let keys = nodes.entry(&run.instance).or_default();
        keys.entry(&run.key).or_default().push(run.n);
    }
    nodes
}

fn takeovers(evidence: &Evidence) -> Vec<u64> {
    let keys = by_key(evidence);
    let of_plain: Vec<&Vec<&Run>> = keys
        .iter()
        .filter(|((group, _), _)| *group == PLAIN)
        .map(|(_, runs)| runs)
        .collect();
    let mut spans: Vec<u64> = evidence
        .kills
        .iter()
        .filter_map(|kill| {
            let taken_over = of_plain.iter().filter_map(|runs| {
                let after = runs.partition_point(|run| run.start <= kill.at);
                let last = runs[..after].last()?;
                let was_here = last.instance == kill.instance && last.start + RECENTLY > kill.at;
                let next = runs[after..].iter().find(|run| run.instance != kill.instance)?;
                was_here.then_some(next.start)
            });
            let at = taken_over.min()?;
            // Nobody can take over while the server is down, and that is not the takeover's fault.
            let was_up = evidence
                .outages
                .iter()
                .all(|(from, to)| *to < kill.at || *from > at);
            was_up.then_some((at - kill.at) / MILLISECOND)
        })
        .collect();
    spans.sort_unstable();
    spans
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::{Freeze, Kill};
    use crate::ledger::{Committed, Effect};
    use crate::message::{LEDGER, LEDGER_KEY, STEPS};

    fn id(n: i64) -> Uuid {
        Uuid::from_u128(n as u128)
    }

    fn message(n: i64) -> Committed {
        Committed {
            id: id(n),
            topic: STEPS.to_owned(),
            key: "k".to_owned(),
            n,
        }
    }

    fn run(instance: &str, group: &str, n: i64, start: u64, end: u64) -> Run {
        Run {
            instance: instance.to_owned(),
            group: group.to_owned(),
            id: id(n),
            key: "k".to_owned(),
            n,
            start: start * MILLISECOND,
            end: end * MILLISECOND,
            how: Some(Outcome::Ok),
        }
    }

    fn effect(n: i64) -> Effect {
        Effect {
            id: id(n),
            key: "k".to_owned(),
            n,
        }
    }

    /// Three messages of one key, run in both groups by instance `a`, one after another, and by a node.
    fn sound() -> Evidence {
        let mut evidence = Evidence {
            published: 3,
            committed: (1..=3).map(message).collect(),
            acknowledged: (1..=3).map(id).collect(),
            effects: (1..=3).map(effect).collect(),
            alive: HashSet::from(["a".to_owned()]),
            ..Evidence::default()
        };
        for n in 1..=3 {
            let start = n as u64 * 100;
            for group in [PLAIN, EFFECTS, NODES] {
                evidence.runs.push(run("a", group, n, start, start + 10));
            }
        }
        evidence
    }

    /// The run of a message in a group.
    fn run_of<'a>(evidence: &'a mut Evidence, group: &str, n: i64) -> &'a mut Run {
        let mut runs = evidence.runs.iter_mut();
        runs.find(|run| run.group == group && run.n == n).expect("a run")
    }

    #[test]
    fn a_sound_history_is_found_clean() {
        let verdict = judge(&sound());
        assert_eq!(verdict.findings, Vec::<String>::new());
        assert!(verdict.is_clean());
        assert_eq!(
            (verdict.committed, verdict.delivered, verdict.duplicates),
            (3, 6, 0)
        );
    }

    #[test]
    fn a_message_that_a_group_never_ran_is_lost() {
        for group in [PLAIN, EFFECTS] {
            let mut evidence = sound();
            evidence.runs.retain(|run| run.group != group || run.n != 3);
            assert_eq!(judge(&evidence).lost, 1, "{group}");
        }
    }

    #[test]
    fn a_message_whose_only_run_was_cut_short_is_lost() {
        for how in [None, Some(Outcome::Failed), Some(Outcome::Dropped)] {
            let mut evidence = sound();
            run_of(&mut evidence, PLAIN, 3).how = how;
            assert_eq!(judge(&evidence).lost, 1, "{how:?}");
        }
    }

    #[test]
    fn a_transactional_run_without_its_effect_is_lost() {
        let mut evidence = sound();
        evidence.effects.pop();
        assert_eq!(judge(&evidence).lost, 1);
    }

    #[test]
    fn an_entry_of_the_strict_topic_that_was_never_run_is_lost() {
        let mut evidence = sound();
        evidence.committed.push(Committed {
            id: id(9),
            topic: LEDGER.to_owned(),
            key: LEDGER_KEY.to_owned(),
            n: 1,
        });
        assert_eq!(judge(&evidence).lost, 1);
    }

    #[test]
    fn an_acknowledged_commit_that_is_not_in_the_database_is_lost() {
        let mut evidence = sound();
        evidence.acknowledged.insert(id(9));
        assert_eq!(judge(&evidence).lost, 1);
    }

    #[test]
    fn a_dead_letter_is_not_lost_and_does_not_hold_up_its_key() {
        let mut evidence = sound();
        run_of(&mut evidence, PLAIN, 2).how = Some(Outcome::Failed);
        assert_eq!((judge(&evidence).lost, judge(&evidence).reordered), (1, 1));
        evidence.dead.insert((PLAIN.to_owned(), id(2)));
        let verdict = judge(&evidence);
        assert!(verdict.is_clean(), "{:?}", verdict.findings);
        assert_eq!(verdict.dead, 1);
    }

    #[test]
    fn a_run_of_a_message_that_was_never_committed_is_a_phantom() {
        for group in [PLAIN, EFFECTS, NODES] {
            let mut evidence = sound();
            let mut phantom = run("a", group, 9, 900, 910);
            phantom.key = "other".to_owned();
            // Even if it did not get to its end.
            phantom.how = None;
            evidence.runs.push(phantom);
            assert_eq!(judge(&evidence).phantom, 1, "{group}");
        }
    }

    #[test]
    fn an_effect_of_a_message_that_was_never_committed_is_a_phantom() {
        let mut evidence = sound();
        evidence.effects.push(effect(9));
        assert_eq!(judge(&evidence).phantom, 1);
    }

    #[test]
    fn an_aborted_message_in_the_database_is_a_phantom() {
        let mut evidence = sound();
        evidence.aborted.insert(id(2));
        assert_eq!(judge(&evidence).phantom, 1);
    }

    #[test]
    fn a_message_first_run_before_its_predecessor_is_reordered() {
        let mut evidence = sound();
        run_of(&mut evidence, PLAIN, 3).start = 50 * MILLISECOND;
        run_of(&mut evidence, PLAIN, 3).end = 60 * MILLISECOND;
        assert_eq!(judge(&evidence).reordered, 1);
    }

    #[test]
    fn a_message_run_before_its_failed_predecessor_got_through_is_reordered() {
        let mut evidence = sound();
        run_of(&mut evidence, PLAIN, 2).how = Some(Outcome::Failed);
        evidence.runs.push(run("a", PLAIN, 2, 400, 410));
        assert_eq!(judge(&evidence).reordered, 1);
    }

    #[test]
    fn going_back_after_a_crash_and_on_in_order_is_not_reordered_but_counted_as_duplicates() {
        let mut evidence = sound();
        for n in 1..=3 {
            let start = 1_000 + n as u64 * 100;
            evidence.runs.push(run("b", PLAIN, n, start, start + 10));
        }
        let verdict = judge(&evidence);
        assert!(verdict.is_clean(), "{:?}", verdict.findings);
        assert_eq!(verdict.duplicates, 3);
    }

    #[test]
    fn effects_out_of_order_are_reordered() {
        let mut evidence = sound();
        evidence.effects.swap(0, 1);
        assert_eq!(judge(&evidence).reordered, 1);
    }

    #[test]
    fn an_effect_that_is_there_twice_is_a_duplicate_effect() {
        let mut evidence = sound();
        evidence.effects.push(effect(2));
        assert_eq!(judge(&evidence).effect_duplicates, 1);
    }

    #[test]
    fn two_runs_of_a_key_at_once_are_concurrent() {
        let mut evidence = sound();
        evidence.runs.push(run("b", PLAIN, 3, 305, 320));
        let verdict = judge(&evidence);
        assert_eq!((verdict.concurrent, verdict.zombie_overlaps), (1, 0));
    }

    #[test]
    fn a_run_that_was_cut_short_goes_on_to_the_last_sign_of_life_of_its_process() {
        use crate::history::Line;
        let start = |run, n, at| Line::Start {
            at,
            run,
            group: PLAIN.to_owned(),
            id: id(n),
            key: "k".to_owned(),
            n,
            attempt: 1,
        };
        let mut evidence = Evidence::default();
        evidence.add(
            "a",
            vec![
                start(0, 1, 10),
                Line::Fault {
                    at: 30,
                    kind: "x".to_owned(),
                },
            ],
        );
        evidence.add(
            "b",
            vec![
                start(0, 1, 20),
                Line::End {
                    at: 40,
                    run: 0,
                    how: Outcome::Ok,
                },
            ],
        );
        assert_eq!(judge(&evidence).concurrent, 1);
    }

    #[test]
    fn only_runs_of_an_instance_frozen_past_its_lease_are_zombies() {
        let mut evidence = sound();
        let mut zombie = run("z", PLAIN, 3, 290, 20_000);
        zombie.how = Some(Outcome::Dropped);
        evidence.runs.push(zombie);
        // The zombie began before the one that overlaps with it, so it is the earlier run of the two.
        assert_eq!(judge(&evidence).concurrent, 1);
        let freeze = |instance: &str, to: u64| Freeze {
            instance: instance.to_owned(),
            from: 295 * MILLISECOND,
            to: to * MILLISECOND,
        };
        evidence.freezes = vec![freeze("z", 2_000), freeze("a", 20_000)];
        let short_or_elsewhere = judge(&Evidence {
            freezes: vec![freeze("z", 2_000), freeze("y", 20_000)],
            ..evidence.clone()
        });
        assert_eq!(short_or_elsewhere.concurrent, 1);
        evidence.freezes = vec![freeze("z", 9_000)];
        let verdict = judge(&evidence);
        assert_eq!((verdict.concurrent, verdict.zombie_overlaps), (0, 1));
    }

    #[test]
    fn a_node_that_misses_a_message_has_lost_it() {
        let mut evidence = sound();
        evidence.runs.retain(|run| run.group != NODES || run.n != 2);
        assert_eq!(judge(&evidence).lost, 1);
    }

    #[test]
    fn a_node_that_is_up_and_does_not_see_the_last_message_has_lost_it() {
        let mut evidence = sound();
        evidence.runs.retain(|run| run.group != NODES || run.n != 3);
        assert_eq!(judge(&evidence).lost, 1);
        evidence.alive.clear();
        assert_eq!(judge(&evidence).lost, 0);
    }

    #[test]
    fn a_node_that_sees_a_message_again_is_out_of_order() {
        let mut evidence = sound();
        evidence.runs.push(run("a", NODES, 3, 400, 410));
        assert_eq!(judge(&evidence).reordered, 1);
    }

    #[test]
    fn a_takeover_lasts_from_the_kill_to_the_first_run_of_a_key_elsewhere() {
        let mut evidence = sound();
        evidence.kills = vec![Kill {
            instance: "a".to_owned(),
            at: 205 * MILLISECOND,
        }];
        let last = run_of(&mut evidence, PLAIN, 3);
        last.instance = "b".to_owned();
        last.start = 1_905 * MILLISECOND;
        last.end = 1_910 * MILLISECOND;
        assert_eq!(judge(&evidence).takeovers_ms, [1_700]);
        evidence.outages = vec![(300 * MILLISECOND, 900 * MILLISECOND)];
        assert_eq!(judge(&evidence).takeovers_ms, Vec::<u64>::new());
    }

    /// Message 3 was run by all, and went with a database that was ended; 4 has its number now.
    fn cut_back() -> Evidence {
        let mut evidence = sound();
        let at = |ms: u64| ms * MILLISECOND;
        evidence.cuts.push(CutBack {
            from: at(400),
            to: at(5_000),
            kept: HashSet::from([id(1), id(2)]),
        });
        evidence.published_at = (1..=3).map(|n| (id(n), at(n as u64 * 100 - 50))).collect();
        evidence.published_at.insert(id(4), at(6_000));
        evidence.acknowledged.insert(id(4));
        evidence.committed[2].id = id(4);
        evidence.effects[2].id = id(4);
        for (group, start) in [(PLAIN, 6_100), (EFFECTS, 6_100), (NODES, 6_100)] {
            let mut again = run("a", group, 3, start, start + 10);
            again.id = id(4);
            evidence.runs.push(again);
        }
        evidence
    }

    #[test]
    fn what_went_with_a_database_that_was_ended_is_taken_back_and_not_lost() {
        let verdict = judge(&cut_back());
        assert_eq!(verdict.findings, Vec::<String>::new());
        assert_eq!((verdict.taken_back, verdict.delivered), (1, 6));
    }

    #[test]
    fn what_the_database_still_had_and_what_came_after_may_not_be_lost() {
        for gone in [2, 4] {
            let mut evidence = cut_back();
            evidence.committed.retain(|message| message.id != id(gone));
            evidence.runs.retain(|run| run.id != id(gone));
            evidence.effects.retain(|effect| effect.id != id(gone));
            let verdict = judge(&evidence);
            assert!(verdict.lost > 0, "{gone}: {verdict:?}");
        }
        for group in [PLAIN, EFFECTS, NODES] {
            let mut evidence = cut_back();
            evidence.runs.retain(|run| run.group != group || run.id != id(4));
            assert_eq!(judge(&evidence).lost, 1, "{group}");
        }
    }

    #[test]
    fn whoever_runs_what_was_taken_back_long_after_it_has_a_phantom() {
        let mut evidence = cut_back();
        let mut late = run("a", PLAIN, 3, 5_300, 5_310);
        late.id = id(3);
        evidence.runs.push(late.clone());
        assert_eq!(judge(&evidence).phantom, 0);
        late.start = 20_000 * MILLISECOND;
        late.end = 20_010 * MILLISECOND;
        evidence.runs.push(late);
        assert_eq!(judge(&evidence).phantom, 1);
        evidence.blind.push(Freeze {
            instance: "a".to_owned(),
            from: 4_000 * MILLISECOND,
            to: 20_000 * MILLISECOND,
        });
        assert_eq!(judge(&evidence).phantom, 0);
    }

    #[test]
    fn what_begins_again_after_the_database_went_back_begins_in_order() {
        let mut evidence = cut_back();
        evidence.runs.push(run("b", PLAIN, 1, 5_800, 5_810));
        evidence.runs.push(run("b", PLAIN, 2, 5_900, 5_910));
        assert_eq!(judge(&evidence).reordered, 0);
        evidence.runs.push(run("b", PLAIN, 2, 5_700, 5_710));
        evidence.runs.sort_by_key(|run| run.start);
        assert_eq!(judge(&evidence).reordered, 1);
    }

    #[test]
    fn what_somebody_ran_who_may_not_have_known_says_nothing_about_the_order_after_it() {
        let mut evidence = cut_back();
        evidence.blind.push(Freeze {
            instance: "b".to_owned(),
            from: 4_000 * MILLISECOND,
            to: 5_850 * MILLISECOND,
        });
        for (n, start) in [(1, 5_700), (2, 5_800), (1, 6_900)] {
            evidence.runs.push(run("b", PLAIN, n, start, start + 10));
        }
        evidence.runs.sort_by_key(|run| run.start);
        assert_eq!(judge(&evidence).reordered, 0);
    }

    #[test]
    fn a_node_that_sees_again_what_it_saw_before_the_database_went_back_is_out_of_order() {
        let mut evidence = cut_back();
        evidence.runs.push(run("a", NODES, 2, 5_900, 5_910));
        assert_eq!(judge(&evidence).reordered, 1);
    }

    #[test]
    fn runs_of_an_instance_that_was_out_of_reach_while_the_database_went_back_are_zombies() {
        let mut evidence = cut_back();
        let mut zombie = run("z", PLAIN, 3, 300, 6_105);
        zombie.how = Some(Outcome::Dropped);
        zombie.id = id(3);
        evidence.runs.push(zombie);
        evidence.runs.sort_by_key(|run| run.start);
        assert_eq!(judge(&evidence).concurrent, 2);
        evidence.blind.push(Freeze {
            instance: "z".to_owned(),
            from: 350 * MILLISECOND,
            to: 6_105 * MILLISECOND,
        });
        let verdict = judge(&evidence);
        assert_eq!((verdict.concurrent, verdict.zombie_overlaps), (0, 2));
    }
}
