//! What is dropped at any of its waits: a request whose client is gone, a run that is cancelled. The pool's connections are given back as they were lent.
//! sqlx's own `begin()` does not do that (its issue 4393): whoever had the connection next wrote into a transaction that nobody commits.

use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::BoxFuture;
use postbox::Position;
use postbox_consumer::{Inbox, Tx};
use postbox_dispatcher::{dead_letters, doctor, rejects, restore, retention, status, subscriptions};
use postbox_testkit::TestDatabase;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;

/// What a connection has that its next user did not ask for: channels that it listens to, locks, settings.
const LEFT_BEHIND: &str = "SELECT concat_ws(', ', \
    (SELECT 'listens to ' || string_agg(channel, ', ') FROM pg_listening_channels() AS channel), \
    (SELECT 'has lock ' || string_agg(concat_ws('/', classid, objid), ', ') FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()), \
    (SELECT 'has set ' || string_agg(name, ', ') FROM pg_settings WHERE source = 'session'))";

/// Polls a future so many times and drops it; says whether it ended before.
async fn dropped_after(polls: usize, future: impl Future<Output = ()>) -> bool {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(()) => Poll::Ready(true),
        Poll::Pending if left == 0 => Poll::Ready(false),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}

type Operation = fn(PgPool) -> BoxFuture<'static, ()>;

/// Whatever it answers.
macro_rules! operations {
    ($($name:literal => |$pool:ident| $call:expr),* $(,)?) => {
        [$(($name, (|$pool: PgPool| Box::pin(async move { let _ = $call.await; }) as BoxFuture<'static, ()>) as Operation)),*]
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_dropped_while_it_waits_gives_its_connection_back_without_a_transaction() {
    let db = TestDatabase::new().await.unwrap();
    sqlx::raw_sql("CREATE TABLE note (n bigint)")
        .execute(db.pool())
        .await
        .unwrap();
    let operations = operations![
        "migrate" => |pool| postbox::migrate(&pool),
        "check_schema" => |pool| postbox::check_schema(&pool),
        "Inbox::create" => |pool| Inbox::create(&pool),
        "Inbox::expire" => |pool| Inbox::new("g").expire(&pool, Duration::from_secs(60)),
        "Tx::for_test" => |pool| Tx::for_test(&pool),
        "subscriptions::change" => |pool| subscriptions::change(&pool, "nobody", None, &subscriptions::Change::Paused(true)),
        "subscriptions::seek" => |pool| subscriptions::seek(&pool, 4711, Position::Earliest),
        "restore::rebase" => |pool| restore::rebase(&pool, true),
        "retention::turn" => |pool| retention::turn(&pool),
        "retention::set_keep" => |pool| retention::set_keep(&pool, Duration::from_secs(3 * 86_400)),
        "dead_letters::redrive" => |pool| dead_letters::redrive(&pool, &[1], None),
        "rejects::count" => |pool| rejects::count(&pool),
        "status::read" => |pool| status::read(&pool),
        "doctor::examine" => |pool| doctor::examine(&pool),
    ];
    let mut written = 0_i64;
    for (name, operation) in operations {
        for polls in 0.. {
            // Of its own, so that what is lent next is the connection that was dropped.
            let pool = PgPoolOptions::new()
                .max_connections(1)
                .connect_with((*db.pool().connect_options()).clone())
                .await
                .unwrap();
            let ended = dropped_after(polls, operation(pool.clone())).await;
            sqlx::query("INSERT INTO note VALUES ($1)")
                .bind(polls as i64)
                .execute(&pool)
                .await
                .unwrap_or_else(|error| panic!("{name}, dropped after {polls} polls: {error}"));
            let left: String = sqlx::query_scalar(LEFT_BEHIND).fetch_one(&pool).await.unwrap();
            assert_eq!(left, "", "{name}, dropped after {polls} polls");
            pool.close().await;
            written += 1;
            let there: i64 = sqlx::query_scalar("SELECT count(*) FROM note")
                .fetch_one(db.pool())
                .await
                .unwrap();
            assert_eq!(there, written, "{name}, dropped after {polls} polls");
            if ended {
                break;
            }
        }
    }
}
