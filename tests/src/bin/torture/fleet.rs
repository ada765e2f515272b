//! The processes of a run.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};
use sqlx::ConnectOptions;
use sqlx::postgres::PgConnectOptions;
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinSet;

use crate::clock;
use crate::history::{Line, Log};
use crate::plan::Target;
use crate::proxy::{Address, HalfOpen, Proxy};

/// Longer than a graceful stop may take, with its grace for handlers, a server that is just down, and connections that are dead without a word.
const STOP_LIMIT: Duration = Duration::from_secs(90);

pub(crate) struct Fleet {
    folder: PathBuf,
    seed: u64,
    options: PgConnectOptions,
    address: Address,
    log: Log,
    members: Vec<Member>,
    started: usize,
    /// Of the consumers that are started.
    version: u8,
    stopping: JoinSet<Option<String>>,
    /// What no process should have done.
    pub(crate) oddities: Vec<String>,
}

struct Member {
    instance: String,
    target: Target,
    version: u8,
    proxy: Proxy,
    child: Child,
    /// It ends when this is closed.
    _input: Option<ChildStdin>,
    frozen_at: Option<u64>,
    blind_since: Option<u64>,
    /// Until then it has its share of trouble: two faults at once would not be what they are called.
    troubled_until: Instant,
}

impl Fleet {
    pub(crate) fn new(
        folder: PathBuf,
        seed: u64,
        options: PgConnectOptions,
        address: Address,
        log: Log,
    ) -> Self {
        Self {
            folder,
            seed,
            options,
            address,
            log,
            members: Vec::new(),
            started: 0,
            version: 1,
            stopping: JoinSet::new(),
            oddities: Vec::new(),
        }
    }

    pub(crate) async fn start(&mut self, target: Target) -> anyhow::Result<()> {
        self.started += 1;
        let (command, letter) = match target {
            Target::Producer => ("produce", 'p'),
            Target::Dispatcher => ("dispatch", 'd'),
            Target::Consumer => ("consume", 'c'),
        };
        let instance = format!("{letter}{}", self.started);
        let proxy = Proxy::open(self.address.clone()).await?;
        let url = self
            .options
            .clone()
            .host("127.0.0.1")
            .port(proxy.port())
            .to_url_lossy();
        let path = self.folder.join(format!("{instance}.stderr"));
        let stderr = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let mut child = Command::new(std::env::current_exe()?)
            .arg(command)
            .args(["--name", &instance, "--seed", &self.seed.to_string()])
            .args(["--version", &self.version.to_string()])
            .arg("--folder")
            .arg(&self.folder)
            .env("DATABASE_URL", url.as_str())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start a process of the run")?;
        self.members.push(Member {
            instance,
            target,
            version: self.version,
            proxy,
            _input: child.stdin.take(),
            child,
            frozen_at: None,
            blind_since: None,
            troubled_until: Instant::now(),
        });
        Ok(())
    }

    /// From now on the consumers that are started are of the other version.
    pub(crate) fn change_version(&mut self) {
        self.version = 3 - self.version;
    }

    /// From now on there is a consumer that handles every type.
    pub(crate) async fn be_complete(&mut self) -> anyhow::Result<()> {
        self.version = 2;
        let has_one = |member: &Member| member.target == Target::Consumer && member.version == 2;
        match self.members.iter().any(has_one) {
            true => Ok(()),
            false => self.start(Target::Consumer).await,
        }
    }

    pub(crate) fn count(&self, target: Target) -> usize {
        self.members
            .iter()
            .filter(|member| member.target == target)
            .count()
    }

    pub(crate) fn instances(&self) -> Vec<String> {
        self.members
            .iter()
            .map(|member| member.instance.clone())
            .collect()
    }

    /// One of those that are in no trouble.
    pub(crate) fn pick(&self, target: Target, pick: usize) -> Option<usize> {
        let now = Instant::now();
        let sound: Vec<usize> = (0..self.members.len())
            .filter(|n| self.members[*n].target == target && self.members[*n].troubled_until <= now)
            .collect();
        (!sound.is_empty()).then(|| sound[pick % sound.len()])
    }

    pub(crate) fn kill(&mut self, index: usize) {
        let member = self.members.remove(index);
        self.log.write(&Line::Killed {
            instance: member.instance.clone(),
            at: clock::now(),
        });
        member.signal(Signal::KILL);
        self.stopping.spawn(async move {
            let mut member = member;
            let _ = member.child.wait().await;
            None
        });
    }

