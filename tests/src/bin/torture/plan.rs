//! What is done to the system, and when: all from the seed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fastrand::Rng;

use crate::chance;

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

/// Something that is done to the system at a time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Strike {
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
    Postgres {
        how: Crash,
        down_for: Duration,
    },
    Cut {
        target: Target,
    },
    /// Nothing gets through, and nobody hears that.
    Stall {
        target: Target,
        span: Duration,
    },
    Delay {
        target: Target,
        by: Duration,
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
            Fault::Postgres {
                how: Crash::Immediate,
                ..
            } => "postgres_immediate".to_owned(),
            Fault::Postgres { how: Crash::Kill, .. } => "postgres_kill".to_owned(),
            Fault::Cut { target: t } => format!("cut_{}", target(t)),
            Fault::Stall { target: t, .. } => format!("stall_{}", target(t)),
            Fault::Delay { target: t, .. } => format!("delay_{}", target(t)),
        }
    }
}

/// The strikes of a run, in order.
pub(crate) fn strikes(seed: u64, span: Duration) -> Vec<Strike> {
    let mut rng = chance::rng(seed, "plan");
    let mut deck = Vec::new();
    let mut at = Duration::from_secs(3);
    let mut strikes = Vec::new();
    // The last ones have time to show their effect.
    while at + Duration::from_secs(1) < span {
        if deck.is_empty() {
            deck = (0..CARDS).collect();
            rng.shuffle(&mut deck);
        }
        let card = deck.pop().unwrap_or_default();
        let fault = draw(card, &mut rng);
        strikes.push(Strike {
            at,
            fault,
            pick: rng.usize(0..1_000),
        });
        at += Duration::from_millis(rng.u64(200..1_800));
    }
    strikes
}

/// As many as `draw` knows; from a shuffled deck, so that every kind comes about as often as it is on a card.
const CARDS: u32 = 24;

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
        _ => Fault::Delay {
            target: [Consumer, Producer, Dispatcher][rng.usize(0..3)],
            by: ms(rng, 20..250),
            span: ms(rng, 2_000..8_000),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_seed_gives_the_same_plan_every_time() {
        let span = Duration::from_secs(60);
        assert_eq!(strikes(3, span), strikes(3, span));
        assert_ne!(strikes(3, span), strikes(4, span));
    }

    #[test]
    fn two_minutes_have_many_faults_of_many_kinds() {
        for seed in 0..20 {
            let strikes = strikes(seed, Duration::from_secs(120));
            let kinds: HashSet<String> = strikes.iter().map(|strike| strike.fault.kind()).collect();
            assert!(
                strikes.len() >= 80 && kinds.len() >= 15,
                "seed {seed}: {} of {kinds:?}",
                strikes.len()
            );
        }
    }
}
