//! deadpool-postgres, whose transactions are those of tokio-postgres.

use deadpool_postgres::Transaction;

use crate::error::Result;
use crate::publish::{Answer, OpenTransaction, Query};

impl OpenTransaction for Transaction<'_> {
    async fn run(&mut self, query: Query) -> Result<Answer> {
        let inner: &mut tokio_postgres::Transaction<'_> = self;
        inner.run(query).await
    }
}
