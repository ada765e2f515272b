//! What the consumer suites share: a bench with a dispatcher, a history of runs, and publishing.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postbox::{Message, Outgoing, Publish};
use postbox_consumer::{Consumer, ConsumerHandle, HandlerDefinition};
use postbox_dispatcher::{Dispatcher, DispatcherHandle};
use postbox_testkit::{TestDatabase, eventually};
use serde::{Deserialize, Serialize};
use sqlx::PgPool;

/// How long anything may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A numbered message of a key.
#[derive(Debug, Clone, Serialize, Deserialize, Message)]
#[message(topic = "steps", type = "step", key = key)]
pub struct Step {
    pub key: String,
    pub n: i64,
}

pub fn step(key: impl ToString, n: i64) -> Step {
    Step {
        key: key.to_string(),
        n,
    }
}

/// A database with a dispatcher.
pub struct Bench {
    pub db: TestDatabase,
    pub dispatcher: DispatcherHandle,
}

pub async fn bench() -> Bench {
    let db = TestDatabase::new().await.expect("a database");
    let dispatcher = Dispatcher::new(db.pool().clone())
        .start()
        .await
        .expect("a dispatcher");
    Bench { db, dispatcher }
}

impl Bench {
    pub fn pool(&self) -> PgPool {
        self.db.pool().clone()
    }

    pub fn consumer(&self, handlers: Vec<HandlerDefinition>) -> Consumer {
        Consumer::new(self.pool())
            .handlers(handlers)
            .shutdown_grace(Duration::from_secs(5))
    }

    pub async fn start(&self, handlers: Vec<HandlerDefinition>) -> ConsumerHandle {
        self.consumer(handlers)
            .start()
            .await
            .expect("the consumer starts")
    }

    pub async fn publish<M: Into<Outgoing>>(&self, messages: impl IntoIterator<Item = M>) {
        publish(self.db.pool(), messages).await;
    }

    pub async fn publish_one(&self, step: &Step) {
        self.publish([step]).await;
    }

    pub async fn sql(&self, sql: &'static str) {
        sqlx::raw_sql(sql)
            .execute(self.db.pool())
            .await
            .expect("the statement runs");
    }

    pub async fn number(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql)
            .fetch_one(self.db.pool())
            .await
            .expect("the query runs")
    }
}

pub async fn publish<M: Into<Outgoing>>(pool: &PgPool, messages: impl IntoIterator<Item = M>) {
    let mut tx = pool.begin().await.expect("a transaction");
    tx.publish_all(messages).await.expect("published");
    tx.commit().await.expect("committed");
}

/// One run of a handler, as the handler saw it.
#[derive(Debug, Clone)]
pub struct Run {
    pub key: String,
    pub n: i64,
    pub began: Instant,
    pub ended: Instant,
}

/// What handlers did, in the order in which they ended.
#[derive(Clone, Default)]
pub struct History(Arc<Mutex<Vec<Run>>>);

impl History {
    pub fn note(&self, step: &Step, began: Instant) {
        let run = Run {
            key: step.key.clone(),
            n: step.n,
            began,
            ended: Instant::now(),
        };
        self.0.lock().unwrap().push(run);
    }

    pub fn runs(&self) -> Vec<Run> {
        self.0.lock().unwrap().clone()
    }

    pub fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// The numbers of a key, in the order of their runs.
    pub fn of(&self, key: &str) -> Vec<i64> {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|run| run.key == key)
            .map(|run| run.n)
            .collect()
    }

    pub async fn has(&self, count: usize) {
        eventually(PATIENCE, || async {
            let len = self.len();
            if len >= count {
                Ok(())
            } else {
                Err(format!("{len} of {count} runs"))
            }
        })
        .await;
    }

    pub fn by_key(&self) -> HashMap<String, Vec<Run>> {
        let mut keys: HashMap<String, Vec<Run>> = HashMap::new();
        for run in self.runs() {
            keys.entry(run.key.clone()).or_default().push(run);
        }
        keys
    }

    /// Every key's numbers are 0, 1, 2, … and no two of its runs overlapped.
    pub fn assert_in_order_and_alone(&self, keys: usize, each: i64) {
        let by_key = self.by_key();
        assert_eq!(by_key.len(), keys);
        for (key, runs) in by_key {
            let numbers: Vec<i64> = runs.iter().map(|run| run.n).collect();
            assert_eq!(numbers, (0..each).collect::<Vec<_>>(), "order of key {key}");
            for pair in runs.windows(2) {
                assert!(
                    pair[0].ended <= pair[1].began,
                    "runs of key {key} overlap: {pair:?}"
                );
            }
        }
    }

    /// The most runs that were going on at once.
    pub fn most_at_once(&self) -> usize {
        let runs = self.runs();
        runs.iter()
            .map(|run| {
                runs.iter()
                    .filter(|o| o.began <= run.began && run.began < o.ended)
                    .count()
            })
            .max()
            .unwrap_or(0)
    }
}

/// `keys` × `each` steps, the keys taking turns.
pub fn steps(keys: i64, each: i64) -> Vec<Step> {
    (0..each)
        .flat_map(|n| (0..keys).map(move |key| step(key, n)))
        .collect()
}

/// References, because that is what is published.
pub async fn publish_steps(pool: &PgPool, steps: &[Step]) {
    publish(pool, steps.iter()).await;
}

/// Of one moment, since what is parked may be pending at the next, and the reverse.
const LEFT: &str = "SELECT \
    (SELECT count(*) FROM postbox.outbox) - coalesce((SELECT sum(postbox.next_offset(name)) FROM postbox.topic), 0)::bigint, \
    (SELECT max(b.next_offset - b.position) FROM postbox.subscription s CROSS JOIN LATERAL postbox.backlog(s.id) b WHERE s.group_name = $1), \
    (SELECT count(*) FROM postbox.redelivery r JOIN postbox.subscription s ON s.id = r.subscription_id \
        WHERE s.group_name = $1 AND r.state <> 'halted') \
    + (SELECT count(*) FROM postbox.parked_key k JOIN postbox.subscription s ON s.id = k.subscription_id WHERE s.group_name = $1)";

/// Waits until a group has settled everything that is sequenced now.
pub async fn settled(pool: &PgPool, group: &str) {
    eventually(PATIENCE, || async {
        // What failed has a row of its own; one that waits for an operator would wait for ever.
        let (unsequenced, lag, held): (i64, Option<i64>, i64) = sqlx::query_as(LEFT)
            .bind(group)
            .fetch_one(pool)
            .await
            .map_err(|error| error.to_string())?;
        match lag {
            Some(0) if unsequenced == 0 && held == 0 => Ok(()),
            Some(lag) => Err(format!("{unsequenced} not sequenced, lag {lag}, {held} held")),
            None => Err("no such group".to_owned()),
        }
    })
    .await;
}
