//! Wrong usage that clap cannot find by itself, and the exit status of a command that only said what it would do.

use clap::error::ErrorKind;

/// Exit status of a command that only said what it would do.
pub(crate) const ONLY_A_PREVIEW: u8 = 3;

/// Says what is wrong and ends the process as clap does.
pub(crate) fn wrong_usage(message: impl std::fmt::Display) -> ! {
    clap::Error::raw(
        ErrorKind::ValueValidation,
        format!("{message}\n\nFor more information, try '--help'.\n"),
    )
    .exit()
}

/// A topic, message type or group, for clap.
pub(crate) fn name(text: &str) -> Result<String, String> {
    if postbox::is_name(text) {
        return Ok(text.to_owned());
    }
    Err("a name is 1 to 255 characters of A-Z a-z 0-9 . _ - : /".to_owned())
}
