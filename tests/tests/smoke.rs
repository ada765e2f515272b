//! The main path end to end.
use std::sync::{Arc, Mutex};
use std::time::Duration;
use postbox::{Outgoing, Publish};
use postbox_consumer::{Consumer, Delivery, HandlerError, State, Tx, handler, handlers};
use postbox_testkit::TestDatabase;

type Seen = Arc<Mutex<Vec<(i64, Option<String>)>>>;

#[handler(group = "a", topic = "t")]
async fn note(d: Delivery, State(seen): State<Seen>) {
    seen.lock().unwrap().push((d.offset.get(), d.key));
}
#[handler(group = "b", topic = "t")]
async fn write(d: Delivery, mut tx: Tx) -> Result<(), HandlerError> {
    sqlx::query("INSERT INTO effect VALUES ($1)").bind(d.offset.get()).execute(&mut *tx).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_reaches_every_group() {
    let db = TestDatabase::new().await.unwrap();
    sqlx::query("CREATE TABLE effect (n bigint)").execute(db.pool()).await.unwrap();
    let seen = Seen::default();
    let dispatcher = postbox_dispatcher::Dispatcher::new(db.pool().clone()).start().await.unwrap();
    let consumer = Consumer::new(db.pool().clone()).state(seen.clone()).handlers(handlers![note, write]).start().await.unwrap();
    let mut tx = db.pool().begin().await.unwrap();
    for n in 0..100 {
        tx.publish(Outgoing::json("t", &n).key((n % 7).to_string())).await.unwrap();
    }
    tx.publish_all((100..3000).map(|n| Outgoing::json("t", &n).key((n % 7).to_string()))).await.unwrap();
    tx.commit().await.unwrap();
    postbox_testkit::eventually(Duration::from_secs(10), || async {
        let n = seen.lock().unwrap().len();
        let m: i64 = sqlx::query_scalar("SELECT count(*) FROM effect").fetch_one(db.pool()).await.unwrap();
        if n == 3000 && m == 3000 { Ok(()) } else { Err(format!("{n} {m}")) }
    }).await;
    println!("{:?}", consumer.stats());
    consumer.shutdown().await.unwrap();
    dispatcher.shutdown().await;
}
