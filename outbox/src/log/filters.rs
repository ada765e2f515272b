//! Filters: conditions that the server compares messages with as they are read.

use sqlx::Postgres;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;

/// Conditions in SQL/JSON path over `{headers, payload, key, type}`, with which messages are read: each message says which of them it does not
/// satisfy ([`StoredMessage::refused_by`](super::StoredMessage::refused_by)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filters {
    texts: Vec<String>,
    /// Whether one of them may ask for the payload.
    read_payload: bool,
}

impl Filters {
    /// None.
    pub const NONE: Self = Self {
        texts: Vec::new(),
        read_payload: false,
    };

    /// Another one, if it is not there yet; its number, from 1. `reads_payload`: whether what it says may depend on the payload
    /// (`postbox.filter_reads_payload`).
    pub fn add(&mut self, filter: &str, reads_payload: bool) -> i16 {
        self.read_payload |= reads_payload;
        let known = self.texts.iter().position(|text| text == filter);
        let index = known.unwrap_or_else(|| {
            self.texts.push(filter.to_owned());
            self.texts.len() - 1
        });
        index as i16 + 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// As SQL takes them.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// Whether they are to be given the payload.
    pub fn read_payload(&self) -> bool {
        self.read_payload
    }

    /// The statement that asks for them, if there are any.
    pub(super) fn choose(&self, without: &'static str, with: &'static str) -> &'static str {
        match self.is_empty() {
            true => without,
            false => with,
        }
    }

    pub(super) fn bind<'q>(
        &'q self,
        query: Query<'q, Postgres, PgArguments>,
    ) -> Query<'q, Postgres, PgArguments> {
        match self.is_empty() {
            true => query,
            false => query.bind(&self.texts).bind(self.read_payload),
        }
    }
}
