//! Dispatchers and consumers as processes of their own, and what they use.

use std::process::Stdio;

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::environment::Environment;
use super::sink::LANES;

const BACKENDS: &str = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() \
     AND application_name IN ('postbox dispatcher', 'postbox timers')";

/// Killed when dropped.
pub(crate) struct Process {
    child: Child,
    output: Option<Lines<BufReader<ChildStdout>>>,
}

/// What a worker says at its end.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Delivered {
    pub(crate) deliveries: u64,
    /// Unix time in seconds.
    pub(crate) first: f64,
    pub(crate) last: f64,
    /// Deliveries a second, of one slice after another.
    pub(crate) rates: Vec<f64>,
}

impl Process {
    /// `postbox run`, connected. The dispatcher of this process must have ended.
    pub(crate) async fn dispatcher(environment: &Environment) -> anyhow::Result<Self> {
        let before = postbox_dispatcher::status::dispatchers(&environment.pool).await?;
        let child = command(environment)?
            .arg("run")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start a dispatcher")?;
        environment.dispatchers(before + 1).await?;
        Ok(Self { child, output: None })
    }

    /// `postbox bench worker`; it ends by itself after each of its groups has handled so many messages (0: never).
    pub(crate) async fn worker(
        environment: &Environment,
        topic: &str,
        groups: &[String],
        messages: u64,
    ) -> anyhow::Result<Self> {
        let mut command = command(environment)?;
        command.args(["bench", "worker", "--topic", topic]);
        command.arg("--messages").arg(messages.to_string());
        for group in groups {
            command.arg("--group").arg(group);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a consumer")?;
        let output = child.stdout.take().map(|output| BufReader::new(output).lines());
        Ok(Self { child, output })
    }

    /// Until a worker has handled all, and what it found.
    pub(crate) async fn delivered(&mut self) -> anyhow::Result<Delivered> {
        let output = self.output.as_mut().context("it is no consumer")?;
        let line = output
            .next_line()
            .await?
            .context("a consumer ended before it had every message; see above what it said")?;
        serde_json::from_str(&line).with_context(|| format!("a consumer said {line:?}"))
    }

    /// Since it started; only where there is a /proc.
    pub(crate) fn cpu_seconds(&self) -> Option<f64> {
        cpu_seconds_of(self.child.id()?)
    }

    /// The same of a dispatcher with its processes at the server; only where both are on this machine.
    pub(crate) async fn cpu_seconds_with_server(
        &self,
        environment: &Environment,
    ) -> anyhow::Result<Option<f64>> {
        let backends: Vec<i32> = sqlx::query_scalar(BACKENDS).fetch_all(&environment.pool).await?;
        let at_server: Option<f64> = backends.iter().map(|pid| cpu_seconds_of(*pid as u32)).sum();
        Ok(self
            .cpu_seconds()
            .zip(at_server)
            .map(|(here, there)| here + there))
    }

    pub(crate) fn rss_mb(&self) -> Option<f64> {
        self.status_mb("VmRSS:")
    }

    pub(crate) fn peak_rss_mb(&self) -> Option<f64> {
        self.status_mb("VmHWM:")
    }

    fn status_mb(&self, name: &str) -> Option<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()?)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kilobytes: f64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kilobytes / 1024.0)
    }

    /// Gracefully.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        // A worker stops when nobody listens to it any more.
        drop(self.child.stdin.take());
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id as i32)) {
            // It may just have ended.
            let _ = kill_process(pid, Signal::TERM);
        }
        let status = self.child.wait().await?;
        ensure!(status.success(), "a process of the bench ended with {status}");
        Ok(())
    }
}

fn cpu_seconds_of(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may hold anything: state is the third field, and utime the fourteenth.
    let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / rustix::param::clock_ticks_per_second() as f64)
}

fn command(environment: &Environment) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("cannot tell which program this is")?;
    let mut command = Command::new(program);
    command
        .env("DATABASE_URL", environment.url())
        .env("RUST_LOG", "error")
        .kill_on_drop(true);
    Ok(command)
}

/// Lanes of so many groups.
pub(crate) fn lanes_of(groups: usize) -> i64 {
    LANES * groups as i64
}
