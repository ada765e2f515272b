//! When a group may drain: daily windows by the wall clock of a time zone.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, NaiveTime, Timelike, Utc};
use chrono_tz::Tz;

const DAY: u16 = 24 * 60;

/// Times of the day in which messages are started, such as `22:00-06:00 Europe/Berlin` or `00:00-06:00,12:00-13:00 UTC`.
///
/// The wall clock of the zone decides: a window that spans a change of the clock is an hour shorter or longer that night, one that begins in the
/// hour that is left out begins after it, and an hour that comes twice is in the window both times. The end is not part of a window. Without a
/// zone it is UTC.
///
/// ```
/// use postbox_core::DailyWindow;
///
/// let night: DailyWindow = "22:00-06:00 Europe/Berlin".parse()?;
/// assert!(night.is_open("2026-01-10T21:30:00Z".parse()?));
/// assert!(!night.is_open("2026-01-10T20:59:00Z".parse()?));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DailyWindow {
    /// Minutes of the day: from, to. A window over midnight ends before it begins.
    spans: Vec<(u16, u16)>,
    zone: Tz,
}

impl DailyWindow {
    /// Whether an instant is in it.
    pub fn is_open(&self, at: DateTime<Utc>) -> bool {
        let time = at.with_timezone(&self.zone).time();
        let minute = minute_of(time);
        self.spans.iter().any(|&(from, to)| {
            if from < to {
                (from..to).contains(&minute)
            } else {
                minute >= from || minute < to
            }
        })
    }
}

fn minute_of(time: NaiveTime) -> u16 {
    // At most 1,439.
    (time.num_seconds_from_midnight() / 60) as u16
}

/// Why a text is not a [`DailyWindow`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// A span is not of the form `22:00-06:00`.
    #[error(
        "{0:?} is not a span of the day: write it as 22:00-06:00, with hours 00 to 24; a whole day is 00:00-24:00"
    )]
    Span(String),
    /// The time zone is not known.
    #[error("{0:?} is not a time zone: use an IANA name such as Europe/Berlin or UTC")]
    Zone(String),
}

impl FromStr for DailyWindow {
    type Err = WindowError;

    fn from_str(text: &str) -> Result<Self, WindowError> {
        let (spans, zone) = text.trim().split_once(' ').unwrap_or((text.trim(), "UTC"));
        let zone = zone.trim();
        let zone = zone.parse().map_err(|_| WindowError::Zone(zone.to_owned()))?;
        let spans = spans
            .split(',')
            .map(|span| parse_span(span).ok_or_else(|| WindowError::Span(span.to_owned())))
            .collect::<Result<_, _>>()?;
        Ok(Self { spans, zone })
    }
}

/// An empty one would never open.
fn parse_span(span: &str) -> Option<(u16, u16)> {
    let (from, to) = span.split_once('-')?;
    let (from, to) = (parse_minute(from)?, parse_minute(to)?);
    (from != to && from < DAY).then_some((from, to))
}

fn parse_minute(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |digits: &str| {
        (digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit()))
            .then(|| digits.parse::<u16>().ok())
            .flatten()
    };
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    (minutes < 60 && hours * 60 + minutes <= DAY).then_some(hours * 60 + minutes)
}

impl fmt::Display for DailyWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (from, to)) in self.spans.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            write!(
                f,
                "{comma}{:02}:{:02}-{:02}:{:02}",
                from / 60,
                from % 60,
                to / 60,
                to % 60
            )?;
        }
        write!(f, " {}", self.zone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(text: &str) -> DailyWindow {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    /// The instants, by the half hour in UTC, at which it opens and closes on two days.
    fn changes(window: &DailyWindow, from: &str) -> Vec<String> {
        let from: DateTime<Utc> = from.parse().expect("an instant");
        let mut open = window.is_open(from);
        let mut changes = Vec::new();
        for half in 1..96 {
            let at = from + chrono::TimeDelta::minutes(30 * half);
            if window.is_open(at) != open {
                open = !open;
                changes.push(at.format("%dT%H:%M").to_string());
            }
        }
        changes
    }

    #[test]
    fn a_window_over_midnight_is_open_on_both_sides_of_it() {
        let night = window("22:00-06:00 Europe/Berlin");
        assert_eq!(
            changes(&night, "2026-01-10T12:00:00Z"),
            ["10T21:00", "11T05:00", "11T21:00", "12T05:00"]
        );
    }

    #[test]
    fn the_end_is_not_part_of_a_window() {
        let hour = window("12:00-13:00");
        for (at, open) in [
            ("2026-05-01T11:59:59Z", false),
            ("2026-05-01T12:00:00Z", true),
            ("2026-05-01T12:59:59Z", true),
            ("2026-05-01T13:00:00Z", false),
        ] {
            assert_eq!(hour.is_open(at.parse().expect("an instant")), open, "{at}");
        }
    }

    #[test]
    fn the_wall_clock_decides_when_the_clocks_change() {
        let night = window("22:00-06:00 Europe/Berlin");
        // Forward on 29 March 2026, back on 25 October 2026.
        assert_eq!(
            changes(&night, "2026-03-28T12:00:00Z"),
            ["28T21:00", "29T04:00", "29T20:00", "30T04:00"]
        );
        assert_eq!(
            changes(&night, "2026-10-24T12:00:00Z"),
            ["24T20:00", "25T05:00", "25T21:00", "26T05:00"]
        );
        // 02:30 does not exist on the one day, and comes twice on the other.
        let gap = window("02:00-03:00 Europe/Berlin");
        assert_eq!(changes(&gap, "2026-03-28T12:00:00Z"), ["30T00:00", "30T01:00"]);
        assert_eq!(
            changes(&gap, "2026-10-24T12:00:00Z"),
            ["25T00:00", "25T02:00", "26T01:00", "26T02:00"]
        );
        // Half an hour's change, in the southern summer.
        let lord_howe = window("01:30-02:30 Australia/Lord_Howe");
        assert_eq!(
            changes(&lord_howe, "2026-10-03T00:00:00Z"),
            ["03T15:00", "03T15:30", "04T14:30", "04T15:30"]
        );
    }

    #[test]
    fn several_spans_are_one_window_and_a_day_may_end_at_24() {
        let spans = window("00:00-06:00,12:00-13:00,20:00-24:00 UTC");
        assert_eq!(
            changes(&spans, "2026-05-01T08:00:00Z"),
            [
                "01T12:00", "01T13:00", "01T20:00", "02T06:00", "02T12:00", "02T13:00", "02T20:00",
                "03T06:00"
            ]
        );
        assert!(changes(&window("00:00-24:00"), "2026-05-01T08:00:00Z").is_empty());
    }

    #[test]
    fn it_is_written_as_it_is_read() {
        for text in [
            "22:00-06:00 Europe/Berlin",
            "00:00-06:00,12:00-24:00 America/New_York",
        ] {
            assert_eq!(window(text).to_string(), text);
        }
        assert_eq!(window("01:00-02:00").to_string(), "01:00-02:00 UTC");
    }

    #[test]
    fn a_mistake_is_named() {
        for wrong in [
            "",
            "22:00",
            "22-06",
            "22:00-22:00",
            "24:00-06:00",
            "25:00-26:00",
            "1:00-2:00",
            "01:60-02:00",
        ] {
            assert!(
                matches!(wrong.parse::<DailyWindow>(), Err(WindowError::Span(_))),
                "{wrong:?}"
            );
        }
        let error = "22:00-06:00 Berlin".parse::<DailyWindow>().unwrap_err();
        assert!(
            error.to_string().contains("\"Berlin\" is not a time zone"),
            "{error}"
        );
    }
}
