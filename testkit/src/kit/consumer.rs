//! Consumers of a kit.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use postbox_consumer::{__testkit as consumers, Consumer, HandlerDefinition, SubscriptionStats};

use super::{Kit, Started, locked};

/// A consumer that is to be started. Made by [`Kit::consumer`].
#[must_use = "it does nothing until it is started"]
pub struct KitConsumer {
    kit: Kit,
    number: usize,
    consumer: Consumer,
}

impl KitConsumer {
    pub(super) fn new(kit: Kit, number: usize, mut handlers: Vec<HandlerDefinition>) -> Self {
        handlers
            .iter_mut()
            .for_each(|handler| kit.0.faults.stand_before(handler));
        let name = format!("kit-{number}");
        let consumer = Consumer::new(kit.pool().clone())
            .name(name.clone())
            .node(name)
            .handlers(handlers);
        Self {
            kit,
            number,
            consumer,
        }
    }

    /// Shares a value with the handlers that ask for `State<S>`.
    pub fn state<S: Clone + Send + Sync + 'static>(self, state: S) -> Self {
        self.configure(|consumer| consumer.state(state))
    }

    /// Anything else that a [`Consumer`] has: `configure(|consumer| consumer.window(64).node("a"))`. Layers are around what
    /// [`Kit::fail_once`] does. Handlers that are added here are not among those that it knows.
    pub fn configure(self, configure: impl FnOnce(Consumer) -> Consumer) -> Self {
        Self {
            consumer: configure(self.consumer),
            ..self
        }
    }

    /// Starts it; returns once all its subscriptions are there. It runs until the test ends, or [`RunningConsumer::stop`].
    ///
    /// # Panics
    /// What is wrong with the handlers or the settings.
    pub async fn start(self) -> RunningConsumer {
        let moved = *locked(&self.kit.0.moved);
        let handle = match self.consumer.start().await {
            Ok(handle) => Arc::new(handle),
            Err(error) => panic!("the consumer does not start: {error}"),
        };
        // So that it has read the clock, before that is moved.
        consumers::follow(&handle, Duration::ZERO).await;
        let started = Started { handle, moved };
        let mut consumers = locked(&self.kit.0.consumers);
        consumers.running.push((self.number, started));
        drop(consumers);
        RunningConsumer {
            kit: self.kit,
            number: self.number,
        }
    }
}

impl fmt::Debug for KitConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KitConsumer({})", self.number)
    }
}

/// A consumer that runs in the background. Dropping this changes nothing.
#[derive(Debug, Clone)]
pub struct RunningConsumer {
    kit: Kit,
    number: usize,
}

impl RunningConsumer {
    /// Stops it gracefully, as a deploy does: what runs finishes, its lanes go to others. On return it has stopped. Nothing if it was stopped before.
    ///
    /// # Panics
    /// It had ended by itself; the message says why.
    pub async fn stop(&self) {
        let started = {
            let mut consumers = locked(&self.kit.0.consumers);
            let place = consumers
                .running
                .iter()
                .position(|(number, _)| *number == self.number);
            place.map(|place| consumers.running.remove(place).1)
        };
        let Some(Started { mut handle, .. }) = started else {
            return;
        };
        let handle = loop {
            match Arc::try_unwrap(handle) {
                Ok(handle) => break handle,
                // A settled() beside this asks it just now.
                Err(shared) => handle = shared,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        if let Err(error) = handle.shutdown().await {
            panic!("the consumer had ended: {error}");
        }
    }

    /// What each of its subscriptions did so far; nothing once it is stopped.
    pub fn stats(&self) -> Vec<SubscriptionStats> {
        let consumers = locked(&self.kit.0.consumers);
        let mut running = consumers.running.iter();
        let started = running.find(|(number, _)| *number == self.number);
        started.map_or_else(Vec::new, |(_, started)| started.handle.stats())
    }
}
