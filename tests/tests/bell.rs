//! The bell: a dispatcher that sleeps is woken by what is published, one that is awake is left in peace.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox::{Outgoing, Publish};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestDatabase, TestPostgres, eventually};
use sqlx::postgres::{PgListener, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

mod dice;
mod ledger;
use dice::Dice;

const SOON: Duration = Duration::from_secs(30);
/// Well before the poll of a second that would find a message whose bell was lost.
const PROMPT: Duration = Duration::from_millis(800);
/// Set for the processes that are a dispatcher.
const DATABASE: &str = "POSTBOX_TEST_DISPATCHER";

async fn run(connection: &mut PgConnection, sql: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(sql.into()))
        .execute(connection)
        .await
        .expect("a statement of the test");
}

async fn publish(pool: &PgPool, text: &str) -> Result<(), postbox::Error> {
    let mut tx = pool.begin().await?;
    tx.publish(Outgoing::json("t", text)).await?;
    tx.commit().await?;
    Ok(())
}

async fn head(pool: &PgPool) -> Result<i64, String> {
    sqlx::query_scalar("SELECT postbox.next_offset('t')")
        .fetch_one(pool)
        .await
        .map_err(|error| error.to_string())
}

async fn sequenced(pool: &PgPool, messages: i64) {
    eventually(SOON, async || match head(pool).await? {
        n if n == messages => Ok(()),
        n => Err(format!("{n} of {messages} have an offset")),
    })
    .await;
}

/// The backend that sleeps at the bell.
async fn sleeper(pool: &PgPool) -> Result<i32, String> {
    sqlx::query_scalar(
        "SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database AND d.datname = current_database() \
         WHERE l.locktype = 'advisory' AND l.classid = 1347571761 AND l.objid = 2 AND l.mode = 'ExclusiveLock' AND l.granted",
    )
    .fetch_optional(pool)
    .await
    .map_err(|error| error.to_string())?
    .ok_or_else(|| "nobody sleeps at the bell".to_owned())
}

async fn asleep(pool: &PgPool) -> i32 {
    eventually(SOON, async || sleeper(pool).await).await
}

/// Hears of new segments as a consumer that sleeps does, without asking the database all the time.
struct Listener {
    listener: PgListener,
    _pool: PgPool,
}

impl Listener {
    async fn new(db: &TestDatabase) -> Self {
        let pool = db.connect_pool(1);
        let mut listener = PgListener::connect_with(&pool).await.expect("a listener");
        listener.listen("postbox_segment").await.expect("listening");
        // The sequencer notifies when somebody holds the consumers' bell.
        sqlx::query("SELECT pg_advisory_lock_shared(1347571761, 3)")
            .execute(&mut listener)
            .await
            .expect("the consumers' bell");
        Self {
            listener,
            _pool: pool,
        }
    }

    /// Waits until topic `t` has so many messages.
    async fn hears_of(&mut self, messages: i64) {
        let heard = async {
            loop {
                let notification = self.listener.recv().await.expect("a notification");
                let mut words = notification.payload().split(' ');
                let (topic, head) = (words.next(), words.next().map(str::parse));
                if topic == Some("t") && head == Some(Ok(messages)) {
                    return;
                }
            }
        };
        tokio::time::timeout(SOON, heard)
            .await
            .expect("they are sequenced");
    }
}

/// How long this process was not run when it should have been: a machine with other things to do is no fault of ours.
#[derive(Clone, Default)]
struct Stalls(Arc<AtomicU64>);

