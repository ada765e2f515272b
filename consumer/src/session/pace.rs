//! What operators, or else the code, say of a subscription: whether it is paused, how fast it may go and at which times of the day.

use chrono::{DateTime, Utc};
use serde::Deserialize;
use tracing::{info, warn};

use crate::executor::Pace;
use crate::ids::SubscriptionId;
use postbox_core::DailyWindow;

/// As `postbox.pace` gives it.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct PaceSettings {
    pub(crate) id: SubscriptionId,
    paused: bool,
    rate_limit: Option<f64>,
    instance_rate_limit: Option<f64>,
    drain_window: Option<String>,
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
                target: "postbox_consumer::pace",
                subscription = %settings.id,
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
                warn!(subscription = %settings.id, %error, "the subscription's window cannot be understood")
            }
        }
        self.settings = Some(settings.clone());
    }
}

/// The part of a group's limits that is one instance's: its share of the lanes, and no more than an instance may.
///
/// Lanes are shared fairly, so this is; and it needs no agreement beyond who owns which. While lanes move, the parts may come to less than the
/// limit, never to more.
fn share(group: Option<f64>, instance: Option<f64>, owned_lanes: usize, all_lanes: usize) -> Option<f64> {
    let part = group.map(|rate| rate * owned_lanes as f64 / all_lanes.max(1) as f64);
    match (part, instance) {
        (Some(part), Some(most)) => Some(part.min(most)),
        (part, most) => part.or(most),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> PaceSettings {
        PaceSettings {
            id: SubscriptionId(1),
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

    #[test]
    fn an_instance_has_the_share_of_its_lanes() {
        assert_eq!(share(Some(100.0), None, 8, 32), Some(25.0));
        assert_eq!(share(Some(100.0), Some(20.0), 8, 32), Some(20.0));
        assert_eq!(share(None, Some(20.0), 8, 32), Some(20.0));
        assert_eq!(share(None, None, 8, 32), None);
        assert_eq!(share(Some(100.0), None, 0, 32), Some(0.0));
        let parts: f64 = [11, 11, 10]
            .iter()
            .filter_map(|lanes| share(Some(100.0), None, *lanes, 32))
            .sum();
        assert!((parts - 100.0).abs() < 1e-9);
    }
}
