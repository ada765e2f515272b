//! The breaker's promise: whatever fails, what would come through does, and what would not is given up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::{Bench, History, PATIENCE, Step, bench, publish_steps, settled, step, steps};
use postbox_consumer::{Breaker, Delivery, Extract, HandlerDefinition, HandlerError, Retry};
use postbox_testkit::eventually;

const GROUP: &str = "group";

fn handler<F>(history: &History, decide: F) -> HandlerDefinition
where
    F: Fn(&Step, u32) -> Result<(), HandlerError> + Send + Sync + 'static,
{
    let (history, decide) = (history.clone(), Arc::new(decide));
    HandlerDefinition::new("handler")
        .group(GROUP)
        .retry(Retry::fixed(Duration::from_millis(100)))
        .argument::<Step>()
        .call(move |mut invocation| {
            let (history, decide) = (history.clone(), decide.clone());
            Box::pin(async move {
                let delivery = <Delivery as Extract>::extract(&mut invocation).await?;
                let step = <Step as Extract>::extract(&mut invocation).await?;
                let began = Instant::now();
                tokio::task::yield_now().await;
                decide(&step, delivery.attempt)?;
                history.note(&step, began);
                Ok(())
            })
        })
}

fn down() -> HandlerError {
    HandlerError::retry("down")
}

async fn letters(bench: &Bench, least: i64) {
    eventually(PATIENCE, || async {
        match bench.number("SELECT count(*) FROM postbox.dead_letter").await {
            letters if letters >= least => Ok(()),
            letters => Err(format!("{letters} dead letters")),
        }
    })
    .await;
}

/// Once the healthy keys are done everything that is left fails, three times.
#[tokio::test(flavor = "multi_thread")]
async fn keys_that_fail_a_few_times_come_through_when_nothing_else_is_left() {
    let bench = bench().await;
    let history = History::default();
    let handler = handler(&history, |step, attempt| {
        match step.key.parse::<u64>().unwrap() % 10 == 0 && attempt <= 3 {
            true => Err(down()),
            false => Ok(()),
        }
    });
    let consumer = bench.start(vec![handler]).await;
    publish_steps(bench.db.pool(), &steps(600, 8)).await;
    settled(bench.db.pool(), GROUP).await;
    history.assert_in_order_and_alone(600, 8);
    assert_eq!(consumer.stats()[0].dead, 0);
    assert!(!consumer.stats()[0].breaker_open);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_everything_fails_dead_letters_come_when_the_policy_says_so() {
    let bench = bench().await;
    let history = History::default();
    let handler =
        handler(&history, |_, _| Err(down())).retry(Retry::fixed(Duration::from_millis(100)).max_attempts(3));
    let consumer = bench.start(vec![handler]).await;
    publish_steps(bench.db.pool(), &steps(200, 2)).await;
    // All that ran before it opened.
    letters(&bench, 20).await;
    // And the probes.
    let later = bench.number("SELECT count(*) FROM postbox.dead_letter").await + 2;
    letters(&bench, later).await;
    assert!(consumer.stats()[0].breaker_open);
    assert!(
        bench.number("SELECT count(*) FROM postbox.dead_letter").await < 100,
        "the backlog is kept"
    );
}

/// A few more than run before it opens.
const POISON: i64 = 40;

/// Their attempts never end and come all the time: they are not what the probes are for.
#[tokio::test(flavor = "multi_thread")]
async fn poison_that_fails_for_ever_does_not_keep_the_others_from_being_tried() {
    let bench = bench().await;
    let history = History::default();
    let handler = handler(&history, |step, _| match step.n {
        0 => Err(down()),
        _ => Ok(()),
    })
    .retry(Retry::fixed(Duration::from_millis(50)).unlimited());
    let consumer = bench.start(vec![handler]).await;
    publish_steps(
        bench.db.pool(),
        &(0..POISON).map(|key| step(key, 0)).collect::<Vec<_>>(),
    )
    .await;
    eventually(PATIENCE, || async {
        consumer.stats()[0].breaker_open.then_some(()).ok_or("open")
    })
    .await;
    let others: Vec<Step> = (100..400).map(|key| step(key, 1)).collect();
    publish_steps(bench.db.pool(), &others).await;
    // The poison before them is tried first, one probe each.
    eventually(Duration::from_secs(240), || async {
        match history.len() {
            300 => Ok(()),
            handled => Err(format!("{handled} handled, {:?}", consumer.stats()[0])),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn switched_off_it_never_opens() {
    let bench = bench().await;
    let history = History::default();
    let handler = handler(&history, |_, _| Err(down()))
        .retry(Retry::fixed(Duration::from_millis(50)).max_attempts(2))
        .breaker(Breaker::Off);
    let consumer = bench.start(vec![handler]).await;
    publish_steps(bench.db.pool(), &steps(300, 1)).await;
    letters(&bench, 300).await;
    assert!(!consumer.stats()[0].breaker_open);
}
