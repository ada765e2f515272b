//! SIGINT and SIGTERM: the first stops gracefully, the second at once.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// As a shell reports a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// A token that the first signal cancels. From here on no signal ends the program unasked.
pub(crate) fn on_signal() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let token = CancellationToken::new();
    let stop = token.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if stop.is_cancelled() {
                std::process::exit(INTERRUPTED);
            }
            stop.cancel();
        }
    });
    Ok(token)
}
