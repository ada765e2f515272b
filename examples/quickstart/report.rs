//! What is printed at the end.

use std::fmt;
use std::time::Duration;

use crate::latency::Latency;
use crate::outcome::Outcome;
use crate::verification::Check;

pub(crate) struct Report {
    checks: Vec<Check>,
    rows: Vec<Row>,
}

/// A line of the table.
struct Row {
    name: String,
    messages: u64,
    took: Duration,
    latency: Option<Latency>,
}

impl Report {
    pub(crate) fn new(outcome: &Outcome, checks: Vec<Check>) -> Self {
        let messages = outcome.published;
        let publisher = Row {
            name: String::from("(published)"),
            messages,
            took: outcome.publishing,
            latency: None,
        };
        let groups = outcome
            .latencies
            .groups()
            .into_iter()
            .map(|(group, latency)| Row {
                name: group.to_string(),
                messages,
                took: latency.last - outcome.begun,
                latency: Some(latency),
            });
        let rows = std::iter::once(publisher).chain(groups).collect();
        Self { checks, rows }
    }

    /// Whether nothing differs.
    pub(crate) fn is_good(&self) -> bool {
        self.checks.iter().all(|check| check.difference.is_none())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Verified against SQL:")?;
        for check in &self.checks {
            writeln!(f, "{check}")?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "{:<24} {:>9} {:>11} {:>9} {:>9} {:>9}",
            "group", "messages", "deliveries", "per s", "p50", "p99"
        )?;
        for row in &self.rows {
            row.fmt(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_second = |count: u64| thousands((count as f64 / self.took.as_secs_f64()) as u64);
        write!(f, "{:<24} {:>9} ", self.name, thousands(self.messages))?;
        let Some(latency) = &self.latency else {
            return writeln!(f, "{:>11} {:>9}", "", per_second(self.messages));
        };
        let deliveries = latency.deliveries() as u64;
        write!(f, "{:>11} {:>9} ", thousands(deliveries), per_second(deliveries))?;
        let quantile = |share| format!("{:.1} ms", latency.quantile(share).as_secs_f64() * 1e3);
        writeln!(f, "{:>9} {:>9}", quantile(0.5), quantile(0.99))
    }
}

/// 12345 as 12,345.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::thousands;

    #[test]
    fn thousands_are_separated() {
        assert_eq!(
            [0, 999, 1_000, 53_402, 1_234_567].map(thousands),
            ["0", "999", "1,000", "53,402", "1,234,567"]
        );
    }
}
