//! The `postbox` command, as its users run it.
#![allow(clippy::unwrap_used)] // Clippy allows it in test functions, and here what they call is as much a test.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use postbox_dispatcher::status;
use postbox_testkit::{TestDatabase, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);

/// The command with its database, and no settings of whoever runs the tests.
fn postbox(db: &TestDatabase, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_postbox"));
    command
        .args(arguments)
        .env("DATABASE_URL", db.url())
        .env_remove("RUST_LOG")
        .env("HOSTNAME", "test");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs it to its end with this input.
fn run_with_input(db: &TestDatabase, arguments: &[&str], input: &str) -> Output {
    let mut child = Running::start(postbox(db, arguments).stdin(Stdio::piped()));
    let mut stdin = child.0.stdin.take().unwrap();
    let input = input.to_owned();
    let writer = std::thread::spawn(move || {
        // It may refuse early, and then reads no more.
        let _ = stdin.write_all(input.as_bytes());
    });
    let output = child.output();
    writer.join().unwrap();
    output
}

fn run(db: &TestDatabase, arguments: &[&str]) -> Output {
    run_with_input(db, arguments, "")
}

fn succeed(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Its one line of standard error.
fn fail(output: Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.starts_with("error: ") && error.ends_with('\n') && error.matches('\n').count() == 1,
        "{error}"
    );
    error
}

fn refuse_usage(output: Output) -> String {
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn offsets(text: &str) -> Vec<i64> {
    json_lines(text)
        .iter()
        .map(|line| line["offset"].as_i64().unwrap())
        .collect()
}

/// A process that is killed when the test fails.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn stdout(&mut self) -> BufReader<std::process::ChildStdout> {
        BufReader::new(self.0.stdout.take().unwrap())
    }

    /// Until it ends.
    fn output(mut self) -> Output {
        let stdout = self.0.stdout.take().map(read_on_a_thread);
        let stderr = self.0.stderr.take().map(read_on_a_thread);
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                self.0.kill().unwrap();
                let stderr = stderr.unwrap().join().unwrap();
                panic!("it does not end: {}", String::from_utf8_lossy(&stderr));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = |reader: Option<std::thread::JoinHandle<Vec<u8>>>| {
            reader.map(|r| r.join().unwrap()).unwrap_or_default()
        };
        Output {
            status,
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }
}

fn read_on_a_thread(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `postbox run`, connected.
async fn dispatcher(db: &TestDatabase) -> Running {
    let running = Running::start(postbox(db, &["run"]).stdout(Stdio::null()).stderr(Stdio::null()));
    eventually(PATIENCE, async || match status::dispatchers(db.pool()).await {
        Ok(1) => Ok(()),
        other => Err(format!("dispatchers: {other:?}")),
    })
    .await;
    running
}

/// Messages 0, 1, 2, … without keys, as JSON lines.
fn numbers(count: usize) -> String {
    (0..count).map(|n| format!("{n}\n")).collect()
}

async fn count(db: &TestDatabase) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM postbox.outbox")
        .fetch_one(db.pool())
        .await
        .unwrap()
}

#[tokio::test]
async fn what_is_published_is_consumed_with_every_field_and_in_the_order_of_its_key() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    let arguments = [
        "publish",
        "orders",
        "--key",
        "k\t1",
        "--type",
        "order.placed",
        "--header",
        "tenant=acme",
        "--header",
        "a=b=c",
    ];
    let id = succeed(run(
        &db,
        &[&arguments[..], &["--payload", r#"{"price": 1.10}"#]].concat(),
    ));
    let lines: String = (0..300)
        .map(|n| format!("{{\"id\": {}, \"n\": {n}}}\n", n % 7))
        .collect();
    let ids = succeed(run_with_input(
        &db,
        &["publish", "orders", "--key-field", "id", "-"],
        &lines,
    ));
    assert_eq!(ids.lines().collect::<HashSet<_>>().len(), 300);
    succeed(run(
        &db,
        &[
            "publish",
            "orders",
            "--content-type",
            "text/plain",
            "--payload",
            "tab\there",
        ],
    ));

    let consume = [
        "consume",
        "orders",
        "--group",
        "g",
        "--max",
        "302",
        "--concurrency",
        "8",
        "--json",
    ];
    let lines = json_lines(&succeed(run(&db, &consume)));
    let first = lines.iter().find(|line| line["type"] == "order.placed").unwrap();
    assert_eq!(first["id"], id.trim());
    assert_eq!(first["topic"], "orders");
    assert_eq!(first["offset"], 0);
    assert_eq!(first["key"], "k\t1");
    assert_eq!(first["headers"], json!({"tenant": "acme", "a": "b=c"}));
    assert_eq!(first["attempt"], 1);
    assert_eq!(first["content_type"], "application/json");
    assert_eq!(first["payload"], json!({"price": 1.10}));
    assert!(first["published_at"].as_str().unwrap().ends_with('Z'));
    let text = lines
        .iter()
        .find(|line| line["content_type"] == "text/plain")
        .unwrap();
    assert_eq!(
        (&text["payload_base64"], &text["key"]),
        (&json!("dGFiCWhlcmU="), &Value::Null)
    );
    for key in ["0", "1", "2", "3", "4", "5", "6"] {
        let of_key = lines.iter().filter(|line| line["key"] == key);
        let numbers: Vec<i64> = of_key
            .map(|line| line["payload"]["n"].as_i64().unwrap())
            .collect();
        assert!(numbers.len() > 40 && numbers.is_sorted(), "{numbers:?}");
    }

    let human = succeed(run(
        &db,
        &["consume", "orders", "--broadcast", "--from", "0", "--max", "1"],
    ));
    let fields: Vec<&str> = human.trim_end().split('\t').collect();
    assert_eq!(
        fields[..7],
        [
            id.trim(),
            "orders",
            "0",
            "order.placed",
            "k\\t1",
            r#"{"a":"b=c","tenant":"acme"}"#,
            "1"
        ]
    );
    assert_eq!(fields[8], r#"{"price": 1.10}"#);
}

#[tokio::test]
async fn atomic_publishes_nothing_if_a_line_is_bad() {
    let db = TestDatabase::new().await.unwrap();
    let lines = format!("{}x\n", numbers(2500));
    let output = run_with_input(&db, &["publish", "t", "--atomic"], &lines);
    assert!(output.stdout.is_empty());
    let error = fail(output);
    assert!(
        error.contains("line 2501 is not JSON") && error.contains("nothing was published"),
        "{error}"
    );
    assert_eq!(count(&db).await, 0);

    let large = format!("1\n\"{}\"\n", "x".repeat(1024 * 1024));
    let error = fail(run_with_input(&db, &["publish", "t", "--atomic"], &large));
    assert!(error.contains("line 2 ") && error.contains("limit"), "{error}");
    assert_eq!(count(&db).await, 0);

    assert_eq!(
        succeed(run_with_input(&db, &["publish", "t", "--atomic"], &numbers(2500)))
            .lines()
            .count(),
        2500
    );
    assert_eq!(count(&db).await, 2500);
}

#[tokio::test]
async fn everything_before_a_bad_line_is_published_and_nothing_from_it_on() {
    let db = TestDatabase::new().await.unwrap();
    let output = run_with_input(
        &db,
        &["publish", "t", "--json"],
        &format!("{}x\n1\n", numbers(1500)),
    );
    let printed = json_lines(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!((printed.len(), &printed[1499]["line"]), (1500, &json!(1500)));
    let error = fail(output);
    assert!(
        error.contains("line 1501 ") && error.contains("1500 messages were published before"),
        "{error}"
    );
    assert_eq!(count(&db).await, 1500);

    let large = format!("1\n2\n\"{}\"\n3\n", "x".repeat(1024 * 1024));
    let error = fail(run_with_input(&db, &["publish", "t"], &large));
    assert!(
        error.contains("line 3 ") && error.contains("2 messages were published before"),
        "{error}"
    );
    assert_eq!(count(&db).await, 1502);
}

#[tokio::test]
async fn a_line_is_published_without_waiting_for_the_end_of_the_input() {
    let db = TestDatabase::new().await.unwrap();
    let mut publishing = Running::start(postbox(&db, &["publish", "t", "-"]).stdin(Stdio::piped()));
    let mut stdin = publishing.0.stdin.take().unwrap();
    stdin.write_all(b"1\n").unwrap();
    let mut id = String::new();
    publishing.stdout().read_line(&mut id).unwrap();
    assert_eq!(count(&db).await, 1);
    drop(stdin);
    assert!(publishing.output().status.success());
}

#[tokio::test]
async fn a_deduplication_key_publishes_once() {
    let db = TestDatabase::new().await.unwrap();
    let arguments = ["publish", "t", "--payload", "1", "--dedup-key", "d"];
    assert_eq!(succeed(run(&db, &arguments)), succeed(run(&db, &arguments)));
    assert_eq!(count(&db).await, 1);
    refuse_usage(run(&db, &["publish", "t", "--dedup-key", "d"]));
}

#[tokio::test]
async fn after_a_closed_pipe_it_ends_with_success_and_unprinted_messages_come_again() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    // Much more than fits into a pipe.
    let lines: String = (0..200)
        .map(|n| format!("\"{n} {}\"\n", "x".repeat(8192)))
        .collect();
    succeed(run_with_input(&db, &["publish", "t"], &lines));

    let mut consuming = Running::start(&mut postbox(&db, &["consume", "t", "--group", "g", "--json"]));
    let mut head = String::new();
    let mut stdout = consuming.stdout();
    for _ in 0..3 {
        stdout.read_line(&mut head).unwrap();
    }
    drop(stdout);
    let output = consuming.output();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");

    assert_eq!(offsets(&head), [0, 1, 2]);
    let rest = offsets(&succeed(run(
        &db,
        &["consume", "t", "--group", "g", "--json", "--idle-timeout", "5"],
    )));
    // At most the pipe and one reader's buffer were written and not seen here.
    assert!((3..30).contains(&rest[0]), "{rest:?}");
    assert!(rest.iter().copied().eq(rest[0]..200), "none is missing: {rest:?}");
}

#[tokio::test]
async fn a_closed_pipe_is_noticed_without_another_message() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    succeed(run(&db, &["publish", "t", "--payload", "1"]));
    let mut consuming = Running::start(&mut postbox(&db, &["consume", "t", "--group", "g"]));
    let mut line = String::new();
    consuming.stdout().read_line(&mut line).unwrap();
    let output = consuming.output();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[tokio::test]
async fn a_graceful_stop_loses_nothing_and_repeats_nothing() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    let lines: String = (0..20_000).map(|n| format!("{{\"k\": {}}}\n", n % 13)).collect();
    succeed(run_with_input(&db, &["publish", "t", "--key-field", "k"], &lines));
    let consume = ["consume", "t", "--group", "g", "--json", "--concurrency", "16"];

    let mut printed = String::new();
    for signal in [Signal::TERM, Signal::INT] {
        let mut consuming = Running::start(&mut postbox(&db, &consume));
        let mut stdout = consuming.stdout();
        for _ in 0..100 {
            stdout.read_line(&mut printed).unwrap();
        }
        consuming.signal(signal);
        stdout.read_to_string(&mut printed).unwrap();
        let output = consuming.output();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let owned: i64 =
            sqlx::query_scalar("SELECT count(*) FROM postbox.lane WHERE consumer_id IS NOT NULL")
                .fetch_one(db.pool())
                .await
                .unwrap();
        assert_eq!(owned, 0, "its lanes are free");
    }
    assert!(printed.lines().count() < 20_000, "it was stopped on the way");
    let left = 20_000 - offsets(&printed).iter().collect::<HashSet<_>>().len();
    let rest = run(&db, &[&consume[..], &["--max", &left.to_string()]].concat());
    let mut times = vec![0; 20_000];
    for offset in offsets(&printed).into_iter().chain(offsets(&succeed(rest))) {
        times[offset as usize] += 1;
    }
    let wrong: Vec<(usize, i32)> = times
        .into_iter()
        .enumerate()
        .filter(|(_, times)| *times != 1)
        .collect();
    assert!(
        wrong.is_empty(),
        "offsets not printed once, with how often they were: {wrong:?}"
    );
}

#[tokio::test]
async fn a_graceful_stop_while_catching_up_repeats_nothing_and_records_each_offset_once() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    succeed(run_with_input(
        &db,
        &["publish", "t", "--atomic"],
        &numbers(6_000),
    ));
    let one = ["consume", "t", "--group", "g", "--json", "--max", "1"];
    assert_eq!(offsets(&succeed(run(&db, &one))), [0]);
    // As after a stop with 200 messages in hand that are far apart.
    sqlx::query(
        "UPDATE postbox.lane SET position = 5990, pending = ARRAY(SELECT generate_series(0, 5970, 30))",
    )
    .execute(db.pool())
    .await
    .unwrap();
    for expected in [0, 30, 60] {
        assert_eq!(offsets(&succeed(run(&db, &one))), [expected]);
        let most: i32 = sqlx::query_scalar("SELECT max(cardinality(pending)) FROM postbox.lane")
            .fetch_one(db.pool())
            .await
            .unwrap();
        assert!(most < 200, "each offset once: {most}");
    }
}

#[tokio::test]
async fn max_acknowledges_exactly_so_many() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    succeed(run_with_input(&db, &["publish", "t"], &numbers(50)));
    let consume = |max| {
        offsets(&succeed(run(
            &db,
            &["consume", "t", "--group", "g", "--json", "--max", max],
        )))
    };
    assert_eq!(consume("3"), [0, 1, 2]);
    assert_eq!(consume("1"), [3]);
    let output = run(
        &db,
        &[
            "consume",
            "t",
            "--group",
            "g",
            "--json",
            "--max",
            "6",
            "--concurrency",
            "16",
        ],
    );
    assert!(output.stderr.is_empty(), "{output:?}");
    let six = offsets(&succeed(output));
    assert_eq!(six.len(), 6);
    let mut rest = offsets(&succeed(run(
        &db,
        &["consume", "t", "--group", "g", "--json", "--idle-timeout", "5"],
    )));
    rest.extend(six);
    rest.sort_unstable();
    assert!(rest.into_iter().eq(4..50));
}

