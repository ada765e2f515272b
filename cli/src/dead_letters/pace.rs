//! `--rate`: so many letters in a span of time, evenly.

use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

/// A rate such as 50/s.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rate {
    per_second: f64,
}

impl Rate {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let refusal = || "a rate is a number of letters with /s, /m or /h, such as 50/s".to_owned();
        let (number, unit) = text.split_once('/').unwrap_or((text, "s"));
        let seconds = match unit {
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3_600.0,
            _ => return Err(refusal()),
        };
        let number: u32 = number.parse().map_err(|_| refusal())?;
        match number {
            0 => Err("a rate is at least 1".to_owned()),
            number => Ok(Self {
                per_second: f64::from(number) / seconds,
            }),
        }
    }
}

/// Batches when there is no rate: each is a transaction.
const BATCH: usize = 500;
/// A batch is at most what falls due in so long, so that letters come evenly.
const BEAT: Duration = Duration::from_millis(100);

/// Holds batches back until they are due.
pub(crate) struct Pace {
    rate: Option<Rate>,
    begun: Instant,
    gone: usize,
}

impl Pace {
    pub(crate) fn new(rate: Option<Rate>) -> Self {
        Self {
            rate,
            begun: Instant::now(),
            gone: 0,
        }
    }

    /// How many letters make a batch.
    pub(crate) fn batch(&self) -> usize {
        self.rate.map_or(BATCH, |rate| {
            ((rate.per_second * BEAT.as_secs_f64()) as usize).clamp(1, BATCH)
        })
    }

    /// Waits until so many letters may go; `false` when the program is to stop. The first go at once, others when all before them have had
    /// their time.
    pub(crate) async fn wait(&mut self, letters: usize, stop: &CancellationToken) -> bool {
        let due = self.rate.map_or(self.begun, |rate| {
            self.begun + Duration::from_secs_f64(self.gone as f64 / rate.per_second)
        });
        self.gone += letters;
        tokio::select! {
            biased;
            () = stop.cancelled() => false,
            () = tokio::time::sleep_until(due.into()) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_in_a_unit_of_time() {
        let per_second = |text| Rate::parse(text).map(|rate| rate.per_second);
        assert_eq!(per_second("50/s"), Ok(50.0));
        assert_eq!(per_second("50"), Ok(50.0));
        assert_eq!(per_second("30/m"), Ok(0.5));
        for wrong in ["", "0/s", "1.5/s", "-1/s", "5/d", "5 /s", "/s"] {
            assert!(Rate::parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn letters_go_no_faster_than_the_rate_and_stop_at_once() {
        let stop = CancellationToken::new();
        let mut pace = Pace::new(Some(Rate { per_second: 200.0 }));
        let begun = Instant::now();
        let mut gone = 0;
        while gone < 60 {
            assert!(pace.wait(pace.batch(), &stop).await, "nobody stops it");
            gone += pace.batch();
        }
        // All but the last batch have had their time.
        assert!(
            begun.elapsed() >= Duration::from_millis(200),
            "{:?}",
            begun.elapsed()
        );
        stop.cancel();
        assert!(!pace.wait(1, &stop).await);
    }
}
