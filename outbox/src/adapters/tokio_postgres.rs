//! tokio-postgres. Each statement is sent with its types, so it is one round trip and leaves no prepared statement behind, which poolers mind.

use tokio_postgres::Transaction;
use tokio_postgres::types::{ToSql, Type};

use crate::error::{DatabaseError, Error, Result};
use crate::publish::{Answer, Bind, OpenTransaction, Query};

impl OpenTransaction for Transaction<'_> {
    async fn run(&mut self, query: Query) -> Result<Answer> {
        let parameters: Vec<_> = query.parameters.iter().map(typed).collect();
        let rows = self.query_typed(query.sql, &parameters).await?;
        let column = rows.iter().map(|row| row.try_get(0));
        Ok(Answer(column.collect::<Result<_, _>>()?))
    }
}

pub(super) fn typed(parameter: &Bind) -> (&(dyn ToSql + Sync), Type) {
    match parameter {
        Bind::Text(text) => (text, Type::TEXT),
        Bind::Bytes(bytes) => (bytes, Type::BYTEA),
        Bind::Texts(texts) => (texts, Type::TEXT_ARRAY),
        Bind::Blobs(blobs) => (blobs, Type::BYTEA_ARRAY),
    }
}

impl From<tokio_postgres::Error> for DatabaseError {
    fn from(error: tokio_postgres::Error) -> Self {
        let code = error.code().map(|code| code.code().to_owned());
        // By itself it says "db error".
        let text = match error.as_db_error() {
            Some(told) => told.message().to_owned(),
            None => error.to_string(),
        };
        Self::new(code, text, error)
    }
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        Error::Database(error.into())
    }
}
