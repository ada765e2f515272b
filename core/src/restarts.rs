//! How often, and after which waits, a part that panics is started again.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// A part that panics so often in a row will not do better.
const MOST: u32 = 6;
/// A part that ran for so long had got over it.
const CALM: Duration = Duration::from_secs(60);
/// Waits double from the first up to the last. By the first, what the panic has cancelled has ended.
const FIRST: Duration = Duration::from_millis(500);
const LAST: Duration = Duration::from_secs(10);

/// The starts of one part.
#[derive(Debug)]
pub struct Restarts {
    in_a_row: u32,
    begun: Instant,
}

impl Restarts {
    /// It is started for the first time.
    #[must_use]
    pub fn new() -> Self {
        Self {
            in_a_row: 0,
            begun: Instant::now(),
        }
    }

    /// It has panicked: how long to wait before it is started again; `None`: it has panicked six times in a row.
    pub fn next_wait(&mut self) -> Option<Duration> {
        if self.begun.elapsed() > CALM {
            self.in_a_row = 0;
        }
        self.in_a_row += 1;
        let wait = FIRST.saturating_mul(1 << (self.in_a_row - 1).min(16)).min(LAST);
        self.begun = Instant::now() + wait;
        (self.in_a_row < MOST).then_some(wait)
    }
}

impl Default for Restarts {
    fn default() -> Self {
        Self::new()
    }
}

/// Logs what became of a part. Logging calls the application's subscriber, which may be what panics; whoever watches over parts must not end by that, or
/// nobody would start them again or say that they are gone.
pub fn say(log: impl FnOnce()) {
    // There is nowhere left to tell that it cannot be told.
    let _ = catch_unwind(AssertUnwindSafe(log));
}

/// What a panic said.
#[must_use]
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sixth_panic_in_a_row_is_the_last() {
        let mut restarts = Restarts::new();
        let waits: Vec<_> = (0..6)
            .map(|_| restarts.next_wait().map(|wait| wait.as_millis()))
            .collect();
        assert_eq!(&waits[..3], [Some(500), Some(1_000), Some(2_000)]);
        assert_eq!(&waits[4..], [Some(8_000), None]);
    }
}