#[tokio::test]
async fn a_failing_command_is_retried_and_keeps_the_order_of_its_key() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    for (key, payload) in [("a", "1"), ("a", "2"), ("b", "3"), ("a", "4"), ("b", "5")] {
        succeed(run(
            &db,
            &[
                "publish",
                "t",
                "--type",
                "y",
                "--header",
                "h=v",
                "--key",
                key,
                "--payload",
                payload,
            ],
        ));
    }
    let command = r#"p=$(cat); echo "$POSTBOX_KEY $p $POSTBOX_ATTEMPT $POSTBOX_TOPIC $POSTBOX_TYPE $POSTBOX_HEADERS"
        [ "$p" != 1 ] || [ "$POSTBOX_ATTEMPT" -gt 1 ] || { echo oops >&2; exit 3; }"#;
    let output = run(
        &db,
        &["consume", "t", "--group", "g", "--max", "5", "--exec", command],
    );
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        stderr.contains("oops") && stderr.contains("exit status: 3"),
        "{stderr}"
    );
    let runs = succeed(output);
    assert!(
        runs.lines().all(|line| line.ends_with(r#" t y {"h":"v"}"#)),
        "{runs}"
    );
    let of_key = |key| {
        runs.lines()
            .filter(|line| line.starts_with(key))
            .map(|line| line[2..5].to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(of_key("a"), ["1 1", "1 2", "2 1", "4 1"]);
    assert_eq!(of_key("b"), ["3 1", "5 1"]);
    assert!(
        runs.find("b 5 1") < runs.find("a 1 2"),
        "another key does not wait: {runs}"
    );
    assert_eq!(
        succeed(run(
            &db,
            &["consume", "t", "--group", "g", "--idle-timeout", "1.5"]
        )),
        ""
    );
}

#[tokio::test]
async fn a_command_that_takes_too_long_is_killed_with_its_children_and_retried() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    succeed(run(&db, &["publish", "t", "--payload", "1"]));
    // The child would hold standard output open, and the test would wait for it.
    let command = r#"echo $POSTBOX_ATTEMPT; [ "$POSTBOX_ATTEMPT" -gt 1 ] || { sleep 1000 & wait; }"#;
    let arguments = [
        "consume",
        "t",
        "--group",
        "g",
        "--max",
        "1",
        "--timeout",
        "3s",
        "--exec",
        command,
    ];
    assert_eq!(succeed(run(&db, &arguments)), "1\n2\n");
}

#[tokio::test]
async fn a_command_need_not_read_its_input() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    let large = "x".repeat(500_000);
    succeed(run_with_input(
        &db,
        &["publish", "t", "--content-type", "text/plain"],
        &large,
    ));
    assert_eq!(
        succeed(run(
            &db,
            &[
                "consume",
                "t",
                "--group",
                "g",
                "--max",
                "1",
                "--exec",
                "echo done"
            ]
        )),
        "done\n"
    );
}

#[tokio::test]
async fn only_the_types_asked_for_are_printed() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    for arguments in [&["--type", "a"][..], &["--type", "b"], &["--type", "c"], &[]] {
        succeed(run(
            &db,
            &[&["publish", "t", "--payload", "1"], arguments].concat(),
        ));
    }
    let arguments = [
        "consume",
        "t",
        "--group",
        "g",
        "--type",
        "a",
        "--type",
        "c",
        "--json",
        "--idle-timeout",
        "5",
    ];
    assert_eq!(offsets(&succeed(run(&db, &arguments))), [0, 2]);
    // What is skipped holds up nothing of its key.
    for message_type in ["b", "a"] {
        succeed(run(
            &db,
            &[
                "publish",
                "t",
                "--payload",
                "1",
                "--type",
                message_type,
                "--key",
                "k",
            ],
        ));
    }
    assert_eq!(offsets(&succeed(run(&db, &arguments))), [5]);
}

