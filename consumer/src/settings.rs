//! What an instance can be told.

use std::time::Duration;

use sqlx::PgPool;

use crate::error::Error;
use crate::handler::UnknownType;

/// What an instance can be told.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) node: String,
    pub(crate) lease: Duration,
    pub(crate) grace: Duration,
    pub(crate) window: usize,
    pub(crate) max_failing: usize,
    /// Of transactional handlers, if they have one of their own.
    pub(crate) tx_pool: Option<PgPool>,
    pub(crate) unknown_types: UnknownType,
}

/// Shorter, a pause of a garbage collector's or a hypervisor's would be a death.
const MIN_LEASE: Duration = Duration::from_secs(6);
const MAX_LEASE: Duration = Duration::from_secs(3600);

impl Settings {
    pub(crate) fn check(&self) -> Result<(), Error> {
        let wrong = |setting, value: String, range| {
            Err(Error::Setting {
                setting,
                value,
                range,
            })
        };
        if !(MIN_LEASE..=MAX_LEASE).contains(&self.lease) {
            return wrong("lease", format!("{:?}", self.lease), "it is 6 s to 1 h");
        }
        if self.window == 0 {
            return wrong("window", "0".to_owned(), "it is at least 1");
        }
        if self.max_failing == 0 {
            return wrong("max_failing", "0".to_owned(), "it is at least 1");
        }
        Ok(())
    }
}
