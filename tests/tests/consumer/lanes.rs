//! Lanes, fact by fact: who may settle and checkpoint, where a claim goes on, whom an instance takes for dead (I4, I6).
//!
//! The other instances here are played by SQL, so every fact is made and not waited for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{Bench, PATIENCE, Step, bench, publish_steps, settled, step};
use postbox_consumer::{ConsumerHandle, Delivery, State, handler, handlers};
use postbox_testkit::eventually;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::sync::Notify;

/// Where a lane stands, and who owns it.
#[derive(Debug, PartialEq, Eq, sqlx::FromRow)]
struct Stand {
    consumer_id: Option<i32>,
    epoch: i32,
    position: i64,
    pending: Vec<i64>,
}

/// A subscription whose instances are played by SQL.
struct Stage {
    bench: Bench,
    subscription: i32,
}

impl Stage {
    async fn new(lanes: i16) -> Self {
        let bench = bench().await;
        let subscription = sqlx::query_scalar(
            "SELECT id FROM postbox.subscribe('noting', 'steps', $1, 'key', NULL, 'earliest', NULL)",
        )
        .bind(lanes)
        .fetch_one(bench.db.pool())
        .await
        .unwrap();
        Self { bench, subscription }
    }

    /// An instance with a fresh heartbeat, and the connection that holds its lock.
    async fn instance(&self) -> (i32, PgConnection) {
        let mut session = self.bench.db.connect().await.unwrap();
        let id: i32 = sqlx::query_scalar(
            "INSERT INTO postbox.consumer (id, name, pid, subscriptions, lease) \
             SELECT count(*) + 1, 'played', 0, ARRAY[$1], '1 hour' FROM postbox.consumer RETURNING id",
        )
        .bind(self.subscription)
        .fetch_one(&mut session)
        .await
        .unwrap();
        sqlx::query("SELECT pg_advisory_lock(1347571763, $1)")
            .bind(id)
            .execute(&mut session)
            .await
            .unwrap();
        (id, session)
    }

    /// Claims a lane whose last owner did not die, as who saw this epoch; returns the new one, or `None` if the lane has changed since.
    async fn try_claim(&self, consumer: i32, lane: i16, seen: i32) -> Option<i32> {
        sqlx::query_scalar(
            "SELECT epoch FROM postbox.claim($1, $2, ARRAY[$3], ARRAY[$4::integer], ARRAY[false])",
        )
        .bind(consumer)
        .bind(self.subscription)
        .bind(lane)
        .bind(seen)
        .fetch_optional(self.bench.db.pool())
        .await
        .unwrap()
    }

    async fn claim(&self, consumer: i32, lane: i16, seen: i32) -> i32 {
        self.try_claim(consumer, lane, seen)
            .await
            .expect("the epoch is the lane's")
    }

    /// Checkpoints lane 0; says whether it was accepted.
    async fn checkpoint(&self, consumer: i32, epoch: i32, position: i64, pending: &[i64]) -> bool {
        let accepted: i64 = sqlx::query_scalar(
            "SELECT postbox.checkpoint($1, ARRAY[$2], ARRAY[0::smallint], ARRAY[$3], ARRAY[$4], \
                array_fill($2, ARRAY[cardinality($5)]), $5)",
        )
        .bind(consumer)
        .bind(self.subscription)
        .bind(epoch)
        .bind(position)
        .bind(pending)
        .fetch_one(self.bench.db.pool())
        .await
        .unwrap();
        accepted == 1
    }

    /// Settles in lane 0, as the last statement of a transactional handler does; `false` if it is refused as stale.
    async fn settle(&self, consumer: i32, epoch: i32, offsets: &[i64]) -> bool {
        for offset in offsets {
            let settled = sqlx::query("CALL postbox.settle($1, $2, 0, $3, $4)")
                .bind(consumer)
                .bind(self.subscription)
                .bind(epoch)
                .bind(offset)
                .execute(self.bench.db.pool())
                .await;
            match settled {
                Ok(_) => {}
                Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("PB001") => {
                    return false;
                }
                Err(error) => panic!("{error}"),
            }
        }
        true
    }

    async fn stand(&self, lane: i16) -> Stand {
        sqlx::query_as("SELECT * FROM postbox.lane_state($1, $2)")
            .bind(self.subscription)
            .bind(lane)
            .fetch_one(self.bench.db.pool())
            .await
            .unwrap()
    }

    /// Waits until a lane stands as it should.
    async fn stands(&self, lane: i16, wanted: impl Fn(&Stand) -> bool) -> Stand {
        eventually(PATIENCE, || async {
            let stand = self.stand(lane).await;
            if wanted(&stand) {
                Ok(stand)
            } else {
                Err(format!("{stand:?}"))
            }
        })
        .await
    }

