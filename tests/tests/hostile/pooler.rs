//! Behind PgBouncer with `pool_mode = transaction`: applications publish and transactional handlers run through it; what cannot says so at its start,
//! and connects directly if it is told how.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{History, PATIENCE, Step, step};
use postbox::{Outgoing, Publish};
use postbox_consumer::{Consumer, HandlerError, State, Tx, handler, handlers};
use postbox_dispatcher::Dispatcher;
use postbox_testkit::{TestDatabase, eventually};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

/// Debian's, on a port of its own; `None` where there is none.
struct Bouncer {
    child: Child,
    folder: std::path::PathBuf,
    port: u16,
}

impl Bouncer {
    /// `reset`: what it does with a backend before somebody else gets it.
    async fn start(to: &PgConnectOptions, password: &str, reset: &str) -> Option<Self> {
        let Ok(program) = [
            "/usr/sbin/pgbouncer",
            "/usr/bin/pgbouncer",
            "/usr/local/bin/pgbouncer",
        ]
        .iter()
        .map(std::path::PathBuf::from)
        .find(|path| path.exists())
        .ok_or(()) else {
            eprintln!(
                "SKIPPED: there is no pgbouncer here (apt-get install pgbouncer): nothing of this suite was tested"
            );
            return None;
        };
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let folder = std::env::temp_dir().join(format!("postbox-bouncer-{}-{port}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let (user, ini, users) = (
            to.get_username(),
            folder.join("pgbouncer.ini"),
            folder.join("users.txt"),
        );
        fs::write(&users, format!("\"{user}\" \"{password}\"\n")).unwrap();
        fs::write(
            &ini,
            format!(
                "[databases]\n* = host={} port={} password={password}\n[pgbouncer]\n{reset}\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
                 unix_socket_dir =\nauth_type = trust\nauth_file = {}\npool_mode = transaction\ndefault_pool_size = 5\n\
                 ignore_startup_parameters = extra_float_digits\n",
                to.get_host(),
                to.get_port(),
                users.display()
            ),
        )
        .unwrap();
        let mut command = Command::new(program);
        command
            .arg(&ini)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // It refuses to run as root.
        if rustix::process::getuid().is_root() {
            command.uid(65_534);
        }
        let child = command.spawn().unwrap();
        let begun = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < PATIENCE, "pgbouncer does not listen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Some(Self { child, folder, port })
    }

    /// As an application connects through it: without a cache of prepared statements, which another backend would not know. (Those of a transaction are
    /// forgotten at its end by `server_reset_query_always`, which a PgBouncer before 1.21 needs.)
    fn options(&self, to: &PgConnectOptions) -> PgConnectOptions {
        to.clone()
            .host("127.0.0.1")
            .port(self.port)
            .statement_cache_capacity(0)
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn password(db: &TestDatabase) -> String {
    let address = db.url().split_once("://").unwrap().1;
    let user = address.rsplit_once('@').unwrap().0;
    user.split_once(':')
        .map_or("", |(_, password)| password)
        .to_owned()
}

const FORGET_STATEMENTS: &str = "server_reset_query = DEALLOCATE ALL\nserver_reset_query_always = 1";

#[handler(group = "tx", concurrency = 8)]
async fn in_a_transaction(
    step: Step,
    mut tx: Tx,
    State(history): State<History>,
) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO effect (key, n) VALUES ($1, $2)")
        .bind(&step.key)
        .bind(step.n)
        .execute(&mut *tx)
        .await?;
    tx.publish(Outgoing::json("followed", &step.n).key(&step.key))
        .await?;
    history.note(&step, Instant::now());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applications_and_handlers_go_through_a_transaction_pooler() {
    let db = TestDatabase::new().await.unwrap();
    let direct = (*db.pool().connect_options()).clone();
    let Some(bouncer) = Bouncer::start(&direct, &password(&db), FORGET_STATEMENTS).await else {
        return;
    };
    sqlx::raw_sql("CREATE TABLE effect (key text, n bigint)")
        .execute(db.pool())
        .await
        .unwrap();
    let pool: PgPool = PgPoolOptions::new()
        .max_connections(8)
        .connect_lazy_with(bouncer.options(&direct));
    let dispatcher = Dispatcher::new(pool.clone())
        .direct(direct.clone())
        .start()
        .await
        .unwrap();
    let history = History::default();
    let consumer = Consumer::new(pool.clone())
        .direct(direct.clone())
        .state(history.clone())
        .handlers(handlers![in_a_transaction])
        .start()
        .await
        .unwrap();
    // Several at once, so that the pooler gives them different backends in turn.
    let publishing = (0..8).map(|publisher| {
        let pool = pool.clone();
        tokio::spawn(async move {
            for n in 0..10 {
                let mut tx = pool.begin().await.unwrap();
                tx.publish(&step(publisher, n)).await.unwrap();
                let more: Vec<Step> = vec![step(publisher, 100 + n), step(publisher, 200 + n)];
                tx.publish_all(&more).await.unwrap();
                tx.publish(Outgoing::from(&step("once", n)).dedup_key(format!("{n}")))
                    .await
                    .unwrap();
                tx.commit().await.unwrap();
            }
        })
    });
    for done in publishing.collect::<Vec<_>>() {
        done.await.unwrap();
    }
    let expected = 8 * 30 + 10;
    eventually(PATIENCE, || async {
        let (effects, followed): (i64, i64) =
            sqlx::query_as("SELECT (SELECT count(*) FROM effect), (SELECT count(*) FROM postbox.outbox WHERE topic = 'followed')")
                .fetch_one(db.pool())
                .await
                .unwrap();
        match (effects, followed) {
            (e, f) if e == expected && f == expected => Ok(()),
            other => Err(format!("{other:?} of {expected}")),
        }
    })
    .await;
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dispatcher_and_a_consumer_refuse_a_transaction_pooler_and_say_how_to_go_around_it() {
    let db = TestDatabase::new().await.unwrap();
    let direct = (*db.pool().connect_options()).clone();
    for reset in [
        FORGET_STATEMENTS,
        "server_reset_query = DISCARD ALL\nserver_reset_query_always = 1",
        "server_reset_query =",
        "server_reset_query =\nserver_round_robin = 1",
    ] {
        let Some(bouncer) = Bouncer::start(&direct, &password(&db), reset).await else {
            return;
        };
        let pool: PgPool = PgPoolOptions::new().connect_lazy_with(bouncer.options(&direct));
        // More than once: which backend one gets is a race where they are cleaned first.
        for _ in 0..5 {
            let refused = Dispatcher::new(pool.clone()).start().await.expect_err("refused");
            let also = Consumer::new(pool.clone())
                .state(History::default())
                .handlers(handlers![in_a_transaction])
                .start()
                .await
                .expect_err("refused");
            for error in [refused.to_string(), also.to_string()] {
                for word in ["transaction pooler", "Consumer::direct", "DIRECT_DATABASE_URL"] {
                    assert!(error.contains(word), "{reset}: {error}");
                }
            }
        }
        // Nothing was set that others get now.
        let mut tx = pool.begin().await.unwrap();
        let path: String = sqlx::query_scalar("SELECT current_setting('search_path')")
            .fetch_one(&mut *tx)
            .await
            .unwrap();
        assert_eq!(path, "\"$user\", public");
    }
}
