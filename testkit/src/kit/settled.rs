//! Waiting until nothing runs and nothing is about to.

use std::fmt::Write as _;
use std::panic::Location;
use std::time::{Duration, Instant};

use postbox_consumer::__testkit as consumers;
use tokio::time::{sleep, timeout};

use super::{Kit, standing};

/// Between two looks: what is looked at is often a commit away.
const FIRST_WAIT: Duration = Duration::from_millis(1);
const LONGEST_WAIT: Duration = Duration::from_millis(20);
/// For an executor that has something to do all the time.
const ANSWER: Duration = Duration::from_millis(500);
/// For a look, however little patience is left, and for what the message says beside.
const LOOK: Duration = Duration::from_secs(5);

const UNSEQUENCED: &str = "SELECT u.messages FROM postbox.unsequenced(1) u";

impl Kit {
    /// Waits until nothing runs and nothing is about to: every message that was committed has its place in its topic, and every subscription of this database
    /// that has a live consumer has done with it what can be done now. What handlers publish, and what comes of that, is waited for, too; and so is what
    /// became due, since [`advance`](Self::advance) or by itself.
    ///
    /// Not waited for is what waits for a later time or for somebody: a message that is scheduled or postponed, a retry that is not due, keys behind
    /// those, a breaker until its next probe, a group that is paused or outside of its window, a key that waits for an operator, messages of a type that no
    /// live consumer handles, and a subscription without a live consumer. A rate limit is waited for, and a batch that waits for more messages.
    ///
    /// What a handler started beside itself, such as a task, is not known.
    ///
    /// # Panics
    /// It has not come to that within [`patience`](Self::patience): the message says what still runs or waits. A consumer or the dispatcher has ended by
    /// itself: it says why.
    #[track_caller]
    pub fn settled(&self) -> impl Future<Output = ()> + Send + use<> {
        self.settled_within(self.patience_now())
    }

    /// As [`settled`](Self::settled), for at most so long.
    ///
    /// # Panics
    /// As [`settled`](Self::settled).
    #[track_caller]
    pub fn settled_within(&self, patience: Duration) -> impl Future<Output = ()> + Send + use<> {
        let (kit, caller) = (self.clone(), Location::caller());
        async move {
            let deadline = Instant::now() + patience;
            let mut wait = FIRST_WAIT;
            loop {
                let unsettled = match timeout(LOOK, kit.unsettled()).await {
                    Ok(unsettled) => unsettled,
                    Err(_) => vec!["the database does not answer".to_owned()],
                };
                if unsettled.is_empty() {
                    return;
                }
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let why = kit.explain(&unsettled).await;
                    panic!("not settled within {patience:?} (awaited at {caller}):{why}");
                }
                sleep(wait.min(left)).await;
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        }
    }

    /// What is not settled, in words.
    async fn unsettled(&self) -> Vec<String> {
        self.check_alive();
        let mut standings = Vec::new();
        for started in self.started() {
            match timeout(ANSWER, consumers::standings(&started.handle)).await {
                Ok(Some(of_consumer)) => standings.extend(of_consumer),
                Ok(None) => return vec!["a consumer is connecting again, or ends".to_owned()],
                Err(_) => return vec!["a consumer is at work without a pause, or is cut off".to_owned()],
            }
        }
        let busy = standing::busy(&standings);
        if !busy.is_empty() {
            return busy;
        }
        match standing::look(self.pool(), &standings).await {
            Ok(look) => look.unsettled(&standings),
            Err(error) => vec![format!("the database cannot be asked: {error}")],
        }
    }

    fn check_alive(&self) {
        for started in self.started() {
            if let Some(why) = consumers::why_ended(&started.handle) {
                panic!("a consumer of the test has ended: {why}");
            }
        }
    }

    /// What the message of a time-out says: what is not settled, what runs, and what fails.
    async fn explain(&self, unsettled: &[String]) -> String {
        let mut text = String::new();
        let mut list = |title: &str, lines: &[String]| {
            if !lines.is_empty() {
                let _ = write!(text, "\n{title}\n  {}", lines.join("\n  "));
            }
        };
        list("not settled:", unsettled);
        let running: Vec<String> = self.0.faults.running().iter().map(ToString::to_string).collect();
        list("running:", &running);
        let failing = timeout(LOOK, standing::failing(self.pool())).await;
        list(
            "failing or waiting:",
            &failing.ok().and_then(Result::ok).unwrap_or_default(),
        );
        text
    }

    /// Until every message that is committed has its place in its topic.
    pub(super) async fn sequenced(&self) {
        let deadline = Instant::now() + self.patience_now();
        let mut wait = FIRST_WAIT;
        loop {
            let unsequenced: i64 = sqlx::query_scalar(UNSEQUENCED)
                .fetch_one(self.pool())
                .await
                .expect("the database answers");
            if unsequenced == 0 {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "what was published has no place in its topic after {:?}: the dispatcher does not run",
                self.patience_now()
            );
            sleep(wait).await;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }
}
