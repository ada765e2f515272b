//! What a dispatcher hears. Every notification wakes all connections of the database that listen, whatever they listen to, so a dispatcher has one
//! that does: the sequencer's, which passes on what is for the timers.

use sqlx::postgres::PgNotification;
use tokio::sync::watch;

/// What to listen to.
pub(crate) const CHANNELS: [&str; 3] = [OUTBOX, SCHEDULED, CRON];

const OUTBOX: &str = "postbox_outbox";
const SCHEDULED: &str = "postbox_scheduled";
const CRON: &str = "postbox_cron";

/// How often the timers were rung.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rings {
    /// Something was scheduled that is due soon.
    pub(crate) scheduled: u32,
    /// Schedules have changed.
    pub(crate) cron: u32,
}

/// Hears for the timers, however often the connection changes.
#[derive(Debug, Clone)]
pub(crate) struct Ear(watch::Sender<Rings>);

impl Ear {
    pub(crate) fn new() -> (Self, watch::Receiver<Rings>) {
        let (sender, receiver) = watch::channel(Rings::default());
        (Self(sender), receiver)
    }

    /// Whether it is for the sequencer; otherwise it is passed on.
    pub(crate) fn hears(&self, notification: &PgNotification) -> bool {
        match notification.channel() {
            SCHEDULED => self.ring(1, 0),
            CRON => self.ring(0, 1),
            _ => return true,
        }
        false
    }

    /// What was said while nobody listened was not heard.
    pub(crate) fn has_missed(&self) {
        self.ring(1, 1);
    }

    fn ring(&self, scheduled: u32, cron: u32) {
        self.0.send_modify(|rings| {
            rings.scheduled = rings.scheduled.wrapping_add(scheduled);
            rings.cron = rings.cron.wrapping_add(cron);
        });
    }
}
