//! The `postbox` command where somebody would be fooled: what it prints, what it stops after, what it brings back, and what it waits for.
#![allow(clippy::unwrap_used)] // Clippy allows it in test functions, and here what they call is as much a test.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use postbox_testkit::{TestDatabase, eventually};
use serde_json::Value;

fn command(db: &TestDatabase, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_postbox"));
    command
        .args(arguments)
        .env("DATABASE_URL", db.url())
        .env_remove("RUST_LOG")
        .env("HOSTNAME", "test")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn run(db: &TestDatabase, arguments: &[&str]) -> Output {
    command(db, arguments).output().unwrap()
}

/// Both of its outputs, with this exit status.
fn says(db: &TestDatabase, arguments: &[&str], status: i32) -> String {
    let output = run(db, arguments);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap()
}

async fn number(db: &TestDatabase, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(db.pool()).await.unwrap()
}

async fn sql(db: &TestDatabase, sql: &'static str) {
    sqlx::raw_sql(sql).execute(db.pool()).await.unwrap();
}

// ------------------------------------------------------------------------------------------------------------------- terminals

#[tokio::test]
async fn nothing_that_somebody_published_reaches_a_terminal_as_a_command() {
    let db = TestDatabase::new().await.unwrap();
    // Escape, the eight-bit form of it, delete, a carriage return, and what turns the direction of writing around.
    const EVIL: &str = "x\u{1b}]0;owned\u{7}\u{9b}31m\u{7f}\r\u{202e}y";
    sqlx::query(
        "INSERT INTO postbox.outbox (topic, type, key, headers, content_type, payload) \
         VALUES ('orders', 'placed', $1, jsonb_build_object('h', $1), 'text/plain', convert_to($1, 'UTF8'))",
    )
    .bind(EVIL)
    .execute(db.pool())
    .await
    .unwrap();
    let id: uuid::Uuid = sqlx::query_scalar("SELECT id FROM postbox.outbox")
        .fetch_one(db.pool())
        .await
        .unwrap();
    let id = id.to_string();
    let mut seen = Vec::new();
    for mode in [&[][..], &["--json"][..]] {
        let mut arguments = vec![
            "consume",
            "orders",
            "--broadcast",
            "--from",
            "earliest",
            "--dispatch",
            "--max",
            "1",
        ];
        arguments.extend(mode);
        seen.push(says(&db, &arguments, 0));
    }
    let dies = [
        "consume",
        "orders",
        "--group",
        "g",
        "--dispatch",
        "--max",
        "1",
        "--exec",
        "exit 65",
    ];
    seen.push(says(&db, &dies, 0));
    sqlx::query("UPDATE postbox.dead_letter SET reason = $1, instance = $1, errors = jsonb_build_array(jsonb_build_object('error', $1, 'at', $1))")
        .bind(EVIL)
        .execute(db.pool())
        .await
        .unwrap();
    for arguments in [
        &["dead-letters", "list"][..],
        &["dead-letters", "list", "--json"],
        &["dead-letters", "show", "1"],
        &["dead-letters", "show", "1", "--json"],
        &["dead-letters", "export"],
        &["messages", "show", &id],
        &["messages", "show", &id, "--json"],
        &["status"],
    ] {
        seen.push(says(&db, arguments, 0));
    }
    let is_command =
        |c: char| (c.is_control() && c != '\n' && c != '\t') || ('\u{202a}'..='\u{202e}').contains(&c);
    for text in &seen {
        assert!(!text.contains(is_command), "{text:?}");
    }
    assert!(
        seen[0].contains("owned") && seen[0].contains("\\u001b"),
        "{}",
        seen[0]
    );
    // What is JSON says what it was.
    let line: Value = serde_json::from_str(seen[1].lines().next().unwrap()).unwrap();
    assert_eq!(line["key"], EVIL);
}

// ---------------------------------------------------------------------------------------------------------------------- consume

#[tokio::test]
async fn max_counts_what_is_given_up_too() {
    for (exec, attempts, max) in [("exit 65", "16", 5), ("exit 1", "1", 3)] {
        let db = TestDatabase::new().await.unwrap();
        sql(
            &db,
            "SELECT postbox.publish('orders', '1', key => n::text) FROM generate_series(1, 20) n",
        )
        .await;
        let most = max.to_string();
        let arguments = [
            "consume",
            "orders",
            "--group",
            "g",
            "--dispatch",
            "--exec",
            exec,
            "--max-attempts",
            attempts,
            "--max",
            &most,
        ];
        says(&db, &arguments, 0);
        assert_eq!(
            number(&db, "SELECT count(*) FROM postbox.dead_letter").await,
            max,
            "{exec}"
        );
    }
}

#[tokio::test]
async fn a_run_that_takes_too_long_for_the_last_time_counts_as_well() {
    let db = TestDatabase::new().await.unwrap();
    sql(
        &db,
        "SELECT postbox.publish('orders', '1', key => n::text) FROM generate_series(1, 9) n",
    )
    .await;
    let arguments = [
        "consume",
        "orders",
        "--group",
        "g",
        "--dispatch",
        "--exec",
        "sleep 60",
        "--timeout",
        "300ms",
        "--max-attempts",
        "1",
        "--max",
        "2",
        "--concurrency",
        "1",
    ];
    says(&db, &arguments, 0);
    let died: Vec<String> = sqlx::query_scalar("SELECT reason FROM postbox.dead_letter")
        .fetch_all(db.pool())
        .await
        .unwrap();
    assert_eq!(died.len(), 2, "{died:?}");
    assert!(died[0].contains("took longer than 300ms"), "{died:?}");
}

#[tokio::test]
async fn messages_are_printed_by_offset_where_keys_mix_with_keyless_messages() {
    let db = TestDatabase::new().await.unwrap();
    sql(
        &db,
        "SELECT postbox.publish('orders', '1', key => CASE WHEN n % 3 <> 0 THEN (n % 2)::text END) FROM generate_series(1, 500) n",
    )
    .await;
    let arguments = [
        "consume",
        "orders",
        "--group",
        "peek",
        "--dispatch",
        "--max",
        "500",
        "--json",
    ];
    let output = run(&db, &arguments);
    assert!(output.status.success(), "{output:?}");
    let offsets: Vec<i64> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["offset"]
                .as_i64()
                .unwrap()
        })
        .collect();
    assert_eq!(offsets, (0..500).collect::<Vec<i64>>());
}

