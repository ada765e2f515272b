//! A service on sqlx 0.8, as most are: it publishes with its data, and handles with exactly-once effect.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use postbox::{Message, Publish};
use postbox_consumer::{Consumer, HandlerError, Settlement, State, handler, handlers};
use postbox_dispatcher::Dispatcher;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;

const ORDERS: i64 = 40;

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders", type = "order.placed", key = customer)]
struct OrderPlaced {
    customer: i64,
    order_id: i64,
}

#[derive(Clone)]
struct Shop {
    pool: PgPool,
    runs: Arc<AtomicU32>,
}

/// Every third run fails, in turn before it settles, before it commits, and after.
#[handler(group = "billing", retry(backoff = "fixed(10ms)"))]
async fn charge(order: OrderPlaced, settlement: Settlement, State(shop): State<Shop>) -> Result<(), HandlerError> {
    let run = shop.runs.fetch_add(1, Ordering::Relaxed);
    let mut tx = shop.pool.begin().await?;
    sqlx::query("INSERT INTO charge (order_id) VALUES ($1)")
        .bind(order.order_id)
        .execute(&mut *tx)
        .await?;
    if run % 9 == 0 {
        return Err(HandlerError::retry("before it settles"));
    }
    settlement.settle(&mut tx).await?;
    if run % 9 == 3 {
        return Err(HandlerError::retry("before it commits"));
    }
    tx.commit().await?;
    if run % 9 == 6 {
        return Err(HandlerError::retry("after it committed"));
    }
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let db = postbox_testkit::TestDatabase::new().await?;
    let pool = PgPool::connect(db.url()).await?;
    for table in ["CREATE TABLE placed (order_id bigint PRIMARY KEY)", "CREATE TABLE charge (order_id bigint)"] {
        sqlx::query(table).execute(&pool).await?;
    }
    let dispatcher = Dispatcher::new(db.pool().clone()).start().await?;
    let shop = Shop {
        pool: pool.clone(),
        runs: Arc::default(),
    };
    let consumer = Consumer::connect(db.url())?
        .state(shop)
        .handlers(handlers![charge])
        .start()
        .await?;

    // Of each two transactions one is rolled back.
    for order_id in 0..2 * ORDERS {
        let mut tx = pool.begin().await?;
        sqlx::query("INSERT INTO placed VALUES ($1)").bind(order_id).execute(&mut *tx).await?;
        tx.publish(&OrderPlaced { customer: order_id % 7, order_id }).await?;
        match order_id % 2 {
            0 => tx.commit().await?,
            _ => tx.rollback().await?,
        }
    }

    let done = "SELECT count(*) FROM charge";
    for _ in 0..600 {
        if sqlx::query_scalar::<_, i64>(done).fetch_one(&pool).await? >= ORDERS {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    consumer.shutdown().await?;
    dispatcher.shutdown().await;
    let wrong = "SELECT count(*) FROM (SELECT order_id, count(c) AS times FROM placed p LEFT JOIN charge c USING (order_id) \
         GROUP BY order_id HAVING count(c) <> 1) wrong";
    let charged: i64 = sqlx::query_scalar(done).fetch_one(&pool).await?;
    let wrong: i64 = sqlx::query_scalar(wrong).fetch_one(&pool).await?;
    anyhow::ensure!(charged == ORDERS && wrong == 0, "{charged} charges for {ORDERS} orders, {wrong} wrong");
    println!("a service on sqlx 0.8: {ORDERS} orders, each charged once");
    Ok(())
}