#[tokio::test]
async fn only_what_the_filter_wants_is_printed_and_a_wrong_one_is_refused() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatcher = dispatcher(&db).await;
    let mut ids = Vec::new();
    for (total, region) in [("50", "region=EU"), ("500", "region=EU"), ("500", "region=US")] {
        let payload = format!("{{\"total\": {total}}}");
        let arguments = [
            "publish",
            "t",
            "--payload",
            &payload,
            "--header",
            region,
            "--key",
            "k",
        ];
        ids.push(succeed(run(&db, &arguments)).trim().to_owned());
    }
    let filter = "$.payload.total > 100 && $.headers.region == \"EU\"";
    let arguments = [
        "consume",
        "t",
        "--group",
        "g",
        "--filter",
        filter,
        "--json",
        "--idle-timeout",
        "5",
    ];
    assert_eq!(offsets(&succeed(run(&db, &arguments))), [1]);
    for (id, state) in ids.iter().zip(["filtered", "delivered", "filtered"]) {
        let shown = succeed(run(&db, &["messages", "show", id]));
        assert!(shown.contains(state), "{state}: {shown}");
    }
    let status = json_lines(&succeed(run(&db, &["status", "--json"])));
    assert_eq!(
        status[0]["subscriptions"][0]["filters"],
        json!({ "": filter, "*": filter })
    );
    let listed = succeed(run(&db, &["subscriptions", "list"]));
    assert!(listed.contains(filter), "{listed}");

    let wrong = [
        "consume",
        "t",
        "--group",
        "g",
        "--filter",
        "$.payload.total >",
        "--idle-timeout",
        "5",
    ];
    let refused = run(&db, &wrong);
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && stderr.contains("at character 18"),
        "{stderr}"
    );
}

