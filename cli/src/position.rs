//! Positions in a topic, as they are typed.

use postbox::Position;

use crate::span;

/// For clap.
pub(crate) fn parse(text: &str) -> Result<Position, String> {
    text.parse().or_else(|error| match text.parse::<f64>() {
        Ok(_) => Err(error),
        Err(_) => span::parse(text)
            .map(Position::Ago)
            .map_err(|_| format!("{error}, or a span ago such as 90m or 2d")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_may_be_a_span_ago() {
        assert_eq!(parse("latest"), Ok(Position::Latest));
        assert!(matches!(parse("90m"), Ok(Position::Ago(_))));
        for wrong in ["", "-1", "yesterday"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
