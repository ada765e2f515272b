//! What a dispatcher hears. Every notification wakes all connections of the database that listen, whatever they listen to, so a dispatcher has one
//! that does: the sequencer's, which passes on what is for the timers.

use sqlx::postgres::PgNotification;
use tokio::sync::watch;

use crate::flood::Heard;

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

/// Passes on what is for the timers, however often the connection changes.
#[derive(Debug, Clone)]
pub(crate) struct NotificationRouter {
    timers: watch::Sender<Rings>,
    pub(crate) heard: Heard,
}

impl NotificationRouter {
    pub(crate) fn new() -> (Self, watch::Receiver<Rings>) {
        let (sender, receiver) = watch::channel(Rings::default());
        let router = Self {
            timers: sender,
            heard: Heard::default(),
        };
        (router, receiver)
    }

    /// Whether it is for the sequencer; otherwise it is passed on.
    pub(crate) fn hears(&self, notification: &PgNotification) -> bool {
        let channel = CHANNELS
            .iter()
            .position(|channel| *channel == notification.channel());
        self.heard.count(channel.unwrap_or(0));
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
        self.timers.send_modify(|rings| {
            rings.scheduled = rings.scheduled.wrapping_add(scheduled);
            rings.cron = rings.cron.wrapping_add(cron);
        });
    }
}
