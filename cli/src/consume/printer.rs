//! Writes lines to standard output, one after another.

use std::io::{ErrorKind, Write};
use std::sync::mpsc;

use anyhow::Context;
use postbox_consumer::{Delivery, Raw};
use tokio::io::Interest;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::line;

/// A thread that writes, because a pipe may be full for any time.
pub(crate) struct Printer {
    lines: mpsc::Sender<Line>,
    json: bool,
}

struct Line {
    text: String,
    written: oneshot::Sender<()>,
}

/// Why the printer ended early.
pub(crate) struct Failure(oneshot::Receiver<std::io::Error>);

impl Printer {
    /// Cancels `stop` when nothing can be written any more.
    pub(crate) fn start(json: bool, stop: CancellationToken) -> (Self, Failure) {
        let (lines, queue) = mpsc::channel();
        let (failed, failure) = oneshot::channel();
        std::thread::spawn(move || {
            if let Err(error) = write_all(&queue) {
                // Whoever wants to know looks after the stop.
                let _ = failed.send(error);
                stop.cancel();
            }
        });
        (Self { lines, json }, Failure(failure))
    }

    /// Prints a message. It is flushed on return; `None` if it never will be.
    pub(crate) async fn print(&self, delivery: &Delivery, raw: &Raw) -> Option<()> {
        let text = if self.json {
            line::json(delivery, raw)
        } else {
            line::human(delivery, raw)
        };
        let (written, is_written) = oneshot::channel();
        self.lines.send(Line { text, written }).ok()?;
        is_written.await.ok()
    }
}

fn write_all(queue: &mpsc::Receiver<Line>) -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    for Line { text, written } in queue {
        // Its message was given up meanwhile.
        if written.is_closed() {
            continue;
        }
        output.write_all(text.as_bytes())?;
        output.flush()?;
        // Given up in the moment of writing: it is delivered and printed again.
        let _ = written.send(());
    }
    Ok(())
}

impl Failure {
    /// An error, unless all that happened is that the reader had enough.
    pub(crate) fn check(mut self) -> anyhow::Result<()> {
        match self.0.try_recv() {
            Ok(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(error).context("cannot write to standard output")
            }
            _ => Ok(()),
        }
    }
}

/// Until the reader of standard output is gone, even if there is nothing to write. For ever, if it is no pipe.
pub(crate) async fn until_reader_is_gone() {
    if let Some(output) = watched_stdout()
        && output.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Unchecked, because its mode is shared with every other process that has this pipe, and stays as it is: it is only watched.
fn watched_stdout() -> Option<pipe::Sender> {
    use std::os::fd::AsFd;
    let output = std::io::stdout().as_fd().try_clone_to_owned().ok()?;
    pipe::Sender::from_owned_fd_unchecked(output).ok()
}
