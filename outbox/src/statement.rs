//! A message as SQL, for clients that there is no [`Publish`](crate::Publish) for.

use std::time::Duration;

use chrono::{DateTime, Datelike, Timelike, Utc};

use crate::error::Result;
use crate::id::MessageId;
use crate::outgoing::{DEFAULT_DEDUP_WINDOW, Outgoing, Valid, When};
use crate::publish::storable;

/// What any client of PostgreSQL can bind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parameter {
    /// A `text`, or null.
    Text(Option<String>),
    /// A `bytea`.
    Bytes(Vec<u8>),
}

/// One statement that publishes one message, with what its parameters `$1`, `$2`, … are. Made by [`Outgoing::statement`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "it publishes nothing until it is executed"]
pub struct Statement {
    id: MessageId,
    sql: &'static str,
    parameters: Vec<Parameter>,
}

impl Statement {
    /// The id that the message gets; with a [`dedup_key`](Outgoing::dedup_key) the row that the statement returns has it, since it may be that of an
    /// earlier message.
    pub fn id(&self) -> MessageId {
        self.id
    }

    /// The statement. There are few different ones, so a client that keeps prepared statements by their text prepares each once.
    pub fn sql(&self) -> &'static str {
        self.sql
    }

    /// Its parameters in their order: each `text`, but the payload, which is `bytea`. Whatever else a column is the statement casts.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }
}

impl Outgoing {
    /// The message as one SQL statement, for clients that there is no [`Publish`](crate::Publish) for: another driver, a query builder, a proxy. To be
    /// executed in the transaction of the business data.
    ///
    /// It is the same message as [`publish`](crate::Publish::publish) writes, with the same guarantees: it checks the same limits, takes the same
    /// locks ([`ordered`](Self::ordered)), deduplicates, schedules and expires. A statement that needs more than an append returns one row with one
    /// column, the message's id; a plain one returns no row.
    ///
    /// ```
    /// use postbox::{Outgoing, Parameter};
    ///
    /// let statement = Outgoing::json("carts", &42).key("42").statement()?;
    /// // With a client of yours:
    /// for parameter in statement.parameters() {
    ///     match parameter {
    ///         Parameter::Text(text) => { /* bind a nullable text */ }
    ///         Parameter::Bytes(bytes) => { /* bind a bytea */ }
    ///     }
    /// }
    /// # Ok::<(), postbox::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A message that is refused; the error names the field and the limit.
    pub fn statement(self) -> Result<Statement> {
        let message = self.validate()?;
        let text = |text: Option<&str>| Parameter::Text(text.map(str::to_owned));
        let mut parameters = vec![
            Parameter::Text(Some(message.id.to_string())),
            text(Some(&message.topic)),
            text(message.message_type.as_deref()),
            text(message.key.as_deref()),
            Parameter::Text(message.headers.as_ref().map(ToString::to_string)),
            text(message.content_type.as_deref()),
        ];
        if !message.ordered && !message.is_special() {
            parameters.push(Parameter::Bytes(message.payload));
            return Ok(Statement {
                id: message.id,
                sql: INSERT,
                parameters,
            });
        }
        parameters.extend(special(&message));
        parameters.push(Parameter::Bytes(message.payload));
        Ok(Statement {
            id: message.id,
            sql: PUBLISH,
            parameters,
        })
    }
}

/// As `Publish` appends; nothing is looked up in the publisher's search_path.
const INSERT: &str = "INSERT INTO postbox.outbox (id, topic, type, key, headers, content_type, payload) \
     VALUES ($1::pg_catalog.text::pg_catalog.uuid, $2::pg_catalog.text, $3::pg_catalog.text, $4::pg_catalog.text, \
         $5::pg_catalog.text::pg_catalog.jsonb, $6::pg_catalog.text, $7::pg_catalog.bytea)";

const PUBLISH: &str = "SELECT postbox.publish_bytes(id => $1::pg_catalog.text::pg_catalog.uuid, topic => $2::pg_catalog.text, \
         type => $3::pg_catalog.text, key => $4::pg_catalog.text, headers => $5::pg_catalog.text::pg_catalog.jsonb, \
         content_type => coalesce($6::pg_catalog.text, 'application/json'), dedup_key => $7::pg_catalog.text, \
         dedup_window => $8::pg_catalog.text::interval, ordered => $9::pg_catalog.text::boolean, \
         deliver_at => $10::pg_catalog.text::pg_catalog.timestamptz, delay => $11::pg_catalog.text::interval, \
         expires_at => $12::pg_catalog.text::pg_catalog.timestamptz, expires_in => $13::pg_catalog.text::interval, \
         payload => $14::pg_catalog.bytea)::pg_catalog.text AS id";

/// From the deduplication key on.
fn special(message: &Valid) -> [Parameter; 7] {
    let dedup = message.dedup.as_ref();
    let window = dedup.map_or(DEFAULT_DEDUP_WINDOW, |dedup| dedup.window);
    let at = |when: Option<When>| Parameter::Text(when.and_then(When::at).map(instant));
    let span = |when: Option<When>| Parameter::Text(when.and_then(When::span).map(interval));
    [
        Parameter::Text(dedup.map(|dedup| dedup.key.clone())),
        Parameter::Text(Some(interval(window))),
        Parameter::Text(Some(message.ordered.to_string())),
        at(message.due),
        span(message.due),
        at(message.expiry),
        span(message.expiry),
    ]
}

/// As PostgreSQL reads it whatever its DateStyle. (In RFC 3339 a year has four digits, and chrono writes a sign before five.)
fn instant(at: DateTime<Utc>) -> String {
    let at = storable(at);
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:06}+00",
        at.year(),
        at.month(),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.nanosecond() % 1_000_000_000 / 1_000
    )
}

/// In whole microseconds, and not shorter than asked for.
fn interval(span: Duration) -> String {
    let micros = span.as_nanos().div_ceil(1_000);
    format!("{}.{:06} seconds", micros / 1_000_000, micros % 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_and_spans_are_in_microseconds_and_never_earlier() {
        let at = DateTime::from_timestamp(1_700_000_000, 1).unwrap();
        assert_eq!(instant(at), "2023-11-14 22:13:20.000001+00");
        let far = DateTime::from_timestamp(316_517_932_800, 0).unwrap();
        assert_eq!(instant(far), "12000-01-21 00:00:00.000000+00");
        assert_eq!(interval(Duration::from_nanos(1)), "0.000001 seconds");
        assert_eq!(interval(Duration::from_millis(61_500)), "61.500000 seconds");
    }

    #[test]
    fn parameters_are_as_many_as_the_statement_has() {
        let plain = Outgoing::json("carts", &1).statement().unwrap();
        let special = Outgoing::json("carts", &1).ordered().statement().unwrap();
        for statement in [plain, special] {
            let last = statement.parameters().len();
            assert!(statement.sql().contains(&format!("${last}::")), "{statement:?}");
            assert!(
                !statement.sql().contains(&format!("${}", last + 1)),
                "{statement:?}"
            );
        }
    }

    #[test]
    fn what_publish_refuses_is_refused() {
        let refused = Outgoing::json("or ders", &1).statement().unwrap_err();
        assert!(refused.to_string().contains("or ders"), "{refused}");
    }
}
