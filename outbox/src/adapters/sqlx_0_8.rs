//! sqlx 0.8, for services that have not moved to 0.9 yet.

use sqlx_0_8::{Postgres, Transaction};

use crate::error::{DatabaseError, Error, Result};
use crate::publish::{Answer, Bind, OpenTransaction, Query};

impl OpenTransaction for Transaction<'_, Postgres> {
    async fn run(&mut self, query: Query) -> Result<Answer> {
        let mut bound = sqlx_0_8::query_scalar(query.sql);
        for parameter in query.parameters {
            bound = match parameter {
                Bind::Text(text) => bound.bind(text),
                Bind::Bytes(bytes) => bound.bind(bytes),
                Bind::Texts(texts) => bound.bind(texts),
                Bind::Blobs(blobs) => bound.bind(blobs),
            };
        }
        Ok(Answer(bound.fetch_all(&mut **self).await?))
    }
}

impl From<sqlx_0_8::Error> for DatabaseError {
    fn from(error: sqlx_0_8::Error) -> Self {
        let told = error.as_database_error();
        let code = told.and_then(|told| told.code()).map(|code| code.into_owned());
        let text = told.map_or_else(|| error.to_string(), |told| told.message().to_owned());
        Self::new(code, text, error)
    }
}

impl From<sqlx_0_8::Error> for Error {
    fn from(error: sqlx_0_8::Error) -> Self {
        Error::Database(error.into())
    }
}
