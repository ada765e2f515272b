//! Everything that is known of a run: the histories, and what the business tables say.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use sqlx::PgPool;
use uuid::Uuid;

use crate::history::{self, Ended, Line, Outcome};
use crate::ledger::{self, Committed, Effect};

#[derive(Clone, Debug, Default)]
pub(crate) struct Evidence {
    /// Messages that producers meant to commit.
    pub(crate) published: u64,
    /// Messages of which a producer knows that they were committed, and those of which it knows that they were not.
    pub(crate) acknowledged: HashSet<Uuid>,
    pub(crate) aborted: HashSet<Uuid>,
    /// What the business table says; the truth.
    pub(crate) committed: Vec<Committed>,
    pub(crate) runs: Vec<Run>,
    /// In the order in which they were written.
    pub(crate) effects: Vec<Effect>,
    /// Group and message.
    pub(crate) dead: HashSet<(String, Uuid)>,
    /// Those that a database had which was ended; here they may have another fate.
    pub(crate) dead_before: HashSet<(String, Uuid)>,
    pub(crate) freezes: Vec<Freeze>,
    /// When what an instance sent or was sent was swallowed.
    pub(crate) blind: Vec<Freeze>,
    pub(crate) kills: Vec<Kill>,
    pub(crate) cuts: Vec<CutBack>,
    /// When a message was about to be committed.
    pub(crate) published_at: HashMap<Uuid, u64>,
    /// When the server was down, from and to.
    pub(crate) outages: Vec<(u64, u64)>,
    /// Instances that were up at the end.
    pub(crate) alive: HashSet<String>,
    pub(crate) faults: BTreeMap<String, u64>,
}

/// One run of a handler.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Run {
    pub(crate) instance: String,
    pub(crate) group: String,
    pub(crate) id: Uuid,
    pub(crate) key: String,
    pub(crate) n: i64,
    pub(crate) start: u64,
    /// For a run that was cut short with its process: the last sign of life of that process, which is before its end.
    pub(crate) end: u64,
    /// `None`: cut short with its process.
    pub(crate) how: Option<Outcome>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Freeze {
    pub(crate) instance: String,
    pub(crate) from: u64,
    pub(crate) to: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Kill {
    pub(crate) instance: String,
    pub(crate) at: u64,
}

/// The database went back to an earlier state: the old one was ended after `from`, and nobody reached this one before `to`.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct CutBack {
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// The messages that it has.
    pub(crate) kept: HashSet<Uuid>,
}

impl Evidence {
    /// Whether the message went with the database that was ended; whoever ran it while that was up did right. It may be there all the same: it was
    /// prepared there, and was decided here.
    pub(crate) fn went_with(&self, cut: &CutBack, id: &Uuid) -> bool {
        self.published_at.get(id).is_some_and(|at| *at < cut.to) && !cut.kept.contains(id)
    }

    pub(crate) fn was_taken_back(&self, id: &Uuid) -> bool {
        self.cuts.iter().any(|cut| self.went_with(cut, id))
    }

    pub(crate) async fn collect(
        folder: &Path,
        pool: &PgPool,
        alive: impl IntoIterator<Item = String>,
    ) -> anyhow::Result<Self> {
        let mut evidence = Self {
            committed: ledger::committed(pool).await?,
            effects: ledger::effects(pool).await?,
            dead: ledger::dead_letters(pool).await?.into_iter().collect(),
            alive: alive.into_iter().collect(),
            ..Self::default()
        };
        for (instance, lines) in history::read_all(folder)? {
            evidence.add(&instance, lines);
        }
        evidence.runs.sort_by_key(|run| run.start);
        Ok(evidence)
    }

    /// Adds the history of one process.
    pub(crate) fn add(&mut self, instance: &str, lines: Vec<Line>) {
        let mut open: HashMap<u64, Run> = HashMap::new();
        let mut messages: HashMap<u64, Vec<Uuid>> = HashMap::new();
        let mut last_sign = 0;
        for line in lines {
            match line {
                Line::Publish { at, tx, id, .. } => {
                    self.published += 1;
                    self.published_at.insert(id, at);
                    messages.entry(tx).or_default().push(id);
                }
                Line::Ended { tx, how } => {
                    let ids = messages.remove(&tx).unwrap_or_default();
                    match how {
                        Ended::Committed => self.acknowledged.extend(ids),
                        Ended::Aborted => self.aborted.extend(ids),
                        // The business table knows.
                        Ended::Unknown => {}
                    }
                }
                Line::Start {
                    at,
                    run,
                    group,
                    id,
                    key,
                    n,
                    ..
                } => {
                    last_sign = last_sign.max(at);
                    let started = Run {
                        instance: instance.to_owned(),
                        group,
                        id,
                        key,
                        n,
                        start: at,
                        end: at,
                        how: None,
                    };
                    open.insert(run, started);
                }
                Line::End { at, run, how } => {
                    last_sign = last_sign.max(at);
                    if let Some(mut run) = open.remove(&run) {
                        run.end = at;
                        run.how = Some(how);
                        self.runs.push(run);
                    }
                }
                Line::Fault { at, kind } => {
                    last_sign = last_sign.max(at);
                    *self.faults.entry(kind).or_default() += 1;
                }
                Line::Frozen { instance, from, to } => self.freezes.push(Freeze { instance, from, to }),
                Line::Blind { instance, from, to } => self.blind.push(Freeze { instance, from, to }),
                Line::CutBack { from, to, kept, dead } => {
                    self.outages.push((from, to));
                    self.dead_before.extend(dead);
                    self.cuts.push(CutBack {
                        from,
                        to,
                        kept: kept.into_iter().collect(),
                    });
                }
                Line::Outage { from, to } => self.outages.push((from, to)),
                Line::Killed { instance, at } => self.kills.push(Kill { instance, at }),
            }
        }
        self.runs.extend(open.into_values().map(|run| Run {
            end: run.end.max(last_sign),
            ..run
        }));
    }
}
