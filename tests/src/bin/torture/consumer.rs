//! A consumer as a process: handlers that fail, hang, panic and abort, and write down every run.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use postbox::__private::Transaction;
use postbox_consumer::{Consumer, Delivery, HandlerError, Json, Settlement, State, Tx, handler, handlers};
use sqlx::PgPool;
use uuid::Uuid;

use crate::chance;
use crate::clock::{self, MILLISECOND};
use crate::history::{Line, Log, Outcome};
use crate::ledger::ADD_EFFECT;
use crate::message::{EFFECTS, Entry, LEDGER_KEY, NODES, PLAIN, STRICT, Step};
use crate::plan;
use crate::role::{Role, RoleArgs, until_it_starts};

/// Longer than the timeout of the handlers.
const HANG: Duration = Duration::from_secs(60);

/// Handlers sleep within their transactions, and insert. What the isolation is, and whether anything may be written, Postbox sees to.
const SETTINGS: &str = "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
     SET idle_session_timeout = 0";

pub(crate) async fn run(args: RoleArgs) -> anyhow::Result<()> {
    let role = Role::begin(&args, 10, SETTINGS)?;
    let instance = Instance::new(&args, &role);
    let consumer = until_it_starts(&role.stop, async || {
        Consumer::new(role.pool.clone())
            .name(&args.name)
            .lease(plan::LEASE)
            .shutdown_grace(Duration::from_secs(4))
            // So small that keys are parked and catch up.
            .window(64)
            .state(instance.clone())
            .handlers(handlers![plain, effects, strict, nodes])
            .handlers(match args.version {
                1 => Vec::new(),
                _ => handlers![newer_plain, newer_effects, newer_strict],
            })
            .start()
            .await
    });
    if let Some(consumer) = consumer.await {
        role.stop.cancelled().await;
        consumer.shutdown().await?;
    }
    Ok(())
}

#[handler(
    group = "plain",
    concurrency = 16,
    timeout = "2s",
    retry(max_attempts = 6, backoff = "exponential(50ms, 1s)")
)]
async fn plain(step: Step, delivery: Delivery, State(instance): State<Instance>) -> Result<(), HandlerError> {
    instance.plain(&step, &delivery).await
}

#[handler(
    group = "plain",
    topic = "steps",
    type = "step.newer",
    timeout = "2s",
    retry(max_attempts = 6, backoff = "exponential(50ms, 1s)")
)]
async fn newer_plain(
    Json(step): Json<Step>,
    delivery: Delivery,
    State(instance): State<Instance>,
) -> Result<(), HandlerError> {
    instance.plain(&step, &delivery).await
}

#[handler(
    group = "effects",
    concurrency = 8,
    timeout = "2s",
    retry(max_attempts = 6, backoff = "exponential(50ms, 1s)")
)]
async fn effects(
    step: Step,
    delivery: Delivery,
    tx: Tx,
    State(instance): State<Instance>,
) -> Result<(), HandlerError> {
    instance.effects(&step, &delivery, tx).await
}

#[handler(
    group = "effects",
    topic = "steps",
    type = "step.newer",
    timeout = "2s",
    retry(max_attempts = 6, backoff = "exponential(50ms, 1s)")
)]
async fn newer_effects(
    Json(step): Json<Step>,
    delivery: Delivery,
    settlement: Settlement,
    State(instance): State<Instance>,
) -> Result<(), HandlerError> {
    instance.settled_effects(&step, &delivery, settlement).await
}

#[handler(
    group = "strict",
    order = "topic",
    timeout = "2s",
    retry(backoff = "fixed(50ms)")
)]
async fn strict(
    entry: Entry,
    delivery: Delivery,
    State(instance): State<Instance>,
) -> Result<(), HandlerError> {
    instance.strict(&entry, &delivery).await
}

#[handler(
    group = "strict",
    topic = "ledger",
    type = "entry.newer",
    order = "topic",
    timeout = "2s",
    retry(backoff = "fixed(50ms)")
)]
async fn newer_strict(
    Json(entry): Json<Entry>,
    delivery: Delivery,
    State(instance): State<Instance>,
) -> Result<(), HandlerError> {
    instance.strict(&entry, &delivery).await
}

