//! Questions about processes, and signals to them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

pub(crate) const POLL: Duration = Duration::from_millis(10);

/// Whether the process runs; one that has ended but that nobody has reaped does not.
pub(crate) fn alive(pid: u32) -> bool {
    let Some(id) = to_pid(pid) else { return false };
    match stat(pid) {
        Some(stat) => !matches!(stat.state, 'Z' | 'X'),
        // It belongs to somebody else when the signal is refused, so it lives.
        None => !matches!(test_kill_process(id), Err(rustix::io::Errno::SRCH)),
    }
}

/// Whether it is the server of that data directory, not some later process with the same number.
pub(crate) fn is_server_of(pid: u32, data: &Path) -> bool {
    if !alive(pid) {
        return false;
    }
    match std::fs::read_link(format!("/proc/{pid}/cwd")) {
        Ok(folder) => data.canonicalize().is_ok_and(|data| data == folder),
        Err(_) => mentions(pid, &data.to_string_lossy()),
    }
}

/// Whether the process runs and its command line has that text.
pub(crate) fn mentions(pid: u32, text: &str) -> bool {
    if !alive(pid) {
        return false;
    }
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).or_else(|_| {
        let ps = Command::new("ps")
            .args(["-ww", "-o", "command=", "-p", &pid.to_string()])
            .output();
        ps.map(|output| output.stdout)
    });
    line.is_ok_and(|line| String::from_utf8_lossy(&line).contains(text))
}

/// Nobody minds when the process is gone.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(id) = to_pid(pid) {
        let _ = kill_process(id, signal);
    }
}

/// Ends a server and its processes as a crash of the machine would, and removes the shared memory that they
/// leave behind.
pub(crate) fn kill_server(postmaster: u32) {
    // Stopped, it starts no further process while we look for those it has.
    signal(postmaster, Signal::STOP);
    let mut victims = children(postmaster);
    victims.push(postmaster);
    let memory: Vec<PathBuf> = victims.iter().flat_map(|&pid| shared_memory(pid)).collect();
    for &pid in &victims {
        signal(pid, Signal::KILL);
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    victims.pop();
    while victims.iter().any(|&pid| alive(pid)) && Instant::now() < deadline {
        std::thread::sleep(POLL);
    }
    for file in memory {
        let _ = std::fs::remove_file(file);
    }
}

/// The files of dynamic shared memory that the process has mapped, on Linux.
fn shared_memory(pid: u32) -> Vec<PathBuf> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let mut files: Vec<PathBuf> = maps
        .lines()
        .filter_map(|line| {
            line.find("/dev/shm/PostgreSQL.")
                .map(|at| PathBuf::from(&line[at..]))
        })
        .collect();
    files.dedup();
    files
}

fn children(parent: u32) -> Vec<u32> {
    if stat(std::process::id()).is_none() {
        return children_by_ps(parent);
    }
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| stat(pid).is_some_and(|stat| stat.parent == parent))
        .collect()
}

fn children_by_ps(parent: u32) -> Vec<u32> {
    let Ok(output) = Command::new("ps").args(["-A", "-o", "pid=,ppid="]).output() else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| {
            let (pid, of) = line.trim().split_once(' ')?;
            (of.trim().parse() == Ok(parent)).then(|| pid.parse().ok())?
        })
        .collect()
}

struct Stat {
    state: char,
    parent: u32,
}

/// From `/proc`, where there is one: `pid (any name) state parent …`.
fn stat(pid: u32) -> Option<Stat> {
    let line = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = line.rsplit_once(')')?.1.split_whitespace();
    Some(Stat {
        state: fields.next()?.chars().next()?,
        parent: fields.next()?.parse().ok()?,
    })
}

fn to_pid(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ended_process_that_nobody_reaped_is_not_alive() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        assert!(alive(child.id()) && children(std::process::id()).contains(&child.id()));
        signal(child.id(), Signal::KILL);
        let deadline = Instant::now() + Duration::from_secs(5);
        while alive(child.id()) {
            assert!(Instant::now() < deadline, "still alive");
            std::thread::sleep(POLL);
        }
        child.wait().expect("reaped");
    }

    #[test]
    fn we_are_alive_and_number_zero_is_not() {
        assert!(alive(std::process::id()));
        assert!(!alive(0));
    }
}
