//! How much of this machine is idle, where the system tells (Linux).

use std::time::{Duration, Instant};

/// The system counts in hundredths of a second, so a shorter span says little.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Looks now and then at what the processors have done.
#[derive(Debug, Default)]
pub(crate) struct IdleCores {
    last: Option<(Instant, Ticks)>,
    cores: Option<f64>,
}

/// What all processors have done since the system started.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ticks {
    processors: f64,
    idle: f64,
    all: f64,
}

impl IdleCores {
    /// How many were idle of late; `None` where the system does not tell, or not yet. Of the machine, so of whatever else runs there, too; a quota
    /// of a container is not seen.
    pub(crate) fn look(&mut self) -> Option<f64> {
        if self.last.is_none_or(|(at, _)| at.elapsed() >= LOOK_EVERY) {
            let ticks = std::fs::read_to_string("/proc/stat")
                .ok()
                .as_deref()
                .and_then(read);
            self.cores = self
                .last
                .zip(ticks)
                .and_then(|((_, before), now)| between(before, now));
            self.last = ticks.map(|ticks| (Instant::now(), ticks));
        }
        self.cores
    }
}

fn between(before: Ticks, now: Ticks) -> Option<f64> {
    let all = now.all - before.all;
    (all > 0.0).then(|| (now.idle - before.idle).clamp(0.0, all) / all * now.processors)
}

/// The line of all, and one line for each: user, nice, system, idle, iowait, irq, softirq, steal; guests are counted as users already.
fn read(stat: &str) -> Option<Ticks> {
    let mut lines = stat.lines().take_while(|line| line.starts_with("cpu"));
    let fields: Vec<f64> = lines
        .next()?
        .split_whitespace()
        .skip(1)
        .take(8)
        .map_while(|field| field.parse().ok())
        .collect();
    Some(Ticks {
        processors: lines.count() as f64,
        idle: fields.get(3)? + fields.get(4)?,
        all: fields.iter().sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "cpu  100 0 50 800 40 0 10 0 7 0\ncpu0 50 0 25 400 20 0 5 0 3 0\ncpu1 50 0 25 400 20 0 5 0 4 0\nintr 1 2\n";
    const AFTER: &str = "cpu  110 0 55 820 45 0 10 0 9 0\ncpu0 55 0 25 410 20 0 5 0 3 0\ncpu1 55 0 30 410 25 0 5 0 6 0\nintr 1 2\n";

    #[test]
    fn cores_that_wait_for_a_disk_are_idle_and_guests_are_not_counted_twice() {
        let (before, after) = (read(BEFORE).unwrap(), read(AFTER).unwrap());
        // 25 of 40 hundredths, of two.
        assert_eq!(between(before, after), Some(1.25));
        assert_eq!(between(after, after), None, "no time has passed");
        assert_eq!(between(after, before), None, "it counts backwards");
    }

    #[test]
    fn what_is_not_understood_says_nothing() {
        for text in ["", "intr 1", "cpu", "cpu 1 2 x", "cpu  100 0"] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
