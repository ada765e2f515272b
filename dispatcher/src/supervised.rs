//! A part of the dispatcher, started again when it panics.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use postbox_core::restarts::{Restarts, panic_text, say};
use tracing::error;

/// Runs it, again after each panic, with growing waits; returns when that is no use any more, and says why.
pub(crate) async fn run<F: Future<Output = ()>>(part: &'static str, mut start: impl FnMut() -> F) -> String {
    let mut restarts = Restarts::new();
    loop {
        let why = match AssertUnwindSafe(start()).catch_unwind().await {
            Ok(()) => "it returned".to_owned(),
            Err(panic) => panic_text(panic.as_ref()),
        };
        let Some(wait) = restarts.next_wait() else {
            say(|| {
                error!(
                    part,
                    why, "a part of the dispatcher panics again and again: the dispatcher ends"
                )
            });
            return format!("{part} panics again and again, the last time with: {why}");
        };
        say(|| {
            error!(
                part,
                why,
                ?wait,
                "a part of the dispatcher panicked; starting it again"
            )
        });
        tokio::time::sleep(wait).await;
    }
}
