//! Which letters, as options.

use chrono::{DateTime, Utc};
use postbox_dispatcher::dead_letters::Filter;
use uuid::Uuid;

use crate::span;
use crate::usage::name;

#[derive(Debug, clap::Args)]
pub(crate) struct FilterArgs {
    /// Letters of this group
    #[arg(long, value_parser = name)]
    group: Option<String>,
    /// Letters of this topic
    #[arg(long, value_parser = name)]
    topic: Option<String>,
    /// Letters of this message type
    #[arg(long = "type", value_name = "TYPE", value_parser = name)]
    message_type: Option<String>,
    /// Letters of this key
    #[arg(long)]
    key: Option<String>,
    /// Letters of the message with this id: one for each group that has given it up
    #[arg(long, value_name = "ID")]
    message: Option<Uuid>,
    /// Given up since then: a time (RFC 3339), or so long ago, such as 2h
    #[arg(long, value_name = "WHEN", value_parser = instant)]
    since: Option<DateTime<Utc>>,
    /// Given up before then
    #[arg(long, value_name = "WHEN", value_parser = instant)]
    until: Option<DateTime<Utc>>,
    /// With this text in the reason
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Only letters whose keys wait for an operator
    #[arg(long)]
    halted: bool,
}

impl FilterArgs {
    pub(crate) fn filter(&self) -> Filter {
        let mut filter = Filter::default();
        filter.group = self.group.clone();
        filter.topic = self.topic.clone();
        filter.message_type = self.message_type.clone();
        filter.key = self.key.clone();
        filter.message = self.message;
        filter.since = self.since;
        filter.until = self.until;
        filter.reason = self.reason.clone();
        filter.halted = self.halted;
        filter
    }

    /// Whether nothing is asked of a letter.
    pub(crate) fn is_empty(&self) -> bool {
        self.filter() == Filter::default()
    }
}

fn instant(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.to_utc());
    }
    span::parse(text)
        .ok()
        .and_then(|ago| Utc::now().checked_sub_signed(chrono::TimeDelta::from_std(ago).ok()?))
        .ok_or_else(|| "it is a time such as 2026-11-22T08:00:00Z, or a span such as 30m or 2h".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_is_a_time_or_so_long_ago() {
        assert!(instant("2026-11-22T08:00:00+01:00").is_ok());
        let ago = Utc::now() - instant("2h").expect("a span");
        assert!((7_199..7_260).contains(&ago.num_seconds()), "{ago}");
        for wrong in ["", "yesterday", "-2h", "2026-11-22"] {
            assert!(instant(wrong).is_err(), "{wrong:?}");
        }
    }
}
