//! Messages from standard input, one a line.

use std::collections::HashMap;
use std::fmt;
use std::io::BufRead;

use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use tokio::sync::mpsc::{self, Receiver, Sender};

/// Lines read ahead.
const AHEAD: usize = 1_000;

/// A message of the input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// From 1, empty lines counted.
    pub(crate) number: u64,
    pub(crate) body: Body,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Body {
    /// As it was given: no number is rounded, no field moved.
    pub(crate) payload: Vec<u8>,
    /// Where it is in the payload.
    pub(crate) key: Option<String>,
}

/// A line that is no message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadLine {
    number: u64,
    reason: String,
}

impl BadLine {
    pub(crate) fn new(number: u64, reason: String) -> Self {
        Self { number, reason }
    }

    /// How many of `lines` come before it.
    pub(crate) fn index_in(&self, lines: &[Line]) -> usize {
        lines.partition_point(|line| line.number < self.number)
    }
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} {}", self.number, self.reason)
    }
}

/// What a payload is made of.
#[derive(Debug)]
pub(crate) struct Format {
    json: bool,
    key_field: Option<String>,
}

impl Format {
    pub(crate) fn new(content_type: &str, key_field: Option<String>) -> Self {
        Self {
            json: is_json(content_type),
            key_field,
        }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// The message of these bytes. An error is the end of a sentence that begins with what they are.
    pub(crate) fn read(&self, mut payload: Vec<u8>) -> Result<Body, String> {
        if !self.json {
            return Ok(Body { payload, key: None });
        }
        payload.truncate(payload.trim_ascii_end().len());
        let text = std::str::from_utf8(&payload)
            .map_err(|error| format!("is not UTF-8, as JSON must be: {error}"))?;
        serde_json::from_str::<IgnoredAny>(text).map_err(|error| not_json(&error))?;
        let key = self
            .key_field
            .as_deref()
            .map(|field| key_of(text, field))
            .transpose()?;
        Ok(Body { payload, key })
    }
}

/// Whether a media type says JSON: `application/json`, or `application/cloudevents+json; charset=utf-8`.
pub(crate) fn is_json(content_type: &str) -> bool {
    let essence = content_type
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    essence == postbox::JSON || essence.ends_with("+json")
}

fn not_json(error: &serde_json::Error) -> String {
    // Its "line" is not the input's.
    let text = error.to_string();
    let what = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(what, _)| what);
    format!(
        "is not JSON: {what} (column {}); for other payloads give --content-type",
        error.column()
    )
}

fn key_of(json: &str, field: &str) -> Result<String, String> {
    let fields: HashMap<String, &RawValue> = serde_json::from_str(json)
        .map_err(|_| format!("is not an object with a field {field:?} to take the key from"))?;
    let value = fields
        .get(field)
        .ok_or_else(|| format!("has no field {field:?} to take the key from"))?
        .get();
    match value.as_bytes().first() {
        Some(b'"') => {
            serde_json::from_str(value).map_err(|error| format!("has an unreadable field {field:?}: {error}"))
        }
        Some(b'{' | b'[' | b'n') => Err(format!(
            "has {value} in field {field:?}: a key is a text, a number or a boolean"
        )),
        _ => Ok(value.to_owned()),
    }
}

/// The messages of standard input until it ends or has a bad line.
pub(crate) fn of_stdin(format: Format) -> Receiver<Result<Line, BadLine>> {
    let (sender, lines) = mpsc::channel(AHEAD);
    // A thread of its own: nothing has to wait for a read that never returns.
    std::thread::spawn(move || read(std::io::stdin().lock(), &format, &sender));
    lines
}

fn read(mut input: impl BufRead, format: &Format, lines: &Sender<Result<Line, BadLine>>) {
    for number in 1.. {
        let mut bytes = Vec::new();
        let line = match input.read_until(b'\n', &mut bytes) {
            Ok(0) => return,
            Ok(_) => {
                strip_newline(&mut bytes);
                if bytes.trim_ascii().is_empty() {
                    continue;
                }
                format.read(bytes).map(|body| Line { number, body })
            }
            Err(error) => Err(format!("cannot be read from standard input: {error}")),
        };
        let is_bad = line.is_err();
        if lines
            .blocking_send(line.map_err(|reason| BadLine { number, reason }))
            .is_err()
            || is_bad
        {
            return;
        }
    }
}

fn strip_newline(line: &mut Vec<u8>) {
    if line.pop_if(|byte| *byte == b'\n').is_some() {
        line.pop_if(|byte| *byte == b'\r');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(key_field: Option<&str>) -> Format {
        Format::new(postbox::JSON, key_field.map(str::to_owned))
    }

    fn refused(format: &Format, text: &str) -> String {
        format.read(text.into()).expect_err("it is refused")
    }

    #[test]
    fn a_json_payload_is_checked_and_kept_as_it_is() {
        let text = r#"{"b": 1.10, "a": 123456789012345678901234567890}"#;
        let body = json(None)
            .read(format!("{text}  \r").into_bytes())
            .expect("it is JSON");
        assert_eq!(body.payload, text.as_bytes());
        assert_eq!(
            refused(&json(None), "{\"a\":}"),
            "is not JSON: expected value (column 6); for other payloads give --content-type"
        );
        assert!(json(None).read(vec![b'"', 0xff, b'"']).is_err());
    }

    #[test]
    fn a_key_is_a_scalar_field_with_every_digit() {
        let key = |text: &str| {
            json(Some("k"))
                .read(text.into())
                .map(|body| body.key.unwrap_or_default())
        };
        assert_eq!(key(r#"{"k": "a\u0062"}"#).as_deref(), Ok("ab"));
        assert_eq!(
            key(r#"{"k": 12345678901234567890123, "x": {"k": 1}}"#).as_deref(),
            Ok("12345678901234567890123")
        );
        assert_eq!(key(r#"{"k": true}"#).as_deref(), Ok("true"));
        for text in [
            "[1]",
            "1",
            "{}",
            r#"{"k": null}"#,
            r#"{"k": [1]}"#,
            r#"{"k": {}}"#,
        ] {
            assert!(refused(&json(Some("k")), text).contains("\"k\""), "{text}");
        }
    }

    #[test]
    fn other_payloads_are_bytes_as_they_are() {
        let body = Format::new("text/plain", None)
            .read(b" hello\xff ".to_vec())
            .expect("any bytes will do");
        assert_eq!(body.payload, b" hello\xff ");
    }

    #[test]
    fn json_has_many_media_types() {
        assert!(is_json("Application/JSON; charset=utf-8") && is_json("application/cloudevents+json"));
        assert!(!is_json("application/jsonl") && !is_json("text/plain"));
    }

    #[test]
    fn lines_are_numbered_with_the_empty_ones_and_end_at_a_bad_one() {
        let (sender, mut lines) = mpsc::channel(10);
        read("1\r\n\n  \n2\nx\n3".as_bytes(), &json(None), &sender);
        drop(sender);
        let line = |number, payload: &str| {
            Ok(Line {
                number,
                body: Body {
                    payload: payload.into(),
                    key: None,
                },
            })
        };
        assert_eq!(lines.blocking_recv(), Some(line(1, "1")));
        assert_eq!(lines.blocking_recv(), Some(line(4, "2")));
        let bad = lines
            .blocking_recv()
            .and_then(Result::err)
            .expect("line 5 is bad")
            .to_string();
        assert!(bad.starts_with("line 5 is not JSON"), "{bad}");
        assert_eq!(lines.blocking_recv(), None);
    }
}
