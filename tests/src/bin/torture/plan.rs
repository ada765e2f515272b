//! What is done to the system, and when: all from the seed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fastrand::Rng;

use crate::chance;
use crate::proxy::{HalfOpen, Swallowed, Way};

/// The shortest there is, so that freezes beyond it fit into a run.
pub(crate) const LEASE: Duration = Duration::from_secs(6);
/// From here on a freeze may outlast the lease, which counts from the last heartbeat, up to two seconds before it.
pub(crate) const PAST_LEASE: Duration = Duration::from_millis(3_500);

pub(crate) const KEYS: u64 = 100;
pub(crate) const CONSUMERS: usize = 3;
pub(crate) const MOST_CONSUMERS: usize = 5;
pub(crate) const DISPATCHERS: usize = 2;
pub(crate) const PRODUCERS: usize = 2;
/// Of a hundred consumers so many abort themselves in a handler some time after their start.
pub(crate) const ABORTING_PERCENT: u32 = 35;

pub(crate) fn key(number: u64) -> String {
    format!("k{number:02}")
}

/// While it is there, handlers behave.
pub(crate) fn calm_file(folder: &Path) -> PathBuf {
    folder.join("calm")
}

/// A fault that is injected at a time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PlannedFault {
    pub(crate) at: Duration,
    pub(crate) fault: Fault,
    /// Which of those that can be hit, whoever they are by then.
    pub(crate) pick: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    Kill {
        target: Target,
        back_after: Duration,
    },
    Freeze {
        target: Target,
        span: Duration,
    },
    Stop {
        target: Target,
        back_after: Duration,
    },
    AddConsumer,
    RemoveConsumer,
    /// A rolling deploy, forward or back, has begun: a consumer makes room for one of the other version, of which all are that are started from now on.
    Deploy,
    Postgres {
        how: Crash,
        down_for: Duration,
    },
    Cut {
        target: Target,
    },
    /// Nothing gets through, and nobody hears that; but when an end closes, the other one does.
    Stall {
        target: Target,
        span: Duration,
    },
    Delay {
        target: Target,
        by: Duration,
        span: Duration,
    },
    /// What is sent is swallowed, and nobody hears that, nor that an end closed.
    HalfOpen {
        target: Target,
        how: HalfOpen,
        span: Duration,
    },
    /// The database gets settings that nobody expects, for new connections; by this number some of them, or all.
    Pervert {
        which: u64,
    },
    /// It gets rid of them, for new connections.
    Unpervert,
    /// The database goes back to an earlier state.
    CutBack {
        how: CutBack,
        /// So long before its end the old one was ahead.
        by: Duration,
    },
    /// Somebody sends notifications that are not Postbox's.
    Forge {
        span: Duration,
    },
    /// The server's clock is wrong by so many seconds.
    Clock {
        by: i64,
        span: Duration,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Producer,
    Dispatcher,
    Consumer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    /// PostgreSQL's immediate shutdown.
    Immediate,
    /// SIGKILL to all its processes. Their files are kept, as after any crash that is not the machine's.
    Kill,
}

/// What takes the database back; at most once in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum CutBack {
    /// The primary dies, and an asynchronous standby that lags is promoted
    Failover,
    /// The server dies, and a base backup is recovered to a point in time
    Recovery,
}

impl CutBack {
    /// Every fifth seed has one each, since commits are lost by it, and what was lost with them cannot be judged.
    pub(crate) fn of(seed: u64) -> Option<Self> {
        match seed % 5 {
            0 => Some(Self::Failover),
            3 => Some(Self::Recovery),
            _ => None,
        }
    }
}

/// Every other seed begins with a database whose settings nobody expects.
pub(crate) fn begins_perverse(seed: u64) -> bool {
    seed.is_multiple_of(2)
}

/// Whether a setting is among those of a number; `u64::MAX`: all are.
pub(crate) fn is_chosen(which: u64, setting: usize) -> bool {
    which >> (setting % 64) & 1 == 1
}

