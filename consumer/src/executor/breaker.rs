//! The circuit breaker of a subscription: when everything fails, nothing more is taken in.
//!
//! Without it an outage downstream would copy the whole backlog, message by message, into `postbox.redelivery`.
//!
//! **What it promises.** While it is open
//! - a message that failed before has its further attempts when they are due, by its own policy, so it succeeds or is given up exactly when it would
//!   without a breaker;
//! - of the messages that have not run yet one runs at a time, as a probe, 1, 2, 4, … 30 s after the last one failed. It is an attempt
//!   like any other. So there are at most two more rows a minute, and never more than `max_failing`;
//! - the first success of any closes it.
//!
//! **It ends.** If some message would succeed at its next attempt, that attempt comes: by its policy if it failed before, else as a probe, since
//! every probe that fails leaves the line of those that have not run. If none would ever succeed, each is given up by its policy after its probe.
//! What it cannot get past is what stops a subscription without it, too: `max_failing` messages at once whose policies never give up.

use std::time::{Duration, Instant};

use crate::handler;

/// So many first attempts in a row that fail, without one success, open it. Not later attempts: those of messages that failed together
/// come together too, and say nothing of the others.
const FAILURES: u32 = 20;
/// So many messages parked behind failing ones, without one success, open it too: few keys fail slowly.
const PARKED: u32 = 256;
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LAST_WAIT: Duration = Duration::from_secs(30);

/// Closed: all runs. Open: what failed runs when it is due, and one of the rest now and then, until one succeeds.
#[derive(Debug, Default)]
pub(crate) struct Breaker {
    off: bool,
    failures: u32,
    parked: u32,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    probe_at: Instant,
    wait: Duration,
    /// A probe runs; its offset.
    probing: Option<i64>,
}

impl Breaker {
    pub(crate) fn new(policy: handler::Breaker) -> Self {
        Self {
            off: policy == handler::Breaker::Off,
            ..Self::default()
        }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Whether a message that has not run yet is to be tried.
    pub(crate) fn wants_probe(&self, now: Instant) -> bool {
        (self.open.as_ref()).is_some_and(|open| open.probing.is_none() && open.probe_at <= now)
    }

    /// When the next probe is due.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        self.open
            .as_ref()
            .filter(|open| open.probing.is_none())
            .map(|open| open.probe_at)
    }

    /// The clock was moved on: the next probe is due sooner.
    pub(crate) fn advance(&mut self, span: Duration) {
        if let Some(open) = &mut self.open {
            open.probe_at = open.probe_at.checked_sub(span).unwrap_or(open.probe_at);
        }
    }

    /// A message was started while a probe was allowed.
    pub(crate) fn probes(&mut self, offset: i64) {
        if let Some(open) = &mut self.open {
            open.probing = Some(offset);
        }
    }

    /// A run succeeded; says whether that closed it.
    pub(crate) fn succeeded(&mut self) -> bool {
        self.failures = 0;
        self.parked = 0;
        self.open.take().is_some()
    }

    /// A run failed; says whether that opened it.
    pub(crate) fn failed(&mut self, offset: i64, attempt: u32, now: Instant) -> bool {
        match &mut self.open {
            Some(open) if open.probing == Some(offset) => {
                open.wait = (open.wait * 2).min(LAST_WAIT);
                open.probe_at = now + open.wait;
                open.probing = None;
                false
            }
            // It began before the breaker opened, or has failed before.
            Some(_) => false,
            None => {
                self.failures += u32::from(attempt == 1 || self.failures == 0);
                self.failures >= FAILURES && self.open(now)
            }
        }
    }

    /// A message was parked behind one that fails; says whether that opened it.
    pub(crate) fn parked(&mut self, now: Instant) -> bool {
        self.parked += 1;
        self.open.is_none() && self.parked >= PARKED && self.failures > 0 && self.open(now)
    }

    /// A run ended without saying anything about the handler: if it was the probe, another is due.
    pub(crate) fn inconclusive(&mut self, offset: i64) {
        if let Some(open) = self.open.as_mut().filter(|open| open.probing == Some(offset)) {
            open.probing = None;
        }
    }

    fn open(&mut self, now: Instant) -> bool {
        if self.off {
            return false;
        }
        self.open = Some(Open {
            probe_at: now + FIRST_WAIT,
            wait: FIRST_WAIT,
            probing: None,
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::default();
        for offset in 0..i64::from(FAILURES) - 1 {
            assert!(!breaker.failed(offset, 1, now));
        }
        assert!(!breaker.is_open());
        assert!(breaker.failed(99, 1, now));
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_does_not() {
        let now = Instant::now();
        let open = opened(now);
        assert!(open.is_open() && !open.wants_probe(now));
        let mut breaker = Breaker::default();
        for offset in 0..1000 {
            assert!(!breaker.failed(offset, 1, now));
            if offset % 10 == 0 {
                breaker.succeeded();
            }
        }
        for offset in 0..1000 {
            assert!(!breaker.failed(offset, 2, now), "later attempts say nothing");
        }
    }

    #[test]
    fn one_probe_at_a_time_waits_longer_after_each_failure_and_a_success_closes() {
        let now = Instant::now();
        let mut breaker = opened(now);
        let mut at = now + FIRST_WAIT;
        for wait in [2, 4, 8, 16, 30, 30] {
            assert!(breaker.wants_probe(at));
            breaker.probes(1);
            assert!(!breaker.wants_probe(at));
            // One that began before it opened.
            assert!(!breaker.failed(2, 1, at));
            assert!(!breaker.wants_probe(at));
            breaker.failed(1, 1, at);
            assert_eq!(breaker.wakes_at(), Some(at + Duration::from_secs(wait)));
            at += Duration::from_secs(wait);
        }
        breaker.probes(1);
        breaker.inconclusive(1);
        assert!(breaker.wants_probe(at), "one that says nothing is no probe");
        assert!(breaker.succeeded());
        assert!(!breaker.is_open());
    }

    #[test]
    fn switched_off_it_never_opens() {
        let now = Instant::now();
        let mut breaker = Breaker::new(handler::Breaker::Off);
        assert!((0..1000).all(|offset| !breaker.failed(offset, 1, now) && !breaker.parked(now)));
        assert!(!breaker.is_open());
    }

    #[test]
    fn what_is_parked_behind_failing_keys_opens_it() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        breaker.failed(0, 1, now);
        let opened = (0..PARKED).filter(|_| breaker.parked(now)).count();
        assert_eq!(opened, 1);
        assert!(breaker.is_open());
    }
}
