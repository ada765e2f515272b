//! When a program is to stop.

use tracing::{info, warn};

/// Completes at the first SIGINT or SIGTERM (Ctrl-C elsewhere): what [`Consumer::run_until`](crate::Consumer::run_until) waits for. From the call on these
/// signals no longer end the program by themselves.
///
/// If the signals cannot be listened for, that is logged and it never completes: they end the program, as they would without it.
///
/// # Panics
/// Outside of a Tokio runtime.
#[cfg(unix)]
pub fn shutdown_signal() -> impl Future<Output = ()> + Send {
    use tokio::signal::unix::{SignalKind, signal};

    let signals = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
    async move {
        match signals {
            [Ok(mut interrupt), Ok(mut terminate)] => {
                tokio::select! {
                    _ = interrupt.recv() => info!("SIGINT: stopping"),
                    _ = terminate.recv() => info!("SIGTERM: stopping"),
                }
            }
            [Err(error), _] | [_, Err(error)] => {
                warn!(%error, "cannot listen for signals: they will end the program at once");
                std::future::pending().await
            }
        }
    }
}

/// Completes at Ctrl-C.
#[cfg(not(unix))]
pub fn shutdown_signal() -> impl Future<Output = ()> + Send {
    async {
        if let Err(error) = tokio::signal::ctrl_c().await {
            warn!(%error, "cannot listen for Ctrl-C: it will end the program at once");
            std::future::pending::<()>().await;
        }
        info!("stopping");
    }
}
