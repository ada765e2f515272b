//! A service on diesel, without `async`: it publishes with its data, and handles with exactly-once effect.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::BigInt;
use diesel_async::AsyncPgConnection;
use diesel_async::async_connection_wrapper::AsyncConnectionWrapper;
use postbox::Message;
use postbox::diesel::{InTransaction, Publish};
use postbox_consumer::{Consumer, HandlerError, Settlement, State, handler, handlers};
use postbox_dispatcher::Dispatcher;
use serde::{Deserialize, Serialize};

const ORDERS: i64 = 40;

#[derive(Serialize, Deserialize, Message)]
#[message(topic = "orders", type = "order.placed", key = customer)]
struct OrderPlaced {
    customer: i64,
    order_id: i64,
}

/// What diesel's own PgConnection is, without libpq.
type Client = AsyncConnectionWrapper<AsyncPgConnection>;

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = BigInt)]
    number: i64,
}

fn number(connection: &mut Client, sql: &str) -> anyhow::Result<i64> {
    Ok(sql_query(sql).get_result::<Number>(connection)?.number)
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
    tokio::task::spawn_blocking(move || {
        let mut connection = Client::establish(&shop.url)?;
        connection.transaction(|connection| {
            sql_query("INSERT INTO charge (order_id) VALUES ($1)")
                .bind::<BigInt, _>(order.order_id)
                .execute(connection)?;
            if run % 9 == 0 {
                return Err(HandlerError::retry("before it settles"));
            }
            settlement.settle_blocking(&mut InTransaction::of(connection)?)?;
            if run % 9 == 3 {
                return Err(HandlerError::retry("before it commits"));
            }
            Ok(())
        })?;
        match run % 9 {
            6 => Err(HandlerError::retry("after it committed")),
            _ => Ok(()),
        }
    })
    .await?
}

/// Of each two transactions one is rolled back.
fn place_orders(url: &str) -> anyhow::Result<()> {
    let mut connection = Client::establish(url)?;
    for order_id in 0..2 * ORDERS {
        let placed = connection.transaction::<_, anyhow::Error, _>(|connection| {
            sql_query("INSERT INTO placed VALUES ($1)").bind::<BigInt, _>(order_id).execute(connection)?;
            connection.publish(&OrderPlaced { customer: order_id % 7, order_id })?;
            anyhow::ensure!(order_id % 2 == 0, "it is rolled back");
            Ok(())
        });
        anyhow::ensure!(placed.is_ok() == (order_id % 2 == 0), "{placed:?}");
    }
    let alone = connection.publish(&OrderPlaced { customer: 0, order_id: -1 });
    anyhow::ensure!(matches!(alone, Err(postbox::Error::NoTransaction)), "outside of a transaction: {alone:?}");
    Ok(())
}

/// Waits until all orders are charged, and looks whether each was once.
fn verify(url: &str) -> anyhow::Result<()> {
    let mut connection = Client::establish(url)?;
    let done = "SELECT count(*) AS number FROM charge";
    for _ in 0..600 {
        if number(&mut connection, done)? >= ORDERS {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let wrong = "SELECT count(*) AS number FROM (SELECT order_id FROM placed p LEFT JOIN charge c USING (order_id) \
         GROUP BY order_id HAVING count(c) <> 1) wrong";
    let (charged, wrong) = (number(&mut connection, done)?, number(&mut connection, wrong)?);
    anyhow::ensure!(charged == ORDERS && wrong == 0, "{charged} charges for {ORDERS} orders, {wrong} wrong");
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let db = postbox_testkit::TestDatabase::new().await?;
    let url: Arc<str> = db.url().into();
    let of = url.clone();
    tokio::task::spawn_blocking(move || {
        let mut connection = Client::establish(&of)?;
        sql_query("CREATE TABLE placed (order_id bigint PRIMARY KEY)").execute(&mut connection)?;
        sql_query("CREATE TABLE charge (order_id bigint)").execute(&mut connection)?;
        anyhow::Ok(())
    })
    .await??;
    let dispatcher = Dispatcher::new(db.pool().clone()).start().await?;
    let shop = Shop {
        url: url.clone(),
        runs: Arc::default(),
    };
    let consumer = Consumer::connect(&url)?
        .state(shop)
        .handlers(handlers![charge])
        .start()
        .await?;
    let of = url.clone();
    tokio::task::spawn_blocking(move || place_orders(&of)).await??;
    tokio::task::spawn_blocking(move || verify(&url)).await??;
    consumer.shutdown().await?;
    dispatcher.shutdown().await;
    println!("a service on diesel: {ORDERS} orders, each charged once");
    Ok(())
}
