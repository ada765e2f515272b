//! Waiting for a condition.

use std::fmt::Display;
use std::future::Future;
use std::panic::Location;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

const POLL: Duration = Duration::from_millis(10);

/// Waits until `condition` is `Ok` and gives what it gave; asks every 10 ms.
///
/// # Panics
/// At `timeout`, with the condition's last message and the place of the call.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use std::time::Duration;
/// use postbox_testkit::eventually;
///
/// let mut asked = 0;
/// eventually(Duration::from_secs(5), async || {
///     asked += 1;
///     if asked < 3 { Err(format!("asked {asked} times")) } else { Ok(()) }
/// })
/// .await;
/// # }
/// ```
#[track_caller]
pub fn eventually<T, E: Display>(
    timeout: Duration,
    condition: impl AsyncFnMut() -> Result<T, E>,
) -> impl Future<Output = T> {
    poll(timeout, condition, Location::caller())
}

async fn poll<T, E: Display>(
    timeout: Duration,
    mut condition: impl AsyncFnMut() -> Result<T, E>,
    caller: &'static Location<'static>,
) -> T {
    let deadline = Instant::now() + timeout;
    let mut last = String::from("the condition itself never answered");
    loop {
        match timeout_at(deadline, condition()).await {
            Ok(Ok(value)) => return value,
            Ok(Err(message)) => last = message.to_string(),
            Err(_elapsed) => {}
        }
        assert!(
            Instant::now() < deadline,
            "not within {timeout:?} (awaited at {caller}): {last}"
        );
        sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn gives_what_the_condition_gives() {
        let mut asked = 0;
        let value = eventually(Duration::from_secs(5), async || {
            asked += 1;
            if asked < 3 { Err("not yet") } else { Ok(asked) }
        })
        .await;
        assert_eq!(value, 3);
    }

    #[tokio::test]
    #[should_panic(expected = "two of three")]
    async fn panics_with_the_last_message() {
        eventually(Duration::from_millis(30), || async {
            Err::<(), _>("two of three")
        })
        .await;
    }

    #[tokio::test]
    #[should_panic(expected = "never answered")]
    async fn a_condition_that_hangs_does_not_hang_the_test() {
        eventually(
            Duration::from_millis(30),
            std::future::pending::<Result<(), String>>,
        )
        .await;
    }
}
