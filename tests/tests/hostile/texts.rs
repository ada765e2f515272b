//! Texts, names, spans and payloads that nobody checked: each is the trouble of its own message, and of nobody else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::{Bench, History, PATIENCE, Step, bench, publish_steps, settled, step, steps};
use postbox::Outgoing;
use postbox_consumer::{
    Batch, ConsumerHandle, Delivery, Extract, HandlerDefinition, HandlerError, Json, Retry, State,
    Undecodable, handler, handlers,
};
use postbox_testkit::eventually;
use serde::Deserialize;

const GROUP: &str = "hostile";

type Decide = dyn Fn(&Step, u32) -> Result<(), HandlerError> + Send + Sync;

/// A handler that does as `decide` says, given the step and the attempt, and notes its successes.
fn deciding(group: &'static str, history: &History, decide: Arc<Decide>) -> HandlerDefinition {
    let history = history.clone();
    HandlerDefinition::new("deciding")
        .group(group)
        .retry(Retry::fixed(Duration::from_millis(50)).max_attempts(3))
        .argument::<Step>()
        .call(move |mut invocation| {
            let (history, decide) = (history.clone(), decide.clone());
            Box::pin(async move {
                let delivery = <Delivery as Extract>::extract(&mut invocation).await?;
                let step = <Step as Extract>::extract(&mut invocation).await?;
                let began = Instant::now();
                decide(&step, delivery.attempt)?;
                history.note(&step, began);
                Ok(())
            })
        })
}

