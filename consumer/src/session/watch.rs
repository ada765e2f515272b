//! What a session says when messages do not come: nobody puts them in order, or somebody holds a lock that Postbox needs.

use std::time::{Duration, Instant};

use postbox_core::locks::Complaints;
use sqlx::postgres::PgListener;
use tracing::{info, warn};

/// Between two looks; what stands as it was at the last one has stood for so long.
const EVERY: Duration = Duration::from_secs(5);
/// The same is not said more often.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// Committed messages that no step has seen, told by one; the last step; how many dispatchers are connected; and whether anybody holds a lock for long.
const LOOK: &str = "SELECT u.messages > 0, u.last_tick, (SELECT count(*) FROM pg_stat_activity a \
         WHERE a.application_name = 'postbox dispatcher' AND a.datname = current_database()), \
         EXISTS (SELECT FROM postbox.lock_holders()) \
     FROM postbox.unsequenced(1) u";

#[derive(Default)]
pub(crate) struct Watch {
    looked: Option<Instant>,
    /// The last step, while messages wait for another.
    waiting_since: Option<Option<i64>>,
    said: Option<Instant>,
    complaints: Complaints,
}

impl Watch {
    pub(crate) async fn look(&mut self, listener: &mut PgListener) -> Result<(), sqlx::Error> {
        if self.looked.is_some_and(|looked| looked.elapsed() < EVERY) {
            return Ok(());
        }
        let (waiting, last_tick, dispatchers, held): (bool, Option<i64>, i64, bool) =
            sqlx::query_as(LOOK).fetch_one(&mut *listener).await?;
        self.looked = Some(Instant::now());
        let stands = waiting && self.waiting_since == Some(last_tick);
        self.waiting_since = waiting.then_some(last_tick);
        if stands && self.said.is_none_or(|said| said.elapsed() >= AGAIN_AFTER) {
            self.said = Some(Instant::now());
            warn!(
                dispatchers,
                "messages were committed and nobody has put them in order for 5 s, so none is delivered: run a dispatcher (`postbox run`), or look \
                 what is wrong with it; postbox doctor says more"
            );
        } else if !stands && self.said.take().is_some() {
            info!("messages are put in order again");
        }
        if held {
            self.complaints
                .complain("consumers and dispatchers", listener)
                .await?;
        }
        Ok(())
    }
}
