//! The server that all test processes of a user share, for each major version.
//!
//! The first process starts it, under a lock; a watchdog stops it when no process has used it for ten seconds.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use crate::Error;
use crate::account::Account;
use crate::engine::Engine;
use crate::processes::{self, POLL};
use crate::provision::Provision;
use crate::rundir::watchdog;
use crate::rundir::{self, RunDir};
use crate::version::Major;

/// For speed: what a crash of the machine would do to test databases does not matter.
const SETTINGS: &[(&str, &str)] = &[
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "on"),
    ("max_connections", "400"),
    ("max_prepared_transactions", "64"),
    ("shared_buffers", "128MB"),
];

const CLOSING_TIMEOUT: Duration = Duration::from_secs(30);

/// The server's URL, for as long as this process lives.
pub(crate) fn join_or_start(wanted: Option<Major>) -> Result<(String, Major), Error> {
    let provision = Provision::find(wanted)?;
    let major = provision.major();
    let root = rundir::root(Account::for_servers()?)?;
    let path = root.join(format!("shared-{major}.lock"));
    let lock = File::create(&path).map_err(Error::io(format!("create {}", path.display())))?;
    lock.lock()
        .map_err(Error::io(format!("lock {}", path.display())))?;

    let dir = RunDir::at(root.join(format!("shared-{major}")));
    let url = match join(&dir)? {
        Some(url) => url,
        None => start(provision, &dir)?,
    };
    Ok((url, major))
}

/// `None` when no server is there any more; nothing else is there then either.
fn join(dir: &RunDir) -> Result<Option<String>, Error> {
    match enter(dir) {
        Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(Error::io(format!("write to {}", dir.users().display())))?,
    }
    let deadline = Instant::now() + CLOSING_TIMEOUT;
    while dir.closing().exists() && dir.has_watchdog() {
        if Instant::now() > deadline {
            return Err(Error::Stuck {
                path: dir.path().to_owned(),
            });
        }
        // It sees us and stays, or it saw us too late and the folder goes.
        std::thread::sleep(POLL);
    }
    if dir.closing().exists() || !serves(dir) {
        // A crash of the machine, of the server, or of the process that was starting it.
        watchdog::tear_down(dir);
        return Ok(None);
    }
    if !dir.has_watchdog() {
        watchdog::while_used(dir)?;
    }
    Ok(RunDir::read(&dir.url()))
}

/// From now on the watchdog keeps the server for us, or has seen us too late and says so with `closing`.
fn enter(dir: &RunDir) -> std::io::Result<()> {
    fs::write(dir.users().join(std::process::id().to_string()), "")
}

fn serves(dir: &RunDir) -> bool {
    if !dir.url().exists() {
        return false;
    }
    if dir.path().join("container").exists() {
        return true;
    }
    let lock = fs::read_to_string(dir.data().join("postmaster.pid")).unwrap_or_default();
    let pid = lock.lines().next().and_then(|line| line.trim().parse().ok());
    pid.is_some_and(|pid| processes::is_server_of(pid, &dir.data()))
}

fn start(provision: Provision, dir: &RunDir) -> Result<String, Error> {
    let account = Account::for_servers()?;
    let dir = RunDir::create(dir.path().to_owned(), account)?;
    enter(&dir).map_err(Error::io(format!("write to {}", dir.users().display())))?;
    // Before the server, so that there is none without a watchdog.
    watchdog::while_used(&dir)?;
    let settings = SETTINGS
        .iter()
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let engine = Engine::create(provision, dir.clone(), settings, Vec::new())?;
    let url = engine.url();
    RunDir::write(&dir.url(), &url)?;
    engine.leave();
    Ok(url)
}
