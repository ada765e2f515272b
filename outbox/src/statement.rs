//! A message as SQL, for clients that there is no [`Publish`](crate::Publish) for.

use crate::error::Result;
use crate::id::MessageId;
use crate::outgoing::Outgoing;
use crate::publish::{Bind, Query};

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
        let id = message.id;
        let Query { sql, parameters } = message.into_query();
        let parameters = parameters.into_iter().filter_map(|bind| match bind {
            Bind::Text(text) => Some(Parameter::Text(text)),
            Bind::Bytes(bytes) => Some(Parameter::Bytes(bytes)),
            // Those of batches.
            Bind::Texts(_) | Bind::Blobs(_) => None,
        });
        Ok(Statement {
            id,
            sql,
            parameters: parameters.collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_publish_refuses_is_refused() {
        let refused = Outgoing::json("or ders", &1).statement().unwrap_err();
        assert!(refused.to_string().contains("or ders"), "{refused}");
    }
}
