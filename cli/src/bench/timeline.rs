//! When each of many numbered messages was published and handled.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use postbox::Publish;
use postbox_consumer::{Delivery, Extract, HandlerDefinition, HandlerError, Raw};
use sqlx::{Connection, PgConnection};

use super::environment::Environment;
use super::message::{number, numbered};

/// After so long without a message none will come any more.
const PATIENCE: Duration = Duration::from_secs(30);

/// In nanoseconds from the start; 0: not yet.
pub(crate) struct Timeline {
    pub(crate) start: Instant,
    messages: Vec<Message>,
    count: AtomicUsize,
}

#[derive(Default)]
struct Message {
    committed: AtomicU64,
    /// When it came into the outbox: microseconds since 1970, by the database's clock.
    in_outbox: AtomicI64,
    handled: AtomicU64,
}

impl Timeline {
    /// For messages with the numbers below `total`.
    pub(crate) fn of(total: usize) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            messages: std::iter::repeat_with(Message::default).take(total).collect(),
            count: AtomicUsize::new(0),
        })
    }

    /// What handles them.
    pub(crate) fn handler(self: &Arc<Self>, environment: &Environment, topic: &str) -> HandlerDefinition {
        let timeline = self.clone();
        HandlerDefinition::new("bench")
            .group(environment.group(0))
            .topic(topic.to_owned())
            .call(move |mut invocation| {
                let (timeline, now) = (timeline.clone(), timeline.now());
                Box::pin(async move {
                    let raw = Raw::extract(&mut invocation).await?;
                    let delivery = Delivery::extract(&mut invocation).await?;
                    let message = number(&raw.payload).and_then(|n| timeline.messages.get(n));
                    let message =
                        message.ok_or_else(|| HandlerError::discard("it is none of the bench's"))?;
                    message
                        .in_outbox
                        .store(delivery.published_at.timestamp_micros(), Ordering::Relaxed);
                    if message.handled.swap(now, Ordering::Relaxed) == 0 {
                        timeline.count.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
    }

    /// Publishes one, in a transaction of its own.
    pub(crate) async fn publish(
        &self,
        connection: &mut PgConnection,
        topic: &str,
        n: usize,
    ) -> anyhow::Result<()> {
        let mut tx = connection.begin().await?;
        tx.publish(numbered(topic, n as u64)).await?;
        tx.commit().await?;
        self.messages[n].committed.store(self.now(), Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    pub(crate) async fn until(&self, moment: u64) {
        tokio::time::sleep_until((self.start + Duration::from_nanos(moment)).into()).await;
    }

    pub(crate) fn handled(&self, n: usize) -> u64 {
        self.messages[n].handled.load(Ordering::Relaxed)
    }

    pub(crate) fn handled_at(&self, n: usize) -> Instant {
        self.start + Duration::from_nanos(self.handled(n))
    }

    pub(crate) fn committed_at(&self, n: usize) -> Instant {
        self.start + Duration::from_nanos(self.committed(n))
    }

    fn committed(&self, n: usize) -> u64 {
        self.messages[n].committed.load(Ordering::Relaxed)
    }

    pub(crate) fn in_outbox_micros(&self, n: usize) -> i64 {
        self.messages[n].in_outbox.load(Ordering::Relaxed)
    }

    /// From the return of the commit to the start of the handler.
    pub(crate) fn took(&self, n: usize) -> u64 {
        self.handled(n).saturating_sub(self.committed(n))
    }

    /// Until so many were handled.
    pub(crate) async fn all_handled(&self, total: usize) -> anyhow::Result<()> {
        let mut last = (0, Instant::now());
        loop {
            let count = self.count.load(Ordering::Relaxed);
            if count >= total {
                return Ok(());
            }
            if count > last.0 {
                last = (count, Instant::now());
            }
            ensure!(last.1.elapsed() < PATIENCE, "{count} of {total} messages came");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}
