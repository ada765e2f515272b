//! What doctor finds.

use serde::Serialize;

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// A short name that does not change, for scripts: `no-dispatcher`, `old-transaction`, …
    pub name: &'static str,
    /// What is wrong, with the thing that is.
    pub what: String,
    /// What mends it.
    pub hint: String,
}

/// How bad a [`Finding`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Severity {
    /// Messages are lost, or do not move.
    Error,
    /// It costs, or will become an error.
    Warning,
    /// Worth knowing.
    Note,
}

impl Finding {
    pub(super) fn new(
        severity: Severity,
        name: &'static str,
        what: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self {
            severity,
            name,
            what: what.into(),
            hint: hint.into(),
        }
    }
}

pub(super) fn span(seconds: f64) -> String {
    match seconds.max(0.0) as u64 {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}
