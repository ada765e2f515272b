//! What handlers take and what stands around them: dead letters as arguments and as messages, layers, extractors of one's own, and options in any order.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{Bench, PATIENCE, Step, bench, publish_steps, settled, step, steps};
use postbox::Outgoing;
use postbox_consumer::{
    Consumer, DeadLetter, Delivery, Error, Extract, HandlerDefinition, HandlerError, Invocation, Json,
    Missed, Needs, Position, Retry, State, Tx, handler, handlers,
};
use postbox_dispatcher::subscriptions::{self, Change};
use postbox_dispatcher::{dead_letters, doctor};
use postbox_testkit::eventually;

const TABLE: &str = "CREATE TABLE told (n bigint NOT NULL, what text NOT NULL)";

async fn told(bench: &Bench) -> Vec<(i64, String)> {
    sqlx::query_as("SELECT n, what FROM told ORDER BY n, what")
        .fetch_all(bench.db.pool())
        .await
        .unwrap()
}

async fn is_told(bench: &Bench, expected: &[(i64, &str)]) {
    let expected: Vec<(i64, String)> = expected
        .iter()
        .map(|(n, what)| (*n, (*what).to_owned()))
        .collect();
    eventually(PATIENCE, || async {
        let found = told(bench).await;
        if found == expected {
            Ok(())
        } else {
            Err(format!("{found:?}, given up: {:?}", reasons(bench).await))
        }
    })
    .await;
}

async fn reasons(bench: &Bench) -> Vec<String> {
    sqlx::query_scalar("SELECT left(reason, 200) FROM postbox.dead_letter ORDER BY id")
        .fetch_all(bench.db.pool())
        .await
        .unwrap()
}

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<String>>>);

impl Seen {
    fn note(&self, what: impl Into<String>) {
        self.0.lock().unwrap().push(what.into());
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

// ------------------------------------------------------------------------------------------------------------- on_dead_letter

#[handler(group = "psp", retry(max_attempts = 2, backoff = "fixed(10ms)"), on_dead_letter = note_it)]
async fn charge(step: Step) -> Result<(), HandlerError> {
    match step.n % 3 {
        0 => Err(HandlerError::dead_letter("no such card")),
        _ => Ok(()),
    }
}

async fn note_it(
    step: Step,
    letter: DeadLetter,
    State(seen): State<Seen>,
    mut tx: Tx,
) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO told VALUES ($1, $2)")
        .bind(step.n)
        .bind(&letter.reason)
        .execute(&mut *tx)
        .await?;
    seen.note(format!("{} of {}", step.n, letter.group));
    // What it wrote is taken back.
    match step.n {
        3 => Err(HandlerError::retry("cannot be told")),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_told_of_dead_letters_takes_what_handlers_take_and_its_transaction_commits_with_its_ok() {
    let bench = bench().await;
    bench.sql(TABLE).await;
    let seen = Seen::default();
    let consumer = Consumer::new(bench.pool())
        .state(seen.clone())
        .handlers(handlers![charge])
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(1, 7)).await;
    settled(bench.db.pool(), "psp").await;
    let why = "the handler gave it up: no such card";
    is_told(&bench, &[(0, why), (6, why)]).await;
    eventually(PATIENCE, || async {
        let mut seen = seen.all();
        seen.sort();
        if seen == ["0 of psp", "3 of psp", "6 of psp"] {
            Ok(())
        } else {
            Err(format!("{seen:?}"))
        }
    })
    .await;
    consumer.shutdown().await.unwrap();
    // A state that only the hook asks for is missed at start.
    let error = Consumer::new(bench.pool())
        .handlers(handlers![charge])
        .start()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::MissingState { .. }), "{error}");
}

// ------------------------------------------------------------------------------------------------------------- dead_letters_of