// ---------------------------------------------------------------------------------------------------------------- deliver again

/// A message that group `g` gave up, was redriven with payload `"new"`, and was handled.
async fn redriven_with_another_payload() -> TestDatabase {
    let db = TestDatabase::new().await.unwrap();
    sql(&db, "SELECT postbox.publish('orders', '\"old\"')").await;
    says(
        &db,
        &[
            "consume",
            "orders",
            "--group",
            "g",
            "--dispatch",
            "--max",
            "1",
            "--exec",
            "exit 65",
        ],
        0,
    );
    sql(
        &db,
        "SELECT postbox.redrive(ARRAY(SELECT id FROM postbox.dead_letter), '\"new\"')",
    )
    .await;
    let said = says(
        &db,
        &["consume", "orders", "--group", "g", "--dispatch", "--max", "1"],
        0,
    );
    assert!(said.contains("\"new\""), "{said}");
    db
}

#[tokio::test]
async fn a_replay_keeps_the_payload_that_a_message_was_redriven_with() {
    let db = redriven_with_another_payload().await;
    let replay = [
        "subscriptions",
        "replay",
        "g",
        "orders",
        "--from",
        "earliest",
        "--to",
        "latest",
        "--yes",
    ];
    let replaying = command(&db, &replay).spawn().unwrap();
    let said = says(
        &db,
        &["consume", "orders", "--group", "g", "--dispatch", "--max", "1"],
        0,
    );
    assert!(said.contains("\"new\"") && !said.contains("\"old\""), "{said}");
    let output = replaying.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test]
