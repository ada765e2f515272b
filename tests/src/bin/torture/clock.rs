//! A clock that all processes of this machine share.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`: unlike an `Instant` it can be written down and compared with that of another process, and unlike
/// the wall clock it is never set.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

pub(crate) const MILLISECOND: u64 = 1_000_000;
