//! Postponing is no failure.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{PATIENCE, Step, bench, publish_steps, step};
use postbox_consumer::{Delivery, HandlerError, State, handler, handlers};

/// Number and attempt of each run.
type Runs = Arc<Mutex<Vec<(i64, u32)>>>;

#[handler(group = "postponing")]
async fn at_the_third_look(
    step: Step,
    delivery: Delivery,
    State(runs): State<Runs>,
) -> Result<(), HandlerError> {
    let mut runs = runs.lock().unwrap();
    runs.push((step.n, delivery.attempt));
    match runs.len() {
        0..3 => Err(HandlerError::postpone(Duration::from_millis(20), "not yet")),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_postponed_message_holds_its_key_and_is_no_failure() {
    let bench = bench().await;
    let runs = Runs::default();
    let consumer = bench
        .consumer(handlers![at_the_third_look])
        .state(runs.clone())
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &[step("a", 0), step("a", 1)]).await;
    postbox_testkit::eventually(PATIENCE, || async {
        let stats = consumer.stats().remove(0);
        if stats.handled == 2 {
            Ok(())
        } else {
            Err(format!("{stats:?}"))
        }
    })
    .await;
    assert_eq!(*runs.lock().unwrap(), [(0, 1), (0, 1), (0, 1), (1, 1)]);
    assert_eq!(consumer.stats()[0].failed, 0);
}
