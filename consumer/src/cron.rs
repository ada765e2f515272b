//! Schedules that handlers bring along: checked and registered when the consumer starts.

use postbox::Outgoing;
use postbox::cron::{Cron, Missed, Schedule};
use sqlx::PgPool;

use crate::error::Error;
use crate::handler::HandlerDefinition;

/// What `#[cron]` says of a schedule.
#[derive(Clone, Debug)]
pub(crate) struct CronDefinition {
    name: String,
    expression: String,
    time_zone: String,
    pub(crate) missed: Missed,
}

impl CronDefinition {
    pub(crate) fn new(name: String, expression: String, time_zone: String) -> Self {
        Self {
            name,
            expression,
            time_zone,
            missed: Missed::default(),
        }
    }

    /// The topic of its firings.
    pub(crate) fn topic(&self) -> String {
        format!("cron/{}", self.name)
    }

    fn read(&self) -> Result<Cron, postbox::Error> {
        let schedule = Schedule::parse(&self.expression, &self.time_zone)?;
        let message = Outgoing::json(self.topic(), &());
        Ok(Cron::new(self.name.clone(), schedule, message).missed(self.missed))
    }
}

/// The schedules of these handlers, each with its handler's name; a wrong one is an error before anything is registered.
pub(crate) fn read_all(definitions: &[HandlerDefinition]) -> Result<Vec<(&'static str, Cron)>, Error> {
    definitions
        .iter()
        .filter_map(|definition| Some((definition.name, definition.cron.as_ref()?)))
        .map(|(handler, cron)| match cron.read() {
            Ok(cron) => Ok((handler, cron)),
            Err(source) => Err(Error::Cron { handler, source }),
        })
        .collect()
}

/// Before the subscriptions are: a firing that comes in between is found, because they begin at the earliest message.
pub(crate) async fn register_all(pool: &PgPool, crons: Vec<(&'static str, Cron)>) -> Result<(), Error> {
    for (handler, cron) in crons {
        let mut connection = pool.acquire().await?;
        cron.register(&mut connection)
            .await
            .map_err(|source| Error::Cron { handler, source })?;
    }
    Ok(())
}
