//! Filters: what a handler wants of its messages, by the server's jsonpath; and types that are settled without being read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{Bench, PATIENCE, bench, settled};
use postbox::{MessageId, Outgoing, Publish};
use postbox_consumer::{
    ConsumerHandle, Delivery, Error, Extract, HandlerDefinition, HandlerError, Raw, Retry, UnknownType,
};
use postbox_dispatcher::messages::{self, MessageState};
use postbox_dispatcher::{doctor, status, subscriptions};
use postbox_testkit::eventually;

const GROUP: &str = "buyers";

/// The `n` of its headers, and its key.
type Handled = (i64, Option<String>);

/// What was handled, in order.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Handled>>>);

impl Seen {
    fn numbers(&self) -> Vec<i64> {
        self.0.lock().unwrap().iter().map(|(n, _)| *n).collect()
    }

    fn sorted(&self) -> Vec<i64> {
        let mut numbers = self.numbers();
        numbers.sort_unstable();
        numbers
    }

    fn of(&self, key: &str) -> Vec<i64> {
        let seen = self.0.lock().unwrap();
        let of_key = seen.iter().filter(|(_, of)| of.as_deref() == Some(key));
        of_key.map(|(n, _)| *n).collect()
    }

    async fn has(&self, count: usize) {
        eventually(PATIENCE, || async {
            match self.numbers().len() {
                len if len >= count => Ok(()),
                len => Err(format!("{len} of {count}")),
            }
        })
        .await;
    }
}

/// Handles every type of the topic `orders`, and fails where `fails` says so.
fn handler(seen: &Seen, fails: impl Fn(i64) -> bool + Send + Sync + 'static) -> HandlerDefinition {
    let (seen, fails) = (seen.clone(), Arc::new(fails));
    HandlerDefinition::new("buy")
        .group(GROUP)
        .topic("orders")
        .retry(Retry::fixed(Duration::from_millis(50)).unlimited())
        .argument::<Raw>()
        .call(move |mut invocation| {
            let (seen, fails) = (seen.clone(), fails.clone());
            Box::pin(async move {
                let delivery = <Delivery as Extract>::extract(&mut invocation).await?;
                let n = delivery.headers.get("n").unwrap().parse().unwrap();
                tokio::task::yield_now().await;
                if fails(n) {
                    return Err(HandlerError::retry("down"));
                }
                let key = delivery.key.as_deref().map(str::to_owned);
                seen.0.lock().unwrap().push((n, key));
                Ok(())
            })
        })
}

fn all(seen: &Seen) -> HandlerDefinition {
    handler(seen, |_| false)
}

/// With the header `n`, of the region `EU` if `n` is even, and a total of `n`.
fn order(n: i64) -> Outgoing {
    Outgoing::json(
        "orders",
        &serde_json::json!({ "total": n, "items": [{ "sku": format!("s{n}") }] }),
    )
    .message_type("placed")
    .header("n", n.to_string())
    .header("region", if n % 2 == 0 { "EU" } else { "US" })
}

async fn publish_each(bench: &Bench, messages: impl IntoIterator<Item = Outgoing>) -> Vec<MessageId> {
    let mut ids = Vec::new();
    for message in messages {
        let mut tx = bench.db.pool().begin().await.unwrap();
        ids.push(tx.publish(message).await.unwrap());
        tx.commit().await.unwrap();
    }
    ids
}

async fn state(bench: &Bench, id: MessageId) -> MessageState {
    let found = messages::show(bench.db.pool(), id.as_uuid())
        .await
        .unwrap()
        .unwrap();
    found.groups[0].state
}

async fn status_of(bench: &Bench) -> status::SubscriptionStatus {
    let status = status::read(bench.db.pool()).await.unwrap();
    status.subscriptions.into_iter().next().unwrap()
}

async fn finding(bench: &Bench, name: &str) -> Option<String> {
    let findings = doctor::examine(bench.db.pool()).await.unwrap();
    let found = findings.into_iter().find(|finding| finding.name == name);
    found.map(|finding| finding.what)
}

