//! The inbox: a handler whose effects are in another database has them once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use postbox::MessageId;
use postbox_consumer::{Delivery, HandlerDefinition, HandlerError, Inbox, Outcome};
use postbox_consumer::{Extract, Invocation};
use postbox_testkit::{TestDatabase, eventually};
use sqlx::PgPool;

use crate::support::{PATIENCE, bench, settled, steps};

/// Another database, with the table of effects and the inbox.
async fn elsewhere() -> TestDatabase {
    let db = TestDatabase::empty().await.expect("a database");
    sqlx::raw_sql("CREATE TABLE effect (message_id uuid NOT NULL)")
        .execute(db.pool())
        .await
        .expect("a table of effects");
    Inbox::create(db.pool()).await.expect("the inbox");
    db
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.expect("a number")
}

/// A handler that writes one row elsewhere for each message, and afterwards does what `then` says.
fn effect_elsewhere(
    elsewhere: PgPool,
    inbox: Inbox,
    then: impl Fn(usize) -> Outcome + Clone + Send + Sync + 'static,
) -> (HandlerDefinition, Arc<AtomicUsize>) {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let handler = HandlerDefinition::new("effect_elsewhere")
        .group("ledger")
        .topic("steps")
        .retry(postbox_consumer::Retry::fixed(Duration::from_millis(5)))
        .call(move |invocation| {
            let (elsewhere, inbox, then) = (elsewhere.clone(), inbox.clone(), then.clone());
            let run = counted.fetch_add(1, Ordering::SeqCst);
            Box::pin(async move {
                take_effect(invocation, &elsewhere, &inbox).await?;
                then(run)
            })
        });
    (handler, runs)
}

async fn take_effect(mut invocation: Invocation, elsewhere: &PgPool, inbox: &Inbox) -> Outcome {
    let delivery = <Delivery as Extract>::extract(&mut invocation).await?;
    let mut tx = elsewhere.begin().await?;
    if inbox.first(&mut tx, &delivery).await? {
        sqlx::query("INSERT INTO effect (message_id) VALUES ($1)")
            .bind(delivery.id.as_uuid())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
    }
    Ok(())
}

/// What the inbox is asked with where no handler runs.
fn delivery(id: MessageId) -> Delivery {
    let mut delivery = Delivery::for_test("steps");
    delivery.id = id;
    delivery.group = "ledger".into();
    delivery
}

#[tokio::test]
async fn a_message_that_comes_again_after_its_effect_committed_has_no_second_effect() {
    let (bench, elsewhere) = (bench().await, elsewhere().await);
    // Every message fails once after its effect has committed elsewhere, as if the acknowledgement were lost.
    let (handler, runs) = effect_elsewhere(elsewhere.pool().clone(), Inbox::new("ledger"), |run| {
        match run % 2 {
            0 => Err(HandlerError::retry("lost on the way")),
            _ => Ok(()),
        }
    });
    bench.publish(&steps(5, 8)).await;
    let consumer = bench.start(vec![handler]).await;
    settled(bench.db.pool(), "ledger").await;
    consumer.shutdown().await.expect("it stops");
    assert!(runs.load(Ordering::SeqCst) > 40);
    assert_eq!(number(elsewhere.pool(), "SELECT count(*) FROM effect").await, 40);
    assert_eq!(
        number(elsewhere.pool(), "SELECT count(DISTINCT message_id) FROM effect").await,
        40
    );
}

