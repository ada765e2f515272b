//! Types that an instance does not handle: rolling deploys, services that share a group name, types that nobody handles, names that are mistyped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::{Outgoing, Publish};
use postbox_consumer::{
    Batch, Consumer, ConsumerHandle, Delivery, HandlerDefinition, HandlerError, Json, State, Tx, UnknownType,
    handler, handlers,
};
use postbox_dispatcher::{dead_letters, doctor, messages, status, subscriptions};
use postbox_testkit::eventually;

use crate::support::{Bench, PATIENCE, bench, settled};

/// What was handled: by which instance, of which type, with which key, and which of the messages.
type Entry = (&'static str, String, Option<String>, i64);

#[derive(Clone, Default)]
struct Book(Arc<Mutex<Vec<Entry>>>);

impl Book {
    fn by(&self, instance: &'static str) -> Page {
        Page(self.clone(), instance)
    }

    fn all(&self) -> Vec<Entry> {
        self.0.lock().unwrap().clone()
    }

    /// The numbers of a key in the order in which they were handled.
    fn of(&self, key: &str) -> Vec<i64> {
        let all = self.all().into_iter();
        all.filter(|(_, _, of, _)| of.as_deref() == Some(key))
            .map(|(.., n)| n)
            .collect()
    }

    async fn has(&self, count: usize) {
        eventually(PATIENCE, || async {
            let all = self.all();
            match all.len() == count {
                true => Ok(()),
                false => Err(format!("{} of {count}: {all:?}", all.len())),
            }
        })
        .await;
    }

    /// Each of them once, by an instance that handles its type.
    fn assert_once(&self, count: usize, able: &[(&str, &[&str])]) {
        let all = self.all();
        let numbers: BTreeSet<i64> = all.iter().map(|(.., n)| *n).collect();
        assert_eq!((all.len(), numbers.len()), (count, count), "{all:?}");
        for (instance, message_type, ..) in &all {
            let able = able.iter().find(|(of, _)| of == message_type).unwrap().1;
            assert!(able.contains(instance), "{message_type} by {instance}");
        }
    }
}

/// As one instance writes in it.
#[derive(Clone)]
struct Page(Book, &'static str);

impl Page {
    fn note(&self, delivery: &Delivery, n: i64) {
        let message_type = delivery.message_type.as_deref().unwrap_or("").to_owned();
        let key = delivery.key.as_deref().map(str::to_owned);
        self.0.0.lock().unwrap().push((self.1, message_type, key, n));
    }
}

#[handler(group = "shop", topic = "orders", type = "placed")]
async fn placed(Json(n): Json<i64>, delivery: Delivery, State(page): State<Page>) {
    tokio::time::sleep(Duration::from_millis(1)).await;
    page.note(&delivery, n);
}

#[handler(group = "shop", topic = "orders", type = "refunded")]
async fn refunded(Json(n): Json<i64>, delivery: Delivery, State(page): State<Page>) {
    page.note(&delivery, n);
}

/// Both, once.
#[handler(group = "shop", topic = "orders", type = "refunded")]
async fn refunded_in_tx(
    Json(n): Json<i64>,
    delivery: Delivery,
    State(page): State<Page>,
    mut tx: Tx,
) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO effect (n) VALUES ($1)")
        .bind(n)
        .execute(&mut *tx)
        .await?;
    page.note(&delivery, n);
    Ok(())
}

fn old(bench: &Bench, book: &Book) -> Consumer {
    bench
        .consumer(handlers![placed])
        .state(book.by("old"))
        .name("old")
}

fn new(bench: &Bench, book: &Book) -> Consumer {
    bench
        .consumer(handlers![placed, refunded])
        .state(book.by("new"))
        .name("new")
}

/// Handles nothing but refunds.
fn refunds(bench: &Bench, book: &Book) -> Consumer {
    bench
        .consumer(handlers![refunded])
        .state(book.by("refunds"))
        .name("refunds")
}

async fn start(consumer: Consumer) -> ConsumerHandle {
    consumer.start().await.expect("the consumer starts")
}

fn message(message_type: &str, key: &str, n: i64) -> Outgoing {
    let message = Outgoing::json("orders", &n);
    let message = match message_type {
        "" => message,
        name => message.message_type(name.to_owned()),
    };
    match key {
        "" => message,
        key => message.key(key),
    }
}

async fn publish_each(bench: &Bench, messages: impl IntoIterator<Item = Outgoing>) {
    for message in messages {
        let mut tx = bench.pool().begin().await.unwrap();
        tx.publish(message).await.unwrap();
        tx.commit().await.unwrap();
    }
}

async fn of_shop(bench: &Bench) -> status::SubscriptionStatus {
    let subscriptions = status::subscriptions(bench.db.pool()).await.unwrap();
    subscriptions
        .into_iter()
        .find(|subscription| subscription.group_name == "shop")
        .expect("the subscription")
}

async fn until(
    bench: &Bench,
    is: impl Fn(&status::SubscriptionStatus) -> bool,
) -> status::SubscriptionStatus {
    eventually(PATIENCE, || async {
        let shop = of_shop(bench).await;
        if is(&shop) {
            Ok(())
        } else {
            Err(format!("{shop:?}"))
        }
    })
    .await;
    of_shop(bench).await
}

async fn finding(bench: &Bench, name: &str) -> Option<String> {
    let findings = doctor::examine(bench.db.pool()).await.unwrap();
    let found = findings.into_iter().find(|finding| finding.name == name)?;
    Some(format!("{}; {}", found.what, found.hint))
}

const ABLE: &[(&str, &[&str])] = &[("placed", &["old", "new"]), ("refunded", &["new", "refunds"])];

#[tokio::test(flavor = "multi_thread")]
async fn in_a_rolling_deploy_new_types_go_to_the_instances_that_handle_them() {
    let bench = bench().await;
    let book = Book::default();
    let first = start(old(&bench, &book)).await;
    let _second = start(old(&bench, &book)).await;
    bench
        .publish((0..40).map(|n| message("placed", &format!("k{}", n % 10), n)))
        .await;
    let third = start(new(&bench, &book)).await;
    // Of every second key each fourth is new, and some have no key.
    let kinds = ["placed", "refunded", "placed", "placed"];
    publish_each(
        &bench,
        (40..200).map(|n| {
            let key = if n % 5 == 4 {
                String::new()
            } else {
                format!("k{}", n % 10)
            };
            message(kinds[(n / 10 % 4) as usize], &key, n)
        }),
    )
    .await;
    book.has(200).await;
    book.assert_once(200, ABLE);
    for key in 0..10 {
        let numbers = book.of(&format!("k{key}"));
        assert!(numbers.is_sorted(), "{numbers:?}");
    }
    settled(bench.db.pool(), "shop").await;
    // The other half of the deploy, and back.
    first.shutdown().await.unwrap();
    let fourth = start(new(&bench, &book)).await;
    bench
        .publish((200..240).map(|n| message("refunded", &format!("k{}", n % 10), n)))
        .await;
    book.has(240).await;
    third.shutdown().await.unwrap();
    fourth.shutdown().await.unwrap();
    bench
        .publish((240..260).map(|n| message("placed", &format!("k{}", n % 10), n)))
        .await;
    book.has(260).await;
    book.assert_once(260, ABLE);
    settled(bench.db.pool(), "shop").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_that_share_a_group_name_each_handle_what_is_theirs() {
    let bench = bench().await;
    let book = Book::default();
    let _orders = start(old(&bench, &book)).await;
    let _refunds = start(refunds(&bench, &book)).await;
    // One key that goes to and fro, others of both kinds, and without keys.
    let messages = (0..120).map(|n| match n % 3 {
        0 => message(["placed", "refunded"][(n / 3 % 2) as usize], "both", n),
        1 => message(
            ["placed", "refunded"][(n / 30 % 2) as usize],
            &format!("k{}", n % 10),
            n,
        ),
        _ => message(["refunded", "placed"][(n / 3 % 2) as usize], "", n),
    });
    bench.publish(messages).await;
    // Forty turns of a key between two services.
    eventually(4 * PATIENCE, || async {
        let count = book.all().len();
        if count == 120 {
            Ok(())
        } else {
            Err(format!("{count} of 120"))
        }
    })
    .await;
    book.assert_once(120, &[("placed", &["old"]), ("refunded", &["refunds"])]);
    assert!(book.of("both").is_sorted(), "{:?}", book.of("both"));
    settled(bench.db.pool(), "shop").await;
    let found = finding(&bench, "divided-group").await.expect("a finding");
    assert!(found.contains("old") && found.contains("refunds"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_handles_waits_with_its_key_and_is_handled_by_who_joins() {
    let bench = bench().await;
    let book = Book::default();
    let _old = start(old(&bench, &book)).await;
    bench
        .publish([
            message("placed", "a", 0),
            message("refunded", "a", 1),
            message("placed", "a", 2),
            message("refunded", "", 3),
            message("placed", "", 4),
            message("refunded", "b", 5),
            message("placed", "c", 6),
        ])
        .await;
    book.has(3).await;
    let shop = until(&bench, |shop| shop.waiting == 3).await;
    assert_eq!(shop.waiting_types, ["refunded"]);
    assert_eq!(shop.types, ["", "placed"], "an only handler takes untyped ones");
    let found = finding(&bench, "unhandled-type").await.expect("a finding");
    assert!(
        found.contains("refunded") && found.contains("shop on orders"),
        "{found}"
    );
    let mut states = Vec::new();
    let ids: Vec<uuid::Uuid> = sqlx::query_scalar("SELECT id FROM postbox.outbox ORDER BY seq LIMIT 4")
        .fetch_all(bench.db.pool())
        .await
        .unwrap();
    for id in ids {
        let shown = messages::show(bench.db.pool(), id)
            .await
            .unwrap()
            .expect("it is there");
        states.push(shown.groups[0].state.to_string());
    }
    assert_eq!(states, ["delivered", "unhandled", "parked", "unhandled"]);
    // Other keys go on, and the same ones wait.
    bench
        .publish([message("placed", "a", 7), message("placed", "d", 8)])
        .await;
    book.has(4).await;
    assert_eq!(book.of("a"), [0]);

    let _new = start(new(&bench, &book)).await;
    book.has(9).await;
    assert_eq!(book.of("a"), [0, 1, 2, 7]);
    book.assert_once(9, ABLE);
    settled(bench.db.pool(), "shop").await;
    let shop = of_shop(&bench).await;
    assert_eq!((shop.waiting, shop.waiting_types.len(), shop.unknown), (0, 0, 0));
    assert_eq!(finding(&bench, "unhandled-type").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn untyped_messages_are_a_type_like_any_other() {
    let bench = bench().await;
    let book = Book::default();
    let _new = start(new(&bench, &book)).await;
    bench
        .publish([message("", "a", 0), message("placed", "a", 1), message("", "", 2)])
        .await;
    let shop = until(&bench, |shop| shop.waiting == 2).await;
    assert_eq!(shop.waiting_types, [""]);
    assert!(
        finding(&bench, "unhandled-type")
            .await
            .unwrap()
            .contains("(untyped)")
    );
    // An only handler takes them.
    let _old = start(old(&bench, &book)).await;
    book.has(3).await;
    book.assert_once(3, &[("", &["old"]), ("placed", &["old", "new"])]);
    assert_eq!(book.of("a"), [0, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_holds_only_for_what_no_live_instance_handles() {
    let bench = bench().await;
    let book = Book::default();
    let old = start(old(&bench, &book).unknown_types(UnknownType::Settle)).await;
    let new = start(new(&bench, &book).unknown_types(UnknownType::Settle)).await;
    bench
        .publish((0..60).map(|n| message("refunded", &format!("k{}", n % 20), n)))
        .await;
    book.has(60).await;
    book.assert_once(60, &[("refunded", &["new"])]);
    settled(bench.db.pool(), "shop").await;
    assert_eq!(old.stats()[0].unknown + new.stats()[0].unknown, 0);

    new.shutdown().await.unwrap();
    let some = (60..90).map(|n| message("refunded", if n % 2 == 0 { "" } else { "k" }, n));
    bench.publish(some.chain([message("placed", "k", 90)])).await;
    book.has(61).await;
    settled(bench.db.pool(), "shop").await;
    assert_eq!(old.stats()[0].unknown, 30);
    // With its next heartbeat.
    let shop = until(&bench, |shop| shop.unknown == 30).await;
    assert_eq!(
        shop.unknown_types.0,
        BTreeMap::from([("refunded".to_owned(), 30)])
    );
    let found = finding(&bench, "unknown-type-settled").await.expect("a finding");
    assert!(found.contains("30 of type refunded"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_handles_fails_or_is_a_dead_letter_where_that_is_said() {
    for policy in [UnknownType::Fail, UnknownType::DeadLetter] {
        let bench = bench().await;
        let book = Book::default();
        let old = start(old(&bench, &book).unknown_types(policy)).await;
        bench
            .publish((0..40).map(|n| message("refunded", if n % 2 == 0 { "" } else { "k" }, n)))
            .await;
        bench
            .publish([message("placed", "k", 40), message("placed", "other", 41)])
            .await;
        if policy == UnknownType::DeadLetter {
            book.has(2).await;
            settled(bench.db.pool(), "shop").await;
            assert_eq!(of_shop(&bench).await.dead, 40);
            let letters: Vec<i64> = sqlx::query_scalar("SELECT id FROM postbox.dead_letter ORDER BY id")
                .fetch_all(bench.db.pool())
                .await
                .unwrap();
            // To who handles them.
            let _new = start(new(&bench, &book)).await;
            dead_letters::redrive(bench.db.pool(), &letters, None)
                .await
                .unwrap();
            book.has(42).await;
            book.assert_once(42, ABLE);
        } else {
            eventually(PATIENCE, || async {
                let stats = &old.stats()[0];
                if stats.failed >= 10 && book.of("other") == [41] {
                    Ok(())
                } else {
                    Err(format!("{stats:?}"))
                }
            })
            .await;
            assert!(!old.stats()[0].breaker_open, "that says nothing of the handlers");
            assert_eq!(book.of("k"), [0; 0]);
            let _new = start(new(&bench, &book)).await;
            eventually(4 * PATIENCE, || async {
                let count = book.all().len();
                if count == 42 {
                    Ok(())
                } else {
                    Err(format!("{count} of 42"))
                }
            })
            .await;
            book.assert_once(42, ABLE);
            assert!(book.of("k").is_sorted());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_replayed_or_redriven_waits_for_who_handles_it_and_effects_are_there_once_more() {
    let bench = bench().await;
    bench.sql("CREATE TABLE effect (n bigint NOT NULL)").await;
    let book = Book::default();
    let consumer = |book: &Book| {
        bench
            .consumer(handlers![placed, refunded_in_tx])
            .state(book.by("new"))
            .name("new")
    };
    let new = start(consumer(&book)).await;
    bench
        .publish((0..20).map(|n| {
            message(
                ["placed", "refunded"][(n % 2) as usize],
                ["", "k"][(n / 10) as usize],
                n,
            )
        }))
        .await;
    book.has(20).await;
    settled(bench.db.pool(), "shop").await;
    let _old = start(old(&bench, &book)).await;
    new.shutdown().await.unwrap();
    let subscription = subscriptions::find(bench.db.pool(), "shop", "orders")
        .await
        .unwrap();
    let (_, replayed) = subscriptions::replay(bench.db.pool(), subscription, 0, 20, 1000)
        .await
        .unwrap();
    assert_eq!(replayed, 20);
    // Those without a key, and the first of the key.
    book.has(26).await;
    until(&bench, |shop| shop.waiting == 6).await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 10);
    let _new = start(consumer(&book)).await;
    book.has(40).await;
    settled(bench.db.pool(), "shop").await;
    assert_eq!(bench.number("SELECT count(*) FROM effect").await, 20);
    assert_eq!(bench.number("SELECT count(DISTINCT n) FROM effect").await, 10);
    let twice: Vec<i64> = (10..20).chain(10..20).collect();
    assert_eq!(book.of("k"), twice);
}

/// Runs beside the test, and dies with it without a word.
fn start_mortal(consumer: Consumer) -> tokio::runtime::Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.spawn(async move {
        let _handle = consumer.start().await.expect("the consumer starts");
        std::future::pending::<()>().await;
    });
    runtime
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_dies_of_it_or_with_it_leaves_all_to_the_next_that_handles_it() {
    let bench = bench().await;
    bench.sql("CREATE TABLE effect (n bigint NOT NULL)").await;
    let book = Book::default();
    let mut next = 0;
    let mut publish = async |count: i64| {
        let kinds = ["refunded", "placed", "refunded"];
        let messages = (next..next + count)
            .map(|n| message(kinds[(n % 3) as usize], ["a", "b", "", "c"][(n % 4) as usize], n));
        bench.publish(messages).await;
        next += count;
    };
    let consumer = || {
        // A pool of its own: the runtime dies.
        Consumer::new(bench.db.connect_pool(4))
            .handlers(handlers![placed, refunded_in_tx])
            .state(book.by("new"))
            .name("new")
    };
    let _old = start(old(&bench, &book)).await;
    publish(40).await;
    for _ in 0..3 {
        let runtime = start_mortal(consumer());
        publish(40).await;
        let before = book.all().len();
        eventually(PATIENCE, || async {
            if book.all().len() > before + 5 {
                Ok(())
            } else {
                Err("waiting")
            }
        })
        .await;
        runtime.shutdown_background();
    }
    let _new = start(consumer()).await;
    eventually(4 * PATIENCE, || async {
        let numbers: BTreeSet<i64> = book.all().into_iter().map(|(.., n)| n).collect();
        if numbers.len() == 160 {
            Ok(())
        } else {
            Err(format!("{} of 160", numbers.len()))
        }
    })
    .await;
    settled(bench.db.pool(), "shop").await;
    let refunds = (0..160).filter(|n| n % 3 != 1).count() as i64;
    assert_eq!(
        bench.number("SELECT count(*) FROM effect").await,
        refunds,
        "exactly once"
    );
    assert_eq!(
        bench.number("SELECT count(DISTINCT n) FROM effect").await,
        refunds
    );
    for key in ["a", "b", "c"] {
        // A crash repeats; what is first seen is in order.
        let mut seen = BTreeSet::new();
        let firsts: Vec<i64> = book.of(key).into_iter().filter(|n| seen.insert(*n)).collect();
        assert!(firsts.is_sorted(), "{key}: {firsts:?}");
    }
}

#[handler(group = "shop", topic = "orders", type = "refunded", batch = 10)]
async fn refunds_in_batches(refunds: Batch<Json<i64>>, State(page): State<Page>) {
    for refund in refunds {
        page.note(&refund.delivery, refund.message.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_handed_over_too() {
    let bench = bench().await;
    let book = Book::default();
    let _old = start(old(&bench, &book)).await;
    bench
        .publish((0..200).map(|n| {
            message(
                ["placed", "refunded"][(n / 7 % 2) as usize],
                &format!("k{}", n % 5),
                n,
            )
        }))
        .await;
    until(&bench, |shop| shop.waiting >= 5).await;
    let _new = start(
        bench
            .consumer(handlers![placed, refunds_in_batches])
            .state(book.by("new")),
    )
    .await;
    book.has(200).await;
    book.assert_once(200, ABLE);
    for key in 0..5 {
        let numbers = book.of(&format!("k{key}"));
        assert!(numbers.is_sorted(), "{numbers:?}");
    }
    settled(bench.db.pool(), "shop").await;
}

fn ordered(
    definitions: Vec<HandlerDefinition>,
    order: postbox_consumer::MessageOrder,
) -> Vec<HandlerDefinition> {
    definitions
        .into_iter()
        .map(|definition| definition.order(order))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn in_the_order_of_the_topic_the_cursor_waits_and_without_order_nothing_else_does() {
    use postbox_consumer::MessageOrder;
    for order in [MessageOrder::Topic, MessageOrder::None] {
        let bench = bench().await;
        let book = Book::default();
        let _old = start(
            bench
                .consumer(ordered(handlers![placed], order))
                .state(book.by("old")),
        )
        .await;
        let kinds = ["placed", "placed", "refunded"];
        bench
            .publish((0..60).map(|n| message(kinds[(n % 3) as usize], ["k", ""][(n % 2) as usize], n)))
            .await;
        book.has(if order == MessageOrder::Topic { 2 } else { 40 }).await;
        until(&bench, |shop| shop.waiting_types == ["refunded"]).await;
        let _new = start(
            bench
                .consumer(ordered(handlers![placed, refunded], order))
                .state(book.by("new")),
        )
        .await;
        book.has(60).await;
        book.assert_once(60, ABLE);
        if order == MessageOrder::Topic {
            let numbers: Vec<i64> = book.all().into_iter().map(|(.., n)| n).collect();
            assert!(numbers.is_sorted(), "{numbers:?}");
        }
        settled(bench.db.pool(), "shop").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_outlives_its_slot_and_a_seek_leaves_it_or_takes_it_along() {
    let bench = bench().await;
    let book = Book::default();
    let old = start(old(&bench, &book)).await;
    bench
        .publish((0..30).map(|n| {
            message(
                ["refunded", "placed"][(n % 2) as usize],
                ["a", "b", ""][(n / 2 % 3) as usize],
                n,
            )
        }))
        .await;
    until(&bench, |shop| shop.waiting == 7 && shop.parked >= 20).await;
    // As when the slot is old.
    let copied = bench
        .number("SELECT sum(postbox.copy_parked(l.subscription_id, l.lane, 1000, 1000))::bigint FROM postbox.lane l")
        .await;
    assert_eq!(copied, 20);
    until(&bench, |shop| shop.waiting == 7).await;
    let new_one = start(new(&bench, &book)).await;
    book.has(30).await;
    assert!(book.of("a").is_sorted() && book.of("b").is_sorted());
    settled(bench.db.pool(), "shop").await;
    new_one.shutdown().await.unwrap();

    // What was passed still waits, what comes after does not come.
    bench
        .publish([
            message("refunded", "", 30),
            message("refunded", "c", 31),
            message("placed", "c", 32),
        ])
        .await;
    until(&bench, |shop| shop.waiting == 2).await;
    let subscription = subscriptions::find(bench.db.pool(), "shop", "orders")
        .await
        .unwrap();
    subscriptions::seek(bench.db.pool(), subscription, subscriptions::Position::Latest)
        .await
        .unwrap();
    let _new = start(new(&bench, &book)).await;
    book.has(33).await;
    assert_eq!(book.of("c"), [31, 32]);
    settled(bench.db.pool(), "shop").await;
    old.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_fits_into_memory_waits_and_is_handed_over() {
    let bench = bench().await;
    let book = Book::default();
    let _old = start(old(&bench, &book).window(64)).await;
    // Far more than a window, and than are read or may fail at once.
    bench
        .publish((0..3000).map(|n| message("refunded", if n % 2 == 0 { "" } else { "k" }, n)))
        .await;
    bench
        .publish((3000..3010).map(|n| message("placed", &format!("other{n}"), n)))
        .await;
    book.has(10).await;
    until(&bench, |shop| shop.waiting == 1501).await;
    let _new = start(new(&bench, &book).window(64)).await;
    eventually(4 * PATIENCE, || async {
        let count = book.all().len();
        if count == 3010 {
            Ok(())
        } else {
            Err(format!("{count} of 3010"))
        }
    })
    .await;
    book.assert_once(3010, ABLE);
    assert!(book.of("k").is_sorted());
    settled(bench.db.pool(), "shop").await;
}

#[handler(broadcast, topic = "orders", type = "placed")]
async fn seen_by_all(Json(n): Json<i64>, delivery: Delivery, State(page): State<Page>) {
    page.note(&delivery, n);
}

#[handler(broadcast = "durable", topic = "orders", type = "placed")]
async fn kept(Json(n): Json<i64>, delivery: Delivery, State(page): State<Page>) {
    page.note(&delivery, n);
}

#[handler(broadcast = "durable", topic = "orders", type = "placed", unknown = "settle")]
async fn choosy(Json(n): Json<i64>, delivery: Delivery, State(page): State<Page>) {
    page.note(&delivery, n);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_from_memory_counts_what_it_does_not_take_and_a_durable_one_does_as_it_is_told() {
    let bench = bench().await;
    let book = Book::default();
    let consumer = start(
        bench
            .consumer(handlers![seen_by_all, kept, choosy])
            .node("here")
            .state(book.by("here")),
    )
    .await;
    bench
        .publish([
            message("placed", "a", 0),
            message("refunded", "a", 1),
            message("placed", "a", 2),
            message("refunded", "", 3),
            message("placed", "b", 4),
        ])
        .await;
    // All but what is behind the refund in the one that waits.
    book.has(8).await;
    eventually(PATIENCE, || async {
        let unknown: Vec<u64> = consumer.stats().iter().map(|stats| stats.unknown).collect();
        if unknown == [2, 0, 2] {
            Ok(())
        } else {
            Err(format!("{unknown:?}"))
        }
    })
    .await;
    eventually(PATIENCE, || async {
        let all = status::subscriptions(bench.db.pool()).await.unwrap();
        let waits = all
            .iter()
            .filter(|subscription| !subscription.waiting_types.is_empty());
        let waits: Vec<&str> = waits
            .map(|subscription| subscription.group_name.as_str())
            .collect();
        if waits == ["node/here/kept"] {
            Ok(())
        } else {
            Err(format!("{waits:?}"))
        }
    })
    .await;
    let found = finding(&bench, "unhandled-type").await.expect("a finding");
    assert!(found.contains("node/here/kept"), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_group_hands_nothing_over_and_does_so_when_it_goes_on() {
    let bench = bench().await;
    let book = Book::default();
    let _old = start(old(&bench, &book)).await;
    let _new = start(new(&bench, &book)).await;
    subscriptions::change(
        bench.db.pool(),
        "shop",
        None,
        &subscriptions::Change::Paused(true),
    )
    .await
    .unwrap();
    // Until both have heard of the pause they go on, so what comes first may be handled.
    let mut published: i64 = 0;
    loop {
        let more = (published..published + 50).map(|n| {
            message(
                ["placed", "refunded"][(n % 2) as usize],
                &format!("k{}", n % 7),
                n,
            )
        });
        bench.publish(more).await;
        published += 50;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let shop = of_shop(&bench).await;
        if shop.paused && shop.backlog >= 40 {
            break;
        }
        assert!(published < 1_000, "it goes on although it is paused");
    }
    subscriptions::change(
        bench.db.pool(),
        "shop",
        None,
        &subscriptions::Change::Paused(false),
    )
    .await
    .unwrap();
    book.has(published as usize).await;
    book.assert_once(published as usize, ABLE);
    settled(bench.db.pool(), "shop").await;
}

#[handler(group = "misnamed", topic = "order", type = "placed")]
async fn of_another_topic(_n: Json<i64>) {}

#[handler(group = "shop", topic = "orders", types = ["refundd", "invoiced"])]
async fn mistyped(_n: Json<i64>) {}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_names_a_mistyped_topic_and_a_mistyped_type_with_what_may_be_meant() {
    let bench = bench().await;
    bench
        .publish([message("placed", "a", 0), message("refunded", "a", 1)])
        .await;
    let _consumer = bench.start(handlers![of_another_topic, mistyped]).await;
    until(&bench, |shop| shop.waiting_types.len() == 1).await;
    let topic = finding(&bench, "topic-without-messages")
        .await
        .expect("a finding");
    assert!(
        topic.contains("misnamed is subscribed to topic order") && topic.contains("there is a topic orders"),
        "{topic}"
    );
    let findings = doctor::examine(bench.db.pool()).await.unwrap();
    let of_types: Vec<_> = findings
        .iter()
        .filter(|finding| finding.name == "type-without-messages")
        .collect();
    let near = of_types
        .iter()
        .find(|finding| finding.what.contains("type refundd"))
        .expect("a finding");
    assert!(
        near.what.contains("there are messages of type refunded"),
        "{near:?}"
    );
    assert_eq!(near.severity, doctor::Severity::Warning);
    let far = of_types
        .iter()
        .find(|finding| finding.what.contains("type invoiced"))
        .expect("a finding");
    assert_eq!(far.severity, doctor::Severity::Note);
}
