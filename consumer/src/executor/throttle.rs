//! How many messages an instance may start in a second.

use std::time::{Duration, Instant};

/// What may be saved up beside the next message: what is due within this, so that a late timer loses nothing.
const BURST_SECONDS: f64 = 0.05;

/// A token bucket. It holds on average from the first message on: what is started in a span never exceeds rate × span + burst.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// Messages a second; `None`: no limit.
    rate: Option<f64>,
    tokens: f64,
    filled: Instant,
}

impl Throttle {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            rate: None,
            tokens: 0.0,
            filled: now,
        }
    }

    /// Sets the rate; what was saved up under the old one is kept as far as the new one allows.
    pub(crate) fn set(&mut self, rate: Option<f64>, now: Instant) {
        self.fill(now);
        if self.rate.is_none() {
            // Nothing was saved up without a limit.
            self.tokens = 0.0;
        }
        self.rate = rate;
        self.tokens = self.tokens.min(self.burst());
    }

    pub(crate) fn is_limited(&self) -> bool {
        self.rate.is_some()
    }

    /// Whether a message may start now.
    pub(crate) fn allows(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.rate.is_none() || self.tokens >= 1.0
    }

    /// How many messages may start now.
    pub(crate) fn available(&mut self, now: Instant) -> usize {
        self.fill(now);
        self.rate.map_or(usize::MAX, |_| self.tokens.max(0.0) as usize)
    }

    /// The clock was moved on: what the rate allows in that span may start, as far as it is saved up.
    pub(crate) fn advance(&mut self, span: Duration) {
        self.filled = self.filled.checked_sub(span).unwrap_or(self.filled);
    }

    /// So many messages start.
    pub(crate) fn spend(&mut self, messages: usize) {
        if self.rate.is_some() {
            self.tokens -= messages as f64;
        }
    }

    /// When the next message may start, if that is not now; never, at a rate of zero.
    pub(crate) fn ready_at(&self) -> Option<Instant> {
        let rate = self.rate?;
        let missing = 1.0 - self.tokens;
        if missing <= 0.0 {
            return None;
        }
        let wait = Duration::try_from_secs_f64(missing / rate).unwrap_or(Duration::from_secs(3600));
        Some(self.filled + wait.min(Duration::from_secs(3600)))
    }

    fn fill(&mut self, now: Instant) {
        let Some(rate) = self.rate else {
            self.filled = now;
            return;
        };
        let span = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + span * rate).min(self.burst());
        self.filled = now;
    }

    fn burst(&self) -> f64 {
        self.rate.map_or(0.0, |rate| 1.0 + rate * BURST_SECONDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Starts whatever may start for so long, looking again when told; returns how many.
    fn run(throttle: &mut Throttle, mut now: Instant, span: Duration) -> (u64, Instant) {
        let end = now + span;
        let mut started = 0;
        while now < end {
            while throttle.allows(now) {
                throttle.spend(1);
                started += 1;
            }
            now = throttle
                .ready_at()
                .expect("limited")
                .max(now + Duration::from_micros(10));
        }
        (started, now)
    }

    #[test]
    fn a_rate_holds_within_two_percent() {
        for rate in [0.5, 3.0, 100.0, 5_000.0, 80_000.0] {
            let begun = Instant::now();
            let mut throttle = Throttle::new(begun);
            throttle.set(Some(rate), begun);
            let seconds = (200.0 / rate).max(10.0);
            let (started, _) = run(&mut throttle, begun, Duration::from_secs_f64(seconds));
            let expected = rate * seconds;
            assert!(
                (started as f64 - expected).abs() <= (expected * 0.02).max(2.0),
                "{started} of {expected} at {rate} a second"
            );
        }
    }

    #[test]
    fn a_pause_saves_up_little() {
        let begun = Instant::now();
        let mut throttle = Throttle::new(begun);
        throttle.set(Some(1_000.0), begun);
        let later = begun + Duration::from_secs(3600);
        let (started, _) = run(&mut throttle, later, Duration::from_secs(1));
        assert!((990..=1_060).contains(&started), "{started}");
    }

    #[test]
    fn a_new_rate_counts_from_when_it_is_set() {
        let begun = Instant::now();
        let mut throttle = Throttle::new(begun);
        assert!(throttle.allows(begun), "without a limit all may start");
        throttle.set(Some(10.0), begun);
        assert!(
            !throttle.allows(begun),
            "nothing is saved up while there is no limit"
        );
        let (_, now) = run(&mut throttle, begun, Duration::from_secs(2));
        throttle.set(Some(1_000.0), now);
        let (started, now) = run(&mut throttle, now, Duration::from_secs(1));
        assert!((980..=1_060).contains(&started), "{started}");
        throttle.set(None, now);
        assert!(throttle.allows(now) && throttle.ready_at().is_none());
    }
}
