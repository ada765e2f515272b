//! How far everything is, on standard error, and whether it is done.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::Instant;

use crate::node::Node;
use crate::replay::Replay;
use crate::report::thousands;

/// A group that handles nothing for so long will not come any further.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Progress<'a> {
    pub(crate) replay: &'a Replay,
    pub(crate) nodes: &'a [Node],
}

impl Progress<'_> {
    /// Shows it until it is dropped.
    pub(crate) async fn show(&self) -> Infallible {
        let terminal = std::io::stderr().is_terminal();
        let mut ticks = tokio::time::interval(Duration::from_millis(if terminal { 100 } else { 2_000 }));
        loop {
            ticks.tick().await;
            let mut line = format!("{}", self.replay.clock().format("%e %B, %k:%M"));
            let _ = write!(line, "  published {}", thousands(self.replay.published()));
            for (group, (handled, _)) in self.groups() {
                let _ = write!(line, "  {group} {}", thousands(handled));
            }
            // Nobody may be watching.
            let _ = match terminal {
                true => write!(std::io::stderr(), "\r{line}\x1b[K"),
                false => writeln!(std::io::stderr(), "{line}"),
            };
        }
    }

    /// Returns when every group has handled every event that was published.
    pub(crate) async fn all_handled(&self) -> Result<()> {
        let mut before = BTreeMap::new();
        let mut since = Instant::now();
        loop {
            let groups = self.groups();
            if groups.values().all(|(handled, due)| handled >= due) {
                return Ok(());
            }
            if groups != before {
                since = Instant::now();
            } else if since.elapsed() > PATIENCE {
                let late: Vec<String> = groups
                    .iter()
                    .filter(|(_, (handled, due))| handled < due)
                    .map(|(group, (handled, due))| format!("{group} has handled {handled} of {due} events"))
                    .collect();
                bail!(
                    "nothing was handled for {} s: {}",
                    PATIENCE.as_secs(),
                    late.join(", ")
                );
            }
            before = groups;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What each group has handled, and how much is due of what is published: nodes share a group's events, and each has
    /// all those of a broadcast.
    fn groups(&self) -> BTreeMap<String, (u64, u64)> {
        let mut groups = BTreeMap::new();
        for (group, handled) in self.nodes.iter().flat_map(Node::handled) {
            let copies = if group.starts_with("broadcast/") {
                self.nodes.len() as u64
            } else {
                1
            };
            let (sum, due) = groups.entry(group).or_insert((0, 0));
            *sum += handled;
            *due = copies * self.replay.published();
        }
        groups
    }
}
