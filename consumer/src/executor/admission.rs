//! Whether messages may start, and how fast.

use std::time::{Duration, Instant};

use super::command::Pace;
use super::inline_cost::InlineCost;
use super::moved::Moved;
use crate::clock::later;
use crate::executor::breaker::Breaker;
use crate::executor::throttle::Throttle;
use crate::handler;

pub(super) struct Admission {
    pub(super) breaker: Breaker,
    pub(super) throttle: Throttle,
    pub(super) inline_cost: InlineCost,
    pub(super) moved: Moved,
    /// A member learns it before its first message.
    open: bool,
    stop_by: Option<Instant>,
}

impl Admission {
    pub(super) fn new(breaker: handler::Breaker, open: bool) -> Self {
        Self {
            breaker: Breaker::new(breaker),
            throttle: Throttle::new(Instant::now()),
            inline_cost: InlineCost::default(),
            moved: Moved::default(),
            open,
            stop_by: None,
        }
    }

    /// Whether messages may start: not paused, and within the window.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    pub(super) fn set(&mut self, pace: Pace) {
        self.open = pace.open;
        self.throttle.set(pace.rate, Instant::now());
    }

    /// The clock was moved on.
    pub(super) fn advance(&mut self, span: Duration) {
        self.breaker.advance(span);
        self.throttle.advance(span);
        self.moved.advance(span);
    }

    /// Nothing new starts from now on, and what runs has so long.
    pub(super) fn stop(&mut self, grace: Duration) {
        self.stop_by = Some(later(Instant::now(), grace));
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop_by.is_some()
    }

    pub(super) fn stop_by(&self) -> Option<Instant> {
        self.stop_by
    }
}