#[tokio::test]
async fn a_duplicate_waits_for_the_run_that_is_in_flight() {
    let elsewhere = elsewhere().await;
    let (inbox, message) = (Inbox::new("ledger"), delivery(MessageId::new()));
    for commits in [false, true] {
        let mut first = elsewhere.pool().begin().await.expect("a transaction");
        assert!(inbox.first(&mut first, &message).await.expect("noted"));
        let answered = Arc::new(AtomicBool::new(false));
        let second = tokio::spawn({
            let (pool, inbox, message, answered) = (
                elsewhere.pool().clone(),
                inbox.clone(),
                message.clone(),
                answered.clone(),
            );
            async move {
                let mut tx = pool.begin().await.expect("a transaction");
                let answer = inbox.first(&mut tx, &message).await.expect("an answer");
                answered.store(true, Ordering::SeqCst);
                answer
            }
        });
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        eventually(PATIENCE, async || match number(elsewhere.pool(), waiting).await {
            1 => Ok(()),
            waiting => Err(format!("{waiting} wait")),
        })
        .await;
        assert!(!answered.load(Ordering::SeqCst));
        match commits {
            true => first.commit().await.expect("committed"),
            false => first.rollback().await.expect("rolled back"),
        }
        // The second is the first where the first was not.
        assert_eq!(second.await.expect("it ends"), !commits);
    }
}

#[tokio::test]
async fn names_remember_for_themselves_and_what_is_forgotten_or_expired_is_new() {
    let elsewhere = elsewhere().await;
    let pool = elsewhere.pool();
    let (ledger, replay) = (Inbox::new("ledger"), Inbox::new("ledger/2026-11"));
    let messages: Vec<MessageId> = (0..3).map(|_| MessageId::new()).collect();
    let note = async |inbox: &Inbox, id: MessageId| {
        let mut tx = pool.begin().await.expect("a transaction");
        let first = inbox.first(&mut tx, &delivery(id)).await.expect("an answer");
        tx.commit().await.expect("committed");
        first
    };
    for id in &messages {
        assert!(note(&ledger, *id).await && note(&replay, *id).await && !note(&ledger, *id).await);
    }

    let mut tx = pool.begin().await.expect("a transaction");
    let forgotten = ledger.forget(&mut tx, &[messages[0], MessageId::new()]).await;
    assert_eq!(forgotten.expect("forgotten"), 1);
    tx.commit().await.expect("committed");
    assert!(note(&ledger, messages[0]).await && !note(&replay, messages[0]).await);

    sqlx::raw_sql(
        "UPDATE postbox_inbox SET handled_at = handled_at - interval '31 days' WHERE group_name = 'ledger';
         INSERT INTO postbox_inbox (group_name, message_id, handled_at)
         SELECT 'ledger', gen_random_uuid(), now() - interval '40 days' FROM generate_series(1, 12000)",
    )
    .execute(pool)
    .await
    .expect("time passes");
    let month = Duration::from_secs(30 * 24 * 3600);
    assert_eq!(replay.expire(pool, month).await.expect("nothing is old"), 0);
    assert_eq!(ledger.expire(pool, month).await.expect("expired"), 12_003);
    assert!(note(&ledger, messages[1]).await && !note(&replay, messages[1]).await);
}

#[tokio::test]
async fn the_table_is_made_once_by_any_number_and_used_by_a_role_that_cannot_make_it() {
    let db = TestDatabase::empty().await.expect("a database");
    let mut makers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let pool = db.connect_pool(1);
        makers.spawn(async move { Inbox::create(&pool).await });
    }
    while let Some(made) = makers.join_next().await {
        made.expect("it ends").expect("created");
    }
    let comments = "SELECT count(*) FROM pg_description WHERE objoid = 'postbox_inbox'::regclass";
    assert_eq!(number(db.pool(), comments).await, 4);

    let role = crate::role::Role::new(&db).await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC; GRANT SELECT, INSERT, DELETE ON postbox_inbox TO {}",
        role.name
    )))
    .execute(db.pool())
    .await
    .expect("granted");
    Inbox::create(&role.pool).await.expect("it is there");
    let mut tx = role.pool.begin().await.expect("a transaction");
    let inbox = Inbox::new("ledger");
    assert!(
        inbox
            .first(&mut tx, &delivery(MessageId::new()))
            .await
            .expect("noted")
    );
    tx.commit().await.expect("committed");
    inbox.expire(&role.pool, Duration::ZERO).await.expect("expired");
    role.drop(&db).await;
}
