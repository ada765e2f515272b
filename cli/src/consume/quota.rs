//! `--max`: how many messages may be done with, acknowledged or given up.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;

pub(crate) struct Quota {
    /// Those that nobody works on.
    free: Semaphore,
    left: AtomicU32,
    stop: CancellationToken,
}

impl Quota {
    /// Cancels `stop` when it is used up.
    pub(crate) fn new(max: u32, stop: CancellationToken) -> Self {
        // More than a semaphore holds cannot be in hand at once either.
        let free = usize::try_from(max)
            .unwrap_or(usize::MAX)
            .min(Semaphore::MAX_PERMITS);
        Self {
            free: Semaphore::new(free),
            left: AtomicU32::new(max),
            stop,
        }
    }

    /// The right to be done with one message, once there is one; `None` when the program is to stop.
    pub(crate) async fn take(&self) -> Option<Share<'_>> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            free = self.free.acquire() => free.ok().map(|free| Share { free, quota: self }),
        }
    }
}

/// Dropped unused, it goes back.
pub(crate) struct Share<'a> {
    free: SemaphorePermit<'a>,
    quota: &'a Quota,
}

impl Share<'_> {
    /// Its message is done.
    pub(crate) fn used(self) {
        self.free.forget();
        if self.quota.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.quota.free.close();
            self.quota.stop.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_share_that_was_not_used_goes_to_another_message() {
        let stop = CancellationToken::new();
        let quota = Quota::new(1, stop.clone());
        drop(quota.take().await.expect("one is free"));
        quota.take().await.expect("it is free again").used();
        assert!(stop.is_cancelled());
        assert!(quota.take().await.is_none());
    }
}