async fn finding_is(bench: &Bench, name: &str, there: bool) -> String {
    let found = Mutex::new(String::new());
    eventually(PATIENCE, || async {
        let finding = finding(bench, name).await;
        match finding.is_some() == there {
            true => {
                *found.lock().unwrap() = finding.unwrap_or_default();
                Ok(())
            }
            false => Err(format!("{finding:?}")),
        }
    })
    .await;
    found.into_inner().unwrap()
}

fn filtered(consumer: &ConsumerHandle) -> u64 {
    consumer.stats()[0].filtered
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_filter_wants_is_handled_and_the_rest_is_passed_counted_and_visible() {
    let bench = bench().await;
    let seen = Seen::default();
    let filter = "$.headers.region == \"EU\" && $.payload.total > 100";
    let consumer = bench.start(vec![all(&seen).filter(filter)]).await;
    // Some one by one, as a step tells them to who is in its process; most at once.
    let ids = publish_each(&bench, (95..125).map(order)).await;
    bench.publish((125..1500).map(order)).await;
    settled(bench.db.pool(), GROUP).await;
    let wanted: Vec<i64> = (102..1500).filter(|n| n % 2 == 0).collect();
    assert_eq!(seen.sorted(), wanted);
    assert_eq!(filtered(&consumer) as usize, 1405 - wanted.len());
    for (n, id) in (95..125).zip(ids) {
        let wanted = n > 100 && n % 2 == 0;
        let expected = if wanted {
            MessageState::Delivered
        } else {
            MessageState::Filtered
        };
        assert_eq!(state(&bench, id).await, expected, "{n}");
    }
    let what = finding_is(&bench, "filtered", true).await;
    assert!(what.contains(filter), "{what}");
    let status = status_of(&bench).await;
    assert_eq!((status.backlog, status.dead, status.retrying), (0, 0, 0));
    assert_eq!(status.filters.0.get("*"), Some(&Some(filter.to_owned())));
    assert_eq!(status.filters_from, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_handler_and_each_group_has_its_own_and_types_and_keys_can_be_asked_for() {
    let bench = bench().await;
    let (placed, paid, others, every) = (Seen::default(), Seen::default(), Seen::default(), Seen::default());
    let other_group = HandlerDefinition::group(all(&others), "others");
    let everything = HandlerDefinition::group(all(&every), "every");
    let _consumer = bench
        .start(vec![
            all(&placed).message_type("placed").filter("$.payload.total < 10"),
            all(&paid).message_type("paid").filter("$.key == \"k1\""),
            other_group.filter("$.type == \"paid\" || exists($.payload.items[*] ? (@.sku == \"s3\"))"),
            everything,
        ])
        .await;
    let of_type = |n: i64| match n % 2 {
        0 => order(n).message_type("paid").key(format!("k{}", n % 4)),
        _ => order(n).key(format!("k{}", n % 4)),
    };
    bench.publish((0..40).map(of_type)).await;
    for group in [GROUP, "others", "every"] {
        settled(bench.db.pool(), group).await;
    }
    assert_eq!(placed.sorted(), [1, 3, 5, 7, 9]);
    assert_eq!(paid.sorted(), Vec::<i64>::new(), "paid ones have even keys");
    let of_others: Vec<i64> = (0..40).filter(|n| n % 2 == 0 || *n == 3).collect();
    assert_eq!(others.sorted(), of_others);
    assert_eq!(every.sorted(), (0..40).collect::<Vec<i64>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_payload_that_is_no_json_nothing_is_true_and_headers_still_count() {
    let bench = bench().await;
    let (by_header, by_payload) = (Seen::default(), Seen::default());
    let of_payload = HandlerDefinition::group(all(&by_payload), "payload");
    let consumer = bench
        .start(vec![
            all(&by_header).filter("$.headers.region == \"EU\""),
            of_payload.filter("$.payload.total == 2 || $.payload == 2 || $.headers.also == \"yes\""),
        ])
        .await;
    let headers = |message: Outgoing, n: i64| message.header("n", n.to_string()).header("region", "EU");
    let bytes = |content_type: &'static str, payload: &[u8]| {
        Outgoing::bytes("orders", content_type, payload.to_vec())
    };
    bench
        .publish([
            headers(bytes("text/plain", b"2"), 0),
            headers(bytes("application/x-protobuf", b"\xff\x00\x01"), 1),
            headers(bytes("application/json", b"{\"total\": 2"), 2),
            headers(bytes("application/json", b"\xff"), 3),
            headers(bytes("application/json", b""), 4),
            headers(bytes("application/json", br#"{"total": 2, "z": "\u0000"}"#), 5),
            headers(bytes("application/json", br#"{"total": 1e999999}"#), 6),
            headers(
                bytes("application/json", b"{\"total\": 2").header("also", "yes"),
                7,
            ),
            // These are JSON.
            headers(
                bytes("application/vnd.orders+json; charset=utf-8", b"{\"total\": 2}"),
                8,
            ),
            headers(bytes("application/json", b"2"), 9),
            headers(bytes("application/json", b"{\"total\": 2.0, \"total\": 2}"), 10),
        ])
        .await;
    let deep = format!("{}1{}", "[".repeat(20_000), "]".repeat(20_000));
    bench
        .publish([headers(bytes("application/json", deep.as_bytes()), 11)])
        .await;
    // A plain INSERT may leave everything out.
    bench
        .sql("INSERT INTO postbox.outbox (topic, payload, headers) VALUES ('orders', '{\"total\": 2}', '{\"n\": \"12\"}')")
        .await;
    settled(bench.db.pool(), GROUP).await;
    settled(bench.db.pool(), "payload").await;
    assert_eq!(by_header.sorted(), (0..12).collect::<Vec<i64>>());
    assert_eq!(by_payload.sorted(), [7, 8, 9, 10, 12]);
    let stats = consumer.stats();
    assert_eq!((stats[0].filtered, stats[1].filtered), (1, 8));
    assert!(
        stats
            .iter()
            .all(|of| (of.failed, of.dead, of.retrying) == (0, 0, 0)),
        "{stats:?}"
    );
}

/// An error of one filter is nobody else's, and neither hides what is true nor stops anything.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_filter_cannot_be_evaluated_of_is_passed_and_said_and_other_filters_do_not_notice() {
    let bench = bench().await;
    let (deep, total, not_total, dated) =
        (Seen::default(), Seen::default(), Seen::default(), Seen::default());
    let group = |seen: &Seen, name: &str, filter: &str| {
        HandlerDefinition::group(all(seen), name).filter(filter.to_owned())
    };
    let consumer = bench
        .start(vec![
            // The server cannot go so deep.
            group(&deep, "deep", "exists($.payload.** ? (@ == \"never\"))"),
            group(&total, "total", "$.payload.total == 2"),
            group(&not_total, "not-total", "!($.payload.total == 2)"),
            // Instants with and without a time zone can be compared.
            group(
                &dated,
                "dated",
                "$.payload.at.datetime() > \"2024-01-01\".datetime() || $.payload.total == 3",
            ),
        ])
        .await;
    let headers = |payload: String, n: i64| {
        Outgoing::bytes("orders", "application/json", payload.into_bytes()).header("n", n.to_string())
    };
    let nested = format!(
        "{{\"total\": 2, \"nested\": {}1{}}}",
        "[".repeat(5_000),
        "]".repeat(5_000)
    );
    let with_instant = |total: i64| format!("{{\"total\": {total}, \"at\": \"2025-05-01T00:00:00+00:00\"}}");
    bench
        .publish([
            headers(nested, 0),
            headers(with_instant(2), 1),
            headers(with_instant(4), 2),
        ])
        .await;
    for group in ["deep", "total", "not-total", "dated"] {
        settled(bench.db.pool(), group).await;
    }
    assert_eq!(deep.sorted(), Vec::<i64>::new());
    assert_eq!(total.sorted(), [0, 1]);
    assert_eq!(not_total.sorted(), [2]);
    assert_eq!(dated.sorted(), [1, 2]);
    let filtered: Vec<u64> = consumer.stats().iter().map(|of| of.filtered).collect();
    assert_eq!(filtered, [3, 1, 2, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_filter_is_refused_as_the_consumer_starts_with_its_position() {
    let bench = bench().await;
    let seen = Seen::default();
    for (filter, why) in [
        ("$.headers.region = \"EU\"", "at character 18: syntax error"),
        ("$.a == 1 & $.b == 2", "at character 10: "),
        ("$.a == 1 && ($.b == 2", "at character 22: "),
        ("$.a == \"x", "at character 10: "),
        ("$.key like_regex \"^(a\"", "invalid regular expression"),
        ("$.payload.total", "is no condition"),
        ("$.payload.items[*] ? (@.sku == \"A\")", "is no condition"),
        ("$.payload.total > $limit", "has a variable"),
        ("exists($.payload ? (@.total > $limit))", "has a variable"),
        (" ", "is empty"),
        ("", "is empty"),
    ] {
        let consumer = bench.consumer(vec![all(&seen).filter(filter)]);
        match consumer.start().await {
            Err(Error::Filter {
                handler,
                filter: said,
                why: said_why,
            }) => {
                assert_eq!((handler, said.as_str()), ("buy", filter));
                assert!(said_why.contains(why), "{filter}: {said_why}");
            }
            other => panic!("{filter}: {other:?}"),
        }
    }
    for filter in ["true", "null", "1 == 1", "\"$\" == \"$\""] {
        let refused = bench.consumer(vec![all(&seen).filter(filter)]).start().await;
        let why = refused.err().unwrap().to_string();
        assert!(why.contains("the same of every message"), "{filter}: {why}");
    }
    // These look odd and are conditions.
    for filter in [
        "$.key == \"US$\"",
        "!($.payload.total > 5)",
        "strict $.payload.a == 1",
        "$.key == null",
    ] {
        let consumer = bench.start(vec![all(&seen).filter(filter)]).await;
        consumer.shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_parked_meets_the_filter_when_it_is_taken_up_and_keys_keep_their_order() {
    let bench = bench().await;
    let seen = Seen::default();
    let up = Arc::new(AtomicBool::new(false));
    let failing = {
        let up = up.clone();
        // The first of key k0.
        handler(&seen, move |n| n == 2 && !up.load(Ordering::Relaxed))
    };
    let filter = "$.headers.region == \"EU\" || $.payload.total < 1";
    let consumer = bench
        .consumer(vec![failing.filter(filter).concurrency(4)])
        .window(32);
    let consumer = consumer.start().await.unwrap();
    // Far more of it than the window, and a slot that is old: what is parked is in the log, and copied.
    bench
        .publish((2..600).map(|n| order(n).key(format!("k{}", n / 2 % 3))))
        .await;
    seen.has(198).await;
    let copied =
        "SELECT sum(postbox.copy_parked(l.subscription_id, l.lane, 300, 1000))::bigint FROM postbox.lane l";
    // Once it is recorded that all others are handled.
    eventually(PATIENCE, || async {
        match status_of(&bench).await {
            status if status.backlog == 0 && status.parked > 0 => Ok(()),
            status => Err(format!(
                "{} to be handled, {} parked",
                status.backlog, status.parked
            )),
        }
    })
    .await;
    assert!(bench.number(copied).await > 0);
    bench
        .publish((600..900).map(|n| order(n).key(format!("k{}", n / 2 % 3))))
        .await;
    seen.has(298).await;
    up.store(true, Ordering::Relaxed);
    settled(bench.db.pool(), GROUP).await;
    let wanted: Vec<i64> = (2..900).filter(|n| n % 2 == 0).collect();
    assert_eq!(seen.sorted(), wanted);
    assert_eq!(
        filtered(&consumer),
        449,
        "once each, though what is parked is looked at twice"
    );
    for key in ["k0", "k1", "k2"] {
        assert!(seen.of(key).is_sorted(), "{key}: {:?}", seen.of(key));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_filter_applies_from_where_the_group_stands_and_what_failed_before_runs_all_the_same() {
    let bench = bench().await;
    let seen = Seen::default();
    let up = Arc::new(AtomicBool::new(false));
    let failing = {
        let up = up.clone();
        move |n| n == 3 && !up.load(Ordering::Relaxed)
    };
    let us = handler(&seen, failing.clone()).filter("$.headers.region == \"US\"");
    let consumer = bench.consumer(vec![us]).name("us").start().await.unwrap();
    let first = publish_each(&bench, (0..8).map(order)).await;
    seen.has(3).await;
    let eu = || handler(&seen, failing.clone()).filter("$.headers.region == \"EU\"");
    let both = bench.consumer(vec![eu()]).name("eu").start().await.unwrap();
    let what = finding_is(&bench, "filters-differ", true).await;
    assert!(what.contains("eu") && what.contains("us"), "{what}");
    consumer.shutdown().await.unwrap();
    finding_is(&bench, "filters-differ", false).await;
    let second = publish_each(&bench, (8..16).map(order)).await;
    seen.has(7).await;
    up.store(true, Ordering::Relaxed);
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(
        seen.sorted(),
        [1, 3, 5, 7, 8, 10, 12, 14],
        "3 failed under the first one"
    );
    for (n, id) in first.iter().chain(&second).enumerate() {
        let wanted = if n < 8 { n % 2 == 1 } else { n % 2 == 0 };
        let expected = if wanted {
            MessageState::Delivered
        } else {
            MessageState::Filtered
        };
        assert_eq!(state(&bench, *id).await, expected, "{n}");
    }
    let status = status_of(&bench).await;
    assert!(
        status.filters_from.is_some_and(|from| (3..=8).contains(&from)),
        "{:?}",
        status.filters_from
    );

    // What comes again by a seek or a replay meets the filter that there is now; what was not wanted is wanted then.
    let id = subscriptions::find(bench.db.pool(), GROUP, "orders")
        .await
        .unwrap();
    subscriptions::seek(bench.db.pool(), id, subscriptions::Position::Earliest)
        .await
        .unwrap();
    seen.has(16).await;
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(
        seen.numbers()[8..].iter().copied().filter(|n| n % 2 == 1).count(),
        0
    );
    assert_eq!(state(&bench, first[1]).await, MessageState::Filtered, "now");
    assert_eq!(
        bench
            .number("SELECT replayed FROM postbox.replay((SELECT id FROM postbox.subscription), 0, 16)")
            .await,
        16
    );
    seen.has(24).await;
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(seen.sorted().iter().filter(|n| *n % 2 == 1).count(), 4);
    both.shutdown().await.unwrap();
    let without = bench.start(vec![all(&seen)]).await;
    assert!(status_of(&bench).await.filters.0.is_empty());
    without.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn broadcasts_and_batches_have_filters_too() {
    let bench = bench().await;
    let (node, every, batched) = (Seen::default(), Seen::default(), Seen::default());
    let filter = "$.payload.total % 3 == 0";
    let in_batches = {
        let batched = batched.clone();
        HandlerDefinition::new("index")
            .group("index")
            .topic("orders")
            .message_type("placed")
            .batch(50)
            .argument::<postbox_consumer::Batch<postbox_consumer::Json<serde_json::Value>>>()
            .call(move |mut invocation| {
                let batched = batched.clone();
                Box::pin(async move {
                    type Orders = postbox_consumer::Batch<postbox_consumer::Json<serde_json::Value>>;
                    let orders = <Orders as Extract>::extract(&mut invocation).await?;
                    for order in orders.iter().map(|item| &item.message.0) {
                        batched
                            .0
                            .lock()
                            .unwrap()
                            .push((order["total"].as_i64().unwrap(), None));
                    }
                    Ok(())
                })
            })
    };
    let _consumer = bench
        .start(vec![
            all(&every).broadcast().filter(filter),
            HandlerDefinition::durable_broadcast(all(&node)).filter(filter),
            in_batches.filter(filter),
        ])
        .await;
    bench.publish((0..300).map(order)).await;
    let wanted: Vec<i64> = (0..300).step_by(3).collect();
    for seen in [&node, &every, &batched] {
        seen.has(100).await;
    }
    settled(bench.db.pool(), "index").await;
    for seen in [&node, &every, &batched] {
        assert_eq!(seen.sorted(), wanted);
    }
}

/// `each` messages of `types` types that take turns.
fn of_types(types: usize, each: usize) -> impl Iterator<Item = Outgoing> {
    (0..types * each).map(move |n| order(n as i64).message_type(format!("t{}", n % types)))
}

async fn unknown_is(consumer: &ConsumerHandle, count: u64) {
    eventually(PATIENCE, || async {
        match consumer.stats()[0].unknown {
            unknown if unknown == count => Ok(()),
            unknown => Err(format!("{unknown} of {count}")),
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn types_that_nobody_handles_are_settled_without_being_read() {
    let bench = bench().await;
    let seen = Seen::default();
    let one = all(&seen)
        .message_type("t7")
        .unknown(UnknownType::Settle)
        .lanes(4);
    let consumer = bench.start(vec![one]).await;
    bench.publish(of_types(20, 5)).await;
    settled(bench.db.pool(), GROUP).await;
    unknown_is(&consumer, 95).await;

    // A backlog of which only those rows are there that are handled: of another one that is read it would be said that it is gone.
    bench.sql("SELECT postbox.pause('buyers', 'orders', true)").await;
    eventually(PATIENCE, || async {
        match status_of(&bench).await.paused {
            true => Ok(()),
            false => Err("not paused".to_owned()),
        }
    })
    .await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    bench.publish(of_types(20, 400)).await;
    eventually(PATIENCE, || async {
        match bench.number("SELECT postbox.next_offset('orders')").await {
            8100 => Ok(()),
            next => Err(format!("{next}")),
        }
    })
    .await;
    bench.sql("DELETE FROM postbox.outbox WHERE type <> 't7'").await;
    bench.sql("SELECT postbox.pause('buyers', 'orders', false)").await;
    unknown_is(&consumer, 95 + 19 * 400).await;
    seen.has(405).await;
    assert_eq!(seen.numbers().len(), 405);
    let what = finding_is(&bench, "unknown-type-settled", true).await;
    assert!(what.contains("of type t13"), "{what}");
    consumer.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_that_somebody_handles_is_read_though_another_has_its_hash() {
    let bench = bench().await;
    let twins = "SELECT array_agg(t.name) FROM (SELECT 'c' || n AS name FROM generate_series(1, 400000) n) t \
        GROUP BY postbox.key_hash(t.name) HAVING count(*) > 1 ORDER BY 1 LIMIT 1";
    let twins: Vec<String> = sqlx::query_scalar(twins)
        .fetch_one(bench.db.pool())
        .await
        .unwrap();
    let (orphan, handled) = (twins[0].clone(), twins[1].clone());
    let (first, second) = (Seen::default(), Seen::default());
    let mine = |seen: &Seen| all(seen).message_type("mine").unknown(UnknownType::Settle);
    let one = bench.start(vec![mine(&first)]).await;
    let of = |name: &str, n: i64| order(n).message_type(name.to_owned());
    // It never meets the other one.
    bench.publish((0..20).map(|n| of(&orphan, n))).await;
    settled(bench.db.pool(), GROUP).await;
    unknown_is(&one, 20).await;
    let two = bench
        .start(vec![
            mine(&second),
            all(&second)
                .message_type(handled.clone())
                .unknown(UnknownType::Settle),
        ])
        .await;
    // Until all know of it.
    eventually(PATIENCE, || async {
        bench.publish((0..40).map(|n| of(&handled, n))).await;
        settled(bench.db.pool(), GROUP).await;
        let (before, expected) = (second.numbers().len(), second.numbers().len() + 40);
        bench.publish((0..40).map(|n| of(&handled, n))).await;
        settled(bench.db.pool(), GROUP).await;
        match second.numbers().len() == expected {
            true => Ok(()),
            false => Err(format!("{} more of 40", second.numbers().len() - before)),
        }
    })
    .await;
    let before = second.numbers().len();
    bench
        .publish((0..400).map(|n| of([&orphan, &handled][n as usize % 2], n)))
        .await;
    settled(bench.db.pool(), GROUP).await;
    assert_eq!(second.numbers().len(), before + 200);
    for consumer in [one, two] {
        consumer.shutdown().await.unwrap();
    }
}
