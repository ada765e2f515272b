//! Texts from outside on their way into the database: what a handler's error, a panic or a name may hold that no column takes.
//!
//! PostgreSQL refuses U+0000 in every text and in `jsonb`, and a `jsonb` beyond a quarter of a gigabyte. Whoever reports such a text reports
//! in one statement with others, so it would be everybody's failure.

use std::fmt::{Display, Write};

/// Bytes that are kept of a text.
pub const MOST: usize = 4096;

/// What stands for U+0000: a text of every encoding has it.
const NUL: &str = "\\0";

/// The text as the database takes it: without U+0000, and cut at [`MOST`] bytes, which it says. What is beyond is never in memory.
pub fn clean(text: impl Display) -> String {
    clean_to(MOST, text)
}

/// As [`clean`], cut at so many bytes.
pub fn clean_to(most: usize, text: impl Display) -> String {
    let mut cut = Cut {
        kept: String::new(),
        most,
        bytes: 0,
    };
    if write!(cut, "{text}").is_err() {
        // It was the text's own implementation, since a cut takes everything.
        cut.kept.push_str("(a text that cannot be displayed)");
    }
    if cut.bytes > cut.kept.len() {
        // Writing to a string never fails.
        let _ = write!(cut.kept, "… ({} bytes)", cut.bytes);
    }
    cut.kept
}

/// Only what every encoding has: for a database whose own has not got what the text has.
pub fn ascii(text: &str) -> String {
    text.chars()
        .fold(String::with_capacity(text.len()), |mut ascii, c| {
            match c {
                '\n' | '\t' | ' '..='~' => ascii.push(c),
                _ => ascii.extend(c.escape_default()),
            }
            ascii
        })
}

/// Keeps the beginning of what is written to it.
struct Cut {
    kept: String,
    most: usize,
    /// Of what was written, as far as nothing stands for something else.
    bytes: usize,
}

impl Cut {
    fn keep(&mut self, text: &str) {
        self.bytes += text.len();
        // Once something was left out, nothing is kept that comes after it.
        if self.bytes - text.len() > self.kept.len() {
            return;
        }
        let room = self.most.saturating_sub(self.kept.len()).min(text.len());
        self.kept.push_str(&text[..text.floor_char_boundary(room)]);
    }
}

impl Write for Cut {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for (n, part) in text.split('\0').enumerate() {
            if n > 0 {
                self.keep(NUL);
            }
            self.keep(part);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_the_database_refuses_is_left_and_the_rest_is_as_it_was() {
        assert_eq!(clean("plain “text” 🦀"), "plain “text” 🦀");
        assert_eq!(clean("a\0b\0"), "a\\0b\\0");
        assert_eq!(clean("\0".repeat(3)), "\\0\\0\\0");
        assert_eq!(clean(""), "");
    }

    #[test]
    fn long_texts_are_cut_between_characters_and_say_how_long_they_were() {
        let long = clean("é".repeat(3000));
        assert!(long.starts_with(&"é".repeat(2048)), "{long}");
        assert!(long.ends_with("… (6000 bytes)"), "{long}");
        assert_eq!(clean_to(3, "aéé"), "aé… (5 bytes)");
        assert_eq!(clean_to(2, "aéé"), "a… (5 bytes)");
        assert_eq!(clean_to(3, "abc"), "abc");
        // In parts, too: what comes after a gap is not kept.
        assert_eq!(
            clean_to(4, format_args!("{}{}{}", "abc", "éé", "d")),
            "abc… (8 bytes)"
        );
        assert!(clean("x".repeat(1 << 20)).len() < MOST + 32);
    }

    #[test]
    fn in_ascii_everything_can_still_be_told() {
        assert_eq!(ascii("a → b\n\u{7}"), "a \\u{2192} b\n\\u{7}");
    }
}