    /// Gracefully.
    pub(crate) fn stop(&mut self, index: usize) {
        let member = self.members.remove(index);
        member.signal(Signal::TERM);
        self.stopping.spawn(async move {
            let mut member = member;
            match tokio::time::timeout(STOP_LIMIT, member.child.wait()).await {
                Ok(Ok(status)) if status.success() => None,
                // It was about to abort in a handler anyway.
                Ok(Ok(status)) if status.signal() == Some(Signal::ABORT.as_raw()) => None,
                Ok(Ok(status)) => Some(format!(
                    "{} ended with {status} when it was to stop",
                    member.instance
                )),
                Ok(Err(error)) => Some(format!("{} cannot be waited for: {error}", member.instance)),
                Err(_) => {
                    let _ = member.child.kill().await;
                    Some(format!("{} did not stop within {STOP_LIMIT:?}", member.instance))
                }
            }
        });
    }

    pub(crate) fn freeze(&mut self, index: usize, span: Duration) -> String {
        let member = &mut self.members[index];
        member.trouble(span + Duration::from_secs(1));
        member.frozen_at = Some(clock::now());
        member.signal(Signal::STOP);
        member.instance.clone()
    }

    pub(crate) fn thaw(&mut self, instance: &str) {
        let Some(member) = self.members.iter_mut().find(|member| member.instance == instance) else {
            return;
        };
        member.signal(Signal::CONT);
        if let Some(from) = member.frozen_at.take() {
            self.log.write(&Line::Frozen {
                instance: instance.to_owned(),
                from,
                to: clock::now(),
            });
        }
    }

    pub(crate) fn cut(&mut self, index: usize) {
        self.members[index].trouble(Duration::from_secs(1));
        self.members[index].proxy.cut();
    }

    pub(crate) fn cut_all(&self) {
        self.members.iter().for_each(|member| member.proxy.cut());
    }

    pub(crate) fn stall(&mut self, index: usize, span: Duration) -> String {
        let member = &mut self.members[index];
        member.trouble(span + Duration::from_secs(1));
        member.proxy.stall(true);
        member.instance.clone()
    }

    pub(crate) fn delay(&mut self, index: usize, by: Duration, span: Duration) -> String {
        let member = &mut self.members[index];
        member.trouble(span);
        member.proxy.delay(by);
        member.instance.clone()
    }

    pub(crate) fn half_open(&mut self, index: usize, how: HalfOpen, span: Duration) -> String {
        let member = &mut self.members[index];
        // What it lost it has yet to find out.
        member.trouble(span + Duration::from_secs(5));
        member.blind_since = Some(clock::now());
        member.proxy.half_open(Some(how));
        member.instance.clone()
    }

    pub(crate) fn clear(&mut self, instance: &str) {
        if let Some(member) = self.members.iter_mut().find(|member| member.instance == instance) {
            member.proxy.stall(false);
            member.proxy.delay(Duration::ZERO);
            member.proxy.half_open(None);
            if let Some(from) = member.blind_since.take() {
                self.log.write(&Line::Blind {
                    instance: instance.to_owned(),
                    from,
                    to: clock::now(),
                });
            }
        }
    }

    pub(crate) fn heal(&mut self) {
        for instance in self.instances() {
            self.thaw(&instance);
            self.clear(&instance);
        }
    }

    /// Takes note of those that ended by themselves; returns what they were, so that they are started again.
    pub(crate) fn reap(&mut self) -> Vec<Target> {
        let mut gone = Vec::new();
        let mut index = 0;
        while index < self.members.len() {
            match self.members[index].child.try_wait() {
                Ok(None) => index += 1,
                Ok(Some(status)) => {
                    let instance = self.members[index].instance.clone();
                    self.clear(&instance);
                    let member = self.members.remove(index);
                    if status.signal() != Some(Signal::ABORT.as_raw()) {
                        self.oddities
                            .push(format!("{} ended by itself with {status}", member.instance));
                    }
                    gone.push(member.target);
                }
                Err(error) => {
                    let member = self.members.remove(index);
                    self.oddities
                        .push(format!("{} cannot be waited for: {error}", member.instance));
                }
            }
        }
        while let Some(ended) = self.stopping.try_join_next() {
            self.oddities.extend(ended.ok().flatten());
        }
        gone
    }

    /// Stops all of a kind and waits for them.
    pub(crate) async fn stop_all(&mut self, target: Target) {
        while let Some(index) = self.members.iter().position(|member| member.target == target) {
            self.stop(index);
        }
        while let Some(ended) = self.stopping.join_next().await {
            self.oddities.extend(ended.ok().flatten());
        }
    }
}

impl Member {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.child.id().and_then(|id| Pid::from_raw(id as i32)) {
            // It may have ended just now.
            let _ = kill_process(pid, signal);
        }
    }

    fn trouble(&mut self, span: Duration) {
        self.troubled_until = Instant::now() + span;
    }
}
