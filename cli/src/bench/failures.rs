//! One key in ten fails three times, in the midst of a backlog: what that costs the whole, and the other keys.
//!
//! Fair is a run that is long beside what the failing keys must wait: hence the short fixed backoff. With the default policy (1, 2 and 4 s) what
//! counts is how long they need to catch up when the last of them has succeeded.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::ensure;
use postbox_consumer::{Consumer, Delivery, Extract, HandlerDefinition, HandlerError, Retry};

use super::environment::Environment;
use super::fanout;
use super::message::KEYS;
use super::report::Report;
use super::rounds::median;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many are pending
    #[arg(long, default_value_t = Self::default().messages, value_parser = clap::value_parser!(u64).range(100_000..))]
    messages: u64,
}

impl Default for Args {
    fn default() -> Self {
        Self { messages: 1_000_000 }
    }
}

const FAILURES: u32 = 3;
const BACKOFF: Duration = Duration::from_millis(100);
/// More would only repeat.
const ROUNDS: usize = 3;
/// After so long without a message none will come any more.
const PATIENCE: Duration = Duration::from_secs(60);
const PARKED_KEYS: &str = "SELECT count(*) FROM postbox.parked_key k JOIN postbox.subscription s ON s.id = k.subscription_id WHERE s.topic = $1";

pub(crate) async fn measure(environment: &mut Environment, args: &Args) -> anyhow::Result<Vec<Report>> {
    let rounds = environment.settings.rounds().min(ROUNDS);
    environment.progress.begin("failures", 3 * rounds);
    let (mut fixed, mut default) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let topic = environment.topic("failures");
        fanout::publish(environment, &topic, args.messages).await?;
        let mut runs = Vec::new();
        for (n, retry) in [None, Some(Retry::fixed(BACKOFF)), Some(Retry::default())]
            .into_iter()
            .enumerate()
        {
            runs.push(
                run(
                    environment,
                    &topic,
                    &environment.group(3 * round + n),
                    args.messages,
                    retry,
                )
                .await?,
            );
            environment.progress.step("draining");
        }
        let [without, short, long] = runs[..] else {
            continue;
        };
        fixed.push((without, short));
        default.push((without, long));
    }
    let report = |backoff: &str, pairs: &[(Run, Run)]| {
        let of = |figure: fn(&Run, &Run) -> f64| median(pairs.iter().map(|(a, b)| figure(a, b)).collect());
        Report::verified("failures")
            .with("messages", args.messages)
            .with("backoff", backoff)
            .figure("without_s", of(|without, _| without.all))
            .figure("with_s", of(|_, with| with.all))
            .figure("throughput_ratio", of(|without, with| without.all / with.all))
            .figure(
                "other_keys_lateness",
                of(|without, with| with.others / without.others),
            )
            .figure("caught_up_after_s", of(|_, with| with.all - with.healed))
            .figure("parked_keys", of(|_, with| with.parked_keys))
    };
    Ok(vec![
        report("3 x 100 ms", &fixed),
        report("1 + 2 + 4 s", &default),
    ])
}

/// Seconds after the first message.
#[derive(Debug, Clone, Copy)]
struct Run {
    all: f64,
    /// Until all messages of the keys that do not fail were handled.
    others: f64,
    /// Until the last of the messages that failed had succeeded.
    healed: f64,
    /// The most that there were.
    parked_keys: f64,
}

async fn run(
    environment: &Environment,
    topic: &str,
    group: &str,
    messages: u64,
    retry: Option<Retry>,
) -> anyhow::Result<Run> {
    let failing = retry.is_some();
    let seen = Arc::new(Seen::default());
    let handler = {
        let seen = seen.clone();
        // Every key's messages come in turn.
        let fails_at = messages / 10 / KEYS;
        HandlerDefinition::new("bench")
            .group(group.to_owned())
            .topic(topic.to_owned())
            .retry(retry.unwrap_or_default())
            .call(move |mut invocation| {
                let seen = seen.clone();
                Box::pin(async move {
                    let delivery = Delivery::extract(&mut invocation).await?;
                    let offset = delivery.offset.get() as u64;
                    let of_tenth = offset % KEYS % 10 == 7;
                    if failing && of_tenth && offset / KEYS == fails_at {
                        if delivery.attempt <= FAILURES {
                            return Err(HandlerError::retry("as it was told"));
                        }
                        *seen.healed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                    }
                    seen.all.fetch_add(1, Ordering::Relaxed);
                    seen.others.fetch_add(u64::from(!of_tenth), Ordering::Relaxed);
                    Ok(())
                })
            })
    };
    let consumer = Consumer::new(environment.consumer_pool(1))
        .name("postbox-bench")
        .handlers([handler])
        .start()
        .await?;
    let others = messages - (0..messages).filter(|offset| offset % KEYS % 10 == 7).count() as u64;
    let begun = seen.until(&seen.all, 1).await?;
    let mut parked_keys = 0;
    let parked = async {
        loop {
            let now: i64 = sqlx::query_scalar(PARKED_KEYS)
                .bind(topic)
                .fetch_one(&environment.pool)
                .await?;
            parked_keys = parked_keys.max(now);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let ends = async {
        let others = seen.until(&seen.others, others).await?;
        anyhow::Ok((others, seen.until(&seen.all, messages).await?))
    };
    let (others, all) = tokio::select! {
        ends = ends => ends?,
        failed = parked => return failed,
    };
    consumer.shutdown().await?;
    let handled = seen.all.load(Ordering::Relaxed);
    ensure!(
        handled == messages,
        "{handled} messages of {messages} were handled"
    );
    let healed = seen
        .healed
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .unwrap_or(begun);
    Ok(Run {
        all: (all - begun).as_secs_f64(),
        others: (others - begun).as_secs_f64(),
        healed: (healed - begun).as_secs_f64(),
        parked_keys: parked_keys as f64,
    })
}

/// What a handler was given and did.
#[derive(Default)]
struct Seen {
    all: AtomicU64,
    others: AtomicU64,
    healed: Mutex<Option<Instant>>,
}

impl Seen {
    /// Until there are so many; when that was.
    async fn until(&self, counter: &AtomicU64, count: u64) -> anyhow::Result<Instant> {
        let mut last = (0, Instant::now());
        loop {
            let now = counter.load(Ordering::Relaxed);
            if now >= count {
                return Ok(Instant::now());
            }
            if now > last.0 {
                last = (now, Instant::now());
            }
            ensure!(
                last.1.elapsed() < PATIENCE,
                "{now} of {count} messages were handled, and none for {} s",
                PATIENCE.as_secs()
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
