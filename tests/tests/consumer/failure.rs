//! What becomes of messages that fail: retries, parking, dead letters, halted keys, the breaker, and what operators decide.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{Bench, History, PATIENCE, Step, bench, publish_steps, settled, step, steps};
use postbox_consumer::{
    DeadLetter, Delivery, Exhausted, Extract, HandlerDefinition, HandlerError, Retry, Tx,
};
use postbox_dispatcher::messages::MessageState;
use postbox_dispatcher::{messages, status};
use postbox_testkit::eventually;
use uuid::Uuid;

const GROUP: &str = "group";

/// Id, number, header `postbox-redriven`, attempt.
type SeenRun = (String, i64, Option<String>, u32);

/// A handler that does as `decide` says, given the step and the attempt, and notes its successes.
fn handler<F>(history: &History, decide: F) -> HandlerDefinition
where
    F: Fn(&Step, u32) -> Result<(), HandlerError> + Send + Sync + 'static,
{
    let (history, decide) = (history.clone(), Arc::new(decide));
    HandlerDefinition::new("handler")
        .group(GROUP)
        .retry(quickly())
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

fn quickly() -> Retry {
    Retry::fixed(Duration::from_millis(50))
}

fn down() -> HandlerError {
    HandlerError::retry("down")
}

async fn letters(bench: &Bench) -> Vec<(i64, i64, String, i32, bool)> {
    sqlx::query_as(
        "SELECT id, \"offset\", reason, attempts, halted FROM postbox.dead_letter ORDER BY \"offset\"",
    )
    .fetch_all(bench.db.pool())
    .await
    .unwrap()
}

async fn there_are(bench: &Bench, count: i64, sql: &'static str) {
    eventually(PATIENCE, || async {
        match bench.number(sql).await {
            number if number == count => Ok(()),
            number => Err(format!("{number}, not {count}: {sql}")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_are_counted_and_then_the_message_is_a_dead_letter_with_its_history() {
    let bench = bench().await;
    let history = History::default();
    let told: Arc<Mutex<Vec<DeadLetter>>> = Arc::default();
    let hook = told.clone();
    let handler = handler(&history, |step, attempt| match step.n {
        0 => Err(HandlerError::retry(format!("attempt {attempt} went wrong"))),
        _ => Ok(()),
    })
    .retry(quickly().max_attempts(3))
    .on_dead_letter(move |letter: DeadLetter| {
        let hook = hook.clone();
        async move { hook.lock().unwrap().push(letter) }
    });
    let consumer = bench.start(vec![handler]).await;
    publish_steps(bench.db.pool(), &steps(1, 3)).await;
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(history.of("0"), [1, 2], "the key goes on");
    let letters = letters(&bench).await;
    assert_eq!(letters.len(), 1);
    let (_, offset, reason, attempts, halted) = &letters[0];
    assert_eq!((*offset, *attempts, *halted), (0, 3, false));
    assert_eq!(reason, "failed 3 times: attempt 3 went wrong");
    let errors: Vec<String> = sqlx::query_scalar(
        "SELECT e ->> 'error' FROM postbox.dead_letter, jsonb_array_elements(errors) e WHERE e ->> 'instance' <> '' AND e ? 'at'",
    )
    .fetch_all(bench.db.pool())
    .await
    .unwrap();
    assert_eq!(errors, [1, 2, 3].map(|n| format!("attempt {n} went wrong")));
    assert_eq!(consumer.stats()[0].dead, 1);
    eventually(PATIENCE, || async {
        (told.lock().unwrap().len() == 1)
            .then_some(())
            .ok_or("the hook is not told")
    })
    .await;
    assert_eq!(told.lock().unwrap()[0].attempts, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_can_send_a_message_to_the_dead_letters_at_once_and_an_old_failure_is_given_up() {
    let bench = bench().await;
    let history = History::default();
    let handler = handler(&history, |step, _| match step.n {
        0 => Err(HandlerError::dead_letter("cannot be")),
        1 => Err(down()),
        _ => Ok(()),
    })
    .retry(quickly().unlimited().max_age(Duration::from_millis(200)));
    let _consumer = bench.start(vec![handler]).await;
    publish_steps(bench.db.pool(), &steps(1, 3)).await;
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(history.of("0"), [2]);
    let reasons: Vec<String> = letters(&bench).await.into_iter().map(|l| l.2).collect();
    assert_eq!(
        reasons,
        [
            "the handler gave it up: cannot be",
            "failing for longer than 200ms: down"
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn successors_of_a_failing_key_are_parked_and_run_in_order_and_no_other_key_waits() {
    let bench = bench().await;
    let history = History::default();
    let up = Arc::new(AtomicBool::new(false));
    let handler = {
        let up = up.clone();
        handler(&history, move |step, _| match step.key.as_str() {
            "0" if !up.load(Ordering::Relaxed) => Err(down()),
            _ => Ok(()),
        })
    };
    let consumer = bench
        .consumer(vec![handler.retry(quickly().unlimited()).concurrency(4)])
        .window(32);
    let _consumer = consumer.start().await.unwrap();
    let all = steps(4, 300);
    publish_steps(bench.db.pool(), &all).await;
    // Far more than the window: they cannot all be in memory.
    history.has(900).await;
    assert!(history.of("0").is_empty());
    eventually(PATIENCE, || async {
        let status = status::read(bench.db.pool())
            .await
            .map_err(|error| error.to_string())?;
        let parked = status.subscriptions[0].parked;
        if (250..300).contains(&parked) {
            Ok(())
        } else {
            Err(format!("{parked} parked"))
        }
    })
    .await;
    there_are(&bench, 1, "SELECT count(*) FROM postbox.redelivery").await;
    there_are(&bench, 1, "SELECT count(*) FROM postbox.parked_key").await;
    let last = "SELECT id FROM postbox.outbox WHERE key = '0' ORDER BY seq DESC LIMIT 1";
    let last: Uuid = sqlx::query_scalar(last).fetch_one(bench.db.pool()).await.unwrap();
    let found = messages::show(bench.db.pool(), last).await.unwrap().unwrap();
    assert_eq!(found.groups[0].state, MessageState::Parked);
    up.store(true, Ordering::Relaxed);
    settled(bench.db.pool(), GROUP).await;
    history.assert_in_order_and_alone(4, 300);
    there_are(&bench, 0, "SELECT count(*) FROM postbox.parked_key").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_and_parked_messages_survive_a_change_of_owners() {
    let bench = bench().await;
    let history = History::default();
    let up = Arc::new(AtomicBool::new(false));
    let most = Arc::new(AtomicU64::new(0));
    let make = || {
        let (up, most) = (up.clone(), most.clone());
        handler(&history, move |step, attempt| {
            if step.key == "0" && !up.load(Ordering::Relaxed) {
                most.fetch_max(u64::from(attempt), Ordering::Relaxed);
                return Err(down());
            }
            Ok(())
        })
        .retry(quickly().unlimited())
        .concurrency(4)
    };
    let first = bench.consumer(vec![make()]).window(32).start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(4, 100)).await;
    history.has(300).await;
    eventually(PATIENCE, || async {
        (most.load(Ordering::Relaxed) >= 3)
            .then_some(())
            .ok_or("attempts")
    })
    .await;
    first.shutdown().await.unwrap();
    let attempts = most.swap(0, Ordering::Relaxed);
    let recorded = bench
        .number("SELECT attempt::bigint FROM postbox.redelivery WHERE state = 'retry'")
        .await;
    assert_eq!(
        recorded as u64, attempts,
        "the attempts made are on record after a graceful stop"
    );
    let _second = bench.consumer(vec![make()]).window(32).start().await.unwrap();
    eventually(PATIENCE, || async {
        (most.load(Ordering::Relaxed) > attempts)
            .then_some(())
            .ok_or("attempts go on")
    })
    .await;
    publish_steps(
        bench.db.pool(),
        &(100..120).map(|n| step("0", n)).collect::<Vec<_>>(),
    )
    .await;
    up.store(true, Ordering::Relaxed);
    settled(bench.db.pool(), GROUP).await;
    let numbers = history.of("0");
    assert_eq!(numbers, (0..120).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_halted_key_waits_for_an_operator_who_redrives_discards_or_releases() {
    let bench = bench().await;
    let history = History::default();
    let up = Arc::new(AtomicBool::new(false));
    let handler = {
        let up = up.clone();
        handler(&history, move |step, _| match step.n {
            0 if step.key != "3" && !up.load(Ordering::Relaxed) => Err(down()),
            _ => Ok(()),
        })
    };
    let consumer = bench
        .start(vec![
            handler.retry(quickly().max_attempts(2).exhausted(Exhausted::Halt)),
        ])
        .await;
    publish_steps(bench.db.pool(), &steps(4, 3)).await;
    history.has(3).await;
    there_are(&bench, 3, "SELECT count(*) FROM postbox.dead_letter WHERE halted").await;
    assert_eq!(history.of("3"), [0, 1, 2], "no other key waits");
    assert_eq!(history.len(), 3);
    eventually(PATIENCE, || async {
        (consumer.stats()[0].halted == 3).then_some(()).ok_or("halted")
    })
    .await;
    up.store(true, Ordering::Relaxed);
    let of_key = |letters: &[(i64, i64, String, i32, bool)], key: i64| letters[key as usize].0;
    let all = letters(&bench).await;
    sqlx::query(
        "SELECT postbox.redrive(ARRAY[$1]), postbox.discard(ARRAY[$2]), postbox.release_key(ARRAY[$3])",
    )
    .bind(of_key(&all, 0))
    .bind(of_key(&all, 1))
    .bind(of_key(&all, 2))
    .execute(bench.db.pool())
    .await
    .unwrap();
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(history.of("0"), [0, 1, 2], "redriven");
    assert_eq!(history.of("1"), [1, 2], "discarded");
    assert_eq!(history.of("2"), [1, 2], "released");
    there_are(
        &bench,
        1,
        "SELECT count(*) FROM postbox.dead_letter WHERE NOT halted AND key = '2'",
    )
    .await;
    there_are(&bench, 1, "SELECT count(*) FROM postbox.dead_letter").await;
    there_are(&bench, 0, "SELECT count(*) FROM postbox.redelivery").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_halted_key_stays_halted_for_the_next_owner() {
    let bench = bench().await;
    let history = History::default();
    let make = || {
        handler(&history, |step, _| if step.n == 0 { Err(down()) } else { Ok(()) })
            .retry(quickly().max_attempts(1).exhausted(Exhausted::Halt))
    };
    let first = bench.start(vec![make()]).await;
    publish_steps(bench.db.pool(), &steps(1, 3)).await;
    there_are(&bench, 1, "SELECT count(*) FROM postbox.dead_letter WHERE halted").await;
    first.shutdown().await.unwrap();
    let _second = bench.start(vec![make()]).await;
    publish_steps(bench.db.pool(), &[step("other", 1)]).await;
    history.has(1).await;
    assert_eq!(history.of("0"), Vec::<i64>::new());
    bench
        .sql("SELECT postbox.release_key(ARRAY(SELECT id FROM postbox.dead_letter))")
        .await;
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(history.of("0"), [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_topic_order_a_failure_holds_the_topic_and_nothing_is_copied() {
    let bench = bench().await;
    let history = History::default();
    let up = Arc::new(AtomicBool::new(false));
    let handler = {
        let up = up.clone();
        handler(&history, move |step, _| match step.n {
            1 if !up.load(Ordering::Relaxed) => Err(down()),
            _ => Ok(()),
        })
    };
    let handler = handler
        .retry(quickly().unlimited())
        .order(postbox_consumer::MessageOrder::Topic)
        .concurrency(4);
    let _consumer = bench.consumer(vec![handler]).window(32).start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(1, 200)).await;
    there_are(&bench, 1, "SELECT count(*) FROM postbox.redelivery").await;
    assert_eq!(history.of("0"), [0]);
    up.store(true, Ordering::Relaxed);
    settled(bench.db.pool(), GROUP).await;
    history.assert_in_order_and_alone(1, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redriven_letter_keeps_its_id_gets_a_header_and_may_get_a_new_payload() {
    let bench = bench().await;
    let seen: Arc<Mutex<Vec<SeenRun>>> = Arc::default();
    let note = seen.clone();
    let handler = HandlerDefinition::new("handler")
        .group(GROUP)
        .retry(quickly().max_attempts(1))
        .argument::<Step>()
        .call(move |mut invocation| {
            let note = note.clone();
            Box::pin(async move {
                let delivery = <Delivery as Extract>::extract(&mut invocation).await?;
                let step = <Step as Extract>::extract(&mut invocation).await?;
                let redriven = delivery.headers.get("postbox-redriven").map(str::to_owned);
                note.lock()
                    .unwrap()
                    .push((delivery.id.to_string(), step.n, redriven, delivery.attempt));
                if step.n == 0 { Err(down()) } else { Ok(()) }
            })
        });
    let _consumer = bench.start(vec![handler]).await;
    publish_steps(bench.db.pool(), &steps(1, 1)).await;
    for payload in [None, Some("{\"key\": \"0\", \"n\": 7}")] {
        there_are(&bench, 1, "SELECT count(*) FROM postbox.dead_letter").await;
        sqlx::query("SELECT postbox.redrive(ARRAY(SELECT id FROM postbox.dead_letter), $1)")
            .bind(payload.map(str::as_bytes))
            .execute(bench.db.pool())
            .await
            .unwrap();
    }
    settled(bench.db.pool(), GROUP).await;
    let seen = seen.lock().unwrap().clone();
    let ids: HashSet<&String> = seen.iter().map(|(id, ..)| id).collect();
    assert_eq!(ids.len(), 1);
    let rest: Vec<(i64, Option<&str>, u32)> = seen
        .iter()
        .map(|(_, n, header, attempt)| (*n, header.as_deref(), *attempt))
        .collect();
    assert_eq!(rest, [(0, None, 1), (0, Some("1"), 1), (7, Some("2"), 1)]);
    there_are(&bench, 0, "SELECT count(*) FROM postbox.dead_letter").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_opens_the_breaker_leaves_few_rows_and_everything_is_delivered_in_order_afterwards() {
    let bench = bench().await;
    let history = History::default();
    let up = Arc::new(AtomicBool::new(false));
    let runs = Arc::new(AtomicU64::new(0));
    let handler = {
        let (up, runs) = (up.clone(), runs.clone());
        handler(&history, move |_, _| {
            runs.fetch_add(1, Ordering::Relaxed);
            match up.load(Ordering::Relaxed) {
                true => Ok(()),
                false => Err(down()),
            }
        })
    };
    let consumer = bench.start(vec![handler.retry(Retry::default())]).await;
    publish_steps(bench.db.pool(), &steps(500, 20)).await;
    eventually(PATIENCE, || async {
        consumer.stats()[0].breaker_open.then_some(()).ok_or("open")
    })
    .await;
    let at_first = runs.load(Ordering::Relaxed);
    // Several probes.
    eventually(PATIENCE, || async {
        (runs.load(Ordering::Relaxed) >= at_first + 2)
            .then_some(())
            .ok_or("probes")
    })
    .await;
    let runs_so_far = runs.load(Ordering::Relaxed);
    assert!(
        runs_so_far < 200,
        "only probes and due attempts run: {runs_so_far}"
    );
    let rows = bench.number("SELECT count(*) FROM postbox.redelivery").await;
    assert!(rows <= 100, "{rows} rows");
    up.store(true, Ordering::Relaxed);
    settled(bench.db.pool(), GROUP).await;
    assert!(!consumer.stats()[0].breaker_open);
    assert_eq!(
        consumer.stats()[0].dead,
        0,
        "the policy's attempts outlast the outage"
    );
    history.assert_in_order_and_alone(500, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_with_few_keys_does_not_copy_the_backlog() {
    let bench = bench().await;
    let history = History::default();
    let up = Arc::new(AtomicBool::new(false));
    let handler = {
        let up = up.clone();
        handler(&history, move |_, _| match up.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err(down()),
        })
    };
    let consumer = bench
        .start(vec![
            handler
                .retry(Retry::fixed(Duration::from_millis(500)).unlimited())
                .concurrency(4),
        ])
        .await;
    publish_steps(bench.db.pool(), &steps(3, 2000)).await;
    eventually(PATIENCE, || async {
        consumer.stats()[0].breaker_open.then_some(()).ok_or("open")
    })
    .await;
    let rows = bench.number("SELECT count(*) FROM postbox.redelivery").await;
    assert!(rows < 1000, "{rows} rows");
    up.store(true, Ordering::Relaxed);
    settled(bench.db.pool(), GROUP).await;
    history.assert_in_order_and_alone(3, 2000);
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_failing_messages_and_no_more_are_taken_in_while_the_rest_goes_on_failing() {
    let bench = bench().await;
    let history = History::default();
    let up = Arc::new(AtomicBool::new(false));
    let handler = {
        let up = up.clone();
        // Every other key fails: no outage.
        handler(&history, move |step, _| {
            let odd = step.key.parse::<u64>().unwrap() % 2 == 1;
            if odd && !up.load(Ordering::Relaxed) {
                Err(down())
            } else {
                Ok(())
            }
        })
    };
    let consumer = bench
        .consumer(vec![handler.retry(quickly().unlimited()).concurrency(4)])
        .max_failing(64)
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(1000, 2)).await;
    eventually(PATIENCE, || async {
        (consumer.stats()[0].retrying >= 64)
            .then_some(())
            .ok_or("failing")
    })
    .await;
    let rows = async || {
        bench
            .number("SELECT count(*) FROM postbox.redelivery WHERE state = 'retry'")
            .await
    };
    eventually(PATIENCE, async || match rows().await {
        64.. => Ok(()),
        rows => Err(rows),
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let rows = rows().await;
    assert!((64..=72).contains(&rows), "{rows} rows");
    up.store(true, Ordering::Relaxed);
    settled(bench.db.pool(), GROUP).await;
    history.assert_in_order_and_alone(1000, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transactional_handler_that_fails_first_has_its_effect_once_and_leaves_no_row() {
    let bench = bench().await;
    bench.sql("CREATE TABLE effect (key text, n bigint)").await;
    let handler = HandlerDefinition::new("handler")
        .group(GROUP)
        .retry(quickly())
        .argument::<Step>()
        .argument::<Tx>()
        .call(|mut invocation| {
            Box::pin(async move {
                let delivery = <Delivery as Extract>::extract(&mut invocation).await?;
                let step = <Step as Extract>::extract(&mut invocation).await?;
                let mut tx = <Tx as Extract>::extract(&mut invocation).await?;
                sqlx::query("INSERT INTO effect VALUES ($1, $2)")
                    .bind(&step.key)
                    .bind(step.n)
                    .execute(&mut *tx)
                    .await?;
                if delivery.attempt < 3 && step.n % 2 == 0 {
                    return Err(down());
                }
                Ok(())
            })
        });
    let _consumer = bench.start(vec![handler]).await;
    publish_steps(bench.db.pool(), &steps(5, 4)).await;
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 20);
    assert_eq!(
        bench
            .number("SELECT count(*) FROM (SELECT DISTINCT key, n FROM effect) d")
            .await,
        20
    );
    assert_eq!(bench.number("SELECT count(*) FROM postbox.redelivery").await, 0);
}

/// `OUTAGE_SECONDS=3600 cargo test -p postbox-tests --test consumer failure -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes as long as the outage that it plays"]
async fn a_long_outage_leaves_at_most_a_thousand_rows_and_everything_is_delivered_in_order_afterwards() {
    let seconds = std::env::var("OUTAGE_SECONDS").map_or(60, |seconds| seconds.parse().unwrap());
    let bench = bench().await;
    let history = History::default();
    let up = Arc::new(AtomicBool::new(false));
    let handler = {
        let up = up.clone();
        handler(&history, move |_, _| match up.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err(down()),
        })
    };
    // The default policy.
    let consumer = bench.start(vec![handler.retry(Retry::default())]).await;
    for chunk in steps(2000, 100).chunks(5000) {
        publish_steps(bench.db.pool(), chunk).await;
    }
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let rows = bench.number("SELECT count(*) FROM postbox.redelivery").await;
    println!(
        "after {seconds} s: {rows} rows in redelivery, {:?}",
        consumer.stats()[0]
    );
    assert!(rows <= 1000, "{rows} rows");
    assert!(consumer.stats()[0].breaker_open);
    up.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    eventually(Duration::from_secs(900), || async {
        (history.len() == 200_000).then_some(()).ok_or("not all")
    })
    .await;
    println!("all delivered {:?} after its end", begun.elapsed());
    assert_eq!(consumer.stats()[0].dead, 0);
    history.assert_in_order_and_alone(2000, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_expired_never_runs_and_is_settled_or_a_dead_letter_as_its_handler_says() {
    let bench = bench().await;
    let (settling, burying) = (History::default(), History::default());
    let up = Arc::new(AtomicBool::new(false));
    let fails_at_first = |history: &History| {
        let up = up.clone();
        handler(history, move |step, _| match step.n {
            // Tried in time, and expired before it succeeds.
            1 if !up.load(Ordering::Relaxed) => Err(down()),
            _ => Ok(()),
        })
        .retry(Retry::fixed(Duration::from_secs(60)))
    };
    let settle = bench.start(vec![fails_at_first(&settling)]).await;
    let bury = fails_at_first(&burying)
        .group("buries")
        .expired(postbox_consumer::Expired::DeadLetter);
    let in_an_hour = |n| postbox::message(&step("0", n)).expires_in(Duration::from_secs(3600));
    bench.publish([in_an_hour(0), in_an_hour(1), in_an_hour(2)]).await;
    settling.has(1).await;
    there_are(&bench, 1, "SELECT count(*) FROM postbox.redelivery").await;
    up.store(true, Ordering::Relaxed);
    bench.db.advance(Duration::from_secs(3600)).await.unwrap();
    bench.publish_one(&step("0", 3)).await;
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(settling.of("0"), [0, 3]);
    assert_eq!(settle.stats()[0].expired, 2);
    there_are(&bench, 0, "SELECT count(*) FROM postbox.dead_letter").await;

    let _bury = bench.start(vec![bury]).await;
    settled(bench.db.pool(), "buries").await;
    assert_eq!(burying.of("0"), [3]);
    let reasons: Vec<String> = letters(&bench).await.into_iter().map(|l| l.2).collect();
    assert_eq!(reasons, vec!["it expired before it was handled"; 3]);
    bench
        .sql("SELECT postbox.redrive(ARRAY(SELECT id FROM postbox.dead_letter))")
        .await;
    settled(bench.db.pool(), "buries").await;
    assert_eq!(
        burying.of("0"),
        [3, 0, 1, 2],
        "redriven, it does not expire again"
    );
}

/// What was parked and is in memory is pending: a new owner finds it by and by in the log, and what is still parked at once.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_waits_for_what_was_before_it_under_the_next_owner_too() {
    let bench = bench().await;
    let history = History::default();
    let (up, through) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let make = || {
        let (history, up, through) = (history.clone(), up.clone(), through.clone());
        HandlerDefinition::new("handler")
            .group(GROUP)
            .retry(quickly().unlimited())
            .concurrency(4)
            .argument::<Step>()
            .call(move |mut invocation| {
                let (history, up, through) = (history.clone(), up.clone(), through.clone());
                Box::pin(async move {
                    let step = <Step as Extract>::extract(&mut invocation).await?;
                    let began = Instant::now();
                    if step.key == "0" && !up.load(Ordering::Relaxed) {
                        return Err(down());
                    }
                    // The first that had been parked.
                    while step.key == "0" && step.n == 1 && !through.load(Ordering::Relaxed) {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    history.note(&step, began);
                    Ok(())
                })
            })
    };
    let first = bench.consumer(vec![make()]).window(32);
    let first = first.shutdown_grace(Duration::ZERO).start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(4, 100)).await;
    history.has(300).await;
    there_are(&bench, 1, "SELECT count(*) FROM postbox.parked_key").await;
    up.store(true, Ordering::Relaxed);
    // Some of the key's are pending, and some, behind them, are parked.
    let pending = "SELECT count(*) FROM postbox.parked_key k CROSS JOIN LATERAL postbox.lane_state(k.subscription_id, k.lane) l \
         WHERE k.\"offset\" > ALL (l.pending) AND cardinality(l.pending) > 8";
    there_are(&bench, 1, pending).await;
    first.shutdown().await.unwrap();
    there_are(&bench, 1, pending).await;
    through.store(true, Ordering::Relaxed);
    let _second = bench.consumer(vec![make()]).window(32).start().await.unwrap();
    settled(bench.db.pool(), GROUP).await;
    history.assert_in_order_and_alone(4, 100);
}

/// While it is not recorded that a message is no longer parked, a new owner would run it again, whatever was committed.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_parked_has_its_transactional_effect_once_though_no_report_arrives() {
    let bench = bench().await;
    bench.sql("CREATE TABLE effect (key text, n bigint)").await;
    let up = Arc::new(AtomicBool::new(false));
    let handler = {
        let up = up.clone();
        HandlerDefinition::new("handler")
            .group(GROUP)
            .retry(Retry::fixed(Duration::from_secs(3)).unlimited())
            .concurrency(4)
            .argument::<Step>()
            .argument::<Tx>()
            .call(move |mut invocation| {
                let up = up.clone();
                Box::pin(async move {
                    let step = <Step as Extract>::extract(&mut invocation).await?;
                    let mut tx = <Tx as Extract>::extract(&mut invocation).await?;
                    if step.key == "0" && !up.load(Ordering::Relaxed) {
                        return Err(down());
                    }
                    sqlx::query("INSERT INTO effect VALUES ($1, $2)")
                        .bind(&step.key)
                        .bind(step.n)
                        .execute(&mut *tx)
                        .await?;
                    Ok(())
                })
            })
    };
    let _consumer = bench.consumer(vec![handler]).window(32).start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(4, 60)).await;
    there_are(&bench, 180, "SELECT count(*) FROM effect").await;
    there_are(&bench, 1, "SELECT count(*) FROM postbox.parked_key").await;
    // An attempt has just been recorded: no report is under way that would hold the head's row.
    let quiet = "SELECT count(*) FROM postbox.redelivery WHERE due_at > postbox.clock() + interval '2 s'";
    there_are(&bench, 1, quiet).await;
    // Reports wait, and nobody else does.
    let mut lock = bench.db.pool().begin().await.unwrap();
    let table = "LOCK TABLE postbox.parked_key IN EXCLUSIVE MODE";
    sqlx::query(table).execute(&mut *lock).await.unwrap();
    up.store(true, Ordering::Relaxed);
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' \
         AND query LIKE '%postbox.record%' AND query_start < clock_timestamp() - interval '1 s'";
    there_are(&bench, 1, waiting).await;
    assert_eq!(
        bench.number("SELECT count(*) FROM effect WHERE key = '0'").await,
        1
    );
    bench
        .sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' \
                AND query LIKE '%postbox.record%'",
        )
        .await;
    lock.rollback().await.unwrap();
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 240);
    let distinct = "SELECT count(*) FROM (SELECT DISTINCT key, n FROM effect) d";
    assert_eq!(bench.number(distinct).await, 240);
}