#[handler(broadcast, topic = "steps", types = ["step", "step.newer"])]
async fn nodes(Json(step): Json<Step>, delivery: Delivery, State(instance): State<Instance>) {
    let run = instance.begin(NODES, &delivery, &step.key, step.n);
    instance.work(0..3).await;
    run.end(Outcome::Ok);
}

/// How much a group's messages suffer: in the strict topic every failure holds up everything.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Harshness {
    Mild,
    Full,
}

#[derive(Clone)]
struct Instance {
    name: Arc<str>,
    seed: u64,
    log: Log,
    pool: PgPool,
    calm: Arc<AtomicBool>,
    /// When the process aborts in a handler; 0: never.
    abort_at: u64,
    throws: Arc<AtomicU64>,
}

impl Instance {
    fn new(args: &RoleArgs, role: &Role) -> Self {
        let mut rng = chance::rng(args.seed, &args.name);
        let abort_at = match rng.u32(0..100) {
            0..plan::ABORTING_PERCENT => clock::now() + rng.u64(3_000..30_000) * MILLISECOND,
            _ => 0,
        };
        let calm = Arc::new(AtomicBool::new(false));
        tokio::spawn(watch_for_calm(plan::calm_file(&args.folder), calm.clone()));
        Self {
            name: args.name.as_str().into(),
            seed: args.seed,
            log: role.log.clone(),
            pool: role.pool.clone(),
            calm,
            abort_at,
            throws: Arc::new(AtomicU64::new(rng.u64(..))),
        }
    }

    async fn plain(&self, step: &Step, delivery: &Delivery) -> Result<(), HandlerError> {
        let run = self.begin(PLAIN, delivery, &step.key, step.n);
        self.suffer(PLAIN, delivery, Harshness::Full).await?;
        run.end(Outcome::Ok);
        Ok(())
    }

    async fn effects(&self, step: &Step, delivery: &Delivery, mut tx: Tx) -> Result<(), HandlerError> {
        let run = self.begin(EFFECTS, delivery, &step.key, step.n);
        // The effect before the failure, so that a failed run has one to be rolled back.
        sqlx::query(ADD_EFFECT)
            .bind(delivery.id.as_uuid())
            .bind(&step.key)
            .bind(step.n)
            .bind(&*self.name)
            .execute(&mut *tx)
            .await?;
        self.suffer(EFFECTS, delivery, Harshness::Full).await?;
        run.end(Outcome::Ok);
        Ok(())
    }

    /// The same in a transaction that is not the consumer's. What goes wrong may do so before it settles, and between that and its commit.
    async fn settled_effects(
        &self,
        step: &Step,
        delivery: &Delivery,
        settlement: Settlement,
    ) -> Result<(), HandlerError> {
        let run = self.begin(EFFECTS, delivery, &step.key, step.n);
        // Not sqlx's, which leaves its transaction in the pool where it is dropped while it begins.
        let mut tx =
            Transaction::begin(&self.pool, "BEGIN ISOLATION LEVEL READ COMMITTED, READ WRITE").await?;
        sqlx::query(ADD_EFFECT)
            .bind(delivery.id.as_uuid())
            .bind(&step.key)
            .bind(step.n)
            .bind(&*self.name)
            .execute(&mut *tx)
            .await?;
        match step.n % 2 {
            0 => {
                self.suffer(EFFECTS, delivery, Harshness::Full).await?;
                settlement.settle(&mut tx).await?;
            }
            _ => {
                settlement.settle(&mut tx).await?;
                self.suffer(EFFECTS, delivery, Harshness::Full).await?;
            }
        }
        // Before the commit, as with a `Tx`: whether that was made, the effects say.
        run.end(Outcome::Ok);
        tx.commit().await?;
        Ok(())
    }

    async fn strict(&self, entry: &Entry, delivery: &Delivery) -> Result<(), HandlerError> {
        let run = self.begin(STRICT, delivery, LEDGER_KEY, entry.n);
        self.suffer(STRICT, delivery, Harshness::Mild).await?;
        run.end(Outcome::Ok);
        Ok(())
    }

    fn begin(&self, group: &str, delivery: &Delivery, key: &str, n: i64) -> Run {
        let run = Run {
            log: self.log.clone(),
            number: self.log.next_run(),
            ended: false,
        };
        self.log.write(&Line::Start {
            at: clock::now(),
            run: run.number,
            group: group.to_owned(),
            id: delivery.id.as_uuid(),
            key: key.to_owned(),
            n,
            attempt: delivery.attempt,
        });
        run
    }

