//! SeaORM 2, which stands on sqlx 0.9.

use sea_orm::sea_query::ArrayType;
use sea_orm::{ConnectionTrait, DatabaseTransaction, DbBackend, DbErr, RuntimeErr, Statement, Value};

use crate::error::{DatabaseError, Error, Result};
use crate::publish::{Answer, Bind, OpenTransaction, Query};

impl OpenTransaction for DatabaseTransaction {
    async fn run(&mut self, query: Query) -> Result<Answer> {
        let values = query.parameters.into_iter().map(value);
        let statement = Statement::from_sql_and_values(DbBackend::Postgres, query.sql, values);
        let rows = self.query_all_raw(statement).await?;
        let column = rows.iter().map(|row| row.try_get_by_index(0));
        Ok(Answer(column.collect::<Result<_, _>>()?))
    }
}

fn value(parameter: Bind) -> Value {
    match parameter {
        Bind::Text(text) => Value::String(text),
        Bind::Bytes(bytes) => Value::Bytes(Some(bytes)),
        Bind::Texts(texts) => Value::String(Some(literal(&texts))),
        Bind::Blobs(blobs) => {
            let blobs = blobs.into_iter().map(|bytes| Value::Bytes(Some(bytes)));
            Value::Array(ArrayType::Bytes, Some(Box::new(blobs.collect())))
        }
    }
}

/// The array as PostgreSQL writes it, which the statement casts: SeaORM's own hold no nulls.
fn literal(texts: &[Option<String>]) -> String {
    let mut literal = String::from("{");
    for (n, text) in texts.iter().enumerate() {
        if n > 0 {
            literal.push(',');
        }
        let Some(text) = text else {
            literal.push_str("NULL");
            continue;
        };
        literal.push('"');
        for character in text.chars() {
            if matches!(character, '"' | '\\') {
                literal.push('\\');
            }
            literal.push(character);
        }
        literal.push('"');
    }
    literal.push('}');
    literal
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
