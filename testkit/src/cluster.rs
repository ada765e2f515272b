//! A server made from binaries: its data directory, and its process.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::account::Account;
use crate::binaries::Binaries;
use crate::processes::{self, POLL};
use crate::rundir::RunDir;
use crate::{Error, url};

/// Recovery after a crash counts too.
const START_TIMEOUT: Duration = Duration::from_secs(120);
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Below the ports that systems give to outgoing connections: those could take the port of a stopped server, or
/// even connect to themselves there.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

#[derive(Debug)]
pub(crate) struct Cluster {
    binaries: Binaries,
    account: Account,
    dir: RunDir,
    port: u16,
    password: String,
    settings: Vec<(String, String)>,
    environment: Vec<(String, String)>,
    server: Option<Child>,
}

/// How a server is asked to stop.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stop {
    /// Sessions are ended, and everything is written.
    Fast,
    /// As in a crash of the server: recovery follows.
    Immediate,
}

/// Up to where a backup is recovered.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// What the backup itself has.
    Backup,
    /// A restore point, by the write-ahead log that is kept in a folder.
    Point { archive: PathBuf, name: String },
}

impl Cluster {
    /// Makes the data directory and starts the server.
    pub(crate) fn create(
        binaries: Binaries,
        account: Account,
        dir: RunDir,
        settings: Vec<(String, String)>,
        environment: Vec<(String, String)>,
    ) -> Result<Self, Error> {
        let password = random_password();
        let mut cluster = Self {
            binaries,
            account,
            dir,
            port: 0,
            password,
            settings,
            environment,
            server: None,
        };
        cluster.initdb()?;
        cluster.find_port()?;
        Ok(cluster)
    }

    /// Starts it for the first time.
    fn find_port(&mut self) -> Result<(), Error> {
        for _ in 0..5 {
            self.port = free_port()?;
            match self.start() {
                // Somebody was faster.
                Err(Error::Start { output, .. }) if output.contains("Address already in use") => {}
                other => return other,
            }
        }
        self.start()
    }

    pub(crate) fn url(&self) -> String {
        url::local(self.port, &self.password)
    }

    /// A program beside the server's, if it is there.
    pub(crate) fn program(&self, name: &str) -> Option<PathBuf> {
        Some(self.binaries.program(name)).filter(|program| program.exists())
    }