impl Fault {
    pub(crate) fn kind(&self) -> String {
        let target = |target: &Target| match target {
            Target::Producer => "producer",
            Target::Dispatcher => "dispatcher",
            Target::Consumer => "consumer",
        };
        match self {
            Fault::Kill { target: t, .. } => format!("kill_{}", target(t)),
            Fault::Freeze { target: t, span } if *span >= PAST_LEASE => {
                format!("freeze_{}_past_lease", target(t))
            }
            Fault::Freeze { target: t, .. } => format!("freeze_{}", target(t)),
            Fault::Stop { target: t, .. } => format!("stop_{}", target(t)),
            Fault::AddConsumer => "add_consumer".to_owned(),
            Fault::RemoveConsumer => "remove_consumer".to_owned(),
            Fault::Deploy => "deploy".to_owned(),
            Fault::Postgres {
                how: Crash::Immediate,
                ..
            } => "postgres_immediate".to_owned(),
            Fault::Postgres { how: Crash::Kill, .. } => "postgres_kill".to_owned(),
            Fault::Cut { target: t } => format!("cut_{}", target(t)),
            Fault::Stall { target: t, .. } => format!("stall_{}", target(t)),
            Fault::Delay { target: t, .. } => format!("delay_{}", target(t)),
            Fault::HalfOpen { target: t, how, .. } => {
                let way = match how.way {
                    Way::ToServer => "to_server",
                    Way::ToClient => "to_client",
                    Way::Both => "both_ways",
                };
                let swallowed = match how.swallowed {
                    Swallowed::Lost => "lost",
                    Swallowed::Held => "held",
                };
                format!("half_open_{}_{way}_{swallowed}", target(t))
            }
            Fault::Pervert { which: u64::MAX } => "settings_perverse".to_owned(),
            Fault::Pervert { .. } => "settings_partly_perverse".to_owned(),
            Fault::Unpervert => "settings_reset".to_owned(),
            Fault::CutBack {
                how: CutBack::Failover,
                ..
            } => "failover".to_owned(),
            Fault::CutBack {
                how: CutBack::Recovery,
                ..
            } => "recovery".to_owned(),
            Fault::Forge { .. } => "forge".to_owned(),
            Fault::Clock { by, .. } if *by > 0 => "clock_on".to_owned(),
            Fault::Clock { .. } => "clock_back".to_owned(),
        }
    }
}

/// The faults of a run, in order.
pub(crate) fn faults(seed: u64, span: Duration, cut_back: Option<CutBack>) -> Vec<PlannedFault> {
    let mut rng = chance::rng(seed, "plan");
    let mut cut_back = cut_back.map(|how| {
        // In the middle: it takes some seconds to prepare, and there is something to be seen before and after.
        let at = span.mul_f64(0.3 + 0.2 * rng.f64());
        let by = Duration::from_millis(rng.u64(100..4_000));
        (at, Fault::CutBack { how, by })
    });
    let mut deck = Vec::new();
    let mut at = Duration::from_secs(3);
    let mut faults = Vec::new();
    // The last ones have time to show their effect.
    while at + Duration::from_secs(1) < span {
        if deck.is_empty() {
            deck = (0..CARDS).collect();
            rng.shuffle(&mut deck);
        }
        let fault = match cut_back.take_if(|(due, _)| *due <= at) {
            Some((_, fault)) => fault,
            None => draw(deck.pop().unwrap_or_default(), &mut rng),
        };
        faults.push(PlannedFault {
            at,
            fault,
            pick: rng.usize(0..1_000),
        });
        at += Duration::from_millis(rng.u64(200..1_800));
    }
    faults
}

/// As many as `draw` knows; from a shuffled deck, so that every kind comes about as often as it is on a card.
const CARDS: u32 = 38;

