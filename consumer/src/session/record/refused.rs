//! Reports that the database refuses: which message is to blame, and what is written of it instead.
//!
//! A report is one transaction for many messages of many groups. If one of its values is out of range, or not in the database's encoding, or
//! a constraint forbids it, trying the report again would fail for ever, and with it everybody's progress. So the culprits are found by
//! trying parts of the report out, and the whole is written with other words for them.

use postbox_core::text;
use sqlx::postgres::PgListener;
use sqlx::{Acquire, Error};
use tracing::error;

use crate::ids::SubscriptionId;
use crate::protocol::journal::Entry;
use crate::session::record::{Line, Reporter, try_out};

/// How much is left of a refused entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Degree {
    /// Its texts in ASCII.
    Ascii,
    /// Another text in place of its own.
    Replaced,
    /// No headers and no content type either.
    Bare,
}

impl Degree {
    pub(crate) const ALL: [Self; 3] = [Self::Ascii, Self::Replaced, Self::Bare];
}

/// The database refuses what was sent, and would again: data (22), constraints (23), limits (54), an allocation beyond a gigabyte, which has no code of
/// its own, or what somebody's trigger raises (P0).
pub(crate) fn for_its_data(error: &Error) -> bool {
    let Error::Database(error) = error else {
        return matches!(error, Error::Encode(_));
    };
    let code = error.code().unwrap_or_default();
    ["22", "23", "54", "P0"]
        .iter()
        .any(|class| code.starts_with(class))
        || (code == "XX000" && error.message().starts_with("invalid memory alloc request size"))
}

/// Which of these entries the database refuses, and why. By halves: of a thousand, one costs twenty tries.
pub(crate) async fn find(
    listener: &mut PgListener,
    reporter: Reporter<'_>,
    lines: &[Line<'_>],
) -> Result<Vec<(SubscriptionId, i64, String)>, Error> {
    let connection = listener.acquire().await?;
    let mut culprits = Vec::new();
    let mut parts = vec![lines];
    while let Some(part) = parts.pop() {
        match try_out(connection, reporter, part).await {
            Ok(()) => {}
            Err(error) if !for_its_data(&error) => return Err(error),
            Err(error) => match part {
                [(subscription, offset, _)] => culprits.push((*subscription, *offset, error.to_string())),
                _ => {
                    let (left, right) = part.split_at(part.len() / 2);
                    parts.extend([right, left].into_iter().filter(|half| !half.is_empty()));
                }
            },
        }
    }
    Ok(culprits)
}

/// Other words for what was refused.
pub(crate) fn put_otherwise(entry: &mut Entry, degree: Degree, offset: i64, why: &str) {
    let why = text::ascii(&text::clean(why));
    error!(
        offset,
        why,
        ?degree,
        "the database refuses what is to be recorded of a message; recording less of it"
    );
    let instead = |text: &str| match degree {
        Degree::Ascii => text::ascii(text),
        _ => format!("(the text could not be recorded: {why})"),
    };
    for failure in &mut entry.failures {
        failure.error = instead(&failure.error);
    }
    entry.reason = entry.reason.as_deref().map(instead);
    entry.bare |= degree == Degree::Bare;
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use chrono::Utc;

    use super::*;
    use crate::ids::{Epoch, Lane};
    use crate::protocol::journal::{Disposition, Failure};

    #[test]
    fn what_is_left_becomes_less_by_degrees() {
        let mut entry = Entry {
            lane: Lane::of(0, 1),
            epoch: Epoch(1),
            disposition: Disposition::Dead,
            attempts: 1,
            due: Instant::now(),
            failures: vec![Failure {
                attempt: 1,
                at: Utc::now(),
                error: "a → b".to_owned(),
            }],
            reason: Some("a → b".to_owned()),
            record: None,
            bare: false,
        };
        put_otherwise(&mut entry, Degree::Ascii, 1, "no arrow");
        assert_eq!(entry.reason.as_deref(), Some("a \\u{2192} b"));
        put_otherwise(&mut entry, Degree::Replaced, 1, "no arrow");
        assert_eq!(
            entry.failures[0].error,
            "(the text could not be recorded: no arrow)"
        );
        assert!(!entry.bare);
        put_otherwise(&mut entry, Degree::Bare, 1, "no arrow");
        assert!(entry.bare);
    }
}
