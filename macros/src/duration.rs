//! A duration in an option: a whole number and a unit, as in `"20s"`.

use std::time::Duration;

use proc_macro2::TokenStream;
use quote::quote;
use syn::LitStr;

/// A duration longer than zero, checked when the macro runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Interval(Duration);

impl Interval {
    /// Reads a literal such as `"20s"`.
    pub(crate) fn from_literal(literal: &LitStr) -> syn::Result<Self> {
        Self::parse(&literal.value()).map_err(|message| syn::Error::new(literal.span(), message))
    }

    /// Reads a text such as `20s`; the error says what a duration looks like.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mend =
            || format!("{text:?} is no duration: write a whole number and a unit (500ms, 20s, 5m, 2h, 7d)");
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(mend)?;
        let (number, unit) = text.split_at(unit_at);
        let number: u64 = number.parse().map_err(|_| mend())?;
        let milliseconds_per_unit = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(mend()),
        };
        // The database keeps intervals as i64 microseconds.
        let milliseconds = number
            .checked_mul(milliseconds_per_unit)
            .filter(|ms| *ms <= i64::MAX as u64 / 1_000)
            .ok_or_else(|| format!("{text:?} is too long"))?;
        if milliseconds == 0 {
            return Err(format!("{text:?} is no time at all: a duration is longer than 0"));
        }
        Ok(Self(Duration::from_millis(milliseconds)))
    }

    /// The expression that makes it.
    pub(crate) fn expression(self) -> TokenStream {
        // It came from a u64 of milliseconds.
        let milliseconds = self.0.as_millis() as u64;
        quote!(::core::time::Duration::from_millis(#milliseconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_a_number_and_a_unit() {
        for (text, milliseconds) in [
            ("500ms", 500),
            ("20s", 20_000),
            ("5m", 300_000),
            ("2h", 7_200_000),
            ("7d", 604_800_000),
        ] {
            assert_eq!(
                Interval::parse(text),
                Ok(Interval(Duration::from_millis(milliseconds)))
            );
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "20",
            "s",
            "1.5s",
            "-1s",
            "20 s",
            "20sec",
            "1h30m",
            "0s",
            "99999999999999999999s",
        ] {
            assert!(Interval::parse(text).is_err(), "{text:?} was taken");
        }
        assert!(
            Interval::parse("999999999999999d")
                .unwrap_err()
                .contains("too long")
        );
    }
}
