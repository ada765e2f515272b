//! A dead letter, for people and for programs.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::{DateTime, SecondsFormat, Utc};
use postbox_dispatcher::dead_letters::DeadLetter;
use serde::Serialize;
use serde_json::Value;

use crate::output::in_line;

#[derive(Serialize)]
struct Object<'a> {
    id: i64,
    group: &'a str,
    topic: &'a str,
    offset: i64,
    message_id: String,
    r#type: Option<&'a str>,
    key: Option<&'a str>,
    headers: Option<&'a Value>,
    content_type: &'a str,
    published_at: String,
    died_at: String,
    attempts: i32,
    reason: &'a str,
    halted: bool,
    instance: Option<&'a str>,
    errors: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
}

/// One JSON object. The payload, where there is one, is a text, or base64 where it is not UTF-8.
pub(crate) fn json(letter: &DeadLetter) -> anyhow::Result<String> {
    let bytes = letter.payload.as_deref();
    let payload = bytes.and_then(|bytes| std::str::from_utf8(bytes).ok());
    let object = Object {
        id: letter.id,
        group: &letter.group_name,
        topic: &letter.topic,
        offset: letter.offset,
        message_id: letter.message_id.to_string(),
        r#type: letter.message_type.as_deref(),
        key: letter.key.as_deref(),
        headers: letter.headers.as_ref(),
        content_type: content_type(letter),
        published_at: clock(letter.published_at),
        died_at: clock(letter.died_at),
        attempts: letter.attempts,
        reason: &letter.reason,
        halted: letter.halted,
        instance: letter.instance.as_deref(),
        errors: &letter.errors,
        payload,
        payload_base64: bytes
            .filter(|_| payload.is_none())
            .map(|bytes| BASE64.encode(bytes)),
    };
    Ok(serde_json::to_string(&object)?)
}

/// All that is known, a line each.
pub(crate) fn human(letter: &DeadLetter) -> String {
    let or_none = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let halted = match letter.halted {
        true => "yes: its key waits until the letter is redriven, discarded or released",
        false => "no",
    };
    let lines = [
        ("Dead letter", letter.id.to_string()),
        ("Group", letter.group_name.clone()),
        ("Topic, offset", format!("{}, {}", letter.topic, letter.offset)),
        ("Message", letter.message_id.to_string()),
        ("Type", or_none(letter.message_type.as_deref())),
        ("Key", or_none(letter.key.as_deref())),
        (
            "Headers",
            letter.headers.as_ref().map_or("-".to_owned(), Value::to_string),
        ),
        ("Published at", clock(letter.published_at)),
        ("Given up at", clock(letter.died_at)),
        ("By", or_none(letter.instance.as_deref())),
        ("Reason", letter.reason.clone()),
        ("Halted", halted.to_owned()),
        ("Attempts", letter.attempts.to_string()),
    ];
    let mut text = String::new();
    for (name, value) in lines {
        let _ = writeln!(text, "{name:<15}{}", in_line(&value));
    }
    let errors = letter.errors.as_array().map_or(&[][..], Vec::as_slice);
    if !errors.is_empty() {
        text.push_str("\nErrors\n");
    }
    for error in errors {
        let field = |name: &str| match &error[name] {
            Value::String(text) => text.clone(),
            Value::Null => "-".to_owned(),
            other => other.to_string(),
        };
        let _ = writeln!(
            text,
            "  {}  attempt {}  {}  {}",
            in_line(&field("at")),
            in_line(&field("attempt")),
            in_line(&field("instance")),
            in_line(&field("error"))
        );
    }
    if let Some(payload) = &letter.payload {
        let payload = match std::str::from_utf8(payload) {
            Ok(text) => text.to_owned(),
            Err(_) => format!("base64:{}", BASE64.encode(payload)),
        };
        let _ = write!(text, "\nPayload ({})\n{payload}", content_type(letter));
    }
    text
}

pub(crate) fn clock(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn content_type(letter: &DeadLetter) -> &str {
    letter.content_type.as_deref().unwrap_or(postbox::JSON)
}
