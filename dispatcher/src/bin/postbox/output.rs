//! What goes to standard output and how errors are told.

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
        match writeln!(std::io::stdout().lock(), "{line}") {
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
    let _ = writeln!(std::io::stderr(), "{line}");
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
    fn an_error_says_each_cause_once_and_on_one_line() {
        let error = anyhow::anyhow!("the\nserver")
            .context("outer: middle")
            .context("outer");
        assert_eq!(in_one_line(&error), "outer: outer: middle: the server");
        let error = anyhow::anyhow!("cause").context("what failed: cause");
        assert_eq!(in_one_line(&error), "what failed: cause");
    }
}
