//! What goes to standard output and how errors are told.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{ErrorKind, Write};

use anyhow::Context;

/// Standard output. Once its reader is gone, as in `postbox … | head`, what is written to it is dropped, which is no error.
#[derive(Debug, Default)]
pub(crate) struct Output {
    closed: bool,
}

impl Output {
    /// Writes a line.
    pub(crate) fn line(&mut self, line: &impl Display) -> anyhow::Result<()> {
        if self.closed {
            return Ok(());
        }
        match writeln!(std::io::stdout().lock(), "{}", harmless(&line.to_string())) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            result => result.context("cannot write to standard output"),
        }
    }
}

/// `error: …` with its causes, on one line.
pub(crate) fn print_error(error: &anyhow::Error) {
    to_stderr(&format_args!("error: {}", in_one_line(error)));
}

pub(crate) fn warn(message: &str) {
    to_stderr(&format_args!("warning: {message}"));
}

/// What is worth knowing beside the data.
pub(crate) fn note(message: &str) {
    to_stderr(&message);
}

fn to_stderr(line: &impl Display) {
    // There is nowhere left to tell that it cannot be told.
    let _ = writeln!(std::io::stderr(), "{}", harmless(&line.to_string()));
}

/// Without what a terminal would obey or show in another order than it is: control characters but for the end of a line and tabs, and what turns
/// the direction of writing around. These are as in JSON, so JSON stays what it is.
///
/// Everything that is printed goes through here, since keys, topics, errors and names may have been written by anybody.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    if !text.contains(is_harmful) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match is_harmful(character) {
            // All are of the basic plane.
            true => shown.push_str(&format!("\\u{:04x}", u32::from(character))),
            false => shown.push(character),
        }
    }
    Cow::Owned(shown)
}

fn is_harmful(character: char) -> bool {
    match character {
        '\n' | '\t' => false,
        '\u{61c}'
        | '\u{200e}'
        | '\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2066}'..='\u{2069}'
        | '\u{feff}' => true,
        other => other.is_control(),
    }
}

/// As [`harmless`], and on one line: what stands among other things on it.
pub(crate) fn in_line(text: &str) -> String {
    harmless(&text.replace('\n', "\\n").replace('\t', "\\t")).into_owned()
}

/// Whether the database refused it for want of a privilege.
pub(crate) fn is_denied(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        matches!(cause.downcast_ref::<sqlx::Error>(), Some(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42501"))
    })
}

pub(crate) fn in_one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        // Many errors already say their cause.
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_printed_commands_a_terminal_and_json_stays_json() {
        for (text, shown) in [
            ("plain \u{fc} \u{6f22}\tx\ny", "plain \u{fc} \u{6f22}\tx\ny"),
            ("\u{1b}[2J", "\\u001b[2J"),
            ("a\u{9b}31m\u{7f}\r\u{0}", "a\\u009b31m\\u007f\\u000d\\u0000"),
            ("\u{202e}live\u{2066}", "\\u202elive\\u2066"),
        ] {
            assert_eq!(harmless(text), shown);
            let json = serde_json::to_string(text).expect("a text has a JSON form");
            let read: String = serde_json::from_str(&harmless(&json)).expect("still JSON");
            assert_eq!(read, text);
        }
        assert_eq!(in_line("a\nb\tc\u{1b}"), "a\\nb\\tc\\u001b");
    }

    #[test]
    fn an_error_says_each_cause_once_and_on_one_line() {
        let error = anyhow::anyhow!("the\nserver")
            .context("outer: middle")
            .context("outer");
        assert_eq!(in_one_line(&error), "outer: outer: middle: the server");
        let error = anyhow::anyhow!("cause").context("what failed: cause");
        assert_eq!(in_one_line(&error), "what failed: cause");
    }
}
