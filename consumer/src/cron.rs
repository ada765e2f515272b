//! Schedules that handlers bring along: checked and registered when the consumer starts.

use postbox::__private::Transaction;
use postbox::Publish;
use postbox::cron::Cron;
use sqlx::PgPool;

use crate::error::Error;
use crate::handler::HandlerDefinition;

/// The schedules of these handlers, each with its handler's name; a wrong one is an error before anything is registered.
pub(crate) fn read_all(definitions: &[HandlerDefinition]) -> Result<Vec<(&'static str, Cron)>, Error> {
    definitions
        .iter()
        .filter_map(|definition| Some((definition.name, definition.cron.as_ref()?, definition.missed)))
        .map(
            |(handler, cron, missed)| match cron.read(missed.unwrap_or_default()) {
                Ok(cron) => Ok((handler, cron)),
                Err(source) => Err(Error::Cron { handler, source }),
            },
        )
        .collect()
}

/// Whatever the database, the role and the pool default to.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE";

/// Before the subscriptions are: a firing that comes in between is found, because they begin at the earliest message.
pub(crate) async fn register_all(pool: &PgPool, crons: Vec<(&'static str, Cron)>) -> Result<(), Error> {
    for (handler, cron) in crons {
        let mut tx = Transaction::begin(pool, BEGIN).await?;
        tx.register(cron)
            .await
            .map_err(|source| Error::Cron { handler, source })?;
        tx.commit().await?;
    }
    Ok(())
}
