//! A bar for what takes long, on standard error when that is a terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const WIDTH: usize = 30;
const EVERY: Duration = Duration::from_millis(100);

pub(crate) struct Progress {
    what: &'static str,
    of: i64,
    begun: Instant,
    drawn: Option<Instant>,
    is_seen: bool,
}

impl Progress {
    pub(crate) fn new(what: &'static str, of: i64) -> Self {
        Self {
            what,
            of,
            begun: Instant::now(),
            drawn: None,
            is_seen: std::io::stderr().is_terminal(),
        }
    }

    /// So much is done.
    pub(crate) fn at(&mut self, done: i64) {
        if !self.is_seen || self.drawn.is_some_and(|drawn| drawn.elapsed() < EVERY) {
            return;
        }
        self.drawn = Some(Instant::now());
        let line = bar(self.what, done, self.of, self.begun.elapsed());
        // If it cannot be seen, nothing is lost.
        let _ = write!(std::io::stderr(), "\r{line}\x1b[K");
    }

    /// Wipes the bar: what was done is told otherwise.
    pub(crate) fn end(self) {
        if self.drawn.is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn bar(what: &str, done: i64, of: i64, elapsed: Duration) -> String {
    let of = of.max(done).max(1);
    let full = (done as f64 / of as f64 * WIDTH as f64) as usize;
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let left = Duration::from_secs_f64((of - done) as f64 / rate.max(0.001)).as_secs();
    format!(
        "{what} [{}{}] {done} of {of}, {rate:.0}/s, {left} s left",
        "#".repeat(full),
        "-".repeat(WIDTH - full.min(WIDTH))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_says_how_much_how_fast_and_how_long() {
        assert_eq!(
            bar("redriving", 50, 200, Duration::from_secs(10)),
            "redriving [#######-----------------------] 50 of 200, 5/s, 30 s left"
        );
        assert!(bar("redriving", 7, 0, Duration::ZERO).contains("7 of 7"));
    }
}
