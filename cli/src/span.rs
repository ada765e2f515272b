//! Spans of time on the command line: `4ms`, `20s`, `5m`, `1h`, `3d`; a bare number is seconds.

use std::time::Duration;

pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let at = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let seconds = match unit {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(refusal()),
    };
    let number: f64 = number.parse().map_err(|_| refusal())?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| refusal())
}

fn refusal() -> String {
    "a span is a number with ms, s, m, h or d, such as 250ms or 30s".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_has_a_unit_or_is_in_seconds() {
        assert_eq!(parse("4ms"), Ok(Duration::from_millis(4)));
        assert_eq!(parse("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse("3d"), Ok(Duration::from_secs(259_200)));
        assert_eq!(parse("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "s", "4 ms", "-1s", "1w", "1e400", "1.2.3"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