    /// Works a while, and does what this attempt is disposed to.
    async fn suffer(
        &self,
        group: &str,
        delivery: &Delivery,
        harshness: Harshness,
    ) -> Result<(), HandlerError> {
        let disposition = Disposition::of(
            self.seed,
            group,
            delivery.id.as_uuid(),
            delivery.attempt,
            harshness,
        );
        if self.calm.load(Ordering::Relaxed) {
            self.work(0..3).await;
            return Ok(());
        }
        if self.abort_at != 0 && clock::now() > self.abort_at {
            self.log.fault("handler_abort");
            std::process::abort();
        }
        match disposition {
            Disposition::Fine => self.work(0..4).await,
            Disposition::Slow => self.work(50..400).await,
            Disposition::Fails => {
                self.work(0..10).await;
                self.log.fault("handler_fail");
                return Err(HandlerError::retry("as it was told"));
            }
            Disposition::Panics => {
                self.log.fault("handler_panic");
                panic!("as it was told");
            }
            Disposition::Hangs => {
                self.log.fault("handler_hang");
                tokio::time::sleep(HANG).await;
            }
            Disposition::Kills => {
                self.log.fault("handler_poison");
                std::process::abort();
            }
        }
        Ok(())
    }

    async fn work(&self, milliseconds: std::ops::Range<u64>) {
        let throw = self.throws.fetch_add(1, Ordering::Relaxed);
        let span = milliseconds.start + chance::throw(throw, b"work", milliseconds.end - milliseconds.start);
        if span > 0 {
            tokio::time::sleep(Duration::from_millis(span)).await;
        }
    }
}

/// What happens to an attempt at a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disposition {
    Fine,
    Slow,
    Fails,
    Panics,
    Hangs,
    /// The process with it.
    Kills,
}

impl Disposition {
    /// The same wherever it runs. Most that fail get through at the fourth attempt; a few are doomed, and are to end as dead letters.
    fn of(seed: u64, group: &str, id: Uuid, attempt: u32, harshness: Harshness) -> Self {
        let about = [group.as_bytes(), id.as_bytes()].concat();
        let throw = chance::throw(seed, &about, 10_000);
        let throw = match harshness {
            Harshness::Full => throw,
            // Rarer by a factor of four.
            Harshness::Mild => throw * 4,
        };
        match throw {
            0..100 if attempt <= 3 => Disposition::Fails,
            100..300 if attempt <= 1 => Disposition::Fails,
            300..340 if attempt <= 2 => Disposition::Panics,
            340..360 if attempt <= 1 => Disposition::Hangs,
            360..560 => Disposition::Slow,
            560..570 => Disposition::Fails,
            570 => Disposition::Kills,
            _ => Disposition::Fine,
        }
    }
}

/// A run that is under way. Dropped without an end, it was cut short: by a panic, the timeout, or a cancellation.
struct Run {
    log: Log,
    number: u64,
    ended: bool,
}

impl Run {
    fn end(mut self, how: Outcome) {
        self.write(how);
    }

    fn write(&mut self, how: Outcome) {
        self.ended = true;
        self.log.write(&Line::End {
            at: clock::now(),
            run: self.number,
            how,
        });
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.ended {
            self.write(Outcome::Dropped);
        }
    }
}

async fn watch_for_calm(file: PathBuf, calm: Arc<AtomicBool>) {
    while !file.exists() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    calm.store(true, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_dispositions_occur_and_only_the_doomed_never_get_through() {
        let dispositions = |attempt| {
            (0..20_000).map(move |n| Disposition::of(1, PLAIN, Uuid::from_u128(n), attempt, Harshness::Full))
        };
        for disposition in [
            Disposition::Fails,
            Disposition::Panics,
            Disposition::Hangs,
            Disposition::Kills,
            Disposition::Slow,
            Disposition::Fine,
        ] {
            assert!(
                dispositions(1).any(|other| other == disposition),
                "{disposition:?} never happens"
            );
        }
        let doomed = dispositions(4)
            .filter(|disposition| !matches!(disposition, Disposition::Fine | Disposition::Slow))
            .count();
        assert!((1..60).contains(&doomed), "{doomed} of 20,000");
    }
}
