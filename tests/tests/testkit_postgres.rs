//! What tests may rely on: databases of their own, servers of their own, and nothing left behind.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use postbox_testkit::{Error, TestDatabase, TestPostgres, eventually};
use sqlx::{Connection, PgConnection};

const SOON: Duration = Duration::from_secs(15);

/// Set for the processes that tests here start and kill.
const ROLE: &str = "POSTBOX_TESTKIT_ROLE";

#[tokio::test]
async fn fresh_databases_are_independent() {
    let (one, other) = tokio::join!(TestDatabase::empty(), TestDatabase::empty());
    let (one, other) = (one.expect("a database"), other.expect("another"));
    for db in [&one, &other] {
        // Would fail in a shared database, where the table is there already.
        sqlx::query("create table note (text text)")
            .execute(db.pool())
            .await
            .expect("create");
    }
    sqlx::query("insert into note values ('one')")
        .execute(one.pool())
        .await
        .expect("insert");
    assert_eq!(notes(&mut other.connect().await.expect("connect")).await, 0);
    assert_ne!(one.url(), other.url());
}

#[tokio::test]
async fn a_new_database_has_the_schema_of_postbox() {
    let db = TestDatabase::new().await.expect("a database");
    let exists: bool =
        sqlx::query_scalar("select exists (select from pg_namespace where nspname = 'postbox')")
            .fetch_one(&db.connect_pool(1))
            .await
            .expect("the catalogue");
    assert!(exists);
}

#[tokio::test]
async fn databases_made_at_once_come_from_one_template() {
    let server = TestPostgres::private().await.expect("a server");
    let all = futures_util::future::join_all((0..8).map(|_| server.database())).await;
    let databases = all
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
        .expect("eight databases");
    let templates: i64 = sqlx::query_scalar(
        "select count(*) from pg_database where starts_with(datname, 'postbox_template_')",
    )
    .fetch_one(databases[0].pool())
    .await
    .expect("the catalogue");
    assert_eq!(templates, 1);
}

#[tokio::test]
async fn a_dropped_database_is_gone() {
    // Of its own: in the shared one, a session of another test may hold up every drop. It waits for a checkpoint, and not long for that.
    let server = TestPostgres::builder()
        .setting("fsync", "off")
        .start()
        .await
        .expect("a server");
    let db = server.empty_database().await.expect("a database");
    let name = db.name().to_owned();
    sqlx::query("select 1")
        .execute(db.pool())
        .await
        .expect("a session that lasts");
    drop(db);
    let mut connection = PgConnection::connect(server.url()).await.expect("connect");
    let exists: bool = sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
        .bind(name)
        .fetch_one(&mut connection)
        .await
        .expect("the catalogue");
    assert!(!exists);
}

#[tokio::test]
async fn a_private_server_keeps_its_data_when_stopped_or_killed() {
    let server = TestPostgres::private().await.expect("a server");
    let db = server.empty_database().await.expect("a database");
    sqlx::query("create table note (text text)")
        .execute(db.pool())
        .await
        .expect("create");
    let mut expected = 0;
    for way in ["stop", "stop_immediate", "kill", "kill again", "restart"] {
        sqlx::query("insert into note values ($1)")
            .bind(way)
            .execute(db.pool())
            .await
            .expect("insert");
        expected += 1;
        let stopped = match way {
            "stop" => server.stop().await,
            "stop_immediate" => server.stop_immediate().await,
            "restart" => server.restart().await,
            _ => server.kill().await,
        };
        stopped.unwrap_or_else(|error| panic!("{way}: {error}"));
        if way != "restart" {
            assert!(
                PgConnection::connect(db.url()).await.is_err(),
                "{way}: the server still answers"
            );
        }
        server
            .start()
            .await
            .unwrap_or_else(|error| panic!("start after {way}: {error}"));
        let mut connection = db.connect().await.expect("connect");
        assert_eq!(notes(&mut connection).await, expected, "after {way}");
        // The pool's own connections are broken; it finds out as any application does.
        eventually(SOON, async || {
            sqlx::query("select 1").execute(db.pool()).await.map(drop)
        })
        .await;
    }
}

