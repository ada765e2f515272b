//! diesel-async. As with diesel, that a transaction is open is asked when something is published.

use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl, TransactionManager};

use super::diesel::{Bound, is_open};
use crate::error::Result;
use crate::publish::{Answer, OpenTransaction, Query};

impl OpenTransaction for AsyncPgConnection {
    async fn run(&mut self, query: Query) -> Result<Answer> {
        type Manager = <AsyncPgConnection as AsyncConnection>::TransactionManager;
        is_open(Manager::transaction_manager_status_mut(self))?;
        Ok(Answer(Bound(query).load(self).await?))
    }
}
