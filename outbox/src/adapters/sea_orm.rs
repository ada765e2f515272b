//! SeaORM 2, which stands on sqlx 0.9.

use sea_orm::sea_query::ArrayType;
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, RuntimeErr, Statement, Value};

use crate::error::{DatabaseError, Error, Result};
use crate::publish::{Answer, Bind, OpenTransaction, Query};

impl OpenTransaction for DatabaseTransaction {
    async fn run(&mut self, query: Query) -> Result<Answer> {
        let mut sql = query.sql.to_owned();
        let values: Vec<Value> = (1..)
            .zip(query.parameters)
            .map(|(n, parameter)| value(n, parameter, &mut sql))
            .collect();
        let statement = Statement::from_sql_and_values(DbBackend::Postgres, sql, values);
        let rows = self.query_all_raw(statement).await?;
        let column = rows.iter().map(|row| row.try_get_by_index(0));
        Ok(Answer(column.collect::<Result<_, _>>()?))
    }
}

fn value(n: usize, parameter: Bind, sql: &mut String) -> Value {
    match parameter {
        Bind::Text(text) => Value::String(text),
        Bind::Bytes(bytes) => Value::Bytes(Some(bytes)),
        Bind::Texts(texts) if texts.iter().any(Option::is_none) => {
            *sql = sql.replace(&array(n), &array_of_json(n));
            Value::String(Some(serde_json::Value::from(texts).to_string()))
        }
        Bind::Texts(texts) => {
            let texts = texts.into_iter().map(Value::String);
            Value::Array(ArrayType::String, Some(Box::new(texts.collect())))
        }
        Bind::Blobs(blobs) => {
            let blobs = blobs.into_iter().map(|bytes| Value::Bytes(Some(bytes)));
            Value::Array(ArrayType::Bytes, Some(Box::new(blobs.collect())))
        }
    }
}

fn array(n: usize) -> String {
    format!("${n}::pg_catalog.text[]")
}

/// SeaORM's arrays hold no nulls. (In the text of one, NULL is a null only if the database has array_nulls on.)
fn array_of_json(n: usize) -> String {
    format!("ARRAY(SELECT pg_catalog.json_array_elements_text(${n}::pg_catalog.text::pg_catalog.json))")
}

impl From<DbErr> for DatabaseError {
    fn from(error: DbErr) -> Self {
        let told = match &error {
            DbErr::Conn(RuntimeErr::SqlxError(told))
            | DbErr::Exec(RuntimeErr::SqlxError(told))
            | DbErr::Query(RuntimeErr::SqlxError(told)) => told.as_database_error(),
            _ => None,
        };
        let code = told.and_then(|told| told.code()).map(|code| code.into_owned());
        let text = told.map_or_else(|| error.to_string(), |told| told.message().to_owned());
        Self::new(code, text, error)
    }
}

impl From<DbErr> for Error {
    fn from(error: DbErr) -> Self {
        Error::Database(error.into())
    }
}
