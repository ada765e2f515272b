//! Which due times have fired.

use chrono::{DateTime, Utc};

use super::Schedule;

/// Most spans that are remembered: one more for each time that the clock was ahead and came back.
const MOST: usize = 32;

/// Spans of due times, of which all have fired, in order.
///
/// While clocks go forward the last firing says it all. One that was ahead fires due times that are to come once it is set right: of those, these have
/// fired, and those before them have not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fired {
    spans: Vec<(DateTime<Utc>, DateTime<Utc>)>,
}

impl Fired {
    /// From the first and last due times of spans.
    pub fn new(from: Vec<DateTime<Utc>>, to: Vec<DateTime<Utc>>) -> Self {
        let mut spans: Vec<_> = from.into_iter().zip(to).collect();
        spans.sort_unstable();
        Self { spans }
    }

    /// The first and last due times of the spans.
    pub fn into_parts(self) -> (Vec<DateTime<Utc>>, Vec<DateTime<Utc>>) {
        self.spans.into_iter().unzip()
    }

    /// The end of the span that has this due time, if it has fired.
    pub(crate) fn until(&self, due: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let span = self.spans.iter().find(|(from, to)| *from <= due && due <= *to)?;
        Some(span.1)
    }

    /// With further due times, in order. Spans between which there is no due time of the schedule become one.
    pub fn and(mut self, schedule: &Schedule, due: &[DateTime<Utc>]) -> Self {
        self.spans.extend(due.iter().map(|at| (*at, *at)));
        self.spans.sort_unstable();
        let mut merged: Vec<(DateTime<Utc>, DateTime<Utc>)> = Vec::new();
        for (from, to) in self.spans {
            match merged.last_mut() {
                Some(last) if schedule.after(last.1).is_none_or(|next| next >= from) => {
                    last.1 = last.1.max(to);
                }
                _ => merged.push((from, to)),
            }
        }
        // The oldest are the least likely to come again.
        merged.drain(..merged.len().saturating_sub(MOST));
        Self { spans: merged }
    }
}
