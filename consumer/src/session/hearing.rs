//! What a session makes of what it hears: the sequencer's announcements are so; anything else is a hint, and anybody may give any number of those.

use std::time::{Duration, Instant};

use postbox_core::seal::{Heard, Seal};
use tracing::warn;

/// However many hints come, one look in so long answers them.
const HINTS_EVERY: Duration = Duration::from_millis(100);
/// So many in a row, and whatever else is due has its turn.
const IN_A_ROW: u32 = 64;
/// More hints than operators give.
const MANY: u64 = 1_000;
/// How often what is odd is noted, and how often it is logged.
const NOTE_EVERY: Duration = Duration::from_secs(5);
const SAY_EVERY: Duration = Duration::from_secs(600);

pub(crate) struct Hearing {
    seal: Seal,
    in_a_row: u32,
    /// When the last look that a hint asked for was due.
    hinted: Option<Instant>,
    /// Since they were last noted.
    hints: u64,
    forged: u64,
    noted: Instant,
    said: Option<Instant>,
}

/// What to do about a notification.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Said<'a> {
    Announcement(&'a str),
    /// Look, not before this.
    Look(Instant),
    Nothing,
}

impl Hearing {
    pub(crate) fn new(seal: Seal) -> Self {
        Self {
            seal,
            in_a_row: 0,
            hinted: None,
            hints: 0,
            forged: 0,
            noted: Instant::now(),
            said: None,
        }
    }

    pub(crate) fn hear<'a>(&mut self, text: &'a str) -> Said<'a> {
        match self.seal.open(text) {
            Heard::Announcement(text) => return Said::Announcement(text),
            Heard::Known => return Said::Nothing,
            Heard::Hint => self.hints += 1,
            Heard::Forged => self.forged += 1,
        }
        self.in_a_row += 1;
        let now = Instant::now();
        let due = self.hinted.map_or(now, |hinted| now.max(hinted + HINTS_EVERY));
        if self.hinted.is_none_or(|hinted| hinted <= now) {
            self.hinted = Some(due);
        }
        Said::Look(due)
    }

    /// Others have to have their turn.
    pub(crate) fn is_tired(&self) -> bool {
        self.in_a_row >= IN_A_ROW
    }

    pub(crate) fn rest(&mut self) {
        self.in_a_row = 0;
    }

    /// What is to be noted of others' notifications, in words and number; logs it the first time.
    pub(crate) fn complaint(&mut self) -> Option<(String, i64)> {
        if self.noted.elapsed() < NOTE_EVERY {
            return None;
        }
        self.noted = Instant::now();
        let (hints, forged) = (std::mem::take(&mut self.hints), std::mem::take(&mut self.forged));
        if forged == 0 && hints < MANY {
            return None;
        }
        let what = format!(
            "{forged} on postbox_segment that no dispatcher sent, and {hints} without a word, in {} s",
            NOTE_EVERY.as_secs()
        );
        if self.said.is_none_or(|said| said.elapsed() > SAY_EVERY) {
            self.said = Some(Instant::now());
            warn!(
                what,
                "somebody sends notifications of Postbox's channels; what they say is not believed"
            );
        }
        Some((what, i64::try_from(forged + hints).unwrap_or(i64::MAX)))
    }
}
