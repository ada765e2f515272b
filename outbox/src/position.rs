//! Positions in a topic.

use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, NaiveDate, Utc};

use crate::id::Offset;

/// A position in a topic: where a new subscription begins, or where one is moved to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Position {
    /// At the earliest message that is retained.
    Earliest,
    /// Behind the newest message that is in order at that moment.
    Latest,
    /// At an offset, or the nearest one there is.
    Offset(Offset),
    /// At the first message published at or after an instant.
    At(DateTime<Utc>),
    /// At the first message published at most so long ago.
    Ago(Duration),
}

impl Position {
    /// As `postbox.start_offset` takes it.
    #[doc(hidden)]
    pub fn to_sql(self) -> (&'static str, Option<String>) {
        match self {
            Position::Earliest => ("earliest", None),
            Position::Latest => ("latest", None),
            Position::Offset(offset) => ("offset", Some(offset.get().to_string())),
            Position::At(instant) => ("time", Some(instant.to_rfc3339())),
            Position::Ago(span) => ("ago", Some(format!("{} microseconds", span.as_micros()))),
        }
    }
}

impl FromStr for Position {
    type Err = String;

    /// `earliest`, `latest`, an offset, an instant (RFC 3339, or a date, which is its midnight in UTC).
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(offset @ 0..) = text.parse() {
            return Ok(Position::Offset(Offset::new(offset)));
        }
        if let Ok(instant) = DateTime::parse_from_rfc3339(text) {
            return Ok(Position::At(instant.to_utc()));
        }
        if let Some(midnight) = text
            .parse::<NaiveDate>()
            .ok()
            .and_then(|date| date.and_hms_opt(0, 0, 0))
        {
            return Ok(Position::At(midnight.and_utc()));
        }
        match text {
            "earliest" => Ok(Position::Earliest),
            "latest" => Ok(Position::Latest),
            _ => Err(
                "a position is earliest, latest, an offset, or an instant such as 2026-11-22T08:00:00Z"
                    .to_owned(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_a_word_an_offset_or_an_instant() {
        assert_eq!("earliest".parse(), Ok(Position::Earliest));
        assert_eq!("latest".parse(), Ok(Position::Latest));
        assert_eq!("42".parse(), Ok(Position::Offset(Offset::new(42))));
        let noon = "2026-11-22T12:00:00Z";
        let expected = DateTime::parse_from_rfc3339(noon).expect("an instant").to_utc();
        assert_eq!(noon.parse(), Ok(Position::At(expected)));
        assert_eq!("2026-11-22T13:00:00+01:00".parse(), Ok(Position::At(expected)));
        assert!(matches!("2026-11-22".parse(), Ok(Position::At(_))));
        for wrong in ["", "newest", "12h", "-1", "2026-13-01"] {
            assert!(wrong.parse::<Position>().is_err(), "{wrong:?}");
        }
    }
}
