//! SIGINT and SIGTERM: the first stops gracefully, a later one at once.

use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// As a shell reports a program that SIGINT ended.
pub(crate) const INTERRUPTED: u8 = 130;

/// Signals so close together are one: `timeout` and terminals tell the process and its group.
const ONE_SIGNAL: Duration = Duration::from_millis(500);

/// A token that the first signal cancels. From here on no signal ends the program unasked.
pub(crate) fn on_signal() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let token = CancellationToken::new();
    let stop = token.clone();
    tokio::spawn(async move {
        let mut first = None;
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if first.get_or_insert_with(Instant::now).elapsed() > ONE_SIGNAL {
                std::process::exit(INTERRUPTED.into());
            }
            stop.cancel();
        }
    });
    Ok(token)
}