impl Stalls {
    fn watch() -> Self {
        let stalls = Self::default();
        let longest = stalls.0.clone();
        std::thread::spawn(move || {
            while Arc::strong_count(&longest) > 1 {
                let begun = Instant::now();
                std::thread::sleep(Duration::from_millis(5));
                longest.fetch_max(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
            }
        });
        stalls
    }

    fn longest_since_asked(&self) -> Duration {
        Duration::from_millis(self.0.swap(0, Ordering::Relaxed))
    }
}

// ------------------------------------------------------------------------------------------------------- no bell is lost

/// Publishes around the moment at which the dispatcher falls asleep; returns how long each message took to be sequenced.
async fn rounds(db: Arc<TestDatabase>, seed: u64, rounds: usize) -> Vec<Duration> {
    let stalls = Stalls::watch();
    let dispatcher = Dispatcher::new(db.connect_pool(2))
        .start()
        .await
        .expect("it works");
    let mut listener = Listener::new(&db).await;
    let mut connection = db.connect().await.expect("it works");
    let mut dice = Dice::new(seed);
    let mut took = Vec::new();
    let mut n: i64 = 0;
    for _ in 0..rounds {
        // A burst wakes it; messages that come one at a time do not.
        let mut bursts = 0;
        while sleeper(db.pool()).await.is_ok() && bursts < 10 {
            ring(db.pool()).await;
            bursts += 1;
        }
        // Its last poll is about 60 ms after the last message, so half of the rounds are about then.
        let pause = if dice.below(2) == 0 {
            dice.below(110_000)
        } else {
            52_000 + dice.below(25_000)
        };
        tokio::time::sleep(Duration::from_micros(pause)).await;
        n += 1;
        let mut tx = connection.begin().await.expect("it works");
        tx.publish(Outgoing::json("t", &n)).await.expect("it works");
        // A third stays open for a while, over the falling asleep.
        if dice.below(3) == 0 {
            tokio::time::sleep(Duration::from_micros(dice.below(90_000))).await;
        }
        stalls.longest_since_asked();
        tx.commit().await.expect("it works");
        let committed = Instant::now();
        listener.hears_of(n).await;
        took.push(committed.elapsed().saturating_sub(stalls.longest_since_asked()));
    }
    dispatcher.shutdown().await;
    ledger::complete(&db, "t").await;
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_message_waits_for_the_poll_whenever_it_is_published() {
    // Dropped at the end, because dropping a database takes its time.
    let databases = futures_util::future::join_all((0..4).map(|_| TestDatabase::new())).await;
    let databases: Vec<_> = databases
        .into_iter()
        .map(|db| Arc::new(db.expect("a database")))
        .collect();
    let seeds = databases.iter().zip(1..);
    let all: Vec<_> = seeds
        .map(|(db, seed)| tokio::spawn(rounds(db.clone(), seed, 50)))
        .collect();
    let mut took = Vec::new();
    for one in all {
        took.extend(one.await.unwrap());
    }
    let late = took.iter().filter(|took| **took > PROMPT).count();
    let slow = took
        .iter()
        .filter(|took| **took > Duration::from_millis(400))
        .count();
    let longest = took.iter().max().expect("rounds");
    println!("{} rounds, longest {longest:?}, {slow} over 400 ms", took.len());
    assert_eq!(
        late,
        0,
        "of {} messages; the longest took {longest:?}",
        took.len()
    );
}

#[tokio::test]
async fn a_message_wakes_a_dispatcher_that_has_long_been_asleep() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let mut listener = Listener::new(&db).await;
    let mut bell = PgListener::connect_with(&db.connect_pool(1)).await.unwrap();
    bell.listen("postbox_outbox").await.unwrap();
    for n in 1..=5 {
        asleep(db.pool()).await;
        publish(db.pool(), "x").await.unwrap();
        let committed = Instant::now();
        listener.hears_of(n).await;
        assert!(committed.elapsed() < PROMPT, "{:?}", committed.elapsed());
        let rang = tokio::time::timeout(SOON, bell.recv()).await;
        rang.expect("it rang").expect("a notification");
    }
    dispatcher.shutdown().await;
}

/// A burst of rings, which wakes a dispatcher up.
async fn ring(pool: &PgPool) {
    for _ in 0..100 {
        sqlx::query("SELECT pg_notify('postbox_outbox', '')")
            .execute(pool)
            .await
            .expect("it rings");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_burst_publishers_do_not_ring() {
    const EACH: i64 = 1_000;
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let mut bell = PgListener::connect_with(&db.connect_pool(1)).await.unwrap();
    bell.listen("postbox_outbox").await.unwrap();
    asleep(db.pool()).await;
    let publishers: Vec<_> = (0..4)
        .map(|_| {
            let db = db.clone();
            tokio::spawn(async move {
                let mut connection = db.connect().await.expect("a connection");
                for n in 0..EACH {
                    let mut tx = connection.begin().await.expect("a transaction");
                    tx.publish(Outgoing::json("t", &n)).await.expect("published");
                    tx.commit().await.expect("committed");
                }
            })
        })
        .collect();
    for publisher in publishers {
        publisher.await.unwrap();
    }
    sequenced(db.pool(), 4 * EACH).await;
    // Behind all that the publishers sent.
    sqlx::query("SELECT pg_notify('postbox_outbox', 'end')")
        .execute(db.pool())
        .await
        .unwrap();
    let mut rings = 0;
    while bell.recv().await.unwrap().payload() != "end" {
        rings += 1;
    }
    println!("{rings} rings for {} messages", 4 * EACH);
    assert!(rings > 0, "the first woke it");
    // Some tens of milliseconds pass until it knows that it is a burst.
    assert!(rings < EACH, "{rings} rings for {} messages", 4 * EACH);
    dispatcher.shutdown().await;
    ledger::complete(&db, "t").await;
}

/// Polling would make each of them wait for the next look.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_burst_a_dispatcher_sleeps_while_few_messages_come() {
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let flow = tokio::spawn({
        let pool = db.connect_pool(1);
        async move {
            loop {
                publish(&pool, "few").await.expect("published");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    eventually(SOON, async || {
        for _ in 0..50 {
            publish(db.pool(), "many").await.expect("published");
        }
        match sleeper(db.pool()).await {
            Ok(_) => Err("it sleeps in a burst"),
            Err(_) => Ok(()),
        }
    })
    .await;
    asleep(db.pool()).await;
    flow.abort();
    dispatcher.shutdown().await;
}

/// Two or three hundred a second are no burst where a consumer waits: polling would make each of them wait, on a machine that is nearly idle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_some_hundred_messages_a_second_a_dispatcher_sleeps_and_answers_each() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let mut listener = Listener::new(&db).await;
    publish(db.pool(), "first").await.expect("published");
    listener.hears_of(1).await;
    let asleep = asleep(db.pool()).await;
    for n in 2..300 {
        publish(db.pool(), "one").await.expect("published");
        listener.hears_of(n).await;
        tokio::time::sleep(Duration::from_millis(3)).await;
        if n % 20 == 0 {
            assert_eq!(sleeper(db.pool()).await, Ok(asleep), "after {n} messages");
        }
    }
    dispatcher.shutdown().await;
}

/// How many steps were taken within some time, and how long that was.
async fn steps_within(pool: &PgPool, span: Duration) -> (i64, Duration) {
    const STEPS: &str = "SELECT last_value FROM postbox.tick_id";
    let begun = Instant::now();
    let before: i64 = sqlx::query_scalar(STEPS).fetch_one(pool).await.expect("steps");
    tokio::time::sleep(span).await;
    let after: i64 = sqlx::query_scalar(STEPS).fetch_one(pool).await.expect("steps");
    (after - before, begun.elapsed())
}

/// A publisher has the more of the machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_burst_steps_are_few_while_no_consumer_waits_for_them() {
    const SLOW: Duration = Duration::from_millis(50);
    let db = Arc::new(TestDatabase::new().await.unwrap());
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let burst = tokio::spawn({
        let pool = db.connect_pool(1);
        async move {
            loop {
                let mut tx = pool.begin().await.expect("a transaction");
                let messages = (0..20).map(|n| Outgoing::json("t", &n));
                tx.publish_all(messages).await.expect("published");
                tx.commit().await.expect("committed");
                // So many that steps are large would make the pauses long, too.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    let at_pace = |(steps, took): (i64, Duration)| steps as f64 / (took.as_secs_f64() / SLOW.as_secs_f64());
    // It takes a while to know that it is a burst, which one sleeper's rings are not, and that nobody waits.
    eventually(SOON, async || {
        for _ in 0..50 {
            publish(db.pool(), "many").await.expect("published");
        }
        match at_pace(steps_within(db.pool(), Duration::from_millis(500)).await) {
            pace if pace > 0.2 && pace < 1.2 => Ok(()),
            pace => Err(format!("{pace} steps every {SLOW:?}")),
        }
    })
    .await;
    let _listener = Listener::new(&db).await;
    eventually(SOON, async || {
        match at_pace(steps_within(db.pool(), Duration::from_millis(500)).await) {
            pace if pace > 1.5 => Ok(()),
            pace => Err(format!("{pace} steps every {SLOW:?} for a consumer")),
        }
    })
    .await;
    burst.abort();
    dispatcher.shutdown().await;
}

/// Publishes now and then; returns how long the slowest took to be sequenced.
async fn slowest_of(db: &TestDatabase, listener: &mut Listener, first: i64, messages: i64) -> Duration {
    let stalls = Stalls::watch();
    let mut slowest = Duration::ZERO;
    for n in first..first + messages {
        // Any time between two looks; nothing is waited for here.
        tokio::time::sleep(Duration::from_millis((n as u64 * 37) % 90)).await;
        publish(db.pool(), "x").await.expect("published");
        stalls.longest_since_asked();
        let committed = Instant::now();
        listener.hears_of(n).await;
        let took = committed.elapsed().saturating_sub(stalls.longest_since_asked());
        slowest = slowest.max(took);
    }
    slowest
}

/// Whether this transaction found the dispatcher awake.
const HOLDS_THE_BELL: &str = "SELECT EXISTS (SELECT FROM pg_locks \
     WHERE pid = pg_backend_pid() AND locktype = 'advisory' AND classid = 1347571761 AND objid = 2)";

#[tokio::test]
async fn an_open_transaction_with_a_message_holds_up_nobody_elses_wake_up() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let mut listener = Listener::new(&db).await;
    // It found the dispatcher awake, so the dispatcher may not sleep while it is open.
    let mut open = eventually(SOON, async || {
        let mut tx = db.pool().begin().await.map_err(|error| error.to_string())?;
        tx.publish(Outgoing::json("t", "open"))
            .await
            .map_err(|error| error.to_string())?;
        let holds: bool = sqlx::query_scalar(HOLDS_THE_BELL)
            .fetch_one(&mut *tx)
            .await
            .map_err(|error| error.to_string())?;
        if holds {
            return Ok(tx);
        }
        tx.rollback().await.map_err(|error| error.to_string())?;
        ring(db.pool()).await;
        Err("it was found asleep".to_owned())
    })
    .await;
    let slowest = slowest_of(&db, &mut listener, 1, 40).await;
    assert!(slowest < PROMPT, "{slowest:?}");
    let awake = sleeper(db.pool()).await;
    assert!(
        awake.is_err(),
        "{awake:?} sleeps, and the open transaction will not ring"
    );
    sqlx::query("SELECT 1").execute(&mut *open).await.unwrap();
    open.commit().await.unwrap();
    let committed = Instant::now();
    listener.hears_of(41).await;
    assert!(committed.elapsed() < PROMPT, "{:?}", committed.elapsed());
    asleep(db.pool()).await;
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn a_bell_rung_within_a_savepoint_that_is_rolled_back_is_rung_again() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let mut listener = Listener::new(&db).await;
    for n in 1..=5 {
        asleep(db.pool()).await;
        let mut tx = db.pool().begin().await.unwrap();
        let mut inner = tx.begin().await.unwrap();
        inner.publish(Outgoing::json("t", "never")).await.unwrap();
        inner.rollback().await.unwrap();
        tx.publish(Outgoing::json("t", "x")).await.unwrap();
        tx.commit().await.unwrap();
        let committed = Instant::now();
        listener.hears_of(n).await;
        assert!(committed.elapsed() < PROMPT, "{:?}", committed.elapsed());
    }
    dispatcher.shutdown().await;
}

#[tokio::test]
async fn a_prepared_transaction_is_found_soon_after_it_is_committed() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let mut connection = db.connect().await.unwrap();
    asleep(db.pool()).await;
    let mut tx = connection.begin().await.unwrap();
    tx.publish(Outgoing::json("t", "rang")).await.unwrap();
    let says = sqlx::raw_sql("PREPARE TRANSACTION 'rang'")
        .execute(&mut *tx)
        .await
        .expect_err("it rang");
    assert!(says.to_string().contains("NOTIFY"), "{says}");
    tx.rollback().await.unwrap();
    for n in 1..=2 {
        let name = format!("{}-{n}", db.name());
        asleep(db.pool()).await;
        let mut tx = connection.begin().await.unwrap();
        run(&mut tx, "SET LOCAL postbox.two_phase = on").await;
        tx.publish(Outgoing::json("t", "x")).await.unwrap();
        run(&mut tx, format!("PREPARE TRANSACTION '{name}'")).await;
        // It only says that no transaction is open.
        tx.commit().await.unwrap();
        run(&mut connection, format!("COMMIT PREPARED '{name}'")).await;
        let committed = Instant::now();
        sequenced(db.pool(), n).await;
        assert!(
            committed.elapsed() < Duration::from_secs(3),
            "{:?}",
            committed.elapsed()
        );
    }
    dispatcher.shutdown().await;
}

// ------------------------------------------------------------------------------------------------ the dispatcher's own life

struct Process(Child);

impl Process {
    fn start(db: &TestDatabase) -> Self {
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "as_a_process_that_dispatches", "--nocapture"])
            .env(DATABASE, db.url())
            .stdout(Stdio::null())
            .spawn()
            .expect("a process");
        Self(child)
    }

    /// With SIGKILL.
    fn kill(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("its end");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Not a test of its own: what the processes below do until they are killed.
#[tokio::test]
async fn as_a_process_that_dispatches() {
    if let Ok(url) = std::env::var(DATABASE) {
        let pool = PgPool::connect(&url).await.expect("a connection");
        let _dispatcher = Dispatcher::new(pool).start().await.expect("a dispatcher");
        std::future::pending::<()>().await;
    }
}

#[tokio::test]
async fn when_the_dispatcher_at_the_bell_is_killed_another_takes_its_place() {
    let db = TestDatabase::new().await.unwrap();
    let mut process = Process::start(&db);
    let first = asleep(db.pool()).await;
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let mut listener = Listener::new(&db).await;
    let slowest = slowest_of(&db, &mut listener, 1, 15).await;
    assert!(slowest < PROMPT, "two of them: {slowest:?}");
    assert_eq!(asleep(db.pool()).await, first, "the other one stands by");

    process.kill();
    // Whoever is at the bell or not: what is published now is found by the standby's own looks at the latest.
    publish(db.pool(), "orphan").await.unwrap();
    sequenced(db.pool(), 16).await;
    eventually(SOON, async || match sleeper(db.pool()).await? {
        pid if pid == first => Err("still the first".to_owned()),
        _ => Ok(()),
    })
    .await;
    let mut listener = Listener::new(&db).await;
    let slowest = slowest_of(&db, &mut listener, 17, 15).await;
    assert!(slowest < PROMPT, "after the takeover: {slowest:?}");
    dispatcher.shutdown().await;
    ledger::complete(&db, "t").await;
}

#[tokio::test]
async fn a_dispatcher_that_is_shut_down_leaves_the_bell_at_once() {
    let db = TestDatabase::new().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    asleep(db.pool()).await;
    dispatcher.shutdown().await;
    eventually(SOON, async || match sleeper(db.pool()).await {
        Ok(pid) => Err(format!("{pid} is at the bell")),
        Err(_) => Ok(()),
    })
    .await;
    eventually(SOON, async || {
        let connected: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'postbox dispatcher'",
        )
        .fetch_one(db.pool())
        .await
        .map_err(|error| error.to_string())?;
        if connected == 0 { Ok(()) } else { Err(format!("{connected} connections")) }
    })
    .await;
    // Publishing goes on, and the next dispatcher finds it.
    publish(db.pool(), "x").await.unwrap();
    let next = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    sequenced(db.pool(), 1).await;
    next.shutdown().await;
}

#[tokio::test]
async fn a_dispatcher_works_where_the_database_defaults_to_stricter_isolation() {
    let db = TestDatabase::new().await.unwrap();
    let strict = format!(
        "ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'",
        db.name()
    );
    run(&mut db.connect().await.unwrap(), strict).await;
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    publish(&db.connect_pool(1), "x").await.unwrap();
    sequenced(db.pool(), 1).await;
    dispatcher.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dispatcher_survives_lost_connections_restarts_and_crashes_of_the_server() {
    let server = TestPostgres::private().await.unwrap();
    let db = server.database().await.unwrap();
    let dispatcher = Dispatcher::new(db.connect_pool(2)).start().await.unwrap();
    let mut messages = 0;
    for blow in ["none", "backend", "restart", "kill -9", "backend", "immediate"] {
        match blow {
            "backend" => {
                let pid = asleep(db.pool()).await;
                let mut connection = db.connect().await.unwrap();
                run(&mut connection, format!("SELECT pg_terminate_backend({pid})")).await;
            }
            "restart" => server.restart().await.unwrap(),
            "kill -9" => {
                server.kill().await.unwrap();
                server.start().await.unwrap();
            }
            "immediate" => {
                server.stop_immediate().await.unwrap();
                server.start().await.unwrap();
            }
            _ => {}
        }
        // A pool of its own: the other's connections may be broken.
        let pool = PgPoolOptions::new().connect(db.url()).await.unwrap();
        publish(&pool, blow).await.unwrap();
        messages += 1;
        sequenced(&pool, messages).await;
        asleep(&pool).await;
    }
    dispatcher.shutdown().await;
    let published: Vec<String> = ledger::complete(&db, "t")
        .await
        .iter()
        .map(ledger::Entry::text)
        .collect();
    assert_eq!(
        published,
        ["none", "backend", "restart", "kill -9", "backend", "immediate"]
    );
}
