//! A producer as a process: transactions that commit, abort, dawdle, and are left hanging.

use std::time::Duration;

use fastrand::Rng;
use postbox::{Outgoing, Publish};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Postgres, Transaction};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::chance;
use crate::clock;
use crate::history::{Ended, Line};
use crate::ledger::{ADD_ENTRY, NEXT_NUMBER};
use crate::message::{Entry, LEDGER, LEDGER_KEY, NEWER_ENTRY, NEWER_STEP, STEPS, Step};
use crate::plan;
use crate::role::{Role, RoleArgs};

/// Transactions at once.
const WORKERS: u64 = 6;
/// The mean pause between two transactions of a worker.
const PAUSE_MS: u64 = 40;
/// Longer than any transaction here that is not cut off.
const LIMIT: Duration = Duration::from_secs(12);
const COMMIT_LIMIT: Duration = Duration::from_secs(6);

/// What is acknowledged is durable. A lock is not waited for for long, lest everybody queues up behind one that dawdles; and what is left of a
/// transaction whose client is not heard any more ends by itself, later than one that is only frozen.
const SETTINGS: &str = "SET default_transaction_isolation = 'read committed'; SET default_transaction_read_only = off; \
     SET default_transaction_deferrable = off; SET statement_timeout = 0; SET lock_timeout = '300ms'; \
     SET idle_in_transaction_session_timeout = '15s'; SET idle_session_timeout = 0; SET synchronous_commit = on; SET enable_indexscan = on";

pub(crate) async fn run(args: RoleArgs) -> anyhow::Result<()> {
    let role = Role::begin(&args, WORKERS as u32, SETTINGS)?;
    let mut workers = JoinSet::new();
    for number in 0..WORKERS {
        let worker = Worker {
            pool: role.pool.clone(),
            log: role.log.clone(),
            // Numbers of transactions do not repeat within the process.
            tx: number << 32,
            rng: chance::rng(args.seed, &format!("{} {number}", args.name)),
            name: format!("{}-{number}", args.name),
        };
        let stop = role.stop.clone();
        workers.spawn(async move {
            let mut worker = worker;
            while !stop.is_cancelled() {
                if let Err(error) = worker.transaction().await {
                    tracing::info!(%error, "a transaction failed");
                }
                let pause = Duration::from_millis(worker.rng.u64(0..2 * PAUSE_MS));
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = tokio::time::sleep(pause) => {}
                }
            }
        });
    }
    while let Some(ended) = workers.join_next().await {
        ended?;
    }
    Ok(())
}

struct Worker {
    pool: sqlx::PgPool,
    log: crate::history::Log,
    tx: u64,
    rng: Rng,
    name: String,
}

/// What a transaction is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    /// Rolled back after publishing.
    Aborted,
    /// Held open for seconds before the commit, so that later ones overtake it.
    Delayed,
    /// Has its transaction id long before it publishes.
    Early,
    /// Publishes in savepoints, of which some are rolled back.
    Savepoints,
    /// Prepared, and committed or rolled back later.
    TwoPhase,
    /// The connection is dropped with the transaction open.
    Abandoned,
}

impl Kind {
    fn throw(rng: &mut Rng) -> Self {
        match rng.u32(0..100) {
            0..70 => Kind::Plain,
            70..78 => Kind::Aborted,
            78..81 => Kind::Delayed,
            81..84 => Kind::Early,
            84..92 => Kind::Savepoints,
            92..97 => Kind::TwoPhase,
            _ => Kind::Abandoned,
        }
    }

    fn fault(self) -> Option<&'static str> {
        match self {
            Kind::Plain | Kind::Savepoints => None,
            Kind::Aborted => Some("producer_abort"),
            Kind::Delayed => Some("producer_delay"),
            Kind::Early => Some("producer_early_xid"),
            Kind::TwoPhase => Some("producer_two_phase"),
            Kind::Abandoned => Some("producer_abandon"),
        }
    }
}

impl Worker {
    async fn transaction(&mut self) -> anyhow::Result<()> {
        let mut connection = self.pool.acquire().await?;
        self.tx += 1;
        let kind = Kind::throw(&mut self.rng);
        let result = self.work(&mut connection, kind).await;
        if result.is_err() || kind == Kind::Abandoned {
            // Whatever it is in the middle of.
            connection.close_on_drop();
        }
        result
    }

