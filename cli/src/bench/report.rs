//! What a bench found: a JSON object or a table.

use serde_json::{Map, Value, json};

use super::environment::Environment;
use crate::output::in_one_line;
use crate::table::Table;

pub(crate) struct Report {
    bench: &'static str,
    verified: bool,
    figures: Vec<(&'static str, Value)>,
}

impl Report {
    /// Made once all its messages were seen on the other side.
    pub(crate) fn verified(bench: &'static str) -> Self {
        Self {
            bench,
            verified: true,
            figures: Vec::new(),
        }
    }

    pub(crate) fn failed(bench: &'static str, error: &anyhow::Error) -> Self {
        let report = Self {
            bench,
            verified: false,
            figures: Vec::new(),
        };
        report.with("error", in_one_line(error))
    }

    pub(crate) fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.figures.push((name, value.into()));
        self
    }

    /// A measured one: to a thousandth, and whole from a thousand on.
    pub(crate) fn figure(self, name: &'static str, value: f64) -> Self {
        let value = match value {
            v if !v.is_finite() => Value::Null,
            v if v.abs() >= 1000.0 => json!(v.round() as i64),
            v => json!((v * 1000.0).round() / 1000.0),
        };
        self.with(name, value)
    }

    /// One that is not measured every time.
    pub(crate) fn figure_if(self, name: &'static str, value: Option<f64>) -> Self {
        match value {
            Some(value) => self.figure(name, value),
            None => self.with(name, Value::Null),
        }
    }

    pub(crate) fn json(&self, environment: &Environment) -> anyhow::Result<String> {
        let mut object = Map::new();
        object.insert("bench".to_owned(), json!(self.bench));
        object.insert("verified".to_owned(), json!(self.verified));
        object.insert("postgres".to_owned(), json!(environment.server.version));
        object.insert("cores".to_owned(), json!(environment.server.cores));
        object.insert("postbox".to_owned(), json!(env!("CARGO_PKG_VERSION")));
        object.insert("settings".to_owned(), environment.settings_as_json());
        for (name, value) in &self.figures {
            object.insert((*name).to_owned(), value.clone());
        }
        Ok(serde_json::to_string(&object)?)
    }

    pub(crate) fn table(&self) -> Table {
        let mut table = Table::new(self.bench, &["figure", "value"]);
        for (name, value) in &self.figures {
            let value = match value {
                Value::Null => "-".to_owned(),
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            table.row([(*name).into(), value.into()]);
        }
        let verified = if self.verified { "every message came" } else { "no" };
        table.row(["verified".into(), verified.into()]);
        table
    }
}
