//! What a session notices and tells of: clocks that are set or far off, and notifications that are none of Postbox's.

use std::time::{Duration, Instant};

use chrono::{TimeDelta, Utc};
use postbox_core::{clock, link};
use tracing::{debug, warn};

use super::{LEAST_PATIENCE, Look, Lost, STATEMENT_TIMEOUT, Session};
use crate::session::members::Moment;

/// A clock of an instance's host that is off by more is told of.
const FAR_CLOCK: TimeDelta = TimeDelta::seconds(5);
const SAY_CLOCK_EVERY: Duration = Duration::from_secs(600);

const NOTE: &str = "SELECT postbox.note_incident($1, $2, $3, $4)";

impl Session {
    /// Tells of a clock that was set, and of one of this host that is far from the server's.
    pub(super) async fn mind_clocks(&mut self, look: &Look, moment: Moment) -> Result<(), Lost> {
        if let Some(step) = self.clock.look(look.now, moment.asked, moment.told) {
            let what = format!("the database's clock was set {}", clock::in_words(step));
            warn!(what, "clocks");
            self.note("clock", &what, 1).await?;
        }
        // In the middle of the look, as far as is known.
        let here = Utc::now()
            - TimeDelta::from_std(moment.told.duration_since(moment.asked) / 2).unwrap_or_default();
        let ahead = here - look.wall;
        let far = ahead.abs() > FAR_CLOCK;
        if far
            && self
                .far_clock_said
                .is_none_or(|said| said.elapsed() > SAY_CLOCK_EVERY)
        {
            self.far_clock_said = Some(Instant::now());
            let side = if ahead > TimeDelta::zero() {
                "ahead of"
            } else {
                "behind"
            };
            let what = format!(
                "the clock of instance {} is {} s {side} the database server's",
                self.name,
                ahead.abs().num_seconds()
            );
            warn!(what, "clocks");
            self.note("clock-offset", &what, 1).await?;
        }
        Ok(())
    }

    /// Notes what others' notifications say, for doctor.
    pub(super) async fn complain(&mut self) -> Result<(), Lost> {
        match self.hearing.complaint() {
            Some((what, times)) => self.note("notifications", &what, times).await,
            None => Ok(()),
        }
    }

    /// Notes something odd. A role that may not does without.
    async fn note(&mut self, kind: &str, what: &str, times: i64) -> Result<(), Lost> {
        let query = sqlx::query(NOTE)
            .bind(kind)
            .bind(&self.name)
            .bind(what)
            .bind(times)
            .execute(&mut self.listener);
        let limit = self.lease.left().clamp(LEAST_PATIENCE, STATEMENT_TIMEOUT);
        match link::in_time(limit, "noting what is odd", query).await {
            Err(sqlx::Error::Database(error)) => {
                debug!(%error, "cannot note what was odd");
                Ok(())
            }
            other => other.map(|_| ()).map_err(Lost::from),
        }
    }
}
