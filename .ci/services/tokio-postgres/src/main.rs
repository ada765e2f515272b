//! A service whose data is behind tokio-postgres: it publishes with its data, and handles with exactly-once effect.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use postbox::{Message, Publish};
use postbox_consumer::{Consumer, HandlerError, Settlement, State, handler, handlers};
use postbox_dispatcher::Dispatcher;
use serde::{Deserialize, Serialize};
use tokio_postgres::{Client, NoTls};

const ORDERS: i64 = 40;

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders", type = "order.placed", key = customer)]
struct OrderPlaced {
    customer: i64,
    order_id: i64,
}

async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

#[derive(Clone)]
struct Shop {
    url: Arc<str>,
    runs: Arc<AtomicU32>,
}

/// Every third run fails, in turn before it settles, before it commits, and after.
#[handler(group = "billing", retry(backoff = "fixed(10ms)"))]
async fn charge(order: OrderPlaced, settlement: Settlement, State(shop): State<Shop>) -> Result<(), HandlerError> {
    let run = shop.runs.fetch_add(1, Ordering::Relaxed);
    let mut client = connect(&shop.url).await?;
    let mut tx = client.transaction().await?;
    tx.execute("INSERT INTO charge (order_id) VALUES ($1)", &[&order.order_id]).await?;
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
    let mut client = connect(db.url()).await?;
    client
        .batch_execute("CREATE TABLE placed (order_id bigint PRIMARY KEY); CREATE TABLE charge (order_id bigint)")
        .await?;
    let dispatcher = Dispatcher::new(db.pool().clone()).start().await?;
    let shop = Shop {
        url: db.url().into(),
        runs: Arc::default(),
    };
    let consumer = Consumer::connect(db.url())?
        .state(shop)
        .handlers(handlers![charge])
        .start()
        .await?;

    // Of each two transactions one is rolled back.
    for order_id in 0..2 * ORDERS {
        let mut tx = client.transaction().await?;
        tx.execute("INSERT INTO placed VALUES ($1)", &[&order_id]).await?;
        tx.publish(&OrderPlaced { customer: order_id % 7, order_id }).await?;
        match order_id % 2 {
            0 => tx.commit().await?,
            _ => tx.rollback().await?,
        }
    }

    let done = "SELECT count(*) FROM charge";
    for _ in 0..600 {
        if client.query_one(done, &[]).await?.get::<_, i64>(0) >= ORDERS {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    consumer.shutdown().await?;
    dispatcher.shutdown().await;
    let wrong = "SELECT count(*) FROM (SELECT order_id, count(c) AS times FROM placed p LEFT JOIN charge c USING (order_id) \
         GROUP BY order_id HAVING count(c) <> 1) wrong";
    let (charged, wrong): (i64, i64) = (
        client.query_one(done, &[]).await?.get(0),
        client.query_one(wrong, &[]).await?.get(0),
    );
    anyhow::ensure!(charged == ORDERS && wrong == 0, "{charged} charges for {ORDERS} orders, {wrong} wrong");
    println!("a service on tokio-postgres: {ORDERS} orders, each charged once");
    Ok(())
}
