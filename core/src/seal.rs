//! Which notifications are the sequencer's: anybody who may connect can send one, and name any channel.
//!
//! A step tells its tick's number and a seal of it: half of a SHA-256 over the key of this run of the database, which only those can read who dispatch
//! or consume, and the number. Nobody else knows the seal of a tick before that is committed; and from then on it is worth nothing: notifications come
//! to everybody in the order of the commits, so whoever listened has heard the true one before anything that somebody made of its seal, and whoever
//! did not, reads in the table that this tick was. So the text need not be sealed, and it costs the step nothing. Another run has another key.

use std::fmt::Write as _;

use sha2::{Digest, Sha256};
use sqlx::postgres::PgListener;

/// The key first, so that no step of this run is sealed with another.
const KEY: &str = "SELECT postbox.run_key()";
const NEWEST: &str = "SELECT coalesce((SELECT t.id FROM postbox.tick t ORDER BY t.id DESC LIMIT 1), 0)";

/// What a notification is.
#[derive(Debug, PartialEq, Eq)]
pub enum Heard<'a> {
    /// The sequencer's: what it says is so.
    Announcement(&'a str),
    /// It was told before this connection looked for the first time.
    Known,
    /// It only says that there may be something.
    Hint,
    /// It says something, and is not the sequencer's, or was sent again.
    Forged,
}

/// Opens what one connection hears.
#[derive(Debug)]
pub struct Seal {
    key: Vec<u8>,
    /// The newest step when it was made.
    first: i64,
    /// The newest step that was heard of.
    newest: i64,
}

/// The key of this run of the database.
///
/// # Errors
///
/// The database's; a role that neither dispatches nor consumes may not read it.
pub async fn run_key(connection: &mut PgListener) -> Result<Vec<u8>, sqlx::Error> {
    sqlx::query_scalar(KEY).fetch_one(connection).await
}

impl Seal {
    /// For a connection that listens already.
    ///
    /// # Errors
    ///
    /// As [`run_key`].
    pub async fn of(connection: &mut PgListener) -> Result<Self, sqlx::Error> {
        let key = run_key(connection).await?;
        let newest = sqlx::query_scalar(NEWEST).fetch_one(connection).await?;
        Ok(Self::new(key, newest))
    }

    fn new(key: Vec<u8>, newest: i64) -> Self {
        Self {
            key,
            first: newest,
            newest,
        }
    }

    /// The key of this run of the database.
    pub fn key(&self) -> &[u8] {
        &self.key
    }

    /// What a notification is. What is opened once is not opened again.
    pub fn open<'a>(&mut self, text: &'a str) -> Heard<'a> {
        if text.is_empty() {
            return Heard::Hint;
        }
        let mut words = text.rsplitn(3, ' ');
        let (Some(Ok(number)), Some(given), Some(announcement)) =
            (words.next().map(str::parse::<i64>), words.next(), words.next())
        else {
            return Heard::Forged;
        };
        // First, since it costs nothing.
        let is_old = number <= self.newest;
        if (is_old && number > self.first) || given != seal(&self.key, number) {
            return Heard::Forged;
        }
        if is_old {
            return Heard::Known;
        }
        self.newest = number;
        Heard::Announcement(announcement)
    }
}

/// What a step is to say after its announcement, if it writes this tick: its seal and its number.
#[must_use]
pub fn sealed(key: &[u8], tick: i64) -> String {
    format!("{} {tick}", seal(key, tick))
}

fn seal(key: &[u8], tick: i64) -> String {
    let digest = Sha256::new()
        .chain_update(key)
        .chain_update(tick.to_string())
        .finalize();
    digest[..16]
        .iter()
        .fold(String::with_capacity(32), |mut hex, byte| {
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_with_the_key_is_believed_once_and_nothing_else_is() {
        let key = [7; 32];
        let mut seal = Seal::new(key.to_vec(), 10);
        let text = |tick: i64, announcement: &str| format!("{announcement} {}", sealed(&key, tick));
        assert_eq!(
            seal.open(&text(11, "orders 17 -")),
            Heard::Announcement("orders 17 -")
        );
        assert_eq!(seal.open(&text(11, "orders 17 -")), Heard::Forged, "sent again");
        assert_eq!(
            seal.open(&text(11, "orders 99 -")),
            Heard::Forged,
            "its seal with another text"
        );
        assert_eq!(seal.open(&text(10, "orders 16 -")), Heard::Known);
        assert_eq!(seal.open(&text(13, "")), Heard::Announcement(""));
        assert_eq!(
            seal.open(&text(12, "orders 18 -")),
            Heard::Forged,
            "older than what was heard"
        );
        assert_eq!(seal.open(""), Heard::Hint);
        for forged in [
            "orders 18 -".to_owned(),
            "x".to_owned(),
            " ".to_owned(),
            "  ".to_owned(),
            format!("orders 18 - {}", sealed(&[8; 32], 14)),
            text(14, "orders 18 -").replace(" 14", " 15"),
            text(14, "orders 18 -").to_uppercase(),
            format!("{} orders 18 -", sealed(&key, 14)),
            sealed(&key, 14),
        ] {
            assert_eq!(seal.open(&forged), Heard::Forged, "{forged}");
        }
    }
}