#[tokio::test]
async fn settings_hold_over_restarts() {
    let server = TestPostgres::builder()
        .setting("max_prepared_transactions", "10")
        .setting("cluster_name", "name with spaces")
        .start()
        .await
        .expect("a server");
    for _ in 0..2 {
        let mut connection = PgConnection::connect(server.url()).await.expect("connect");
        for (name, value) in [
            ("max_prepared_transactions", "10"),
            ("cluster_name", "name with spaces"),
            ("fsync", "on"),
        ] {
            assert_eq!(setting(&mut connection, name).await, value);
        }
        server.restart().await.expect("restart");
    }
}

#[tokio::test]
async fn a_server_that_does_not_start_says_what_its_log_says() {
    let error = TestPostgres::builder()
        .setting("shared_buffers", "many")
        .start()
        .await
        .expect_err("no start");
    assert!(matches!(error, Error::Start { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .contains("invalid value for parameter \"shared_buffers\""),
        "{error}"
    );
}

#[tokio::test]
async fn a_shared_server_is_not_stopped() {
    let server = TestPostgres::shared().await.expect("a server");
    assert!(matches!(
        server.stop().await,
        Err(Error::NotPrivate { operation: "stop" })
    ));
    assert!(matches!(
        server.kill().await,
        Err(Error::NotPrivate { operation: "kill" })
    ));
    PgConnection::connect(server.url())
        .await
        .expect("it still answers");
}

#[tokio::test]
async fn a_dropped_private_server_leaves_nothing() {
    let server = TestPostgres::private().await.expect("a server");
    let data = data_directory(server.url()).await;
    let home = data.parent().expect("its folder").to_owned();
    let postmaster = postmaster(&data);
    drop(server);
    assert!(!is_alive(postmaster));
    assert!(!home.exists(), "{}", home.display());
}

#[tokio::test]
async fn a_killed_process_leaves_no_private_server() {
    let mut process = Process::start("private", None);
    let data = data_directory(&process.url).await;
    let postmaster = postmaster(&data);
    assert!(is_alive(postmaster));
    process.kill();
    gone(&data, postmaster, SOON).await;
}

#[tokio::test]
async fn the_shared_server_ends_after_its_last_user_and_a_broken_one_is_replaced() {
    let place = Place::new("shared");
    let mut first = Process::start("shared", Some(&place.0));
    let mut second = Process::start("shared", Some(&place.0));
    assert_eq!(first.url, second.url, "one server for all");
    let data = data_directory(&first.url).await;
    let server = postmaster(&data);

    let home = data.parent().expect("its folder").to_owned();
    first.kill();
    let first_user = home.join("users").join(first.child.id().to_string());
    eventually(SOON, async || {
        if first_user.exists() {
            Err("not noticed")
        } else {
            Ok(())
        }
    })
    .await;
    assert!(is_alive(server), "the second still uses it");

    // As after a crash of the machine: no server, no watchdog, but their files. The server may tidy up the
    // shared memory, which such a crash would have lost, and gets its lock file back.
    let watchdog = std::fs::read_to_string(home.join("watchdog")).expect("its number");
    let lock = std::fs::read(data.join("postmaster.pid")).expect("the server's lock file");
    kill("-KILL", watchdog.trim().parse().expect("a number"));
    kill("-QUIT", server);
    eventually(
        SOON,
        async || if is_alive(server) { Err("alive") } else { Ok(()) },
    )
    .await;
    std::fs::write(data.join("postmaster.pid"), lock).expect("the lock file");
    second.kill();
    let mut third = Process::start("shared", Some(&place.0));
    let data = data_directory(&third.url).await;
    let server = postmaster(&data);
    assert!(is_alive(server));

    third.kill();
    gone(&data, server, Duration::from_secs(30)).await;
}

#[tokio::test]
async fn a_database_of_a_killed_process_is_dropped_by_the_next() {
    let place = Place::new("leftovers");
    let mut killed = Process::start("database", Some(&place.0));
    let data = data_directory(&killed.url).await;
    let server = postmaster(&data);
    killed.kill();
    let mut next = Process::start("database", Some(&place.0));
    let mut connection = PgConnection::connect(&next.url).await.expect("connect");
    let databases: Vec<String> =
        sqlx::query_scalar("select datname from pg_database where starts_with(datname, 'postbox_test_')")
            .fetch_all(&mut connection)
            .await
            .expect("the catalogue");
    assert_eq!(databases.len(), 1, "{databases:?}");
    assert!(next.url.contains(&databases[0]), "{databases:?}");
    drop(connection);
    next.kill();
    gone(&data, server, Duration::from_secs(30)).await;
}

#[tokio::test]
async fn the_binaries_of_npm_serve_a_version_that_the_machine_lacks() {
    if !Command::new("npm")
        .arg("ping")
        .output()
        .is_ok_and(|output| output.status.success())
    {
        println!("skipped: npm is absent or its registry does not answer");
        return;
    }
    let server = TestPostgres::builder()
        .version(18)
        .start()
        .await
        .expect("PostgreSQL 18");
    assert_eq!(server.version(), 18);
    let db = server.database().await.expect("a database");
    let mut connection = db.connect().await.expect("connect");
    assert!(setting(&mut connection, "server_version").await.starts_with("18"));
    server.kill().await.expect("kill");
    server.start().await.expect("start");
    db.connect().await.expect("connect");
}

#[tokio::test]
async fn a_version_that_nobody_has_is_an_error_that_says_what_to_do() {
    let error = TestPostgres::builder()
        .version(99)
        .start()
        .await
        .expect_err("there is none");
    let message = error.to_string();
    for part in ["install PostgreSQL 99", "DATABASE_URL", "npm"] {
        assert!(message.contains(part), "{part:?} is missing in: {message}");
    }
}

/// The process that other tests here start: takes a server, says its URL, and waits to be killed.
#[tokio::test]
#[ignore = "a part of other tests"]
async fn process_with_a_server() {
    let role = std::env::var(ROLE).unwrap_or_default();
    let database;
    let server = match role.as_str() {
        "private" => TestPostgres::private().await.expect("a server"),
        "shared" => TestPostgres::shared().await.expect("a server"),
        "database" => {
            database = TestDatabase::empty().await.expect("a database");
            println!("\nurl={}", database.url());
            return std::future::pending().await;
        }
        // Run by somebody who runs all ignored tests.
        _ => return,
    };
    println!("\nurl={}", server.url());
    std::future::pending::<()>().await;
}

struct Process {
    child: Child,
    url: String,
}

impl Process {
    fn start(role: &str, temporary_files: Option<&Path>) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["process_with_a_server", "--exact", "--ignored", "--nocapture"]);
        command
            .env(ROLE, role)
            .env_remove("DATABASE_URL")
            .stdout(Stdio::piped());
        if let Some(folder) = temporary_files {
            command.env("TMPDIR", folder);
        }
        let mut child = command.spawn().expect("a process");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        let url = output
            .lines()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("url=").map(str::to_owned))
            .expect("it has a server");
        Self { child, url }
    }

    fn kill(&mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("its end");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder for temporary files that the server's user can reach, too.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let folder = Path::new("/tmp").join(format!("postbox-{name}-{}", std::process::id()));
        std::fs::create_dir(&folder).expect("a folder");
        Self(folder.canonicalize().expect("its name"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn gone(data: &Path, postmaster: u32, timeout: Duration) {
    let home = data.parent().expect("its folder").to_owned();
    eventually(timeout, async || match (is_alive(postmaster), home.exists()) {
        (false, false) => Ok(()),
        (alive, files) => Err(format!("server alive: {alive}, files there: {files}")),
    })
    .await;
}

async fn notes(connection: &mut PgConnection) -> i64 {
    sqlx::query_scalar("select count(*) from note")
        .fetch_one(connection)
        .await
        .expect("count")
}

async fn setting(connection: &mut PgConnection, name: &str) -> String {
    sqlx::query_scalar("select current_setting($1)")
        .bind(name)
        .fetch_one(connection)
        .await
        .expect("a setting")
}

async fn data_directory(url: &str) -> PathBuf {
    let mut connection = PgConnection::connect(url).await.expect("connect");
    PathBuf::from(setting(&mut connection, "data_directory").await)
}

fn postmaster(data: &Path) -> u32 {
    let lock = std::fs::read_to_string(data.join("postmaster.pid")).expect("the server's lock file");
    lock.lines()
        .next()
        .expect("a line")
        .trim()
        .parse()
        .expect("a number")
}

fn is_alive(pid: u32) -> bool {
    // A process that has ended and awaits its parent counts as ended.
    let output = Command::new("ps")
        .args(["-o", "stat=", "-p", &pid.to_string()])
        .output()
        .expect("ps");
    let state = String::from_utf8_lossy(&output.stdout);
    !state.trim().is_empty() && !state.trim().starts_with('Z')
}

fn kill(signal: &str, pid: u32) {
    assert!(
        Command::new("kill")
            .args([signal, &pid.to_string()])
            .status()
            .expect("kill")
            .success()
    );
}
