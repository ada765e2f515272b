//! A step of the sequencer that cannot be done at once: in how large parts to do it.
//!
//! A backlog may need more memory, temporary files or time than a step may have, and one message may be why every step fails. Both are found out in
//! the same way: the step is done in parts, which get smaller with each failure.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicI64, Ordering};

use tracing::{info, warn};

/// Numbers in the first part.
const FIRST: i64 = 16 * 1024;

/// Zero: all at once.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    at_most: AtomicI64,
    /// Larger ones failed.
    most: AtomicI64,
}

impl Parts {
    /// So many numbers at a time; `None`: all at once.
    pub(crate) fn at_most(&self) -> Option<i64> {
        Some(self.at_most.load(Ordering::Relaxed)).filter(|at_most| *at_most > 0)
    }

    pub(crate) fn failed(&self, error: &sqlx::Error) {
        let next = match self.at_most() {
            None => {
                warn!(%error, "a step over all that is new fails; taking it in parts, until a part succeeds or the message is found that is to blame");
                self.most.store(FIRST, Ordering::Relaxed);
                FIRST
            }
            Some(failed) => {
                self.most.store((failed / 2).max(1), Ordering::Relaxed);
                (failed / 8).max(1)
            }
        };
        self.at_most.store(next, Ordering::Relaxed);
    }

    /// The next may be larger.
    pub(crate) fn succeeded(&self) {
        let (at_most, most) = (
            self.at_most.load(Ordering::Relaxed),
            self.most.load(Ordering::Relaxed),
        );
        if at_most >= most {
            // What failed then may succeed now.
            self.most
                .store((most + most / 8 + 1).min(FIRST), Ordering::Relaxed);
        }
        self.at_most.store((2 * at_most).min(most), Ordering::Relaxed);
    }

    pub(crate) fn all_done(&self) {
        info!("all that could not be sequenced at once is sequenced");
        self.at_most.store(0, Ordering::Relaxed);
    }
}

/// Whether a step may fail for what is in it, or for how much it is: class 22, data; 23, constraints; 53, resources (memory, disk, temporary files);
/// 54, limits; XX, damage; or it took too long.
pub(crate) fn is_to_be_parted(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == ErrorKind::TimedOut,
        _ => is_of_a_message(error) || of_class(error, &["53", "57014"]),
    }
}

/// Whether a step over one message fails for that message.
pub(crate) fn is_of_a_message(error: &sqlx::Error) -> bool {
    of_class(error, &["22", "23", "54", "XX", "53200"])
}

fn of_class(error: &sqlx::Error, classes: &[&str]) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| classes.iter().any(|class| code.starts_with(class)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_get_small_until_they_succeed_and_grow_slowly_to_what_failed() {
        let parts = Parts::default();
        let error = sqlx::Error::RowNotFound;
        assert_eq!(parts.at_most(), None);
        let mut sizes = Vec::new();
        for _ in 0..7 {
            parts.failed(&error);
            sizes.extend(parts.at_most());
        }
        assert_eq!(sizes, [16_384, 2_048, 256, 32, 4, 1, 1]);
        let parts = Parts::default();
        parts.failed(&error);
        parts.failed(&error);
        for size in [4_096, 8_192, 8_192, 9_217] {
            parts.succeeded();
            assert_eq!(parts.at_most(), Some(size));
        }
        for _ in 0..10 {
            parts.succeeded();
        }
        assert_eq!(parts.at_most(), Some(FIRST));
        parts.all_done();
        assert_eq!(parts.at_most(), None);
    }
}
