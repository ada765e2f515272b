//! The headers of a message.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Names and values that travel beside the payload, in the order of the names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Headers(BTreeMap<String, String>);

impl Headers {
    /// None.
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// The value of a header; names are compared exactly.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Sets a header, replacing the one of that name.
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.0.insert(name.into(), value.into());
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Each name with its value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// From JSON as it is stored, for who reads messages by SQL: never an error, whatever it is. What SQL put there as another type than text is
    /// kept as its JSON text; what is no object, as the header `headers`.
    pub fn from_stored(json: &str) -> Self {
        if let Ok(texts) = serde_json::from_str(json) {
            return Self(texts);
        }
        // Raw values: numbers that no Rust type holds and any depth of nesting are only passed over.
        match serde_json::from_str::<BTreeMap<String, &RawValue>>(json) {
            Ok(values) => Self(
                values
                    .into_iter()
                    .map(|(name, value)| (name, text(value.get())))
                    .collect(),
            ),
            Err(_) => Self(BTreeMap::from([("headers".to_owned(), text(json))])),
        }
    }
}

/// The text that the JSON is, or the JSON itself.
fn text(json: &str) -> String {
    serde_json::from_str(json).unwrap_or_else(|_| json.to_owned())
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        Self(
            pairs
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_json_is_stored_is_read() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let huge = "1".repeat(400);
        for (stored, name, value) in [
            (r#"{"a": "b"}"#.to_owned(), "a", "b"),
            (format!(r#"{{"n": {huge}, "a": "\u00e9"}}"#), "n", huge.as_str()),
            (r#"{"n": 1, "a": "\u00e9"}"#.to_owned(), "a", "é"),
            (format!(r#"{{"d": {deep}}}"#), "d", deep.as_str()),
            (r#"{"o": {"p": 1}, "z": null}"#.to_owned(), "o", r#"{"p": 1}"#),
            (r#"{"o": {"p": 1}, "z": null}"#.to_owned(), "z", "null"),
            ("[1, 2]".to_owned(), "headers", "[1, 2]"),
            (r#""text""#.to_owned(), "headers", "text"),
            (huge.clone(), "headers", huge.as_str()),
            (deep.clone(), "headers", deep.as_str()),
            ("null".to_owned(), "headers", "null"),
        ] {
            let headers = Headers::from_stored(&stored);
            assert_eq!(headers.get(name), Some(value), "{:.60}", stored);
        }
    }
}
