//! Major versions of PostgreSQL.

use std::fmt;

/// Postbox's SQL needs this version.
pub(crate) const OLDEST: Major = Major(15);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Major(pub(crate) u32);

impl fmt::Display for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Major {
    /// From `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)` or `postgres (PostgreSQL) 19beta1`.
    pub(crate) fn of_program(output: &str) -> Option<Self> {
        let number = output.split_once("(PostgreSQL)")?.1.trim_start();
        let digits = number.find(|c: char| !c.is_ascii_digit()).unwrap_or(number.len());
        number[..digits].parse().ok().map(Major)
    }

    pub(crate) fn serves(self, wanted: Option<Major>) -> bool {
        self >= OLDEST && wanted.is_none_or(|wanted| wanted == self)
    }
}

/// For messages.
pub(crate) fn describe(wanted: Option<Major>) -> String {
    wanted.map_or_else(|| format!("{OLDEST} or newer"), |major| major.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_what_the_server_program_says() {
        let of = |output| Major::of_program(output).map(|major| major.0);
        assert_eq!(
            of("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"),
            Some(15)
        );
        assert_eq!(of("postgres (PostgreSQL) 19beta1\n"), Some(19));
        assert_eq!(of("postgres: command not found"), None);
    }
}