    async fn sequenced(&self, head: i64) {
        eventually(PATIENCE, || async {
            let next = self.bench.number("SELECT postbox.next_offset('steps')").await;
            if next == head { Ok(()) } else { Err(next) }
        })
        .await;
    }

    async fn start(&self, offsets: &Offsets) -> ConsumerHandle {
        self.bench
            .consumer(handlers![noting])
            .state(offsets.clone())
            .start()
            .await
            .unwrap()
    }
}

/// The offsets that were handled.
#[derive(Clone, Default)]
struct Offsets(Arc<Mutex<Vec<i64>>>);

impl Offsets {
    async fn have(&self, count: usize) -> Vec<i64> {
        eventually(PATIENCE, || async {
            let mut offsets = self.0.lock().unwrap().clone();
            offsets.sort_unstable();
            if offsets.len() >= count {
                Ok(offsets)
            } else {
                Err(format!("{offsets:?}"))
            }
        })
        .await
    }
}

#[handler(group = "noting")]
async fn noting(_step: Step, delivery: Delivery, State(offsets): State<Offsets>) {
    offsets.0.lock().unwrap().push(delivery.offset.get());
}

/// A message for each key, so that they do not wait for one another.
fn one_a_key(count: i64) -> Vec<Step> {
    (0..count).map(|key| step(key, 0)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_saw_a_lane_free_the_first_to_claim_has_it() {
    let stage = Stage::new(1).await;
    let (first, _session) = stage.instance().await;
    let (second, _other_session) = stage.instance().await;
    let seen = stage.stand(0).await.epoch;
    let epoch = stage.claim(first, 0, seen).await;
    assert_eq!(stage.try_claim(second, 0, seen).await, None);
    let stand = stage.stand(0).await;
    assert_eq!((stand.consumer_id, stand.epoch), (Some(first), epoch));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_needs_the_owner_its_epoch_and_its_lock() {
    let stage = Stage::new(1).await;
    let (owner, session) = stage.instance().await;
    let (other, _other_session) = stage.instance().await;
    let first = stage.claim(owner, 0, 0).await;
    assert!(stage.settle(owner, first, &[0]).await);
    // As after a commit whose answer was lost: the same owner, anew.
    let second = stage.claim(owner, 0, first).await;
    assert!(!stage.settle(owner, first, &[1]).await, "of an older epoch");
    assert!(!stage.settle(other, second, &[1]).await, "of another instance");
    assert!(stage.settle(owner, second, &[1]).await);
    session.close().await.unwrap();
    eventually(PATIENCE, || async {
        let live: bool = sqlx::query_scalar("SELECT postbox.is_live($1)")
            .bind(owner)
            .fetch_one(stage.bench.db.pool())
            .await
            .unwrap();
        if live { Err("it is alive") } else { Ok(()) }
    })
    .await;
    assert!(
        !stage.settle(owner, second, &[2]).await,
        "without a session, although nobody has claimed the lane"
    );
}

/// In the first subscription's lane 0, which the first instance has claimed once.
const SETTLE_5: &str = "CALL postbox.settle(1, 1, 0, 1, '5')";

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_that_is_not_committed_holds_off_a_claim_and_waits_for_one() {
    let stage = Stage::new(1).await;
    let (owner, _session) = stage.instance().await;
    let (other, _other_session) = stage.instance().await;
    let epoch = stage.claim(owner, 0, 0).await;
    assert_eq!((owner, stage.subscription, epoch), (1, 1, 1));
    let pool = stage.bench.db.pool();

    let mut settling = pool.begin().await.unwrap();
    sqlx::raw_sql(SETTLE_5).execute(&mut *settling).await.unwrap();
    assert_eq!(stage.try_claim(other, 0, epoch).await, None);
    settling.commit().await.unwrap();
    let claim = "SELECT done FROM postbox.claim(2, 1, '{0}', '{1}', '{f}')";
    let mut claiming = pool.begin().await.unwrap();
    let done: Vec<i64> = sqlx::query_scalar(claim).fetch_one(&mut *claiming).await.unwrap();
    assert_eq!(done, [5], "the next owner need not run it");

    // Its check is newer than the claim that it waits for.
    let settling = tokio::spawn({
        let pool = pool.clone();
        async move { sqlx::raw_sql(SETTLE_5).execute(&pool).await }
    });
    eventually(PATIENCE, async || {
        let waiting = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database() \
            WHERE l.locktype = 'advisory' AND l.classid = 1347571762 AND NOT l.granted";
        match stage.bench.number(waiting).await {
            1 => Ok(()),
            waiting => Err(format!("{waiting} wait")),
        }
    })
    .await;
    claiming.commit().await.unwrap();
    let refused = settling.await.unwrap().unwrap_err();
    assert!(refused.to_string().contains("no longer owned"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_in_another_isolation_is_refused() {
    let stage = Stage::new(1).await;
    let (owner, _session) = stage.instance().await;
    stage.claim(owner, 0, 0).await;
    for (isolation, allowed) in [
        ("REPEATABLE READ", false),
        ("SERIALIZABLE", false),
        ("READ COMMITTED", true),
    ] {
        let mut tx = stage.bench.db.pool().begin().await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(format!(
            "SET TRANSACTION ISOLATION LEVEL {isolation}"
        )))
        .execute(&mut *tx)
        .await
        .unwrap();
        match sqlx::raw_sql(SETTLE_5).execute(&mut *tx).await {
            Ok(_) => assert!(allowed, "{isolation}"),
            Err(error) => assert!(
                !allowed
                    && error
                        .as_database_error()
                        .and_then(|error| error.code())
                        .as_deref()
                        == Some("PB008"),
                "{isolation}: {error}"
            ),
        }
    }
}

/// An owner leaves lanes that it is about to release out of its reports, and may die before it releases them.
#[tokio::test(flavor = "multi_thread")]
async fn a_lane_whose_owner_died_before_it_released_it_goes_on_from_the_last_checkpoint_that_has_it() {
    let stage = Stage::new(2).await;
    let (owner, _session) = stage.instance().await;
    let (next, _next_session) = stage.instance().await;
    let first = stage.claim(owner, 0, 0).await;
    let other = stage.claim(owner, 1, 0).await;
    assert!(stage.checkpoint(owner, first, 10, &[3]).await);
    // Without lane 0 from now on.
    for position in [20, 30] {
        sqlx::query_scalar::<_, i64>(
            "SELECT postbox.checkpoint($1, ARRAY[$2], ARRAY[1::smallint], ARRAY[$3], ARRAY[$4], '{}', '{}')",
        )
        .bind(owner)
        .bind(stage.subscription)
        .bind(other)
        .bind(position)
        .fetch_one(stage.bench.db.pool())
        .await
        .unwrap();
    }
    let stand = stage.stand(0).await;
    assert_eq!((stand.position, &*stand.pending), (10, [3].as_slice()));
    let second = stage.claim(next, 0, first).await;
    let stand = stage.stand(0).await;
    assert_eq!(
        (stand.position, &*stand.pending),
        (10, [3].as_slice()),
        "and so does who claims it"
    );
    // Who owns it again does not go on from what it wrote under its earlier ownership.
    assert!(stage.checkpoint(next, second, 12, &[]).await);
    let third = stage.claim(owner, 0, second).await;
    assert_eq!(stage.stand(0).await.position, 12);
    assert!(stage.checkpoint(owner, third, 15, &[]).await);
    assert_eq!(stage.stand(0).await.position, 15);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_checkpoint_is_refused_and_one_that_slipped_in_is_not_read() {
    let stage = Stage::new(1).await;
    let (owner, _session) = stage.instance().await;
    let (other, _other_session) = stage.instance().await;
    let first = stage.claim(owner, 0, 0).await;
    assert!(stage.checkpoint(owner, first, 10, &[]).await);
    let second = stage.claim(owner, 0, first).await;
    assert_eq!(stage.stand(0).await.position, 10, "the claim goes on from it");
    assert!(
        !stage.checkpoint(owner, first, 20, &[]).await,
        "of an older epoch"
    );
    assert!(
        !stage.checkpoint(other, second, 20, &[]).await,
        "of another instance"
    );
    assert_eq!(stage.stand(0).await.position, 10);
    // Its check and the claim may be at the same time, so it may be there all the same.
    sqlx::query(
        "INSERT INTO postbox.checkpoint (subscription_id, consumer_id, lanes, epochs, positions, pending) \
         VALUES ($1, $2, '{0}', ARRAY[$3], '{30}', '{}')",
    )
    .bind(stage.subscription)
    .bind(owner)
    .bind(first)
    .execute(stage.bench.db.pool())
    .await
    .unwrap();
    assert_eq!(stage.stand(0).await.position, 10);
    assert!(stage.checkpoint(owner, second, 20, &[]).await);
    assert_eq!(stage.stand(0).await.position, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_owner_runs_what_was_not_settled_and_nothing_else() {
    let stage = Stage::new(1).await;
    let (owner, session) = stage.instance().await;
    let epoch = stage.claim(owner, 0, 0).await;
    publish_steps(stage.bench.db.pool(), &one_a_key(8)).await;
    stage.sequenced(8).await;
    // 1 and 3 were still running when it wrote its last checkpoint; 3 and 6 committed after that.
    assert!(stage.checkpoint(owner, epoch, 5, &[1, 3]).await);
    assert!(stage.settle(owner, epoch, &[3, 6]).await);
    session.close().await.unwrap();
    stage.bench.sql("DELETE FROM postbox.consumer").await;

    let offsets = Offsets::default();
    let _successor = stage.start(&offsets).await;
    assert_eq!(offsets.have(3).await, [1, 5, 7]);
    publish_steps(stage.bench.db.pool(), &one_a_key(1)).await;
    assert_eq!(offsets.have(4).await, [1, 5, 7, 8]);
    settled(stage.bench.db.pool(), "noting").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_are_taken_a_second_after_the_lock_went_or_when_the_lease_ended_and_not_before() {
    let stage = Stage::new(2).await;
    let (locked, _session) = stage.instance().await;
    let (unlocked, session) = stage.instance().await;
    session.close().await.unwrap();
    stage.claim(locked, 0, 0).await;
    stage.claim(unlocked, 1, 0).await;
    let offsets = Offsets::default();
    let begun = Instant::now();
    let _instance = stage.start(&offsets).await;
    stage.stands(1, |stand| stand.consumer_id != Some(unlocked)).await;
    // Within this time an instance that lost nothing but its connection cancels its handlers.
    let after = begun.elapsed();
    assert!(after >= Duration::from_secs(1), "taken after {after:?}");
    assert_eq!(
        stage.stand(0).await.consumer_id,
        Some(locked),
        "who holds its lock and has a lease is alive"
    );
    // Frozen, or its host is gone: the server does not know, and holds the lock for it. Its heartbeat's number does not change for its lease.
    sqlx::query("UPDATE postbox.consumer SET lease = '2 seconds' WHERE id = $1")
        .bind(locked)
        .execute(stage.bench.db.pool())
        .await
        .unwrap();
    stage.stands(0, |stand| stand.consumer_id != Some(locked)).await;
}

/// Holds up messages of the key "held" until the test lets them go.
#[derive(Clone, Default)]
struct Hold {
    arrived: Arc<Notify>,
    go_on: Arc<Notify>,
    begun: Arc<AtomicU64>,
    ended: Arc<AtomicU64>,
}

#[handler(group = "noting")]
async fn holding(step: Step, State(hold): State<Hold>) {
    if step.key == "held" {
        hold.begun.fetch_add(1, Ordering::SeqCst);
        hold.arrived.notify_one();
        hold.go_on.notified().await;
        hold.ended.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_checkpoint_passes_a_message_whose_handler_still_runs() {
    let stage = Stage::new(1).await;
    let hold = Hold::default();
    let _consumer = stage
        .bench
        .consumer(handlers![holding])
        .state(hold.clone())
        .start()
        .await
        .unwrap();
    let mut all = vec![step("held", 0), step("held", 1)];
    all.extend(one_a_key(20));
    publish_steps(stage.bench.db.pool(), &all).await;
    hold.arrived.notified().await;
    // The running one, and the one behind it.
    stage
        .stands(0, |stand| stand.position == 22 && stand.pending == [0, 1])
        .await;
    hold.go_on.notify_one();
    hold.arrived.notified().await;
    let stand = stage.stands(0, |stand| stand.pending.len() < 2).await;
    assert_eq!(stand.pending, [1]);
    hold.go_on.notify_one();
    stage.stands(0, |stand| stand.pending.is_empty()).await;
    assert_eq!(hold.begun.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_runs_at_shutdown_may_finish_and_is_settled() {
    let stage = Stage::new(1).await;
    let hold = Hold::default();
    let consumer = stage
        .bench
        .consumer(handlers![holding])
        .state(hold.clone())
        .start()
        .await
        .unwrap();
    publish_steps(stage.bench.db.pool(), &[step("held", 0), step("held", 1)]).await;
    hold.arrived.notified().await;
    let let_go = async {
        // Long after the order to stop has arrived, and well within the grace.
        tokio::time::sleep(Duration::from_secs(2)).await;
        hold.go_on.notify_one();
    };
    let (stopped, ()) = tokio::join!(consumer.shutdown(), let_go);
    stopped.unwrap();
    assert_eq!(hold.ended.load(Ordering::SeqCst), 1);
    let stand = stage.stand(0).await;
    assert_eq!(stand.consumer_id, None);
    let first_due = stand.pending.iter().copied().min().unwrap_or(stand.position);
    assert_eq!(first_due, 1, "its successor was not begun: {stand:?}");
    assert_eq!(hold.begun.load(Ordering::SeqCst), 1);
}
