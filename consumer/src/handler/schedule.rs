//! The schedule of a handler.

use postbox::Outgoing;
use postbox::cron::{Cron, Missed, Schedule};

/// What `#[cron]` says of a schedule.
#[derive(Clone, Debug)]
pub(crate) struct CronDefinition {
    name: String,
    expression: String,
    time_zone: String,
}

impl CronDefinition {
    pub(crate) fn new(name: String, expression: String, time_zone: String) -> Self {
        Self {
            name,
            expression,
            time_zone,
        }
    }

    /// The topic of its firings.
    pub(crate) fn topic(&self) -> String {
        format!("cron/{}", self.name)
    }

    pub(crate) fn read(&self, missed: Missed) -> Result<Cron, postbox::Error> {
        let schedule = Schedule::parse(&self.expression, &self.time_zone)?;
        let message = Outgoing::json(self.topic(), &());
        Ok(Cron::new(self.name.clone(), schedule, message).missed(missed))
    }
}
