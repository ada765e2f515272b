//! postgres, the synchronous client that stands on tokio-postgres, and has its errors.

use postgres::Transaction;

use super::tokio_postgres::typed;
use crate::error::Result;
use crate::publish::blocking::OpenTransaction;
use crate::publish::{Answer, Query};

impl OpenTransaction for Transaction<'_> {
    fn run(&mut self, query: Query) -> Result<Answer> {
        let parameters: Vec<_> = query.parameters.iter().map(typed).collect();
        let rows = self.query_typed(query.sql, &parameters)?;
        let column = rows.iter().map(|row| row.try_get(0));
        Ok(Answer(column.collect::<Result<_, _>>()?))
    }
}
