//! How long to wait after a step while there is much to do.

use std::time::Duration;

/// After a step comes a pause of so many times its cost. By cost, not by the clock: on a busy machine a step takes long because others run, and waiting
/// longer would only add to that. Where a core has nothing else to do, steps may have a fifth of it, and messages come sooner.
const SHARE_OF_AN_IDLE_CORE: f64 = 4.0;
/// Where others need it, a twentieth; steps are larger then, and cost less a message.
const SHARE_OF_A_BUSY_CORE: f64 = 19.0;
/// With so little of a core idle others need it, and with so much nobody does. In between it is shared.
const IDLE_CORES: (f64, f64) = (0.2, 0.5);
/// The pause between two steps, however many messages they find.
const LONG_TICK: Duration = Duration::from_millis(20);
/// However many topics they find, each of which costs a segment of its own; and while no consumer waits for what they find.
const LONGEST_TICK: Duration = Duration::from_millis(50);
/// About what a step costs the server, each message of it, and each topic, for its segment.
const STEP_COST: Duration = Duration::from_micros(300);
const MESSAGE_COST: Duration = Duration::from_micros(2);
const TOPIC_COST: Duration = Duration::from_micros(60);

/// What a step found.
#[derive(Debug, Default)]
pub(crate) struct Step {
    pub(crate) messages: i64,
    /// How many have new messages.
    pub(crate) topics: u32,
    /// As far as it could see, a consumer is there to be told.
    pub(crate) is_awaited: bool,
}

impl Step {
    /// How long to wait after it, if it took so long and so many cores are idle. Where nobody can tell, it is as if none were.
    pub(crate) fn pause(&self, took: Duration, idle_cores: Option<f64>) -> Duration {
        if !self.is_awaited {
            return LONGEST_TICK;
        }
        let share = share(idle_cores.unwrap_or(0.0));
        let times = |cost: Duration, count: u32, limit: Duration| {
            Duration::try_from_secs_f64(cost.as_secs_f64() * f64::from(count) * share)
                .map_or(limit, |pause| pause.min(limit))
        };
        let messages = u32::try_from(self.messages).unwrap_or(u32::MAX);
        let for_messages =
            times(STEP_COST, 1, LONG_TICK) + times(MESSAGE_COST, messages, LONG_TICK) + took / 2;
        let for_topics = times(TOPIC_COST, self.topics, LONGEST_TICK);
        for_messages.min(LONG_TICK).max(for_topics)
    }
}

fn share(idle_cores: f64) -> f64 {
    let (few, enough) = IDLE_CORES;
    let idle = ((idle_cores - few) / (enough - few)).clamp(0.0, 1.0);
    SHARE_OF_A_BUSY_CORE + (SHARE_OF_AN_IDLE_CORE - SHARE_OF_A_BUSY_CORE) * idle
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOOK: Duration = Duration::from_micros(400);

    fn pause_after(messages: i64, topics: u32, is_awaited: bool, idle_cores: f64) -> Duration {
        let step = Step {
            messages,
            topics,
            is_awaited,
        };
        step.pause(TOOK, Some(idle_cores))
    }

    #[test]
    fn the_pause_grows_with_messages_and_topics_up_to_a_limit() {
        for idle in [0.0, 1.0] {
            assert!(pause_after(100, 1, true, idle) > pause_after(1, 1, true, idle));
            assert_eq!(pause_after(1_000_000, 1, true, idle), LONG_TICK);
            assert_eq!(pause_after(i64::MAX, 1, true, idle), LONG_TICK);
            assert_eq!(pause_after(1_000, 10_000, true, idle), LONGEST_TICK);
            assert_eq!(pause_after(1_000, u32::MAX, true, idle), LONGEST_TICK);
        }
        assert!(pause_after(1_000, 30, true, 0.0) > LONG_TICK);
    }

    #[test]
    fn the_less_is_idle_the_longer_it_is() {
        let pauses = [8.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0].map(|idle| pause_after(10, 1, true, idle));
        assert!(pauses.is_sorted(), "{pauses:?}");
        assert!(pauses[0] < Duration::from_micros(1_600), "{pauses:?}");
        assert!(
            (Duration::from_millis(6)..Duration::from_millis(7)).contains(&pauses[7]),
            "{pauses:?}"
        );
        let step = Step {
            messages: 10,
            topics: 1,
            is_awaited: true,
        };
        assert_eq!(
            step.pause(TOOK, None),
            pauses[7],
            "who cannot tell takes no more than on a busy machine"
        );
    }

    #[test]
    fn the_pause_is_the_longest_while_nobody_waits() {
        assert_eq!(pause_after(1, 1, false, 8.0), LONGEST_TICK);
    }
}