#[handler(group = "support", dead_letters_of = "psp")]
async fn call_customer(
    step: Step,
    letter: DeadLetter,
    delivery: Delivery,
    mut tx: Tx,
) -> Result<(), HandlerError> {
    assert_eq!(&*letter.topic, "steps");
    assert_eq!(&*letter.group, "psp");
    assert_eq!(letter.headers.get("trace"), None);
    assert!(
        !letter
            .headers
            .iter()
            .any(|(name, _)| name.starts_with("postbox-dead"))
    );
    assert_ne!(letter.id, delivery.id);
    assert_eq!(letter.key.as_deref(), Some(&*step.key));
    // Fails once, behind what it wrote.
    sqlx::query("INSERT INTO told VALUES ($1, $2)")
        .bind(step.n)
        .bind(format!("{} after {}", letter.reason, letter.attempts))
        .execute(&mut *tx)
        .await?;
    match delivery.attempt {
        1 => Err(HandlerError::retry_in(Duration::from_millis(10), "busy")),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_of_a_group_come_as_messages_and_are_handled_exactly_once() {
    let bench = bench().await;
    bench.sql(TABLE).await;
    let both = || {
        Consumer::new(bench.pool())
            .state(Seen::default())
            .handlers(handlers![charge_quietly, call_customer])
    };
    // What is given up before there is such a handler is not published.
    let consumer = Consumer::new(bench.pool())
        .handlers(handlers![charge_quietly])
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &[step("early", 0)]).await;
    settled(bench.db.pool(), "psp").await;
    consumer.shutdown().await.unwrap();

    let consumer = both().start().await.unwrap();
    publish_steps(bench.db.pool(), &steps(1, 7)).await;
    settled(bench.db.pool(), "psp").await;
    let why = "the handler gave it up: no such card after 1";
    is_told(&bench, &[(0, why), (3, why), (6, why)]).await;
    consumer.shutdown().await.unwrap();
    let consumer = both().start().await.unwrap();
    // Redriven, and given up again: that is another dead letter.
    let letters: Vec<i64> =
        sqlx::query_scalar("SELECT id FROM postbox.dead_letter WHERE key <> 'early' ORDER BY id LIMIT 1")
            .fetch_all(bench.db.pool())
            .await
            .unwrap();
    assert_eq!(
        dead_letters::redrive(bench.db.pool(), &letters, None)
            .await
            .unwrap(),
        1
    );
    is_told(&bench, &[(0, why), (0, why), (3, why), (6, why)]).await;
    settled(bench.db.pool(), "support").await;
    assert_eq!(bench.number("SELECT count(*) FROM postbox.dead_letter").await, 4);
    consumer.shutdown().await.unwrap();
}

#[handler(group = "psp", retry(max_attempts = 2, backoff = "fixed(10ms)"))]
async fn charge_quietly(step: Step) -> Result<(), HandlerError> {
    match step.n % 3 {
        0 => Err(HandlerError::dead_letter("no such card")),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_handler_of_dead_letters_gives_up_is_not_published_again() {
    let bench = bench().await;
    let gives_up = |group: &str, of: Option<&str>| {
        let handler = HandlerDefinition::new("gives_up")
            .group(group)
            .argument::<Json<serde_json::Value>>()
            .call(|_| Box::pin(async { Err(HandlerError::dead_letter("never")) }));
        match of {
            Some(of) => handler.dead_letters_of(of),
            None => handler.topic("steps"),
        }
    };
    let consumer = bench
        .start(vec![
            gives_up("a", None),
            // Of each other, and of itself.
            gives_up("a", Some("a")),
            gives_up("b", Some("a")),
        ])
        .await;
    publish_steps(bench.db.pool(), &steps(1, 2)).await;
    eventually(PATIENCE, || async {
        match bench.number("SELECT count(*) FROM postbox.dead_letter").await {
            6 => Ok(()),
            n => Err(format!("{n} dead letters")),
        }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(
        bench.number("SELECT count(*) FROM postbox.outbox").await,
        4,
        "two, and their copies"
    );
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_with_headers_at_the_limit_still_comes() {
    let bench = bench().await;
    let seen = Seen::default();
    let note = seen.clone();
    let handler = HandlerDefinition::new("notes")
        .group("support")
        .dead_letters_of("psp")
        .argument::<DeadLetter>()
        .call(move |mut invocation| {
            let note = note.clone();
            Box::pin(async move {
                let letter = DeadLetter::extract(&mut invocation).await?;
                note.note(format!(
                    "{} {}",
                    letter.reason.len() > 400,
                    letter.headers.iter().count()
                ));
                Ok(())
            })
        });
    let gives_up = HandlerDefinition::new("gives_up")
        .group("psp")
        .topic("steps")
        .call(|_| Box::pin(async { Err(HandlerError::dead_letter("x".repeat(5_000_000))) }));
    let consumer = bench.start(vec![handler, gives_up]).await;
    let long = Outgoing::json("steps", &1).header("long", "x".repeat(16_000));
    let short = Outgoing::json("steps", &1).header("long", "x".repeat(12_000));
    let mut tx = bench.db.pool().begin().await.unwrap();
    for message in [long, short] {
        postbox::Publish::publish(&mut tx, message).await.unwrap();
    }
    tx.commit().await.unwrap();
    eventually(PATIENCE, || async {
        let mut all = seen.all();
        all.sort();
        if all == ["true 0", "true 1"] {
            Ok(())
        } else {
            Err(format!("{all:?}, given up: {:?}", reasons(&bench).await))
        }
    })
    .await;
    assert_eq!(bench.number("SELECT count(*) FROM postbox.reject").await, 0);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_a_group_whose_dead_letters_are_wanted_and_which_there_is_not() {
    let bench = bench().await;
    let handler = |group: &str| {
        HandlerDefinition::new("h")
            .group(group)
            .call(|_| Box::pin(async { Ok(()) }))
    };
    let consumer = bench
        .start(vec![
            handler("payments").topic("steps"),
            handler("support").dead_letters_of("paymets"),
            handler("reports").dead_letters_of("payments"),
        ])
        .await;
    let findings = doctor::examine(bench.db.pool()).await.unwrap();
    let found: Vec<_> = findings
        .iter()
        .filter(|finding| finding.name == "no-such-group")
        .collect();
    assert_eq!(found.len(), 1, "{findings:?}");
    assert!(found[0].what.contains("there is a group payments"), "{found:?}");
    assert!(
        findings.iter().all(|finding| !finding.what.contains("dead/")),
        "{findings:?}"
    );
    consumer.shutdown().await.unwrap();
}

// ------------------------------------------------------------------------------------------------------------- layers

#[derive(Clone)]
struct Noting(Seen, &'static str);

#[derive(Clone)]
struct NotingService<S>(S, Seen, &'static str);

impl<S> tower::Layer<S> for Noting {
    type Service = NotingService<S>;

    fn layer(&self, inner: S) -> NotingService<S> {
        NotingService(inner, self.0.clone(), self.1)
    }
}

impl<S: tower::Service<Invocation>> tower::Service<Invocation> for NotingService<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, invocation: Invocation) -> S::Future {
        self.1.note(format!(
            "{} {} {}",
            self.2,
            invocation.group(),
            invocation.attempt()
        ));
        self.0.call(invocation)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_stand_around_every_handler_and_what_it_decides_goes_through_them() {
    let bench = bench().await;
    let seen = Seen::default();
    let inside = seen.clone();
    let decides = HandlerDefinition::new("decides")
        .group("decides")
        .argument::<Step>()
        .call(move |mut invocation| {
            let inside = inside.clone();
            Box::pin(async move {
                let step = Step::extract(&mut invocation).await?;
                inside.note(format!("handler {}", step.n));
                Err(HandlerError::dead_letter("by its own word"))
            })
        });
    let consumer = bench
        .consumer(vec![decides])
        .layer(Noting(seen.clone(), "inner"))
        // It boxes errors.
        .layer(tower::timeout::TimeoutLayer::new(Duration::from_secs(60)))
        .layer(Noting(seen.clone(), "outer"))
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(1, 1)).await;
    eventually(PATIENCE, || async {
        match bench
            .number("SELECT count(*) FROM postbox.dead_letter WHERE reason LIKE '%by its own word'")
            .await
        {
            1 => Ok(()),
            n => Err(format!("{n}")),
        }
    })
    .await;
    assert_eq!(seen.all(), ["outer decides 1", "inner decides 1", "handler 0"]);
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_a_layer_is_the_handlers_and_is_retried() {
    let bench = bench().await;
    let runs = Arc::new(AtomicU32::new(0));
    let count = runs.clone();
    let hangs_once = HandlerDefinition::new("hangs_once")
        .group("hangs")
        .topic("steps")
        .retry(Retry::fixed(Duration::from_millis(10)))
        .call(move |_| {
            let first = count.fetch_add(1, Ordering::SeqCst) == 0;
            Box::pin(async move {
                if first {
                    std::future::pending::<()>().await;
                }
                Ok(())
            })
        });
    let consumer = bench
        .consumer(vec![hangs_once])
        .layer(tower::timeout::TimeoutLayer::new(Duration::from_millis(50)))
        .start()
        .await
        .unwrap();
    publish_steps(bench.db.pool(), &steps(1, 1)).await;
    settled(bench.db.pool(), "hangs").await;
    assert!(runs.load(Ordering::SeqCst) >= 2);
    consumer.shutdown().await.unwrap();
}

// ------------------------------------------------------------------------------------------------------------- extractors

struct Tenant(String);

impl Extract for Tenant {
    const NEEDS: Needs = State::<Seen>::NEEDS.and(Delivery::NEEDS);

    async fn extract(invocation: &mut Invocation) -> Result<Self, HandlerError> {
        let State(seen) = State::<Seen>::extract(invocation).await?;
        let delivery = Delivery::extract(invocation).await?;
        let tenant = delivery
            .headers
            .get("tenant")
            .ok_or_else(|| HandlerError::undecodable("no tenant"))?;
        seen.note(tenant);
        Ok(Self(tenant.to_owned()))
    }
}

#[handler(group = "tenants", topic = "steps")]
async fn of_tenant(tenant: Tenant) {
    assert_eq!(tenant.0, "acme");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extractor_of_ones_own_says_what_it_needs() {
    let bench = bench().await;
    let error = Consumer::new(bench.pool())
        .handlers(handlers![of_tenant])
        .start()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::MissingState { .. }), "{error}");
    let seen = Seen::default();
    let consumer = Consumer::new(bench.pool())
        .state(seen.clone())
        .handlers(handlers![of_tenant])
        .start()
        .await
        .unwrap();
    let mut tx = bench.db.pool().begin().await.unwrap();
    for message in [
        Outgoing::json("steps", &1).header("tenant", "acme"),
        Outgoing::json("steps", &1),
    ] {
        postbox::Publish::publish(&mut tx, message).await.unwrap();
    }
    tx.commit().await.unwrap();
    settled(bench.db.pool(), "tenants").await;
    assert_eq!(seen.all(), ["acme"]);
    assert_eq!(bench.number("SELECT count(*) FROM postbox.dead_letter").await, 1);
    consumer.shutdown().await.unwrap();
}

// ------------------------------------------------------------------------------------------------------------- options

#[tokio::test(flavor = "multi_thread")]
async fn options_hold_in_any_order_and_what_cannot_be_is_refused_by_name() {
    let bench = bench().await;
    let define = || HandlerDefinition::new("h").call(|_| Box::pin(async { Ok(()) }));
    // Missed before cron, and the message's options.
    let consumer = bench
        .start(vec![
            define()
                .missed(Missed::All)
                .cron("h", "0 0 1 1 *", "UTC")
                .group("g"),
        ])
        .await;
    let missed: String = sqlx::query_scalar("SELECT missed FROM postbox.cron WHERE name = 'h'")
        .fetch_one(bench.db.pool())
        .await
        .unwrap();
    assert_eq!(missed, "all");
    consumer.shutdown().await.unwrap();
    // A topic said before the argument that has one holds, too.
    let elsewhere = define().topic("elsewhere").argument::<Step>().group("g");
    let behind = define().argument::<Step>().topic("elsewhere").group("g2");
    let consumer = bench.start(vec![elsewhere, behind]).await;
    assert_eq!(
        bench
            .number("SELECT count(*) FROM postbox.subscription WHERE topic = 'elsewhere'")
            .await,
        2
    );
    consumer.shutdown().await.unwrap();

    let refused = [
        (
            define().group("g").topic("t").dead_letters_of("x"),
            "dead_letters_of",
        ),
        (define().topic("t").cron("h", "@daily", "UTC"), "cron"),
        (define().group("g").topic("t").missed(Missed::All), "missed"),
        (
            define().group("g").topic("t").argument::<DeadLetter>(),
            "DeadLetter",
        ),
        (define().group("g").dead_letters_of("x".repeat(255)), "topic"),
    ];
    for (handler, says) in refused {
        let error = bench
            .consumer(vec![handler])
            .start()
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
    let consumer = || bench.consumer(vec![define().group("g").topic("t").start(Position::Latest)]);
    let out_of_range = [
        (
            consumer().lease(Duration::from_secs(1)),
            "lease of the consumer is 1s",
        ),
        (consumer().lease(Duration::MAX), "lease"),
        (consumer().window(0), "window of the consumer is 0"),
        (consumer().max_failing(0), "max_failing of the consumer is 0"),
    ];
    for (consumer, says) in out_of_range {
        let error = consumer.start().await.unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
    let tick = postbox_dispatcher::Dispatcher::new(bench.pool())
        .tick(Duration::ZERO)
        .start()
        .await;
    assert!(
        tick.unwrap_err()
            .to_string()
            .contains("tick of the dispatcher is 0ns")
    );
    let window = Outgoing::json("t", &1).dedup_window(Duration::from_secs(1));
    let mut tx = bench.db.pool().begin().await.unwrap();
    let error = postbox::Publish::publish(&mut tx, window)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("dedup_key"), "{error}");
    let first = Outgoing::json("t", &1)
        .dedup_window(Duration::from_secs(7))
        .dedup_key("k");
    postbox::Publish::publish(&mut tx, first).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(
        bench
            .number(
                "SELECT count(*) FROM postbox.dedup WHERE expires_at < postbox.clock() + interval '8 seconds'"
            )
            .await,
        1
    );
}

// ------------------------------------------------------------------------------------------------------------- pauses

#[tokio::test(flavor = "multi_thread")]
async fn a_group_can_be_paused_before_it_exists() {
    let bench = bench().await;
    let change = |group: &'static str, topic: Option<&'static str>, paused: bool| {
        let pool = bench.pool();
        async move {
            subscriptions::change(&pool, group, topic, &Change::Paused(paused))
                .await
                .unwrap()
        }
    };
    assert_eq!(change("mail", None, true).await, 0);
    let findings = doctor::examine(bench.db.pool()).await.unwrap();
    assert!(
        findings.iter().any(|finding| finding.name == "paused-ahead"),
        "{findings:?}"
    );
    let runs = Arc::new(AtomicU32::new(0));
    let count = runs.clone();
    let handler = move |topic: &str| {
        let count = count.clone();
        HandlerDefinition::new("h")
            .group("mail")
            .topic(topic)
            .call(move |_| {
                count.fetch_add(1, Ordering::SeqCst);
                Box::pin(async { Ok(()) })
            })
    };
    let consumer = bench.start(vec![handler("steps")]).await;
    publish_steps(bench.db.pool(), &steps(1, 3)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(runs.load(Ordering::SeqCst), 0);
    assert_eq!(
        bench
            .number("SELECT count(*) FROM postbox.subscription WHERE paused")
            .await,
        1
    );
    consumer.shutdown().await.unwrap();
    // A paused group is paused on a topic that comes later; one that goes on is not.
    let consumer = bench.start(vec![handler("steps"), handler("later")]).await;
    assert_eq!(
        bench
            .number("SELECT count(*) FROM postbox.subscription WHERE paused")
            .await,
        2
    );
    assert_eq!(change("mail", None, false).await, 2);
    eventually(PATIENCE, || async {
        match runs.load(Ordering::SeqCst) {
            3 => Ok(()),
            runs => Err(format!("{runs} runs")),
        }
    })
    .await;
    let findings = doctor::examine(bench.db.pool()).await.unwrap();
    assert!(
        findings.iter().all(|finding| finding.name != "paused-ahead"),
        "{findings:?}"
    );
    consumer.shutdown().await.unwrap();
}
