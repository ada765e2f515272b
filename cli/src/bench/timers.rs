//! Scheduled messages: how late they come at a steady rate, and how long a burst takes that is due at one instant.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use chrono::{DateTime, Utc};
use postbox_consumer::{Consumer, ConsumerHandle};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::environment::Environment;
use super::report::Report;
use super::rounds::quantile;
use super::sink::LANES;
use super::timeline::Timeline;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Messages that are due a second
    #[arg(long, value_name = "N", default_value_t = Self::default().rate, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Messages that are due at one instant
    #[arg(long, value_name = "N", default_value_t = Self::default().burst, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    burst: u32,
}

impl Default for Args {
    fn default() -> Self {
        Self {
            rate: 2_000,
            burst: 1_000_000,
        }
    }
}

/// Messages a second that are published for now while the burst lasts, and for how long at most.
const IMMEDIATE: (u32, Duration) = (100, Duration::from_secs(3_600));

/// Between the last insert and the first due time, at least.
const LEAD: Duration = Duration::from_secs(3);

pub(crate) async fn measure(environment: &mut Environment, args: &Args) -> anyhow::Result<Vec<Report>> {
    let span = environment.settings.span(10);
    environment.progress.begin("timers", 4);
    let steady = steady(environment, args.rate, span).await?;
    let (burst, immediate) = burst(environment, args.burst as usize).await?;
    Ok(vec![
        Report::verified("timers")
            .with("rate", args.rate)
            .with("messages", steady.handled_ms.len())
            .with("early", steady.early + burst.early)
            .figure("p50_ms", quantile(steady.handled_ms.clone(), 0.5))
            .figure("p99_ms", quantile(steady.handled_ms.clone(), 0.99))
            .figure("max_ms", quantile(steady.handled_ms, 1.0))
            .figure("in_outbox_p50_ms", quantile(steady.in_outbox_ms.clone(), 0.5))
            .figure("in_outbox_p99_ms", quantile(steady.in_outbox_ms, 0.99))
            .with("burst_messages", args.burst)
            .figure("burst_seconds", quantile(burst.handled_ms, 1.0) / 1000.0)
            .figure(
                "burst_in_outbox_seconds",
                quantile(burst.in_outbox_ms, 1.0) / 1000.0,
            )
            .with("immediate_messages", immediate.during_ms.len())
            .figure("immediate_before_p99_ms", quantile(immediate.before_ms, 0.99))
            .figure("immediate_p50_ms", quantile(immediate.during_ms.clone(), 0.5))
            .figure("immediate_p99_ms", quantile(immediate.during_ms.clone(), 0.99))
            .figure("immediate_max_ms", quantile(immediate.during_ms, 1.0)),
    ])
}

/// How long after they were due, by the database's clock.
struct Lateness {
    early: usize,
    /// They began to be handled.
    handled_ms: Vec<f64>,
    /// They came into the outbox: the timers' part of it.
    in_outbox_ms: Vec<f64>,
}

/// Messages that are due one after another, all scheduled before.
async fn steady(environment: &Environment, rate: u32, span: Duration) -> anyhow::Result<Lateness> {
    let total = (span.as_secs_f64() * f64::from(rate)) as usize;
    let topic = environment.topic("timers");
    let timeline = Timeline::of(total);
    let consumer = consume(environment, &[(&topic, &timeline)]).await?;
    let clock = Clock::ask(&environment.pool).await?;
    let schedule = Schedule::insert(environment, &topic, total, rate.into()).await?;
    environment.progress.step("a steady rate");
    schedule.begun(&clock).await;
    timeline.all_handled(total).await?;
    consumer.shutdown().await?;
    environment.progress.step("scheduling a burst");
    schedule.lateness(&timeline, &clock)
}

/// Messages that are due at one instant, and others beside them.
async fn burst(environment: &Environment, total: usize) -> anyhow::Result<(Lateness, Immediate)> {
    let (topic, other) = (environment.topic("burst"), environment.topic("immediate"));
    let timeline = Timeline::of(total);
    let others = Timeline::of((u64::from(IMMEDIATE.0) * IMMEDIATE.1.as_secs()) as usize);
    let consumer = consume(environment, &[(&topic, &timeline), (&other, &others)]).await?;
    let clock = Clock::ask(&environment.pool).await?;
    let schedule = Schedule::insert(environment, &topic, total, i64::MAX).await?;
    environment.progress.step("a burst");
    let publisher = Publisher::start(environment, other, others.clone()).await?;
    schedule.begun(&clock).await;
    let begun = Instant::now();
    timeline.all_handled(total).await?;
    let ended = Instant::now();
    let published = publisher.stop().await?;
    others.all_handled(published).await?;
    consumer.shutdown().await?;
    environment.progress.step("verifying");
    let immediate = Immediate::of(&others, published, begun, ended);
    Ok((schedule.lateness(&timeline, &clock)?, immediate))
}

async fn consume(
    environment: &Environment,
    topics: &[(&str, &Arc<Timeline>)],
) -> anyhow::Result<ConsumerHandle> {
    let handlers = topics
        .iter()
        .map(|(topic, timeline)| timeline.handler(environment, topic));
    let consumer = Consumer::new(environment.consumer_pool(1))
        .name("postbox-bench")
        .handlers(handlers)
        .start()
        .await?;
    for (topic, _) in topics {
        environment.lanes_owned(topic, LANES).await?;
    }
    Ok(consumer)
}

/// The database's clock beside this process's.
struct Clock {
    here: Instant,
    there: DateTime<Utc>,
}

