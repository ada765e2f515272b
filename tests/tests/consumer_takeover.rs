//! Instances as processes of their own: killed, frozen, joining, leaving (I4, I6).
#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use postbox::Outgoing;
use postbox_consumer::{Consumer, HandlerError, Json, State, Tx, handler, handlers};
use postbox_testkit::eventually;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use support::{Bench, PATIENCE, Step, bench, publish_steps, settled, step, steps};

const TABLES: &str = "CREATE TABLE run (id bigserial PRIMARY KEY, key text, n bigint, instance text, \
        began timestamptz NOT NULL DEFAULT clock_timestamp(), ended timestamptz);
    CREATE TABLE effect (id bigserial, key text, n bigint, instance text)";

/// Pairs of runs of one key that overlapped. A run that never ended was killed with its instance.
const OVERLAPS: &str = "SELECT count(*) FROM run a JOIN run b ON a.key = b.key AND a.id < b.id \
    AND a.began < b.ended AND b.began < a.ended";

/// A key goes on with its next number, or back to one that was run before and not ended or not recorded.
const REORDERED: &str = "SELECT count(*) FROM (SELECT n, \
        coalesce(max(n) OVER (PARTITION BY key ORDER BY began, id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), -1) AS reached \
    FROM run) r WHERE n > reached + 1";

/// Messages without a run that ended, each with the runs that it had.
const LOST: &str = "SELECT format('%s %s: %s', m.key, m.n, \
        (SELECT string_agg(format('by %s at %s', r.instance, r.began), ', ' ORDER BY r.id) FROM run r WHERE r.key = m.key AND r.n = m.n)) \
    FROM (SELECT k::text AS key, n FROM generate_series(0, $1 - 1) k, generate_series(0, $2 - 1) n) m \
    WHERE NOT EXISTS (SELECT FROM run r WHERE r.key = m.key AND r.n = m.n AND r.ended IS NOT NULL)";

const WRONG_EFFECTS: &str = "SELECT count(*) FROM (SELECT key, n, count(*) OVER (PARTITION BY key, n) AS times, \
    row_number() OVER (PARTITION BY key ORDER BY id) - 1 AS place FROM effect) e WHERE times <> 1 OR place <> n";

#[derive(Clone)]
struct Instance {
    name: String,
    pool: PgPool,
}

#[handler(group = "runs", concurrency = 8)]
async fn runs(step: Step, State(instance): State<Instance>) -> Result<(), HandlerError> {
    let id: i64 = sqlx::query_scalar("INSERT INTO run (key, n, instance) VALUES ($1, $2, $3) RETURNING id")
        .bind(&step.key)
        .bind(step.n)
        .bind(&instance.name)
        .fetch_one(&instance.pool)
        .await?;
    tokio::time::sleep(Duration::from_millis(3)).await;
    sqlx::query("UPDATE run SET ended = clock_timestamp() WHERE id = $1")
        .bind(id)
        .execute(&instance.pool)
        .await?;
    Ok(())
}

/// A message of the key `poison` kills its process.
#[handler(
    group = "fragile",
    topic = "fragile",
    concurrency = 8,
    retry(max_attempts = 3, backoff = "fixed(50ms)")
)]
async fn fragile(step: Json<Step>, State(instance): State<Instance>) -> Result<(), HandlerError> {
    if step.0.key == "poison" && step.0.n == 1 {
        std::process::abort();
    }
    sqlx::query("INSERT INTO effect (key, n, instance) VALUES ($1, $2, $3)")
        .bind(&step.0.key)
        .bind(step.0.n)
        .bind(&instance.name)
        .execute(&instance.pool)
        .await?;
    Ok(())
}

#[handler(group = "effects", concurrency = 4)]
async fn effects(step: Step, mut tx: Tx, State(instance): State<Instance>) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO effect (key, n, instance) VALUES ($1, $2, $3)")
        .bind(&step.key)
        .bind(step.n)
        .bind(&instance.name)
        .execute(&mut *tx)
        .await?;
    Ok(())
}

