//! The SQL, shell, Python and Node blocks of the guide, run page by page: each page on a database of its own, in the order in which it is read. And what
//! the documents name is there.
#![allow(clippy::unwrap_used)] // Clippy allows it in test functions, and here what they call is as much a test.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use postbox_testkit::TestDatabase;
use sqlx::AssertSqlSafe;

/// `postbox run` stays in the background until the page ends.
const PRELUDE: &str = "postbox() { if [ \"$1\" = run ]; then command postbox \"$@\" >/dev/null 2>&1 & else command postbox \"$@\"; fi; }\n";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn pages() -> Vec<PathBuf> {
    pages_in("docs/guide/src")
}

fn pages_in(folder: &str) -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = fs::read_dir(repository().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    pages.retain(|page| page.extension().is_some_and(|extension| extension == "md"));
    pages.sort();
    pages
}

/// The blocks of these languages, with the lines at which they begin.
fn blocks(page: &str) -> Vec<(usize, &str, String)> {
    let mut found = Vec::new();
    let mut lines = page.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let Some(language) = line.strip_prefix("```") else {
            continue;
        };
        let body: Vec<&str> = lines
            .by_ref()
            .map(|(_, line)| line)
            .take_while(|line| *line != "```")
            .collect();
        if ["sql", "sh", "python", "js"].contains(&language) {
            found.push((number + 1, language, body.join("\n")));
        }
    }
    found
}

/// Ends what a page left running.
struct Background(Option<i32>);

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(group) = self.0.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

/// What runs a block of these languages: with psycopg 3, or with pg. Where a machine has neither, its blocks are left out, unless they are asked for by
/// `POSTBOX_GUIDE_LANGUAGES=all`, as CI does.
fn interpreter(language: &str) -> Option<Command> {
    let works = |program: &str, arguments: [&str; 2]| {
        let answer = Command::new(program)
            .args(arguments)
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .status();
        answer.is_ok_and(|status| status.success())
    };
    let (programs, look, run): (&[&str], _, _) = match language {
        "python" => (&["python3", "/usr/bin/python3"], "import psycopg", "-c"),
        _ => (&["node"], "require('pg')", "-e"),
    };
    let found = programs.iter().find(|program| works(program, [run, look]));
    if found.is_none() {
        let asked_for = std::env::var("POSTBOX_GUIDE_LANGUAGES").is_ok_and(|all| all == "all");
        assert!(!asked_for, "there is no {programs:?} here that can {look}");
        eprintln!("left out: the guide's blocks in {language}, since nothing of {programs:?} can {look}");
    }
    found.map(|program| {
        let mut command = Command::new(program);
        command.arg(run);
        command
    })
}

fn run_by(mut interpreter: Command, db: &TestDatabase, script: &str) -> Result<(), String> {
    let output = interpreter
        .arg(script)
        .env("DATABASE_URL", db.url())
        .output()
        .map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn run_in_shell(db: &TestDatabase, script: &str) -> (Result<(), String>, Background) {
    use std::os::unix::process::CommandExt;
    let folder = Path::new(env!("CARGO_BIN_EXE_postbox")).parent().unwrap();
    let path = std::env::join_paths(
        std::iter::once(folder.to_path_buf())
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    )
    .unwrap();
    let child = Command::new("bash")
        .args(["-eu", "-o", "pipefail", "-c", &format!("{PRELUDE}{script}")])
        .env("PATH", path)
        .env("DATABASE_URL", db.url())
        .env_remove("RUST_LOG")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let background = Background(i32::try_from(child.id()).ok());
    let output = child.wait_with_output().unwrap();
    let result = match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
    };
    (result, background)
}

#[tokio::test]
async fn every_sql_and_shell_block_of_the_guide_does_what_it_says() {
    let mut run = 0;
    for page in pages() {
        let name = page.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&page).unwrap();
        let db = TestDatabase::new().await.unwrap();
        let mut left_running = Vec::new();
        for (line, language, body) in blocks(&text) {
            let result = match language {
                "sql" => sqlx::raw_sql(AssertSqlSafe(body.clone()))
                    .execute(db.pool())
                    .await
                    .map(drop)
                    .map_err(|error| error.to_string()),
                "python" | "js" => match interpreter(language) {
                    Some(interpreter) => run_by(interpreter, &db, &body),
                    // What comes after it counts on its message.
                    None => sqlx::raw_sql(
                        "SELECT postbox.publish(topic => 'orders', key => '1', payload => '{}')",
                    )
                    .execute(db.pool())
                    .await
                    .map(drop)
                    .map_err(|error| error.to_string()),
                },
                _ => {
                    let (result, background) = run_in_shell(&db, &body);
                    left_running.push(background);
                    result
                }
            };
            if let Err(error) = result {
                panic!("{name}, line {line}:\n{body}\n\n{error}");
            }
            run += 1;
        }
    }
    assert!(run >= 20, "only {run} blocks were found");
}

#[test]
fn every_page_is_in_the_summary_and_its_rust_blocks_are_compiled() {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guide");
    let summary = fs::read_to_string(guide.join("src/SUMMARY.md")).unwrap();
    let library = fs::read_to_string(guide.join("lib.rs")).unwrap();
    for page in pages() {
        let name = page.file_name().unwrap().to_string_lossy().into_owned();
        if name != "SUMMARY.md" {
            assert!(
                summary.contains(&format!("({name})")),
                "{name} is not in SUMMARY.md"
            );
            assert!(
                library.contains(&format!("\"{name}\"")),
                "{name} is not in lib.rs"
            );
        }
    }
}

/// The codes `PB001` … that a text names.
fn codes(text: &str) -> BTreeSet<String> {
    text.match_indices("PB0")
        .filter_map(|(at, _)| text.get(at..at + 5))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_error_code_that_is_raised_is_in_the_guide_and_no_other() {
    let mut raised = BTreeSet::new();
    for file in fs::read_dir(repository().join("outbox/migrations/functions")).unwrap() {
        raised.extend(codes(&fs::read_to_string(file.unwrap().path()).unwrap()));
    }
    let listed = codes(&fs::read_to_string(repository().join("docs/guide/src/errors.md")).unwrap());
    assert_eq!(listed, raised);
}

#[test]
fn every_link_between_the_documents_leads_to_a_file() {
    let mut documents = pages_in("");
    documents.extend(pages_in("docs/internals"));
    documents.extend(pages());
    let mut links = 0;
    for document in documents {
        let text = fs::read_to_string(&document).unwrap();
        for rest in text.split("](").skip(1) {
            let Some((link, _)) = rest.split_once(')') else {
                continue;
            };
            let Some(file) = link.split('#').next().filter(|file| !file.is_empty()) else {
                continue;
            };
            if file.contains("://") {
                continue;
            }
            let target = document.parent().unwrap().join(file);
            assert!(
                target.exists(),
                "{} links to {link}, which is not there",
                document.display()
            );
            links += 1;
        }
    }
    assert!(links >= 50, "only {links} links were found");
}