async fn a_seek_brings_an_old_payload_back_only_if_that_is_asked_for() {
    let db = redriven_with_another_payload().await;
    let seek = ["subscriptions", "seek", "g", "orders", "--to", "earliest"];
    let said = says(&db, &seek, 3);
    assert!(
        said.contains("1 of them were redriven with another payload"),
        "{said}"
    );
    let with = |more: &[&'static str]| [&seek[..], more].concat();
    let said = says(&db, &with(&["--yes"]), 1);
    assert!(said.contains("redriven with another payload"), "{said}");
    let said = says(&db, &with(&["--yes", "--original-payloads"]), 0);
    assert!(said.contains("g on orders is at offset 0"), "{said}");
    let said = says(
        &db,
        &["consume", "orders", "--group", "g", "--dispatch", "--max", "1"],
        0,
    );
    assert!(said.contains("\"old\""), "{said}");
}

#[tokio::test]
async fn who_replays_or_seeks_is_told_at_once_that_nobody_runs_it_and_status_says_why_a_group_stands_still() {
    let db = TestDatabase::new().await.unwrap();
    // Each in a transaction of its own.
    for statement in [
        "SELECT postbox.publish('orders', '1') FROM generate_series(1, 3)",
        "SELECT * FROM postbox.sequence()",
        "SELECT * FROM postbox.subscribe('g', 'orders', 4::smallint, 'key', NULL, 'earliest', NULL)",
        "UPDATE postbox.lane SET position = 3",
    ] {
        sql(&db, statement).await;
    }
    let replay = [
        "subscriptions",
        "replay",
        "g",
        "orders",
        "--from",
        "earliest",
        "--to",
        "latest",
        "--yes",
    ];
    let mut replaying = command(&db, &replay).spawn().unwrap();
    let lines = BufReader::new(replaying.stderr.take().unwrap()).lines();
    let told = lines
        .map(Result::unwrap)
        .find(|line| line.contains("no live consumer"))
        .expect("it says so");
    assert!(told.contains("3 messages wait to be run"), "{told}");
    replaying.kill().unwrap();
    replaying.wait().unwrap();
    let said = says(
        &db,
        &[
            "subscriptions",
            "seek",
            "g",
            "orders",
            "--to",
            "earliest",
            "--yes",
        ],
        0,
    );
    assert!(
        said.contains("nothing is delivered yet") && said.contains("no live consumer"),
        "{said}"
    );
    says(&db, &["subscriptions", "pause", "g"], 0);
    says(&db, &["subscriptions", "limit", "g", "orders", "--rate", "2"], 0);
    // A window that is not now.
    let window: String = sqlx::query_scalar(
        "SELECT format('%s:00-%s:00', lpad(h::text, 2, '0'), lpad(((h + 1) % 24)::text, 2, '0')) \
        FROM (SELECT (extract(hour FROM postbox.clock() AT TIME ZONE 'UTC')::integer + 12) % 24) AS n (h)",
    )
    .fetch_one(db.pool())
    .await
    .unwrap();
    says(&db, &["subscriptions", "window", "g", "orders", &window], 0);
    for arguments in [&["status"][..], &["subscriptions", "list"]] {
        let said = says(&db, arguments, 0);
        for reason in [
            "no live consumer",
            "paused",
            "outside its window",
            "limited to 2/s",
        ] {
            assert!(
                said.contains(reason),
                "{arguments:?} does not say {reason:?}: {said}"
            );
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- what was set aside

#[tokio::test]
async fn what_was_set_aside_is_listed_admitted_and_discarded() {
    let db = TestDatabase::new().await.unwrap();
    sql(
        &db,
        "INSERT INTO postbox.outbox (topic, payload) VALUES ('or ders', '1'), (repeat('x', 6000), '2'), ('orders', '3')",
    )
    .await;
    sql(&db, "SELECT * FROM postbox.sequence()").await;
    let listed = says(&db, &["rejects", "list"], 0);
    assert!(
        listed.contains("or ders") && listed.contains("is not allowed"),
        "{listed}"
    );
    assert!(!listed.contains(&"x".repeat(400)), "cut: {listed}");
    let rows: Vec<Value> = says(&db, &["rejects", "list", "--json"], 0)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.len(), 2);
    let seqs: Vec<String> = rows.iter().map(|row| row["seq"].to_string()).collect();
    assert!(says(&db, &["status"], 0).contains("rejects list"));
    // As it is it is refused again, and stays.
    let refused = says(&db, &["rejects", "readmit", &seqs[0]], 1);
    assert!(refused.contains("is not allowed"), "{refused}");
    let admitted = says(&db, &["rejects", "readmit", &seqs[0], "--topic", "orders"], 0);
    assert!(admitted.starts_with("published "), "{admitted}");
    assert!(says(&db, &["rejects", "discard", &seqs[1]], 0).contains("discarded 1"));
    assert!(says(&db, &["rejects", "discard", &seqs[1]], 1).contains("rejects list"));
    assert!(says(&db, &["rejects", "readmit", &seqs[1]], 1).contains("rejects list"));
    sql(&db, "SELECT * FROM postbox.sequence()").await;
    let orders = number(&db, "SELECT postbox.next_offset('orders')").await;
    assert_eq!(
        (orders, number(&db, "SELECT count(*) FROM postbox.reject").await),
        (2, 0)
    );
}

// ------------------------------------------------------------------------------------------------------------- who does not run

#[tokio::test]
async fn what_waits_for_nobody_or_for_its_window_says_so() {
    let db = TestDatabase::new().await.unwrap();
    sql(&db, "SELECT postbox.publish('orders', '1')").await;
    let ahead = says(&db, &["subscriptions", "pause", "mail"], 0);
    assert!(
        ahead.contains("no subscription of mail yet") && ahead.contains("begin paused"),
        "{ahead}"
    );
    // Nobody dispatches here either, so its status is another.
    let found = || String::from_utf8(run(&db, &["doctor"]).stdout).unwrap();
    assert!(found().contains("paused-ahead"));
    let back = says(&db, &["subscriptions", "resume", "mail"], 0);
    assert!(back.contains("none will begin paused"), "{back}");
    assert!(!found().contains("paused-ahead"));

    // A window that is closed just now, whenever that is.
    let hours: i64 = number(
        &db,
        "SELECT extract(hour FROM postbox.clock() AT TIME ZONE 'UTC')::bigint",
    )
    .await;
    let window = format!("{:02}:00-{:02}:00 UTC", (hours + 10) % 24, (hours + 11) % 24);
    sql(
        &db,
        "SELECT postbox.subscribe('mail', 'orders', 1::smallint, 'key', NULL, 'earliest', NULL)",
    )
    .await;
    says(&db, &["subscriptions", "window", "mail", "orders", &window], 0);
    let mut child = command(
        &db,
        &["consume", "orders", "--group", "mail", "--max", "1", "--dispatch"],
    )
    .spawn()
    .unwrap();
    let line = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map(Result::unwrap)
        .find(|line| line.contains("window"));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(line.is_some(), "it says why it waits");

    // Nobody runs what is redriven.
    sql(
        &db,
        "INSERT INTO postbox.dead_letter (subscription_id, \"offset\", lane, reason, attempts, errors, seq, message_id, published_at, payload) \
         SELECT 1, 0, 0, 'failed', 1, '[]', o.seq, o.id, o.published_at, o.payload FROM postbox.outbox o",
    )
    .await;
    let redriven = says(&db, &["dead-letters", "redrive", "--all", "--yes"], 0);
    assert!(
        redriven.contains("mail on orders does not go on for now") && redriven.contains("no live consumer"),
        "{redriven}"
    );
}

#[tokio::test]
async fn who_consumes_where_nobody_dispatches_is_told_so() {
    let db = TestDatabase::new().await.unwrap();
    sql(&db, "SELECT postbox.publish('orders', '1')").await;
    let mut child = command(&db, &["consume", "orders", "--group", "mail", "--max", "1"])
        .spawn()
        .unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    // After five seconds. Should it never be said, the reading ends with the process.
    let told = std::thread::spawn(move || {
        stderr
            .lines()
            .map_while(Result::ok)
            .find(|line| line.contains("nobody has put them in order") && line.contains("postbox run"))
    });
    for _ in 0..600 {
        if told.is_finished() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(told.join().unwrap().is_some());
}

/// Without a database, and understood by the shell that it is for.
#[test]
fn completions_are_a_script_of_the_shell() {
    let script = |shell| {
        let output = Command::new(env!("CARGO_BIN_EXE_postbox"))
            .args(["completions", shell])
            .env_remove("DATABASE_URL")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = script(shell);
        for expected in ["dead-letters", "database-url", "redrive"] {
            assert!(script.contains(expected), "{shell}: {expected}");
        }
    }
    // Where there is no bash, nobody completes by it.
    let words = "source /dev/stdin; COMP_WORDS=(postbox dead-); COMP_CWORD=1; _postbox postbox dead- postbox; echo \"${COMPREPLY[@]}\"";
    let Ok(mut bash) = Command::new("bash")
        .args(["--norc", "-c", words])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
    else {
        return;
    };
    let mut stdin = bash.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, script("bash").as_bytes()).unwrap();
    drop(stdin);
    let completed = String::from_utf8(bash.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(completed.trim(), "dead-letters");
}

/// Who read its log is gone, as when a collector is restarted: it dispatches all the same, and ends well when it is told to.
#[tokio::test(flavor = "multi_thread")]
async fn run_goes_on_where_nobody_reads_its_log_any_more() {
    let db = TestDatabase::new().await.unwrap();
    let mut child = command(&db, &["run"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(log.any(|line| line.unwrap().contains("dispatching")));
    drop(log);
    for n in 1..4 {
        // It has something to say of this.
        sql(
            &db,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'postbox%' AND datname = current_database()",
        )
        .await;
        sql(&db, "SELECT postbox.publish('orders', '{}'::jsonb)").await;
        eventually(std::time::Duration::from_secs(30), || async {
            match number(&db, "SELECT coalesce(postbox.next_offset('orders'), 0)").await {
                head if head == n => Ok(()),
                head => Err(format!("{head} of {n} have an offset")),
            }
        })
        .await;
    }
    let stopped = std::process::Command::new("kill")
        .arg(child.id().to_string())
        .status();
    assert!(stopped.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
