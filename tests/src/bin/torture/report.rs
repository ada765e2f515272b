//! What is printed in the end.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::verdict::Verdict;

/// What there is to say about a run.
pub(crate) struct Report<'a> {
    pub(crate) seed: u64,
    pub(crate) seconds: u64,
    pub(crate) verdict: &'a Verdict,
    /// What was not done when it should have been; `None`: it came to rest.
    pub(crate) unsettled: Option<&'a str>,
    /// What processes did that they should not have done.
    pub(crate) oddities: &'a [String],
}

impl Report<'_> {
    pub(crate) fn passed(&self) -> bool {
        self.verdict.is_clean() && self.unsettled.is_none() && self.oddities.is_empty()
    }

    pub(crate) fn to_json(&self) -> Value {
        let verdict = self.verdict;
        json!({
            "seed": self.seed,
            "seconds": self.seconds,
            "passed": self.passed(),
            "published": verdict.published,
            "committed": verdict.committed,
            "delivered": verdict.delivered,
            "lost": verdict.lost,
            "phantom": verdict.phantom,
            "reordered": verdict.reordered,
            "concurrent": verdict.concurrent,
            "zombie_overlaps": verdict.zombie_overlaps,
            "effect_duplicates": verdict.effect_duplicates,
            "duplicates": verdict.duplicates,
            "dead": verdict.dead,
            "taken_back": verdict.taken_back,
            "quiescent": self.unsettled.is_none(),
            "oddities": self.oddities,
            "faults": verdict.faults,
            "takeover_ms": {
                "count": verdict.takeovers_ms.len(),
                "p50": percentile(&verdict.takeovers_ms, 50),
                "p99": percentile(&verdict.takeovers_ms, 99),
                "max": verdict.takeovers_ms.last(),
            },
        })
    }

    pub(crate) fn to_text(&self) -> String {
        let verdict = self.verdict;
        let mut text = String::new();
        // Writing to a String cannot fail.
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<18} {value}");
        };
        line("published", verdict.published.to_string());
        line("committed", verdict.committed.to_string());
        line("delivered", verdict.delivered.to_string());
        line("lost", verdict.lost.to_string());
        line("phantom", verdict.phantom.to_string());
        line("reordered", verdict.reordered.to_string());
        line("concurrent", verdict.concurrent.to_string());
        line("zombie overlaps", verdict.zombie_overlaps.to_string());
        line("effect duplicates", verdict.effect_duplicates.to_string());
        line("duplicates", verdict.duplicates.to_string());
        line("dead letters", verdict.dead.to_string());
        line("taken back", verdict.taken_back.to_string());
        line(
            "came to rest",
            self.unsettled
                .map_or("yes".to_owned(), |left| format!("no: {left}")),
        );
        let spans = &verdict.takeovers_ms;
        if let Some(max) = spans.last() {
            let (p50, p99) = (percentile(spans, 50), percentile(spans, 99));
            line(
                "takeovers",
                format!(
                    "{}, p50 {} ms, p99 {} ms, max {max} ms",
                    spans.len(),
                    p50.unwrap_or(0),
                    p99.unwrap_or(0)
                ),
            );
        }
        for (kind, count) in &verdict.faults {
            line("fault", format!("{count:>6} {kind}"));
        }
        for oddity in self.oddities {
            line("odd", oddity.clone());
        }
        text
    }
}

/// The least value that at least so many percent do not exceed.
fn percentile(ascending: &[u64], percent: usize) -> Option<u64> {
    let rank = (ascending.len() * percent).div_ceil(100);
    ascending.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<u64> = (1..=200).collect();
        assert_eq!(percentile(&values, 50), Some(100));
        assert_eq!(percentile(&values, 99), Some(198));
        assert_eq!(percentile(&[7], 99), Some(7));
        assert_eq!(percentile(&[], 50), None);
    }
}