#[tokio::test]
async fn without_a_dispatcher_it_says_so_and_dispatch_runs_one() {
    let db = TestDatabase::new().await.unwrap();
    succeed(run(&db, &["publish", "t", "--payload", "1"]));
    let output = run(&db, &["consume", "t", "--group", "g", "--idle-timeout", "200ms"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        stderr.starts_with("warning: no dispatcher is connected") && stderr.contains("postbox run"),
        "{stderr}"
    );
    assert_eq!(succeed(output), "");
    let output = run(
        &db,
        &[
            "consume",
            "t",
            "--group",
            "g",
            "--dispatch",
            "--max",
            "1",
            "--json",
        ],
    );
    assert!(output.stderr.is_empty(), "{output:?}");
    assert_eq!(offsets(&succeed(output)), [0]);
}

#[tokio::test]
async fn status_shows_topics_subscriptions_consumers_and_dispatchers() {
    let db = TestDatabase::new().await.unwrap();
    let empty: Value = serde_json::from_str(&succeed(run(&db, &["status", "--json"]))).unwrap();
    assert_eq!((&empty["dispatchers"], &empty["topics"]), (&json!(0), &json!([])));
    let _dispatcher = dispatcher(&db).await;
    succeed(run_with_input(&db, &["publish", "orders"], &numbers(5)));
    succeed(run(&db, &["consume", "orders", "--group", "mail", "--max", "2"]));
    let _consumer = Running::start(&mut postbox(&db, &["consume", "orders", "--group", "other"]));
    let status = eventually(PATIENCE, async || {
        let status: Value = serde_json::from_str(&succeed(run(&db, &["status", "--json"]))).unwrap();
        let owned = status["subscriptions"]
            .get(1)
            .map_or(0, |other| other["owned"].as_i64().unwrap());
        if owned == 32 {
            Ok(status)
        } else {
            Err(format!("{status}"))
        }
    })
    .await;
    assert_eq!(status["dispatchers"], 1);
    assert_eq!(
        status["topics"][0],
        json!({"topic": "orders", "first_offset": 0, "next_offset": 5})
    );
    assert_eq!(status["subscriptions"][0]["lag"], 3);
    assert_eq!(status["consumers"][0]["live"], true);

    let human = succeed(run(&db, &["status"]));
    for expected in [
        "Dispatchers     1 connected",
        "mail   orders  key    0/32",
        "other  orders  key    32/32",
        "test",
        "live",
    ] {
        assert!(human.contains(expected), "{expected:?} in:\n{human}");
    }
}

#[tokio::test]
async fn invalid_names_are_refused_with_the_alphabet() {
    let db = TestDatabase::new().await.unwrap();
    for arguments in [
        &["publish", "a b", "--payload", "1"][..],
        &["publish", "", "--payload", "1"],
        &["publish", "t", "--payload", "1", "--type", "ä"],
        &["consume", "a,b", "--group", "g"],
        &["consume", "t", "--group", "g g"],
    ] {
        let error = refuse_usage(run(&db, arguments));
        assert!(
            error.contains("1 to 255 characters of A-Z a-z 0-9 . _ - : /"),
            "{error}"
        );
    }
    let error = refuse_usage(run(&db, &["consume", "t"]));
    assert!(
        error.contains("--group") && error.contains("--broadcast"),
        "{error}"
    );
    let error = fail(run(&db, &["publish", "t", "--payload", "hello"]));
    assert!(
        error.contains("the payload is not JSON") && error.contains("--content-type"),
        "{error}"
    );
}

#[tokio::test]
async fn a_database_that_is_not_named_or_not_there_is_told_in_one_line_without_the_password() {
    let db = TestDatabase::new().await.unwrap();
    let error = refuse_usage(
        postbox(&db, &["status"])
            .env_remove("DATABASE_URL")
            .output()
            .unwrap(),
    );
    assert!(
        error.contains("DATABASE_URL") && error.contains("--database-url"),
        "{error}"
    );
    let error = refuse_usage(run(&db, &["status", "--database-url", "mysql://u:secret@h:x/d"]));
    assert!(
        error.contains("postgres://") && !error.contains("secret"),
        "{error}"
    );
    let error = fail(run(
        &db,
        &["--database-url", "postgres://u:secret@127.0.0.1:1/d", "status"],
    ));
    assert!(
        error.contains("\"d\" at 127.0.0.1:1") && error.contains("refused") && !error.contains("secret"),
        "{error}"
    );
}

#[tokio::test]
async fn migrating_twice_is_fine() {
    let db = TestDatabase::empty().await.unwrap();
    let error = fail(run(&db, &["status"]));
    assert!(error.contains("postbox migrate"), "{error}");
    assert!(succeed(run(&db, &["migrate"])).starts_with("applied migration 1\n"));
    assert!(succeed(run(&db, &["migrate"])).starts_with("up to date"));
    let again: Value = serde_json::from_str(&succeed(run(&db, &["migrate", "--json"]))).unwrap();
    assert_eq!(
        again,
        json!({"applied": [], "functions": false, "schema_version": postbox::SCHEMA_VERSION})
    );
}

#[tokio::test]
async fn run_can_migrate_first_and_stops_on_sigterm() {
    let db = TestDatabase::empty().await.unwrap();
    let running = Running::start(&mut postbox(&db, &["run", "--migrate", "--tick", "2ms"]));
    eventually(PATIENCE, async || {
        let output = run(&db, &["status", "--json"]);
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if status["dispatchers"] == 1 {
            Ok(())
        } else {
            Err(format!("{output:?}"))
        }
    })
    .await;
    running.signal(Signal::TERM);
    let output = running.output();
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stderr).contains("stopped"),
        "{output:?}"
    );
    refuse_usage(run(&db, &["run", "--tick", "0ms"]));
}

