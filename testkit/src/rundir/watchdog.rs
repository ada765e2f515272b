//! Shell processes that stop a server and remove its files when its users are gone, however they ended.

use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::Error;
use crate::rundir::RunDir;

/// `$dir` is set. Gives the name free at once, then stops the server and removes the folder.
const TEAR_DOWN: &str = r#"
mv "$dir" "$dir.ending.$$" 2>/dev/null || exit 0
dir=$dir.ending.$$
file=$dir/data/postmaster.pid
pid=$(sed -n 1p "$file" 2>/dev/null)
if [ -n "$pid" ]; then
    # The number may be another process's by now.
    if [ -e /proc/self/cwd ]; then
        [ "$(readlink "/proc/$pid/cwd")" = "$dir/data" ] || pid=
    else
        ps -o command= -p "$pid" 2>/dev/null | grep -q postgres || pid=
    fi
fi
segment=$(sed -n '7s/.* //p' "$file" 2>/dev/null)
if [ -n "$pid" ] && kill -QUIT "$pid" 2>/dev/null; then
    tries=0
    while kill -0 "$pid" 2>/dev/null && [ "$tries" -lt 100 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    kill -KILL "$pid" 2>/dev/null
fi
[ -n "$segment" ] && ipcrm -m "$segment" 2>/dev/null
[ -e "$dir/container" ] && docker rm -f -v "$(cat "$dir/container")"
# A server that was just starting, or ending, may add a file meanwhile.
tries=0
while [ -e "$dir" ] && [ "$tries" -lt 50 ]; do
    [ "$tries" -eq 0 ] || sleep 0.1
    rm -rf "$dir"
    tries=$((tries + 1))
done
"#;

/// Standard input ends when the process that holds its other end has ended.
const WHILE_OWNED: &str = "trap '' HUP INT TERM\ndir=$1\ncat >/dev/null\n";

/// Users put their file into `users` and look for `closing` after; we make `closing` and look for users after.
/// So at least one side sees the other, and no user is left with a server that goes away.
const WHILE_USED: &str = r#"
trap '' HUP INT TERM
dir=$1
used() {
    found=no
    for user in "$dir"/users/*; do
        [ -e "$user" ] || continue
        if kill -0 "${user##*/}" 2>/dev/null; then found=yes; else rm -f "$user"; fi
    done
    [ "$found" = yes ]
}
served() {
    [ -e "$dir/url" ] && [ ! -e "$dir/container" ] || return 0
    kill -0 "$(sed -n 1p "$dir/data/postmaster.pid" 2>/dev/null)" 2>/dev/null
}
idle=0
while [ -d "$dir" ]; do
    if ! served; then mkdir "$dir/closing"; break; fi
    if used; then idle=0; else idle=$((idle + 1)); fi
    if [ "$idle" -ge 10 ]; then
        mkdir "$dir/closing"
        used || break
        rmdir "$dir/closing"
        idle=0
    fi
    sleep 1
done
"#;

/// Ends with its owner, and takes the server along.
#[derive(Debug)]
pub(crate) struct Watchdog {
    child: Child,
    leash: Option<ChildStdin>,
}

impl Watchdog {
    pub(crate) fn while_owned(dir: &RunDir) -> Result<Self, Error> {
        let mut child = spawn(dir, WHILE_OWNED, Stdio::piped())?;
        let leash = child.stdin.take();
        Ok(Self { child, leash })
    }
}

impl Drop for Watchdog {
    /// Waits until the server's files are gone.
    fn drop(&mut self) {
        drop(self.leash.take());
        let _ = self.child.wait();
    }
}

/// Ends some ten seconds after the last user, and takes the server along.
pub(crate) fn while_used(dir: &RunDir) -> Result<(), Error> {
    let mut child = spawn(dir, WHILE_USED, Stdio::null())?;
    // It may end before us, when the server does.
    std::thread::spawn(move || child.wait());
    Ok(())
}

/// Stops whatever still runs there and removes the folder.
pub(crate) fn tear_down(dir: &RunDir) {
    let script = format!("dir=$1\n{TEAR_DOWN}");
    let _ = shell(dir, &script).stdin(Stdio::null()).status();
}

fn spawn(dir: &RunDir, wait: &str, stdin: Stdio) -> Result<Child, Error> {
    let child = shell(dir, &format!("{wait}{TEAR_DOWN}"))
        .stdin(stdin)
        .spawn()
        .map_err(Error::io("start /bin/sh, the server's watchdog"))?;
    RunDir::write(&dir.watchdog(), &child.id().to_string())?;
    Ok(child)
}

fn shell(dir: &RunDir, script: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", script, "postbox-testkit"])
        .arg(dir.path())
        .current_dir("/");
    // Whoever ends the tests' process group does not end the watchdog, nor wait for its output.
    command
        .process_group(0)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}
