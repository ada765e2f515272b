//! A message as a line.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use chrono::SecondsFormat;
use postbox::Headers;
use postbox_consumer::{Delivery, Raw};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::output::harmless;
use crate::publish::is_json;

#[derive(Serialize)]
struct Object<'a> {
    id: String,
    topic: &'a str,
    offset: i64,
    r#type: Option<&'a str>,
    key: Option<&'a str>,
    headers: &'a Headers,
    attempt: u32,
    published_at: String,
    content_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
}

/// One JSON object. The payload is a JSON value with every digit it was published with, or base64 where it is not JSON.
pub(crate) fn json(delivery: &Delivery, raw: &Raw) -> String {
    let payload = json_payload(raw);
    let object = Object {
        id: delivery.id.to_string(),
        topic: &delivery.topic,
        offset: delivery.offset.get(),
        r#type: delivery.message_type.as_deref(),
        key: delivery.key.as_deref(),
        headers: &delivery.headers,
        attempt: delivery.attempt,
        published_at: published_at(delivery),
        content_type: &raw.content_type,
        payload_base64: payload.is_none().then(|| BASE64.encode(&raw.payload)),
        payload,
    };
    let mut line = serde_json::to_string(&object).expect("texts and numbers have a JSON form");
    line.push('\n');
    harmless(&line).into_owned()
}

/// Fields separated by tabs.
pub(crate) fn human(delivery: &Delivery, raw: &Raw) -> String {
    let payload = match (json_payload(raw), std::str::from_utf8(&raw.payload)) {
        (Some(payload), _) => payload.get().replace('\t', " "),
        (None, Ok(text)) => escaped(text),
        (None, Err(_)) => format!("base64:{}", BASE64.encode(&raw.payload)),
    };
    let headers = match delivery.headers.is_empty() {
        true => "-".to_owned(),
        false => serde_json::to_string(&delivery.headers).expect("texts have a JSON form"),
    };
    let line = format!(
        "{}\t{}\t{}\t{}\t{}\t{headers}\t{}\t{}\t{payload}\n",
        delivery.id,
        escaped(&delivery.topic),
        delivery.offset,
        delivery.message_type.as_deref().map_or("-".to_owned(), escaped),
        delivery.key.as_deref().map_or("-".to_owned(), escaped),
        delivery.attempt,
        published_at(delivery),
    );
    harmless(&line).into_owned()
}

/// On one line: in JSON, a newline is only ever space between tokens.
fn json_payload(raw: &Raw) -> Option<Box<RawValue>> {
    if !is_json(&raw.content_type) {
        return None;
    }
    let text = std::str::from_utf8(&raw.payload).ok()?;
    RawValue::from_string(text.trim_ascii().replace(['\n', '\r'], " ")).ok()
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('\t', "\\t")
        .replace('\n', "\\n")
        .replace('\r', "\\r")
}

fn published_at(delivery: &Delivery) -> String {
    delivery.published_at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use postbox::{MessageId, Offset};

    use super::*;

    fn delivery() -> Delivery {
        let mut delivery = Delivery::for_test("t");
        delivery.id = MessageId::from(uuid::Uuid::nil());
        delivery.offset = Offset::new(7);
        delivery.key = Some("a\tb".to_owned());
        delivery.headers = Headers::from_iter([("n", "v")]);
        delivery.published_at = DateTime::UNIX_EPOCH;
        delivery
    }

    fn raw(content_type: &str, payload: &[u8]) -> Raw {
        Raw::new(payload, content_type)
    }

    #[test]
    fn a_json_payload_keeps_its_digits_and_fits_on_one_line() {
        let payload = raw(postbox::JSON, b"{\n\t\"a\": 1.10}\n");
        assert_eq!(
            json(&delivery(), &payload),
            "{\"id\":\"00000000-0000-0000-0000-000000000000\",\"topic\":\"t\",\"offset\":7,\"type\":null,\
             \"key\":\"a\\tb\",\"headers\":{\"n\":\"v\"},\"attempt\":1,\"published_at\":\"1970-01-01T00:00:00.000000Z\",\
             \"content_type\":\"application/json\",\"payload\":{ \t\"a\": 1.10}}\n"
        );
        assert_eq!(
            human(&delivery(), &payload),
            "00000000-0000-0000-0000-000000000000\tt\t7\t-\ta\\tb\t{\"n\":\"v\"}\t1\t1970-01-01T00:00:00.000000Z\t{  \"a\": 1.10}\n"
        );
    }

    #[test]
    fn what_is_not_json_is_base64_or_escaped_text() {
        let last = |raw: &Raw| human(&delivery(), raw).rsplit('\t').next().map(str::to_owned);
        assert_eq!(
            last(&raw("text/plain", b"a\nb\\")).as_deref(),
            Some("a\\nb\\\\\n")
        );
        assert_eq!(last(&raw("image/png", b"\xff")).as_deref(), Some("base64:/w==\n"));
        assert!(json(&delivery(), &raw(postbox::JSON, b"{")).contains("\"payload_base64\":\"ew==\""));
        assert!(json(&delivery(), &raw("text/plain", b"1")).contains("\"payload_base64\":\"MQ==\""));
    }
}