/// What a child process runs: not a test, but the other half of the tests here.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by the other tests as a process of its own"]
async fn instance() {
    let (Ok(url), Ok(name)) = (std::env::var("TAKEOVER_URL"), std::env::var("TAKEOVER_NAME")) else {
        return;
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let pool = PgPoolOptions::new()
        .max_connections(6)
        .connect(&url)
        .await
        .unwrap();
    let instance = Instance {
        name: name.clone(),
        pool: pool.clone(),
    };
    let mut stop = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
    let handlers = match name.starts_with("fragile") {
        true => handlers![fragile],
        false => handlers![runs, effects],
    };
    Consumer::new(pool)
        .name(name)
        .lease(Duration::from_secs(6))
        .state(instance)
        .handlers(handlers)
        .run_until(async { stop.recv().await.unwrap_or_default() })
        .await
        .unwrap();
}

/// A consumer in a process of its own, killed when the test ends.
struct Process {
    child: Child,
    name: String,
}

impl Process {
    fn start(bench: &Bench, name: &str) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["instance", "--exact", "--ignored", "--nocapture"])
            .env("TAKEOVER_URL", bench.db.url())
            .env("TAKEOVER_NAME", name)
            .stdout(Stdio::null())
            .stderr(if std::env::var_os("RUST_LOG").is_some() {
                Stdio::inherit()
            } else {
                Stdio::null()
            })
            .spawn()
            .unwrap();
        Self {
            child,
            name: name.to_owned(),
        }
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill")
            .args([signal, &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// How many lanes it owns, of both groups; only by a live session, or by any.
    async fn lanes(&self, pool: &PgPool, live: bool) -> i64 {
        sqlx::query_scalar(
            "SELECT count(*) FROM postbox.lane l JOIN postbox.consumer c ON c.id = l.consumer_id \
             WHERE c.name = $1 AND (postbox.is_live(c.id) OR NOT $2)",
        )
        .bind(&self.name)
        .bind(live)
        .fetch_one(pool)
        .await
        .unwrap()
    }

    async fn owns(&self, pool: &PgPool, range: std::ops::RangeInclusive<i64>) {
        eventually(PATIENCE, || async {
            let lanes = self.lanes(pool, *range.start() > 0).await;
            if range.contains(&lanes) {
                Ok(())
            } else {
                Err(format!("{} owns {lanes} lanes, not {range:?}", self.name))
            }
        })
        .await;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Every test here starts several processes and measures times, so they take turns.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

const KEYS: i64 = 40;

/// Publishes numbered steps of all keys until `done`; returns how many of each key.
async fn load(pool: &PgPool, done: impl Future<Output = ()>) -> i64 {
    let mut n = 0;
    tokio::pin!(done);
    loop {
        let round: Vec<Step> = (0..KEYS).map(|key| step(key, n)).collect();
        publish_steps(pool, &round).await;
        n += 1;
        tokio::select! {
            () = &mut done => return n,
            () = tokio::time::sleep(Duration::from_millis(30)) => {}
        }
    }
}

async fn verify(bench: &Bench, each: i64) {
    settled(bench.db.pool(), "runs").await;
    settled(bench.db.pool(), "effects").await;
    let lost: Vec<String> = sqlx::query_scalar(LOST)
        .bind(KEYS)
        .bind(each)
        .fetch_all(bench.db.pool())
        .await
        .unwrap();
    assert!(lost.is_empty(), "lost: {lost:?}");
    assert_eq!(bench.number(OVERLAPS).await, 0, "overlapping runs of a key");
    assert_eq!(bench.number(REORDERED).await, 0, "runs out of order");
    assert_eq!(
        bench.number("SELECT count(*) FROM effect").await,
        KEYS * each,
        "effects"
    );
    assert_eq!(
        bench.number(WRONG_EFFECTS).await,
        0,
        "effects doubled or out of order"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lanes_of_a_killed_instance_run_elsewhere_within_three_seconds() {
    let _turn = TURN.lock().await;
    let bench = bench().await;
    bench.sql(TABLES).await;
    let pool = bench.pool();
    let first = Process::start(&bench, "first");
    let second = Process::start(&bench, "second");
    let third = Process::start(&bench, "third");
    for process in [&first, &second, &third] {
        process.owns(&pool, 20..=22).await;
    }
    let mut took = Vec::new();
    let each = load(&pool, async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        for victim in [&first, &second] {
            let killed = Instant::now();
            victim.signal("-KILL");
            victim.owns(&pool, 0..=0).await;
            took.push(killed.elapsed());
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
    .await;
    // Three, and what a machine with other things to do may need more; the lease is six.
    assert!(took.iter().all(|took| *took < Duration::from_secs(5)), "{took:?}");
    third.owns(&pool, 64..=64).await;
    verify(&bench, each).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_instance_loses_its_lanes_within_its_lease_and_cannot_commit_when_it_wakes() {
    let _turn = TURN.lock().await;
    let bench = bench().await;
    bench.sql(TABLES).await;
    let pool = bench.pool();
    let frozen = Process::start(&bench, "frozen");
    let other = Process::start(&bench, "other");
    for process in [&frozen, &other] {
        process.owns(&pool, 32..=32).await;
    }
    let each = load(&pool, async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let since = Instant::now();
        frozen.signal("-STOP");
        other.owns(&pool, 64..=64).await;
        let took = since.elapsed();
        // The lease of 6 s, counted from its last heartbeat, and a look.
        assert!(took < Duration::from_secs(9), "{took:?}");
        frozen.signal("-CONT");
        frozen.owns(&pool, 32..=32).await;
    })
    .await;
    settled(&pool, "runs").await;
    settled(&pool, "effects").await;
    // A run that was under way when its instance froze may end after the takeover; it is the one thing no lease prevents.
    assert_eq!(bench.number(REORDERED).await, 0);
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, KEYS * each);
    assert_eq!(bench.number(WRONG_EFFECTS).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_that_join_and_leave_under_load_keep_every_key_in_order_and_alone() {
    let _turn = TURN.lock().await;
    let bench = bench().await;
    bench.sql(TABLES).await;
    let pool = bench.pool();
    let first = Process::start(&bench, "first");
    first.owns(&pool, 64..=64).await;
    let each = load(&pool, async {
        let second = Process::start(&bench, "second");
        second.owns(&pool, 32..=32).await;
        let mut third = Process::start(&bench, "third");
        // Of two groups' 32 lanes three instances have ten or eleven each; who has eleven is by their sessions' numbers, which are by chance.
        for process in [&third, &second, &first] {
            process.owns(&pool, 20..=22).await;
        }
        third.signal("-TERM");
        third.owns(&pool, 0..=0).await;
        second.owns(&pool, 32..=32).await;
        eventually(PATIENCE, || {
            let status = third.child.try_wait().unwrap();
            async move {
                if status.is_some_and(|status| status.success()) {
                    Ok(())
                } else {
                    Err(format!("{status:?}"))
                }
            }
        })
        .await;
        second.signal("-TERM");
        second.owns(&pool, 0..=0).await;
        first.owns(&pool, 64..=64).await;
    })
    .await;
    verify(&bench, each).await;
    // Nobody was killed, so nothing was run twice; unless the machine was so slow that an instance lost its session.
    if bench
        .number("SELECT count(*) FROM (SELECT consumer_id FROM postbox.heartbeat UNION SELECT consumer_id FROM postbox.checkpoint) sessions")
        .await
        == 3
    {
        assert_eq!(bench.number("SELECT count(*) FROM run").await, KEYS * each);
    }
}

const CUT_THE_FIRST: &str = "SELECT count(pg_terminate_backend(l.pid)) FROM pg_locks l WHERE l.locktype = 'advisory' \
    AND l.classid = 1347571763 AND l.objid IN (SELECT id::oid FROM postbox.consumer WHERE name = 'first') \
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())";

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_whose_session_is_cut_runs_no_key_beside_its_successor() {
    let _turn = TURN.lock().await;
    let bench = bench().await;
    bench.sql(TABLES).await;
    let pool = bench.pool();
    let first = Process::start(&bench, "first");
    let second = Process::start(&bench, "second");
    for process in [&first, &second] {
        process.owns(&pool, 32..=32).await;
    }
    let each = load(&pool, async {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(400)).await;
            eventually(PATIENCE, || async {
                match bench.number(CUT_THE_FIRST).await {
                    0 => Err("it has no session"),
                    _ => Ok(()),
                }
            })
            .await;
            for process in [&first, &second] {
                process.owns(&pool, 32..=32).await;
            }
        }
    })
    .await;
    verify(&bench, each).await;
}

/// A message that kills whoever runs it is found, tried as often as its policy says, and becomes a dead letter; the others are handled.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_kills_its_process_ends_as_a_dead_letter_and_the_others_are_handled() {
    let bench = bench().await;
    let pool = bench.pool();
    bench.sql(TABLES).await;
    let mut all = steps(20, 10);
    all.extend((0..3).map(|n| step("poison", n)));
    support::publish(
        &pool,
        all.iter()
            .map(|step| Outgoing::json("fragile", step).key(step.key.clone())),
    )
    .await;
    let mut deaths = 0;
    let mut process = Process::start(&bench, "fragile-0");
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let done: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM postbox.dead_letter) AND (SELECT count(DISTINCT (key, n)) FROM effect) = 202",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        if done {
            break;
        }
        assert!(Instant::now() < deadline, "no dead letter after {deaths} deaths");
        if process.child.try_wait().unwrap().is_some() {
            deaths += 1;
            process = Process::start(&bench, &format!("fragile-{deaths}"));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Twice unnoticed, then three attempts on record.
    assert!((3..=8).contains(&deaths), "{deaths} deaths");
    settled(&pool, "fragile").await;
    let (key, attempts, reason): (String, i32, String) =
        sqlx::query_as("SELECT key, attempts, reason FROM postbox.dead_letter")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!((key.as_str(), attempts), ("poison", 3));
    assert!(reason.contains("the process died"), "{reason}");
    let order: Vec<i64> = sqlx::query_scalar("SELECT n FROM effect WHERE key = 'poison' ORDER BY id")
        .fetch_all(&pool)
        .await
        .unwrap();
    assert!(order.ends_with(&[2]) && order.starts_with(&[0]), "{order:?}");
}