/// Reason and errors of the dead letters, by offset.
async fn letters(bench: &Bench) -> Vec<(String, Vec<String>, i32)> {
    sqlx::query_as(
        "SELECT reason, ARRAY(SELECT e ->> 'error' FROM jsonb_array_elements(errors) e), attempts FROM postbox.dead_letter ORDER BY \"offset\"",
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

/// Says of the instance's sessions that are there whether they are the same: their numbers are by chance, so no other ones have the same sum.
async fn sessions(bench: &Bench) -> i64 {
    bench.number("SELECT sum(id)::bigint FROM postbox.consumer").await
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_that_no_column_takes_are_cleaned_and_cut_and_cost_their_own_message_only() {
    let bench = bench().await;
    let (history, healthy) = (History::default(), History::default());
    let hostile = deciding(
        GROUP,
        &history,
        Arc::new(|step, attempt| match step.n {
            0 => Err(HandlerError::retry(format!("a\0b {attempt}"))),
            1 => panic!("panicked\0here"),
            2 => Err(HandlerError::retry("é".repeat(15_000_000))),
            3 => Err(HandlerError::dead_letter("\0\0 it cannot be")),
            4 => Err(HandlerError::discard("\0 nobody wants it")),
            5 => Err(std::io::Error::other("from\0an error").into()),
            6 if attempt == 1 => Err(HandlerError::retry_in(Duration::from_millis(10), "\0")),
            _ => Ok(()),
        }),
    );
    let beside = deciding("healthy", &healthy, Arc::new(|_, _| Ok(())));
    let consumer = bench.start(vec![hostile, beside]).await;
    let session = sessions(&bench).await;
    // Each of a key of its own.
    let all: Vec<Step> = (0..40).map(|n| step(n, n)).collect();
    publish_steps(bench.db.pool(), &all).await;
    settled(bench.db.pool(), GROUP).await;
    settled(bench.db.pool(), "healthy").await;
    let letters = letters(&bench).await;
    assert_eq!(letters.len(), 5, "{letters:?}");
    assert_eq!(letters[0].0, "failed 3 times: a\\0b 3");
    assert_eq!(letters[0].1, ["a\\0b 1", "a\\0b 2", "a\\0b 3"]);
    assert_eq!(
        letters[1].0,
        "failed 3 times: the handler panicked: panicked\\0here"
    );
    assert!(
        letters[2].0.ends_with("… (30000000 bytes)"),
        "{}",
        letters[2].0.len()
    );
    assert!(letters[2].1.iter().all(|error| error.len() < 4200));
    assert_eq!(letters[3].0, "the handler gave it up: \\0\\0 it cannot be");
    assert_eq!(letters[4].1[0], "from\\0an error");
    assert_eq!(history.len(), 34);
    assert_eq!(healthy.len(), 40, "nothing is repeated");
    assert_eq!(sessions(&bench).await, session, "no session was lost");
    assert_eq!(consumer.stats()[0].discarded, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_refuses_of_one_message_is_recorded_in_other_words_and_the_rest_as_it_is() {
    let bench = bench().await;
    let history = History::default();
    bench
        .sql(
            "ALTER TABLE postbox.redelivery ADD CHECK (errors::text NOT LIKE '%poison%'); \
             ALTER TABLE postbox.dead_letter ADD CHECK (reason NOT LIKE '%poison%'); \
             CREATE FUNCTION no_headers() RETURNS trigger LANGUAGE plpgsql AS \
                 $$ BEGIN IF new.headers ? 'x-refused' THEN RAISE 'refused' USING ERRCODE = '22P05'; END IF; RETURN new; END $$; \
             CREATE TRIGGER no_headers BEFORE INSERT ON postbox.redelivery FOR EACH ROW EXECUTE FUNCTION no_headers()",
        )
        .await;
    let handler = deciding(
        GROUP,
        &history,
        Arc::new(|step, _| match step.n {
            7 => Err(HandlerError::retry("poison")),
            9 => Err(HandlerError::dead_letter("more poison")),
            n if n < 20 => Err(HandlerError::retry(format!("failed {n}"))),
            _ => Ok(()),
        }),
    );
    let _consumer = bench.start(vec![handler]).await;
    let session = sessions(&bench).await;
    let messages = (0..40).map(|n| {
        let message = postbox::message(&step(n, n));
        match n {
            5 => message.header("x-refused", "yes"),
            _ => message.header("x-kept", "yes"),
        }
    });
    bench.publish(messages).await;
    settled(bench.db.pool(), GROUP).await;
    let letters = letters(&bench).await;
    assert_eq!(letters.len(), 20, "{letters:?}");
    for (n, (reason, errors, attempts)) in letters.iter().enumerate() {
        match n {
            // Its reason is another constraint's trouble, found after its errors.
            7 | 9 => assert!(
                reason.contains("could not be recorded") && errors[0].contains("could not be recorded"),
                "{n}: {reason}"
            ),
            5 => assert_eq!(*attempts, 3),
            _ => assert_eq!(
                (reason.as_str(), errors.len()),
                (format!("failed 3 times: failed {n}").as_str(), 3)
            ),
        }
    }
    there_are(
        &bench,
        19,
        "SELECT count(*) FROM postbox.dead_letter WHERE headers ? 'x-kept'",
    )
    .await;
    assert_eq!(history.len(), 20);
    assert_eq!(sessions(&bench).await, session, "no session was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn reports_with_heavy_payloads_are_written_in_portions_and_are_whole() {
    let bench = bench().await;
    let history = History::default();
    let handler = HandlerDefinition::new("heavy")
        .group(GROUP)
        .topic("heavy")
        .concurrency(16)
        .retry(Retry::fixed(Duration::from_millis(50)).max_attempts(2))
        .call(|_| Box::pin(async { Err(HandlerError::retry("too heavy")) }));
    let beside = deciding("healthy", &history, Arc::new(|_, _| Ok(())));
    postbox::set_payload_limit(16 * 1024 * 1024);
    let heavy =
        (0..7_u8).map(|n| Outgoing::bytes("heavy", "a/b", vec![n; 5 * 1024 * 1024]).key(n.to_string()));
    bench.publish(heavy).await;
    let _consumer = bench.start(vec![handler, beside]).await;
    let session = sessions(&bench).await;
    publish_steps(bench.db.pool(), &steps(4, 4)).await;
    let whole =
        "SELECT count(*) FROM postbox.dead_letter WHERE length(payload) = 5 * 1024 * 1024 AND attempts = 2";
    there_are(&bench, 7, whole).await;
    settled(bench.db.pool(), "healthy").await;
    assert_eq!(history.len(), 16);
    assert_eq!(sessions(&bench).await, session, "no session was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_beyond_every_clock_are_only_long() {
    let bench = bench().await;
    let history = History::default();
    let handler = deciding(
        GROUP,
        &history,
        Arc::new(|step, _| match step.n {
            0 => Err(HandlerError::retry_in(Duration::MAX, "never")),
            1 => Err(HandlerError::postpone(Duration::MAX, "never")),
            _ => Ok(()),
        }),
    );
    let forever = deciding(
        "forever",
        &History::default(),
        Arc::new(|_, _| Err(HandlerError::retry("no"))),
    )
    .retry(Retry::exponential(Duration::MAX, Duration::MAX));
    let _consumer = bench.start(vec![handler, forever]).await;
    publish_steps(bench.db.pool(), &(0..20).map(|n| step(n, n)).collect::<Vec<_>>()).await;
    history.has(18).await;
    there_are(
        &bench,
        21,
        "SELECT count(*) FROM postbox.redelivery WHERE due_at > now() + interval '1 year'",
    )
    .await;
    publish_steps(bench.db.pool(), &[step("late", 20)]).await;
    history.has(19).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_may_have_any_name() {
    let bench = bench().await;
    let history = History::default();
    let handler = deciding(
        GROUP,
        &history,
        Arc::new(|_, attempt| match attempt {
            1 => Err(HandlerError::retry("once")),
            _ => Ok(()),
        }),
    );
    let consumer = bench
        .consumer(vec![handler])
        .name(format!("a\0b{}", "x".repeat(1_000_000)));
    let _consumer: ConsumerHandle = consumer.start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(3, 2)).await;
    history.has(6).await;
    there_are(
        &bench,
        1,
        "SELECT count(*) FROM postbox.consumer WHERE starts_with(name, 'a\\0bx') AND length(name) < 300",
    )
    .await;
}

// ------------------------------------------------------------------------------------------------------------- undecodable

#[derive(Debug, Deserialize)]
struct Order {
    n: i64,
}

type Seen = Arc<AtomicU64>;

#[handler(group = "typed")]
async fn typed(_: Step, State(seen): State<Seen>) {
    seen.fetch_add(1, Ordering::SeqCst);
}

#[handler(group = "json", topic = "steps")]
async fn json(Json(order): Json<Order>, State(seen): State<Seen>) {
    seen.fetch_add(order.n.signum().unsigned_abs(), Ordering::SeqCst);
}

#[handler(group = "batches", batch = 50, batch_wait = "200ms")]
async fn batches(steps: Batch<Step>, State(seen): State<Seen>) {
    seen.fetch_add(steps.len() as u64, Ordering::SeqCst);
}

#[handler(
    group = "patient",
    undecodable = "retry",
    retry(backoff = "fixed(50ms)", max_attempts = 3)
)]
async fn patient(_: Step, State(seen): State<Seen>) {
    seen.fetch_add(1, Ordering::SeqCst);
}

#[handler(
    group = "patient_batches",
    batch = 50,
    undecodable = "retry",
    retry(backoff = "fixed(50ms)", max_attempts = 3)
)]
async fn patient_batches(steps: Batch<Step>, State(seen): State<Seen>) {
    seen.fetch_add(steps.len() as u64, Ordering::SeqCst);
}

/// Good ones, and between them some that are no step: of the same keys, first, in the middle and last.
async fn publish_mixed(bench: &Bench) {
    let mixed = (0..60_i64).map(|n| {
        let key = (n % 4).to_string();
        let bad = n % 10 == 3 || n < 2;
        let payload = match bad {
            // serde's own message holds U+0000.
            true => serde_json::json!({ "key": key, "n": "bad\0value" }),
            false => serde_json::json!({ "key": key, "n": n + 1 }),
        };
        Outgoing::json("steps", &payload).message_type("step").key(key)
    });
    bench.publish(mixed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undecodable_payload_is_a_dead_letter_at_once_and_its_key_goes_on() {
    let handlers = [
        (handlers![typed], "typed"),
        (handlers![json], "json"),
        (handlers![batches], "batches"),
    ];
    for (handlers, group) in handlers {
        let bench = bench().await;
        let seen = Seen::default();
        publish_mixed(&bench).await;
        let consumer = bench
            .consumer(handlers)
            .state(seen.clone())
            .start()
            .await
            .unwrap();
        settled(bench.db.pool(), group).await;
        assert_eq!(
            seen.load(Ordering::SeqCst),
            52,
            "{group}: the others are handled once"
        );
        let letters = letters(&bench).await;
        assert_eq!(letters.len(), 8, "{group}");
        for (reason, errors, attempts) in &letters {
            assert!(
                reason.starts_with("undecodable, so no further attempt can help: "),
                "{group}: {reason}"
            );
            assert!(reason.contains("expected i64"), "{group}: {reason}");
            assert_eq!((*attempts, errors.len()), (1, 1), "{group}");
        }
        assert!(!consumer.stats()[0].breaker_open);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undecodable_payload_is_retried_if_its_handler_says_so() {
    let handlers = [
        (handlers![patient], "patient"),
        (handlers![patient_batches], "patient_batches"),
    ];
    for (handlers, group) in handlers {
        let bench = bench().await;
        let seen = Seen::default();
        publish_mixed(&bench).await;
        let _consumer = bench
            .consumer(handlers)
            .state(seen.clone())
            .start()
            .await
            .unwrap();
        settled(bench.db.pool(), group).await;
        assert_eq!(
            seen.load(Ordering::SeqCst),
            52,
            "{group}: the others are handled once"
        );
        let letters = letters(&bench).await;
        assert_eq!(letters.len(), 8, "{group}");
        for (reason, _, attempts) in &letters {
            assert!(reason.starts_with("failed 3 times: "), "{group}: {reason}");
            assert_eq!(*attempts, 3, "{group}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn by_hand_too_an_option_says_what_becomes_of_the_undecodable() {
    let bench = bench().await;
    let history = History::default();
    let handler = deciding(
        GROUP,
        &history,
        Arc::new(|step, _| match step.n {
            0 => Err(HandlerError::undecodable("an extractor of one's own")),
            _ => Ok(()),
        }),
    );
    let _consumer = bench
        .start(vec![
            handler.clone().undecodable(Undecodable::Retry).group("retries"),
            handler,
        ])
        .await;
    publish_steps(bench.db.pool(), &steps(1, 3)).await;
    settled(bench.db.pool(), GROUP).await;
    settled(bench.db.pool(), "retries").await;
    let attempts: Vec<i32> = letters(&bench).await.iter().map(|letter| letter.2).collect();
    assert!(attempts == [1, 3] || attempts == [3, 1], "{attempts:?}");
    assert_eq!(history.len(), 4);
}
