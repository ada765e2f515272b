//! `--exec`: a shell command for each message.

use std::process::Stdio;
use std::time::Duration;

use postbox_consumer::{Delivery, HandlerError, Outcome};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncWriteExt;
use tokio::process::{ChildStdin, Command};

/// EX_TEMPFAIL of sysexits.h: not now, and not the message's fault.
const TRY_AGAIN: i32 = 75;
const TRY_AGAIN_IN: Duration = Duration::from_secs(5);
/// EX_DATAERR: this message will never do.
const CANNOT_BE: i32 = 65;

pub(crate) struct ShellCommand {
    command: String,
    timeout: Duration,
}

impl ShellCommand {
    pub(crate) fn new(command: &str, timeout: Duration) -> Self {
        Self {
            command: command.to_owned(),
            timeout,
        }
    }

    /// Runs it; its exit status is the verdict. Dropping the future kills it with all that it started.
    pub(crate) async fn run(&self, delivery: &Delivery, payload: &[u8], content_type: &str) -> Outcome {
        let mut command = Command::new("sh");
        command
            .args(["-c", &self.command])
            .env("POSTBOX_ID", delivery.id.to_string())
            .env("POSTBOX_TOPIC", delivery.topic.as_ref())
            .env("POSTBOX_OFFSET", delivery.offset.to_string())
            .env("POSTBOX_ATTEMPT", delivery.attempt.to_string())
            .env("POSTBOX_HEADERS", serde_json::to_string(&delivery.headers)?)
            .env("POSTBOX_CONTENT_TYPE", content_type)
            .env("POSTBOX_PUBLISHED_AT", delivery.published_at.to_rfc3339())
            .env_remove("POSTBOX_TYPE")
            .env_remove("POSTBOX_KEY");
        if let Some(message_type) = &delivery.message_type {
            command.env("POSTBOX_TYPE", message_type.as_ref());
        }
        if let Some(key) = &delivery.key {
            command.env("POSTBOX_KEY", key);
        }
        // A group of its own: Ctrl-C is for us, and lets commands finish.
        let mut child = command
            .stdin(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let group = Group::of(child.id());
        let input = child.stdin.take();
        let status = tokio::select! {
            status = child.wait() => status?,
            () = tokio::time::sleep(self.timeout) => {
                return Err(HandlerError::retry(format!("the command took longer than {:?} and was killed", self.timeout)));
            }
            () = feed(input, payload) => unreachable!("feeding never ends"),
        };
        group.ended();
        let why = format!("the command ended with {status}");
        match status.code() {
            Some(0) => Ok(()),
            Some(TRY_AGAIN) => Err(HandlerError::postpone(TRY_AGAIN_IN, why)),
            Some(CANNOT_BE) => Err(HandlerError::dead_letter(why)),
            _ => Err(HandlerError::retry(why)),
        }
    }
}

/// Writes the payload. A command need not read it.
async fn feed(input: Option<ChildStdin>, payload: &[u8]) {
    if let Some(mut input) = input {
        let _ = input.write_all(payload).await;
    }
    std::future::pending().await
}

/// The processes of a command; dropping it kills them.
struct Group(Option<Pid>);

impl Group {
    fn of(leader: Option<u32>) -> Self {
        Self(
            leader
                .and_then(|pid| i32::try_from(pid).ok())
                .and_then(Pid::from_raw),
        )
    }

    /// What the command left in the background is left alone.
    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // It may have ended just now.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}
