//! What operators, or else the code, say of a subscription: whether it is paused, how fast it may go and at which times of the day.

use chrono::{DateTime, Utc};
use serde::Deserialize;
use tracing::{info, warn};

use crate::throttle::share;
use crate::window::DailyWindow;

/// As `postbox.pace` gives it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct PaceSettings {
    pub(crate) id: i32,
    paused: bool,
    rate_limit: Option<f64>,
    instance_rate_limit: Option<f64>,
    drain_window: Option<String>,
}

/// What an executor is told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pace {
    /// Whether messages may start at all.
    pub(crate) open: bool,
    /// Most messages a second in this instance; `None`: no limit.
    pub(crate) rate: Option<f64>,
}

/// Turns settings into a pace, and notices when that changes.
#[derive(Debug, Default)]
pub(crate) struct Pacer {
    settings: Option<PaceSettings>,
    window: Option<DailyWindow>,
    told: Option<Pace>,
}

impl Pacer {
    /// The pace at an instant of the database's clock, if it is another than the last time.
    pub(crate) fn change(
        &mut self,
        settings: &PaceSettings,
        now: DateTime<Utc>,
        owned_lanes: usize,
        all_lanes: usize,
    ) -> Option<Pace> {
        if self.settings.as_ref() != Some(settings) {
            self.learn(settings);
        }
        let pace = Pace {
            open: !settings.paused && self.window.as_ref().is_none_or(|window| window.is_open(now)),
            rate: share(
                settings.rate_limit,
                settings.instance_rate_limit,
                owned_lanes,
                all_lanes,
            ),
        };
        if self.told.is_some_and(|told| told.open != pace.open) || (self.told.is_none() && !pace.open) {
            let why = if settings.paused { "paused" } else { "window" };
            info!(
                subscription = settings.id,
                open = pace.open,
                why,
                "messages may start or no longer"
            );
        }
        (self.told.replace(pace) != Some(pace)).then_some(pace)
    }

    fn learn(&mut self, settings: &PaceSettings) {
        match settings
            .drain_window
            .as_deref()
            .map(str::parse::<DailyWindow>)
            .transpose()
        {
            Ok(window) => self.window = window,
            // What was understood last stays: neither to stop for a typing error nor to run at the wrong time.
            Err(error) => {
                warn!(subscription = settings.id, %error, "the subscription's window cannot be understood")
            }
        }
        self.settings = Some(settings.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> PaceSettings {
        PaceSettings {
            id: 1,
            paused: false,
            rate_limit: None,
            instance_rate_limit: None,
            drain_window: None,
        }
    }

    #[test]
    fn only_a_change_is_told() {
        let mut pacer = Pacer::default();
        let now = "2026-05-01T12:00:00Z".parse().expect("an instant");
        let free = Pace {
            open: true,
            rate: None,
        };
        assert_eq!(pacer.change(&settings(), now, 8, 32), Some(free));
        assert_eq!(pacer.change(&settings(), now, 16, 32), None);
        let limited = PaceSettings {
            rate_limit: Some(100.0),
            ..settings()
        };
        let half = Pace {
            open: true,
            rate: Some(50.0),
        };
        assert_eq!(pacer.change(&limited, now, 16, 32), Some(half));
        assert_eq!(pacer.change(&limited, now, 16, 32), None);
        let paused = PaceSettings {
            paused: true,
            ..limited
        };
        assert!(pacer.change(&paused, now, 16, 32).is_some_and(|pace| !pace.open));
    }

    #[test]
    fn a_window_that_cannot_be_understood_changes_nothing() {
        let mut pacer = Pacer::default();
        let noon = "2026-05-01T12:00:00Z".parse().expect("an instant");
        let mut night = PaceSettings {
            drain_window: Some("22:00-06:00 UTC".to_owned()),
            ..settings()
        };
        assert!(pacer.change(&night, noon, 1, 1).is_some_and(|pace| !pace.open));
        night.drain_window = Some("at night".to_owned());
        assert_eq!(pacer.change(&night, noon, 1, 1), None);
        night.drain_window = None;
        assert!(pacer.change(&night, noon, 1, 1).is_some_and(|pace| pace.open));
    }
}