    /// Nothing to do when it runs. On return it takes connections.
    pub(crate) fn start(&mut self) -> Result<(), Error> {
        if self
            .server
            .as_mut()
            .is_some_and(|server| matches!(server.try_wait(), Ok(None)))
        {
            return Ok(());
        }
        let server = self
            .command()?
            .spawn()
            .map_err(Error::io("start the PostgreSQL server"))?;
        let server = self.server.insert(server);
        let deadline = Instant::now() + START_TIMEOUT;
        while !is_ready(&self.dir.data(), server.id()) {
            if let Ok(Some(status)) = server.try_wait() {
                self.server = None;
                return Err(self.start_error(status.to_string()));
            }
            if Instant::now() > deadline {
                self.kill();
                return Err(self.start_error(format!("not ready within {} s", START_TIMEOUT.as_secs())));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Nothing to do when it is stopped. On return it has ended.
    pub(crate) fn stop(&mut self, how: Stop) -> Result<(), Error> {
        let Some(server) = &mut self.server else {
            return Ok(());
        };
        processes::signal(
            server.id(),
            match how {
                Stop::Fast => Signal::INT,
                Stop::Immediate => Signal::QUIT,
            },
        );
        let deadline = Instant::now() + STOP_TIMEOUT;
        while let Ok(None) = server.try_wait() {
            if Instant::now() > deadline {
                let log = self.dir.log();
                let output = tail(&log);
                return Err(Error::Stop {
                    seconds: STOP_TIMEOUT.as_secs(),
                    log,
                    output,
                });
            }
            std::thread::sleep(POLL);
        }
        self.server = None;
        Ok(())
    }

    /// As in a crash of the machine, except that what was written to files is kept.
    pub(crate) fn kill(&mut self) {
        let Some(mut server) = self.server.take() else {
            return;
        };
        processes::kill_server(server.id());
        let _ = server.wait();
        // The server would mind a lock file whose number has become another process's.
        let lock = self.dir.data().join("postmaster.pid");
        if let Some(segment) = fs::read_to_string(&lock)
            .ok()
            .as_deref()
            .and_then(shared_memory_of)
        {
            let _ = Command::new("ipcrm")
                .args(["-m", segment])
                .stderr(Stdio::null())
                .status();
        }
        let _ = fs::remove_file(lock);
    }

    /// A base backup, taken while the server runs; used up by [`recover`](Self::recover).
    pub(crate) fn backup(&self) -> Result<PathBuf, Error> {
        let folder = self
            .dir
            .path()
            .join(format!("backup-{}", uuid::Uuid::now_v7().simple()));
        fs::create_dir(&folder).map_err(Error::io(format!("make {}", folder.display())))?;
        self.account.give(&folder)?;
        let mut command = self.account.command(self.binaries.program("pg_basebackup"));
        command.args([
            "--checkpoint=fast",
            "--wal-method=stream",
            "--no-sync",
            "--dbname",
        ]);
        command.arg(self.url()).arg("--pgdata").arg(&folder);
        self.run(&mut command, "pg_basebackup")?;
        Ok(folder)
    }

    /// A server in `dir` that receives what this one writes, through a port of this machine that leads here, and follows asynchronously.
    pub(crate) fn standby(&self, dir: RunDir, through: u16) -> Result<Self, Error> {
        let mut command = self.account.command(self.binaries.program("pg_basebackup"));
        command.args([
            "--checkpoint=fast",
            "--wal-method=stream",
            "--no-sync",
            "--write-recovery-conf",
            "--dbname",
        ]);
        command
            .arg(url::local(through, &self.password))
            .arg("--pgdata")
            .arg(dir.data());
        self.run(&mut command, "pg_basebackup")?;
        let mut standby = Self {
            binaries: self.binaries.clone(),
            account: self.account,
            dir,
            port: 0,
            password: self.password.clone(),
            settings: self.settings.clone(),
            environment: self.environment.clone(),
            server: None,
        };
        standby.find_port()?;
        Ok(standby)
    }

    /// Ends the server as in a crash and starts what the backup has in its place, as a recovery to a point in time does, or a standby that had received
    /// no more and is promoted: on a new timeline.
    pub(crate) fn recover(&mut self, backup: &Path, end: &End) -> Result<(), Error> {
        self.kill();
        let data = self.dir.data();
        let replacing = || {
            Error::io(format!(
                "put {} in the place of {}",
                backup.display(),
                data.display()
            ))
        };
        fs::remove_dir_all(&data).map_err(replacing())?;
        fs::rename(backup, &data).map_err(replacing())?;
        // Nobody is let in before it has recovered.
        let end = match end {
            End::Backup => "restore_command = 'false'\n".to_owned(),
            End::Point { archive, name } => format!(
                "restore_command = 'cp \"{}/%f\" \"%p\"'\nrecovery_target_name = '{name}'\nrecovery_target_action = 'promote'\n",
                archive.display()
            ),
        };
        let mut settings = OpenOptions::new()
            .append(true)
            .open(data.join("postgresql.auto.conf"))
            .map_err(replacing())?;
        settings
            .write_all(format!("{end}hot_standby = off\n").as_bytes())
            .map_err(replacing())?;
        fs::write(data.join("recovery.signal"), "").map_err(replacing())?;
        self.start()
    }

    /// Leaves the server to its watchdog. A thread takes note of its end, so that nobody takes it for alive.
    pub(crate) fn leave(mut self) {
        if let Some(mut server) = self.server.take() {
            std::thread::spawn(move || server.wait());
        }
    }

    fn initdb(&self) -> Result<(), Error> {
        let password = self.dir.path().join("password");
        fs::write(&password, &self.password).map_err(Error::io(format!("write {}", password.display())))?;
        self.account.give(&password)?;
        let mut command = self.account.command(self.binaries.program("initdb"));
        command.args([
            "--username=postgres",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ]);
        // The password is random already. Iterations would cost every connection some milliseconds, and more where the client is not optimised.
        let auth = match self.binaries.major.0 {
            ..16 => &["--auth-host=md5"][..],
            _ => &["--auth-host=scram-sha-256", "-c", "scram_iterations=1"],
        };
        command.arg("--auth-local=trust").args(auth);
        command
            .arg("--pwfile")
            .arg(&password)
            .arg("--pgdata")
            .arg(self.dir.data());
        self.run(&mut command, "initdb")
    }

    /// Until it has ended well.
    fn run(&self, command: &mut Command, program: &str) -> Result<(), Error> {
        let program = self.binaries.program(program).display().to_string();
        let output = command
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .map_err(Error::io(format!("run {program}")))?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::Program {
            program,
            status: output.status.to_string(),
            output: String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(),
        })
    }

    fn command(&self) -> Result<Command, Error> {
        let log = self.dir.log();
        let opening = || Error::io(format!("open {}", log.display()));
        let log: File = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(opening())?;
        let mut command = self.account.command(self.binaries.program("postgres"));
        command
            .arg("-D")
            .arg(self.dir.data())
            .arg("-p")
            .arg(self.port.to_string());
        command.arg("-c").arg("listen_addresses=127.0.0.1");
        command
            .arg("-c")
            .arg(format!("unix_socket_directories={}", self.socket_folder()));
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        for (name, value) in &self.settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        command
            .stdin(Stdio::null())
            .stderr(log.try_clone().map_err(opening())?)
            .stdout(log);
        // A Ctrl-C is for the tests; the watchdog ends the server.
        command.current_dir(self.dir.path()).process_group(0);
        Ok(command)
    }

    /// Empty, for none, where the system's limit of about 104 characters would be passed.
    fn socket_folder(&self) -> String {
        let folder = self.dir.socket();
        let folder = folder.to_string_lossy();
        if folder.len() > 80 {
            String::new()
        } else {
            format!("\"{folder}\"")
        }
    }

    fn start_error(&self, reason: String) -> Error {
        let log = self.dir.log();
        let output = tail(&log);
        Error::Start { reason, log, output }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Its files are removed next, so there is nothing to write.
        if self.stop(Stop::Immediate).is_err() {
            self.kill();
        }
    }
}

/// The server says so in the eighth line of its lock file.
fn is_ready(data: &Path, pid: u32) -> bool {
    let lock = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
    let mut lines = lock.lines();
    let first = lines.next().and_then(|line| line.trim().parse().ok());
    first == Some(pid) && lines.nth(6).is_some_and(|status| status.trim() == "ready")
}

/// The seventh line of the lock file has the key and the number of the server's System V segment.
fn shared_memory_of(lock: &str) -> Option<&str> {
    lock.lines().nth(6)?.split_whitespace().nth(1)
}

pub(crate) fn free_port() -> Result<u16, Error> {
    let mut result = Err(std::io::ErrorKind::AddrInUse.into());
    for _ in 0..100 {
        let span = u128::from(PORTS.end - PORTS.start);
        let port = PORTS.start + (uuid::Uuid::now_v7().as_u128() % span) as u16;
        result = TcpListener::bind(("127.0.0.1", port)).map(|_| port);
        if result.is_ok() {
            break;
        }
    }
    result.map_err(Error::io("find a free port of 127.0.0.1"))
}

pub(crate) fn random_password() -> String {
    // The last half of a version 7 UUID is random.
    (0..2)
        .map(|_| uuid::Uuid::now_v7().simple().to_string().split_off(16))
        .collect()
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_differ_and_need_no_escapes() {
        let (one, other) = (random_password(), random_password());
        assert_ne!(one, other);
        assert!(one.len() == 32 && one.chars().all(|c| c.is_ascii_alphanumeric()));
    }
}
