//! A consumer in this process that counts what it handles.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use postbox_consumer::{Consumer, ConsumerHandle, HandlerDefinition};
use sqlx::PgPool;

use super::environment::Environment;

/// As subscriptions have by default.
pub(crate) const LANES: i64 = 32;

/// After so long without a message none will come any more.
const PATIENCE: Duration = Duration::from_secs(60);

/// Of so many messages the rate is taken, again and again.
const SLICE: u64 = 10_000;

/// When messages were handled.
pub(crate) struct Handled {
    pub(crate) first: Instant,
    pub(crate) last: Instant,
    /// Deliveries a second, of one slice after another.
    pub(crate) rates: Vec<f64>,
}

pub(crate) struct Sink {
    /// For each group.
    counters: Vec<Arc<AtomicU64>>,
    consumers: Vec<ConsumerHandle>,
    topics: Vec<String>,
}

impl Sink {
    /// Groups with a handler that does nothing, from the first message of the topic on.
    pub(crate) async fn start(pool: PgPool, topic: &str, groups: &[String]) -> anyhow::Result<Self> {
        Self::spread(pool, &[topic.to_owned()], groups, 1).await
    }

    /// One group, with what its handler is made of that one.
    pub(crate) async fn wanting(
        pool: PgPool,
        topic: &str,
        group: &str,
        want: impl FnOnce(HandlerDefinition) -> HandlerDefinition,
    ) -> anyhow::Result<Self> {
        let counter = Arc::new(AtomicU64::new(0));
        let consumer = Consumer::new(pool).name("postbox-bench");
        let handler = want(sink(group, topic, &counter));
        Ok(Self {
            counters: vec![counter],
            consumers: vec![consumer.handlers([handler]).start().await?],
            topics: vec![topic.to_owned()],
        })
    }

    /// As [`start`](Self::start), with several topics and instances.
    pub(crate) async fn spread(
        pool: PgPool,
        topics: &[String],
        groups: &[String],
        instances: usize,
    ) -> anyhow::Result<Self> {
        let counters: Vec<_> = groups.iter().map(|_| Arc::new(AtomicU64::new(0))).collect();
        let mut consumers = Vec::new();
        for _ in 0..instances {
            let of_groups = groups.iter().zip(&counters);
            let handlers = of_groups
                .flat_map(|(group, counter)| topics.iter().map(move |topic| sink(group, topic, counter)));
            let consumer = Consumer::new(pool.clone())
                .name("postbox-bench")
                .handlers(handlers)
                .start()
                .await?;
            consumers.push(consumer);
        }
        Ok(Self {
            counters,
            consumers,
            topics: topics.to_vec(),
        })
    }

    /// Until all that is published from then on is handled at once.
    pub(crate) async fn owns_its_lanes(&self, environment: &Environment) -> anyhow::Result<()> {
        for topic in &self.topics {
            environment
                .lanes_owned(topic, LANES * self.counters.len() as i64)
                .await?;
        }
        Ok(())
    }

    /// By all groups together.
    pub(crate) fn handled(&self) -> u64 {
        self.counters
            .iter()
            .map(|counter| counter.load(Ordering::Relaxed))
            .sum()
    }

    /// Until all groups together have handled so many; returns how many they have.
    pub(crate) async fn has_handled(&self, messages: u64) -> anyhow::Result<u64> {
        let begun = Instant::now();
        loop {
            match self.handled() {
                handled if handled >= messages => return Ok(handled),
                handled => ensure!(
                    begun.elapsed() < PATIENCE,
                    "{handled} of {messages} deliveries came in {} s",
                    PATIENCE.as_secs()
                ),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Until every group has handled exactly so many, counted from the start; what is returned counts from when this was called.
    pub(crate) async fn each_handled(&self, messages: u64) -> anyhow::Result<Handled> {
        let expected = messages * self.counters.len() as u64;
        let before = self.handled();
        let mut first = None;
        let mut last = (before, Instant::now());
        let mut looked = last.1;
        let mut slice = last;
        let mut rates = Vec::new();
        loop {
            let handled = self.handled();
            let now = Instant::now();
            if handled > last.0 {
                if first.is_none() {
                    // It came after the look before.
                    first = Some(looked);
                    slice = (before, looked);
                }
                last = (handled, now);
                if handled - slice.0 >= SLICE {
                    rates.push((handled - slice.0) as f64 / (now - slice.1).as_secs_f64());
                    slice = last;
                }
            }
            looked = now;
            if handled >= expected {
                break;
            }
            ensure!(
                last.1.elapsed() < PATIENCE,
                "{handled} of {expected} deliveries came, and none for {} s",
                PATIENCE.as_secs()
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for counter in &self.counters {
            let handled = counter.load(Ordering::Relaxed);
            ensure!(
                handled == messages,
                "a group handled {handled} messages of {messages}"
            );
        }
        Ok(Handled {
            first: first.unwrap_or(last.1),
            last: last.1,
            rates,
        })
    }

    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        for consumer in self.consumers {
            consumer.shutdown().await?;
        }
        Ok(())
    }
}

fn sink(group: &str, topic: &str, counter: &Arc<AtomicU64>) -> HandlerDefinition {
    let counter = counter.clone();
    HandlerDefinition::new("bench")
        .group(group.to_owned())
        .topic(topic.to_owned())
        .call(move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
            Box::pin(std::future::ready(Ok(())))
        })
}