    async fn work(&mut self, connection: &mut PgConnection, kind: Kind) -> anyhow::Result<()> {
        let mut tx = tokio::time::timeout(LIMIT, connection.begin()).await??;
        match tokio::time::timeout(LIMIT, self.publish(&mut tx, kind)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.ended(Ended::Aborted);
                return Err(error);
            }
            Err(elapsed) => {
                self.ended(Ended::Aborted);
                return Err(elapsed.into());
            }
        }
        if let Some(fault) = kind.fault() {
            self.log.fault(fault);
        }
        let (how, result) = match kind {
            Kind::Abandoned => (Ended::Aborted, Ok(())),
            Kind::Aborted => {
                let rolled_back = tokio::time::timeout(COMMIT_LIMIT, tx.rollback()).await;
                (Ended::Aborted, flat(rolled_back))
            }
            Kind::TwoPhase => tokio::time::timeout(LIMIT, self.two_phase(tx))
                .await
                .unwrap_or_else(|elapsed| (Ended::Unknown, Err(elapsed.into()))),
            _ => match flat(tokio::time::timeout(COMMIT_LIMIT, tx.commit()).await) {
                Ok(()) => (Ended::Committed, Ok(())),
                Err(error) => (Ended::Unknown, Err(error)),
            },
        };
        self.ended(how);
        result
    }

    fn ended(&self, how: Ended) {
        self.log.write(&Line::Ended { tx: self.tx, how });
    }

    /// One or two keys, in their order, so that transactions do not deadlock; now and then an entry of the strict topic after them.
    async fn publish(&mut self, tx: &mut Transaction<'_, Postgres>, kind: Kind) -> anyhow::Result<()> {
        if kind == Kind::TwoPhase {
            sqlx::query("SET LOCAL postbox.two_phase = on")
                .execute(&mut **tx)
                .await?;
        }
        if kind == Kind::Early {
            sqlx::query("SELECT pg_current_xact_id()")
                .execute(&mut **tx)
                .await?;
            self.dawdle(100..1_500).await;
        }
        let mut keys: Vec<u64> = (0..self.rng.u64(1..=2))
            .map(|_| self.rng.u64(0..plan::KEYS))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            let key = plan::key(key);
            for _ in 0..self.rng.u64(1..=2) {
                let in_savepoint = kind == Kind::Savepoints && self.rng.bool();
                if in_savepoint {
                    let mut savepoint = tx.begin().await?;
                    let keep = self.rng.bool();
                    self.step(&mut savepoint, &key, keep).await?;
                    if keep {
                        savepoint.commit().await?;
                    } else {
                        self.log.fault("savepoint_rollback");
                        savepoint.rollback().await?;
                    }
                } else {
                    self.step(tx, &key, true).await?;
                }
            }
        }
        // Entries have one row for all, which is not to be held for long.
        let is_short = matches!(kind, Kind::Plain | Kind::Aborted | Kind::Savepoints);
        if is_short && self.rng.u32(0..100) < 15 {
            self.entry(tx).await?;
        }
        match kind {
            Kind::Delayed => self.dawdle(500..4_000).await,
            _ => self.dawdle(0..6).await,
        }
        Ok(())
    }

    async fn step(
        &mut self,
        tx: &mut Transaction<'_, Postgres>,
        key: &str,
        stays: bool,
    ) -> anyhow::Result<()> {
        let n: i64 = sqlx::query_scalar(NEXT_NUMBER)
            .bind(key)
            .fetch_one(&mut **tx)
            .await?;
        let step = Step {
            key: key.to_owned(),
            n,
        };
        let mut message = Outgoing::from(&step);
        if n % 4 == 3 {
            message = message.message_type(NEWER_STEP);
        }
        let id = tx.publish(message).await?.as_uuid();
        self.note(tx, id, STEPS, key, n, stays).await
    }

    async fn entry(&mut self, tx: &mut Transaction<'_, Postgres>) -> anyhow::Result<()> {
        let n: i64 = sqlx::query_scalar(NEXT_NUMBER)
            .bind(LEDGER_KEY)
            .fetch_one(&mut **tx)
            .await?;
        let mut message = Outgoing::from(&Entry { n });
        if n % 8 == 7 {
            message = message.message_type(NEWER_ENTRY);
        }
        let id = tx.publish(message).await?.as_uuid();
        self.note(tx, id, LEDGER, LEDGER_KEY, n, true).await
    }

    /// In the history before the commit, and in the business table with it. A message whose savepoint is rolled back is in neither:
    /// nobody may ever see it.
    async fn note(
        &self,
        tx: &mut PgConnection,
        id: Uuid,
        topic: &str,
        key: &str,
        n: i64,
        stays: bool,
    ) -> anyhow::Result<()> {
        sqlx::query(ADD_ENTRY)
            .bind(id)
            .bind(topic)
            .bind(key)
            .bind(n)
            .execute(tx)
            .await?;
        if stays {
            self.log.write(&Line::Publish {
                at: clock::now(),
                tx: self.tx,
                id,
                topic: topic.to_owned(),
                key: key.to_owned(),
                n,
            });
        }
        Ok(())
    }

    /// If it does not get to the end, whoever looks after the server decides.
    async fn two_phase(&mut self, mut tx: Transaction<'_, Postgres>) -> (Ended, anyhow::Result<()>) {
        let name = format!("{}-{}", self.name, self.tx);
        let work = async {
            sqlx::raw_sql(AssertSqlSafe(format!("PREPARE TRANSACTION '{name}'")))
                .execute(&mut *tx)
                .await?;
            self.dawdle(0..1_500).await;
            let commits = self.rng.u32(0..4) > 0;
            let verb = if commits { "COMMIT" } else { "ROLLBACK" };
            sqlx::raw_sql(AssertSqlSafe(format!("{verb} PREPARED '{name}'")))
                .execute(&mut *tx)
                .await?;
            // For the driver; there is no transaction any more.
            tx.commit().await?;
            anyhow::Ok(commits)
        };
        match work.await {
            Ok(true) => (Ended::Committed, Ok(())),
            Ok(false) => (Ended::Aborted, Ok(())),
            Err(error) => (Ended::Unknown, Err(error)),
        }
    }

    async fn dawdle(&mut self, span: std::ops::Range<u64>) {
        tokio::time::sleep(Duration::from_millis(self.rng.u64(span))).await;
    }
}

fn flat(result: Result<Result<(), sqlx::Error>, tokio::time::error::Elapsed>) -> anyhow::Result<()> {
    Ok(result??)
}