fn draw(card: u32, rng: &mut Rng) -> Fault {
    use Target::{Consumer, Dispatcher, Producer};
    let ms = |rng: &mut Rng, range| Duration::from_millis(rng.u64(range));
    match card {
        0..4 => Fault::Kill {
            target: Consumer,
            back_after: ms(rng, 300..5_000),
        },
        4 => Fault::Kill {
            target: Producer,
            back_after: ms(rng, 300..3_000),
        },
        5..7 => Fault::Kill {
            target: Dispatcher,
            back_after: ms(rng, 300..3_000),
        },
        7..9 => Fault::Freeze {
            target: Consumer,
            span: ms(rng, 300..2_500),
        },
        9..11 => Fault::Freeze {
            target: Consumer,
            span: ms(rng, 7_500..12_000),
        },
        11 => Fault::Freeze {
            target: Dispatcher,
            span: ms(rng, 500..9_000),
        },
        12 => Fault::Freeze {
            target: Producer,
            span: ms(rng, 500..6_000),
        },
        13 => Fault::Stop {
            target: Consumer,
            back_after: ms(rng, 300..3_000),
        },
        14 => Fault::Stop {
            target: Dispatcher,
            back_after: ms(rng, 300..3_000),
        },
        15 => Fault::AddConsumer,
        16 => Fault::RemoveConsumer,
        17 => Fault::Postgres {
            how: Crash::Immediate,
            down_for: ms(rng, 0..1_500),
        },
        18 => Fault::Postgres {
            how: Crash::Kill,
            down_for: ms(rng, 0..1_500),
        },
        19 => Fault::Cut { target: Consumer },
        20 => Fault::Cut {
            target: if rng.bool() { Producer } else { Dispatcher },
        },
        21 => Fault::Stall {
            target: Consumer,
            span: ms(rng, 1_000..10_000),
        },
        22 => Fault::Stall {
            target: if rng.bool() { Producer } else { Dispatcher },
            span: ms(rng, 1_000..8_000),
        },
        23..25 => Fault::Forge {
            span: ms(rng, 1_000..6_000),
        },
        25 => Fault::Clock {
            by: [5, 60, 3_600][rng.usize(0..3)],
            span: ms(rng, 1_000..8_000),
        },
        26 => Fault::Clock {
            by: [-5, -60, -3_600][rng.usize(0..3)],
            span: ms(rng, 1_000..8_000),
        },
        27..29 => Fault::Deploy,
        // Within what is borne, and longer than any bound but the server's own.
        29..31 => half_open(Consumer, ms(rng, 1_000..9_000), rng),
        31 => half_open(Consumer, ms(rng, 12_000..35_000), rng),
        32 => half_open(Dispatcher, ms(rng, 1_000..20_000), rng),
        33 => half_open(Producer, ms(rng, 1_000..20_000), rng),
        34 => Fault::Pervert { which: u64::MAX },
        35 => Fault::Pervert { which: rng.u64(..) },
        36 => Fault::Unpervert,
        _ => Fault::Delay {
            target: [Consumer, Producer, Dispatcher][rng.usize(0..3)],
            by: ms(rng, 20..250),
            span: ms(rng, 2_000..8_000),
        },
    }
}

fn half_open(target: Target, span: Duration, rng: &mut Rng) -> Fault {
    let how = HalfOpen {
        way: [Way::ToServer, Way::ToClient, Way::Both][rng.usize(0..3)],
        swallowed: [Swallowed::Lost, Swallowed::Held][rng.usize(0..2)],
        takes_new: rng.bool(),
    };
    Fault::HalfOpen { target, how, span }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_seed_gives_the_same_plan_every_time() {
        let span = Duration::from_secs(60);
        let how = Some(CutBack::Failover);
        assert_eq!(faults(3, span, how), faults(3, span, how));
        assert_ne!(faults(3, span, how), faults(4, span, how));
    }

    #[test]
    fn two_minutes_have_many_faults_of_many_kinds() {
        for seed in 0..20 {
            let faults = faults(seed, Duration::from_secs(120), None);
            let kinds: HashSet<String> = faults.iter().map(|planned| planned.fault.kind()).collect();
            assert!(
                faults.len() >= 80 && kinds.len() >= 15,
                "seed {seed}: {} of {kinds:?}",
                faults.len()
            );
        }
    }

    #[test]
    fn history_is_cut_at_most_once_and_where_something_comes_before_and_after() {
        for seed in 0..20 {
            let span = Duration::from_secs(60);
            let faults = faults(seed, span, CutBack::of(seed));
            let cuts: Vec<Duration> = faults
                .iter()
                .filter(|planned| matches!(planned.fault, Fault::CutBack { .. }))
                .map(|planned| planned.at)
                .collect();
            assert_eq!(cuts.len(), usize::from(matches!(seed % 5, 0 | 3)), "seed {seed}");
            assert!(
                cuts.iter().all(|at| *at > span / 4 && *at < span * 3 / 5),
                "{cuts:?}"
            );
        }
    }
}
