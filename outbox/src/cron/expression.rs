//! Cron expressions: what they say, and the wall-clock times that they name. Of time zones they know nothing.

use crate::error::CronError;
use chrono::NaiveDateTime;
use croner::parser::{CronParser, Seconds, Year};

/// Whether an expression names times of the day, or a rhythm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Second, minute and hour are values, lists or ranges.
    TimesOfDay,
    /// One of them is a `*` or a step.
    Rhythm,
}

/// A cron expression.
#[derive(Clone)]
pub(crate) struct Expression {
    text: String,
    kind: Kind,
    cron: croner::Cron,
}

impl Expression {
    pub(crate) fn parse(text: &str) -> Result<Self, CronError> {
        let (cron, kind) = read(text)?;
        Ok(Self {
            text: text.trim().to_owned(),
            kind,
            cron,
        })
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The first time after `wall` that it names, on a wall clock that always goes on evenly.
    pub(crate) fn after(&self, wall: NaiveDateTime) -> Option<NaiveDateTime> {
        self.cron.find_next_occurrence(&wall, false).ok()
    }
}

/// The fields of an expression, the optional second first, and what each takes.
const FIELDS: [(&str, &str); 6] = [
    ("second", "0 to 59, with * , - /"),
    ("minute", "0 to 59, with * , - /"),
    ("hour", "0 to 23, with * , - /"),
    ("day of the month", "1 to 31, with * , - / L W"),
    ("month", "1 to 12 or jan to dec, with * , - /"),
    ("day of the week", "0 to 7 or sun to sat, with * , - / # L"),
];

const MACROS: [(&str, &str); 7] = [
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
];

/// The expression, or where it is wrong: each part of each field is tried by itself.
fn read(expression: &str) -> Result<(croner::Cron, Kind), CronError> {
    let wrong = |column: usize, reason: String| CronError::Expression {
        expression: expression.to_owned(),
        column,
        reason,
    };
    let parser = CronParser::builder()
        .seconds(Seconds::Optional)
        .year(Year::Disallowed)
        .build();
    let fields = split(expression, 0, char::is_whitespace);
    let Some((first, _)) = fields.first() else {
        return Err(wrong(
            1,
            "it is empty: it has five fields, or six with seconds".to_owned(),
        ));
    };
    let at_first = 1 + first;
    if let [(_, name)] = fields[..]
        && name.starts_with('@')
    {
        let name = name.to_ascii_lowercase();
        let Some((_, meaning)) = MACROS.iter().find(|(known, _)| *known == name) else {
            let known = MACROS.map(|(known, _)| known).join(", ");
            return Err(wrong(
                at_first,
                format!("{name:?} is no macro; known are: {known}"),
            ));
        };
        return read(meaning);
    }
    if !(5..=6).contains(&fields.len()) {
        let at = fields
            .get(6)
            .map_or(expression.chars().count() + 1, |(at, _)| at + 1);
        let found = fields.len();
        let reason = format!(
            "it has {found} field{}: minute, hour, day of the month, month, day of the week; or six, with the second first",
            if found == 1 { "" } else { "s" }
        );
        return Err(wrong(at, reason));
    }
    let offset = FIELDS.len() - fields.len();
    for (n, (at, field)) in fields.iter().enumerate() {
        let (name, takes) = FIELDS[n + offset];
        for (at, part) in split(field, *at, |c| c == ',') {
            let mut alone = ["*"; FIELDS.len()];
            alone[n + offset] = part;
            if parser.parse(&alone.join(" ")).is_err() || part.is_empty() {
                return Err(wrong(at + 1, format!("{part:?} is no {name} ({takes})")));
            }
        }
        if field.starts_with(',') || field.ends_with(',') || field.contains(",,") {
            let reason = format!("{field:?} is no {name} ({takes}): a comma stands between two values");
            return Err(wrong(at + 1, reason));
        }
    }
    let is_rhythm = fields[..fields.len() - 3]
        .iter()
        .any(|(_, field)| field.contains(['*', '?', '/']));
    let kind = if is_rhythm { Kind::Rhythm } else { Kind::TimesOfDay };
    parser
        .parse(&expression.split_whitespace().collect::<Vec<_>>().join(" "))
        .map(|cron| (cron, kind))
        .map_err(|error| wrong(at_first, error.to_string()))
}

/// The parts between separators, each with its place in characters; empty ones are left out.
fn split(text: &str, start: usize, is_separator: impl Fn(char) -> bool) -> Vec<(usize, &str)> {
    text.split(is_separator)
        .scan(start, |at, part| {
            let here = *at;
            *at += part.chars().count() + 1;
            Some((here, part))
        })
        .filter(|(_, part)| !part.is_empty())
        .collect()
}