#[tokio::test]
async fn a_newer_schema_is_refused_by_every_command() {
    let db = TestDatabase::new().await.unwrap();
    let later = "INSERT INTO postbox.schema_migration (version, name, checksum) VALUES (1000, 'later', ''); \
         UPDATE postbox.installation SET compatible_from = 1000";
    sqlx::raw_sql(later).execute(db.pool()).await.unwrap();
    for arguments in [
        &["migrate"][..],
        &["run"],
        &["run", "--migrate"],
        &["status"],
        &["publish", "t", "--payload", "1"],
        &["consume", "t", "--group", "g"],
    ] {
        let output = run(&db, arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(
            error.contains("version 1000") && error.contains("upgrade this program"),
            "{arguments:?}: {error}"
        );
    }
}

// ----------------------------------------------------------------------------------------------- postbox scheduled, postbox cron

#[tokio::test]
async fn a_message_for_later_is_listed_shown_moved_and_cancelled() {
    let db = TestDatabase::new().await.unwrap();
    sqlx::query("SELECT postbox.subscribe('mail', 'reminders', 4::smallint, 'key', NULL, 'earliest', NULL)")
        .execute(db.pool())
        .await
        .unwrap();
    let publish = |delay: &str| {
        let arguments = [
            "publish",
            "reminders",
            "--payload",
            "{}",
            "--key",
            "7",
            "--delay",
            delay,
        ];
        succeed(run(&db, &arguments)).trim().to_owned()
    };
    let list = || {
        json_lines(&succeed(run(
            &db,
            &["scheduled", "list", "--json", "--topic", "reminders"],
        )))
    };
    let show = |id: &str| -> Value {
        serde_json::from_str(&succeed(run(&db, &["messages", "show", id, "--json"]))).unwrap()
    };
    let (later, soon) = (publish("2h"), publish("1h"));
    let listed = list();
    let ids: Vec<_> = listed
        .iter()
        .map(|message| message["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, [&soon, &later], "the next first");
    let others = run(&db, &["scheduled", "list", "--json", "--topic", "others"]);
    assert_eq!(succeed(others), "");
    let table = succeed(run(&db, &["scheduled", "list"]));
    assert!(table.contains(&soon) && table.contains("reminders"), "{table}");

    let shown = show(&soon);
    assert_eq!(shown["deliver_at"], listed[0]["deliver_at"]);
    assert_eq!(
        (&shown["offset"], &shown["in_log"], &shown["key"]),
        (&Value::Null, &json!(false), &json!("7"))
    );
    assert_eq!(
        (&shown["groups"][0]["group"], &shown["groups"][0]["state"]),
        (&json!("mail"), &json!("scheduled"))
    );
    let human = succeed(run(&db, &["messages", "show", &soon]));
    assert!(
        human.contains("none yet: it is due at") && human.contains("scheduled"),
        "{human}"
    );

    // Moved behind the other one, and then into the past, where a dispatcher finds it.
    succeed(run(&db, &["scheduled", "reschedule", &soon, "--delay", "3h"]));
    assert_eq!(list()[0]["id"], json!(later));
    refuse_usage(run(&db, &["scheduled", "reschedule", &soon]));
    refuse_usage(run(&db, &["scheduled", "reschedule", &soon, "--at", "tomorrow"]));
    let moved = succeed(run(
        &db,
        &["scheduled", "reschedule", &soon, "--at", "2020-01-01T00:00:00Z"],
    ));
    assert_eq!(moved, format!("rescheduled {soon} to 2020-01-01T00:00:00Z\n"));
    let dispatching = dispatcher(&db).await;
    eventually(PATIENCE, async || {
        let shown = show(&soon);
        if shown["offset"] == json!(0) {
            Ok(())
        } else {
            Err(shown)
        }
    })
    .await;
    let shown = show(&soon);
    assert_eq!(
        (&shown["deliver_at"], &shown["in_log"]),
        (&Value::Null, &json!(true))
    );
    assert_eq!(shown["groups"][0]["state"], "waiting");
    drop(dispatching);

    let arguments = ["scheduled", "cancel", &later, &soon];
    let output = run(&db, &arguments);
    assert!(
        String::from_utf8_lossy(&output.stderr).contains(&format!("message {soon} is not pending")),
        "{output:?}"
    );
    assert_eq!(succeed(output), format!("cancelled {later}\n"));
    assert!(list().is_empty());
    let gone = run(&db, &arguments);
    assert_eq!(gone.status.code(), Some(1), "{gone:?}");
    assert!(
        String::from_utf8_lossy(&gone.stderr).ends_with("error: nothing was cancelled\n"),
        "{gone:?}"
    );
    fail(run(&db, &["scheduled", "reschedule", &later, "--delay", "1h"]));
    let error = fail(run(&db, &["messages", "show", &later]));
    assert!(error.contains("it was cancelled"), "{error}");
}

#[tokio::test]
async fn a_schedule_is_added_listed_paused_and_removed() {
    let db = TestDatabase::new().await.unwrap();
    let add = |name: &str, schedule: &str, more: &[&str]| {
        run(&db, &[&["cron", "add", name, schedule, "reports"], more].concat())
    };
    let list = || json_lines(&succeed(run(&db, &["cron", "list", "--json"])));
    let next = succeed(add(
        "nightly",
        "0 3 * * *",
        &[
            "--tz",
            "Europe/Berlin",
            "--payload",
            r#"{"kind": "nightly"}"#,
            "--missed",
            "all",
        ],
    ));
    let listed = list();
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (
            &listed[0]["name"],
            &listed[0]["time_zone"],
            &listed[0]["missed"],
            &listed[0]["paused"]
        ),
        (
            &json!("nightly"),
            &json!("Europe/Berlin"),
            &json!("all"),
            &json!(false)
        )
    );
    // The same in every form.
    let upcoming = ["cron", "next", "nightly", "-n", "3", "--json"];
    let due: Vec<String> = serde_json::from_str(&succeed(run(&db, &upcoming))).unwrap();
    assert_eq!((due.len(), format!("{}\n", due[0])), (3, next));
    let by_expression = [
        "cron",
        "next",
        "--schedule",
        "0 3 * * *",
        "--tz",
        "Europe/Berlin",
        "-n",
        "3",
        "--json",
    ];
    assert_eq!(
        serde_json::from_str::<Vec<String>>(&succeed(run(&db, &by_expression))).unwrap(),
        due
    );
    let human = succeed(run(&db, &["cron", "next", "nightly", "-n", "1"]));
    assert!(human.contains(&due[0]) && human.contains("03:00"), "{human}");

    assert_eq!(
        succeed(run(&db, &["cron", "pause", "nightly"])),
        "paused nightly\n"
    );
    assert_eq!(list()[0]["paused"], true);
    assert!(succeed(run(&db, &["cron", "list"])).contains("paused"));
    assert_eq!(
        succeed(run(&db, &["cron", "resume", "nightly"])),
        "resumed nightly\n"
    );
    assert_eq!(list()[0]["paused"], false);

    // One of the same name is changed, not doubled.
    succeed(add("nightly", "@hourly", &[]));
    assert_eq!((list().len(), &list()[0]["schedule"]), (1, &json!("@hourly")));
    for wrong in [
        add("wrong", "0 25 * * *", &[]),
        add("wrong", "0 3 * *", &[]),
        add("wrong", "@daily", &["--tz", "Europe/Berlyn"]),
        add("wrong", "@daily", &["--payload", "{"]),
        add("wrong", "@daily", &["--missed", "never"]),
        run(&db, &["cron", "next"]),
    ] {
        refuse_usage(wrong);
    }
    let preview = run(&db, &["cron", "remove", "nightly"]);
    assert_eq!(preview.status.code(), Some(3), "{preview:?}");
    assert_eq!(list().len(), 1);
    assert_eq!(
        succeed(run(&db, &["cron", "remove", "nightly", "--yes"])),
        "removed nightly\n"
    );
    assert!(list().is_empty());
    for command in ["pause", "resume", "next"] {
        let error = fail(run(&db, &["cron", command, "nightly"]));
        assert!(error.contains("there is no schedule \"nightly\""), "{error}");
    }
    fail(run(&db, &["cron", "remove", "nightly", "--yes"]));
}

#[tokio::test]
async fn a_schedule_fires_where_a_dispatcher_runs() {
    let db = TestDatabase::new().await.unwrap();
    let _dispatching = dispatcher(&db).await;
    succeed(run(
        &db,
        &[
            "cron",
            "add",
            "every-second",
            "* * * * * *",
            "ticks",
            "--payload",
            r#""tick""#,
        ],
    ));
    let arguments = ["consume", "ticks", "--group", "listeners", "--json", "--max", "2"];
    for line in json_lines(&succeed(run(&db, &arguments))) {
        assert_eq!(
            (&line["payload"], &line["headers"]["postbox-cron"]),
            (&json!("tick"), &json!("every-second")),
            "{line}"
        );
        assert!(line["headers"]["postbox-scheduled-at"].is_string(), "{line}");
    }
}

// -------------------------------------------------------------------------------------------------------------- postbox bench

#[tokio::test]
async fn bench_publish_prints_its_figures_and_leaves_nothing_of_its_own_behind() {
    let db = TestDatabase::new().await.unwrap();
    sqlx::query("SELECT postbox.subscribe('mine', 'orders', 4::smallint, 'key', NULL, 'earliest', NULL)")
        .execute(db.pool())
        .await
        .unwrap();
    succeed(run(&db, &["publish", "orders", "--payload", "1"]));
    let arguments = [
        "bench",
        "publish",
        "--json",
        "--compare",
        "--seconds",
        "1",
        "--rounds",
        "1",
        "--clients",
        "2",
    ];
    let lines = json_lines(&succeed(run(&db, &arguments)));
    let [figures] = lines.as_slice() else {
        panic!("one object: {lines:?}");
    };
    assert_eq!(figures["bench"], "publish");
    assert_eq!(figures["verified"], true);
    assert!(figures["postgres"].is_string(), "{figures}");
    assert!(figures["cores"].as_u64() >= Some(1), "{figures}");
    assert_eq!(figures["settings"]["clients"], 2);
    assert_eq!(figures["settings"]["server"]["synchronous_commit"], "on");
    for name in [
        "messages",
        "tx_per_s",
        "ratio_to_plain_insert",
        "ratio_to_no_message",
        "textbook_ratio_to_plain_insert",
    ] {
        assert!(figures[name].as_f64() > Some(0.0), "{name}: {figures}");
    }
    for nothing in [
        "SELECT count(*) FROM pg_namespace WHERE nspname = 'postbox_bench'",
        "SELECT count(*) FROM postbox.subscription WHERE group_name <> 'mine'",
        "SELECT count(*) FROM postbox.topic WHERE name <> 'orders'",
    ] {
        let left: i64 = sqlx::query_scalar(nothing).fetch_one(db.pool()).await.unwrap();
        assert_eq!(left, 0, "{nothing}");
    }
    let mine: i64 = sqlx::query_scalar("SELECT count(*) FROM postbox.lane")
        .fetch_one(db.pool())
        .await
        .unwrap();
    assert_eq!(mine, 4, "another group's lanes");
}

#[tokio::test]
async fn bench_with_a_consumer_in_another_process_counts_every_delivery() {
    let db = TestDatabase::new().await.unwrap();
    let arguments = [
        "bench",
        "fanout",
        "--json",
        "--rounds",
        "1",
        "--messages",
        "500",
        "--groups",
        "4",
        "--processes",
        "2",
    ];
    let lines = json_lines(&succeed(run(&db, &arguments)));
    let processes: Vec<_> = lines.iter().map(|line| line["processes"].as_u64()).collect();
    assert_eq!(processes, [Some(1), Some(2)]);
    for line in &lines {
        assert_eq!(
            (&line["verified"], &line["groups"]),
            (&json!(true), &json!(4)),
            "{line}"
        );
        assert!(line["deliveries_per_s"].as_f64() > Some(0.0), "{line}");
    }
}

#[tokio::test]
async fn bench_latency_draws_what_it_found() {
    let db = TestDatabase::new().await.unwrap();
    let picture = std::env::temp_dir().join(format!("postbox-latency-{}.svg", std::process::id()));
    let path = picture.to_str().unwrap();
    let arguments = [
        "bench",
        "latency",
        "--json",
        "--seconds",
        "1",
        "--rate",
        "20",
        "--rate",
        "50",
        "--svg",
        path,
    ];
    let lines = json_lines(&succeed(run(&db, &arguments)));
    let found: Vec<_> = lines
        .iter()
        .map(|line| (line["dispatcher"].as_str(), line["rate"].as_u64()))
        .collect();
    let of = |place| [(Some(place), Some(20)), (Some(place), Some(50))];
    assert_eq!(found, [of("embedded"), of("sidecar")].concat());
    let drawn = std::fs::read_to_string(&picture).unwrap();
    std::fs::remove_file(&picture).unwrap();
    for expected in ["<svg", "embedded, p50", "sidecar, p99", "messages a second"] {
        assert!(drawn.contains(expected), "{expected}");
    }
    refuse_usage(run(&db, &["bench", "latency", "--svg", "latency.png"]));
    refuse_usage(run(&db, &["bench", "latency", "--sweep", "--rate", "5"]));
}

#[tokio::test]
async fn only_one_bench_runs_at_a_time() {
    let db = TestDatabase::new().await.unwrap();
    let mut other = db.connect().await.unwrap();
    sqlx::query("SELECT pg_advisory_lock(1347571766, 1)")
        .execute(&mut other)
        .await
        .unwrap();
    let error = fail(run(&db, &["bench", "publish", "--json", "--seconds", "1"]));
    assert!(error.contains("another `postbox bench`"), "{error}");
}

#[tokio::test]
async fn bench_timers_counts_every_message_and_none_is_early() {
    let db = TestDatabase::new().await.unwrap();
    let arguments = [
        "bench",
        "timers",
        "--json",
        "--seconds",
        "1",
        "--rate",
        "200",
        "--burst",
        "10000",
    ];
    let lines = json_lines(&succeed(run(&db, &arguments)));
    let [figures] = lines.as_slice() else {
        panic!("one object: {lines:?}");
    };
    assert_eq!(
        (&figures["verified"], &figures["early"]),
        (&json!(true), &json!(0))
    );
    assert_eq!(
        (&figures["messages"], &figures["burst_messages"]),
        (&json!(200), &json!(10_000))
    );
    for name in [
        "p50_ms",
        "p99_ms",
        "max_ms",
        "burst_seconds",
        "immediate_p99_ms",
        "immediate_before_p99_ms",
    ] {
        assert!(figures[name].as_f64() > Some(0.0), "{name}: {figures}");
    }
}