impl Clock {
    /// By the shortest of some round trips.
    async fn ask(pool: &PgPool) -> anyhow::Result<Self> {
        let mut connection = pool.acquire().await?;
        let mut best: Option<(Duration, Self)> = None;
        for _ in 0..50 {
            let asked = Instant::now();
            let there = now(&mut connection).await?;
            let took = asked.elapsed();
            if best.as_ref().is_none_or(|(least, _)| took < *least) {
                let here = asked + took / 2;
                best = Some((took, Self { here, there }));
            }
        }
        best.map(|(_, clock)| clock).context("it was not asked")
    }

    fn micros_at(&self, at: Instant) -> i64 {
        let later = at.saturating_duration_since(self.here).as_micros() as i64;
        let earlier = self.here.saturating_duration_since(at).as_micros() as i64;
        self.there.timestamp_micros() + later - earlier
    }
}

async fn now(connection: &mut PgConnection) -> sqlx::Result<DateTime<Utc>> {
    sqlx::query_scalar("SELECT postbox.clock()")
        .fetch_one(connection)
        .await
}

/// Which message is due when.
struct Schedule {
    from: DateTime<Utc>,
    /// A second.
    rate: i64,
    total: usize,
}

/// What `publish` with a `deliver_at` inserts, for many.
const INSERT: &str = "INSERT INTO postbox.scheduled (topic, deliver_at, payload) \
     SELECT $1, $2 + n * 1000000 / $3 * interval '1 microsecond', convert_to(n::text, 'UTF8') \
     FROM generate_series($4, $5 - 1) n";
const AT_ONCE: usize = 20_000;

impl Schedule {
    /// The first is due after all were inserted.
    async fn insert(environment: &Environment, topic: &str, total: usize, rate: i64) -> anyhow::Result<Self> {
        let mut connection = environment.pool.acquire().await?;
        let at_once = AT_ONCE.min(total);
        let mut schedule = Self {
            from: now(&mut connection).await? + Duration::from_secs(86_400),
            rate,
            total,
        };
        // How long it will take.
        let mut tx = connection.begin().await?;
        let begun = Instant::now();
        schedule.insert_some(&mut tx, topic, 0, at_once).await?;
        let needed = begun.elapsed().mul_f64(2.0 * total as f64 / at_once as f64) + LEAD;
        tx.rollback().await?;

        schedule.from = now(&mut connection).await? + needed;
        for first in (0..total).step_by(at_once) {
            schedule
                .insert_some(&mut connection, topic, first, at_once)
                .await?;
        }
        ensure!(
            now(&mut connection).await? < schedule.from,
            "scheduling took more than {needed:?}, twice what its beginning foretold"
        );
        Ok(schedule)
    }

    async fn insert_some(
        &self,
        to: &mut PgConnection,
        topic: &str,
        first: usize,
        count: usize,
    ) -> sqlx::Result<()> {
        sqlx::query(INSERT)
            .bind(topic)
            .bind(self.from)
            .bind(self.rate)
            .bind(first as i64)
            .bind((first + count).min(self.total) as i64)
            .execute(to)
            .await?;
        Ok(())
    }

    fn due_micros(&self, n: usize) -> i64 {
        self.from.timestamp_micros() + n as i64 * 1_000_000 / self.rate
    }

    /// Until the first is due.
    async fn begun(&self, clock: &Clock) {
        let left = self.due_micros(0) - clock.micros_at(Instant::now());
        tokio::time::sleep(Duration::from_micros(left.max(0) as u64)).await;
    }

    fn lateness(&self, timeline: &Timeline, clock: &Clock) -> anyhow::Result<Lateness> {
        let late_ms = |n: usize, at: i64| (at - self.due_micros(n)) as f64 / 1000.0;
        let numbers = 0..self.total;
        let in_outbox_ms: Vec<f64> = numbers
            .clone()
            .map(|n| late_ms(n, timeline.in_outbox_micros(n)))
            .collect();
        // By the database's word alone; nothing is handled before it is in the outbox.
        let early = in_outbox_ms.iter().filter(|late| **late < 0.0).count();
        ensure!(early == 0, "{early} messages were early");
        Ok(Lateness {
            early,
            handled_ms: numbers
                .map(|n| late_ms(n, clock.micros_at(timeline.handled_at(n))))
                .collect(),
            in_outbox_ms,
        })
    }
}

/// Publishes for now, steadily, until it is stopped.
struct Publisher {
    token: CancellationToken,
    task: JoinHandle<anyhow::Result<usize>>,
}

impl Publisher {
    async fn start(
        environment: &Environment,
        topic: String,
        timeline: Arc<Timeline>,
    ) -> anyhow::Result<Self> {
        let mut connection = environment.pool.acquire().await?;
        let token = CancellationToken::new();
        let stop = token.clone();
        let task = tokio::spawn(async move {
            let begin = timeline.now();
            let mut n = 0;
            while !stop.is_cancelled() {
                timeline
                    .until(begin + n as u64 * 1_000_000_000 / u64::from(IMMEDIATE.0))
                    .await;
                timeline.publish(&mut connection, &topic, n).await?;
                n += 1;
            }
            Ok(n)
        });
        Ok(Self { token, task })
    }

    /// How many it published.
    async fn stop(self) -> anyhow::Result<usize> {
        self.token.cancel();
        self.task.await.context("a client ended")?
    }
}

/// From commit to handler, of the messages that were published for now.
struct Immediate {
    before_ms: Vec<f64>,
    during_ms: Vec<f64>,
}

impl Immediate {
    fn of(timeline: &Timeline, published: usize, begun: Instant, ended: Instant) -> Self {
        let took = |published_in: std::ops::Range<Instant>| {
            (0..published)
                .filter(|n| published_in.contains(&timeline.committed_at(*n)))
                .map(|n| timeline.took(n) as f64 / 1e6)
                .collect()
        };
        Self {
            before_ms: took(timeline.start..begun),
            during_ms: took(begun..ended),
        }
    }
}
