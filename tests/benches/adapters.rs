//! What publishing costs more than the INSERT that its user would write by hand, for each client: `cargo bench -p postbox-tests --bench adapters`.
//!
//! In each round each client commits transactions of one message and of a hundred, by Postbox and by hand, in turns. A ratio is that of a round, and
//! the table has their median: what else the machine does meets both.
#![allow(missing_docs, clippy::unwrap_used)] // As in a test; and what diesel's macro makes has none.

use std::time::{Duration, Instant};

use diesel::{Connection, ExpressionMethods};
use diesel_async::async_connection_wrapper::AsyncConnectionWrapper;
use diesel_async::{AsyncConnection, AsyncPgConnection};
use futures_util::future::LocalBoxFuture;
use postbox::{Outgoing, blocking};
use postbox_testkit::TestDatabase;
use sea_orm::sea_query::{Alias, Query};
use sea_orm::{ConnectionTrait, DbBackend, TransactionTrait};
use serde_json::{Value, json};
use tokio_postgres::NoTls;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

const ROUNDS: usize = 21;
const TRANSACTIONS: usize = 200;
const BATCHES: usize = 30;
const BATCH: usize = 100;

/// As one writes it with a client that binds PostgreSQL's types.
const INSERT: &str =
    "INSERT INTO postbox.outbox (id, topic, type, key, headers, payload) VALUES ($1, $2, $3, $4, $5, $6)";
const INSERT_ALL: &str = "INSERT INTO postbox.outbox (id, topic, type, key, headers, payload) \
     SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::jsonb[], $6::bytea[])";

diesel::table! {
    postbox.outbox (id) {
        id -> Uuid,
        topic -> Text,
        #[sql_name = "type"]
        message_type -> Text,
        key -> Text,
        headers -> Jsonb,
        payload -> Binary,
    }
}

/// A message as its columns.
struct Columns {
    id: Uuid,
    key: String,
    headers: Value,
    payload: Vec<u8>,
}

const TOPIC: &str = "orders";
const TYPE: &str = "order.placed";

fn content(n: usize) -> Value {
    json!({"order_id": n, "total_cents": 1999, "note": "two of them, please"})
}

fn message(n: usize) -> Outgoing {
    Outgoing::json(TOPIC, &content(n))
        .message_type(TYPE)
        .key(n.to_string())
        .header("tenant", "acme")
}

fn columns(n: usize) -> Columns {
    Columns {
        id: Uuid::now_v7(),
        key: n.to_string(),
        headers: json!({"tenant": "acme"}),
        payload: serde_json::to_vec(&content(n)).unwrap(),
    }
}

fn messages() -> Vec<Outgoing> {
    (0..BATCH).map(message).collect()
}

/// A batch, column by column.
#[derive(Default)]
struct Batch {
    ids: Vec<Uuid>,
    topics: Vec<&'static str>,
    types: Vec<&'static str>,
    keys: Vec<String>,
    headers: Vec<Value>,
    payloads: Vec<Vec<u8>>,
}

fn batch() -> Batch {
    let mut batch = Batch::default();
    for columns in (0..BATCH).map(columns) {
        batch.ids.push(columns.id);
        batch.topics.push(TOPIC);
        batch.types.push(TYPE);
        batch.keys.push(columns.key);
        batch.headers.push(columns.headers);
        batch.payloads.push(columns.payload);
    }
    batch
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Postbox,
    Hand,
}

#[derive(Clone, Copy)]
enum Work {
    One(usize),
    Batch,
}

trait Contender {
    fn name(&self) -> &'static str;
    fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()>;
}

macro_rules! publish {
    ($tx:expr, $work:expr $(, $await:tt)?) => {
        match $work {
            Work::One(n) => drop($tx.publish(message(n))$(.$await)?.unwrap()),
            Work::Batch => drop($tx.publish_all(messages())$(.$await)?.unwrap()),
        }
    };
}

macro_rules! of_sqlx {
    ($name:ident, $sqlx:ident, $says:literal) => {
        struct $name($sqlx::PgPool);

        impl Contender for $name {
            fn name(&self) -> &'static str {
                $says
            }

            fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()> {
                Box::pin(async move {
                    use postbox::Publish;
                    let mut tx = self.0.begin().await.unwrap();
                    let insert = match (by, work) {
                        (By::Postbox, work) => {
                            publish!(tx, work, await);
                            return tx.commit().await.unwrap();
                        }
                        (By::Hand, Work::One(n)) => {
                            let row = columns(n);
                            $sqlx::query(INSERT)
                                .bind(row.id)
                                .bind(TOPIC)
                                .bind(TYPE)
                                .bind(row.key)
                                .bind(row.headers)
                                .bind(row.payload)
                        }
                        (By::Hand, Work::Batch) => {
                            let batch = batch();
                            $sqlx::query(INSERT_ALL)
                                .bind(batch.ids)
                                .bind(batch.topics)
                                .bind(batch.types)
                                .bind(batch.keys)
                                .bind(batch.headers)
                                .bind(batch.payloads)
                        }
                    };
                    insert.execute(&mut *tx).await.unwrap();
                    tx.commit().await.unwrap();
                })
            }
        }
    };
}

of_sqlx!(Sqlx, sqlx, "sqlx 0.9");
of_sqlx!(Sqlx08, sqlx_0_8, "sqlx 0.8");

/// The parameters as tokio-postgres and its like take them.
macro_rules! with_parameters {
    ($work:expr, |$sql:ident, $parameters:ident| $execute:expr) => {
        match $work {
            Work::One(n) => {
                let row = columns(n);
                let $sql = INSERT;
                let $parameters: &[&(dyn ToSql + Sync)] =
                    &[&row.id, &TOPIC, &TYPE, &row.key, &row.headers, &row.payload];
                $execute
            }
            Work::Batch => {
                let rows = batch();
                let $sql = INSERT_ALL;
                let $parameters: &[&(dyn ToSql + Sync)] = &[
                    &rows.ids,
                    &rows.topics,
                    &rows.types,
                    &rows.keys,
                    &rows.headers,
                    &rows.payloads,
                ];
                $execute
            }
        }
    };
}

/// By hand as its documentation begins: by the text.
struct TokioPostgres(tokio_postgres::Client);

impl Contender for TokioPostgres {
    fn name(&self) -> &'static str {
        "tokio-postgres, `execute(text)`"
    }

    fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            use postbox::Publish;
            let mut tx = self.0.transaction().await.unwrap();
            match by {
                By::Postbox => publish!(tx, work, await),
                By::Hand => {
                    with_parameters!(work, |sql, parameters| tx.execute(sql, parameters).await.unwrap());
                }
            }
            tx.commit().await.unwrap();
        })
    }
}

/// By hand as one does where it counts: prepared once.
struct Prepared(
    tokio_postgres::Client,
    tokio_postgres::Statement,
    tokio_postgres::Statement,
);

impl Contender for Prepared {
    fn name(&self) -> &'static str {
        "tokio-postgres, prepared once"
    }

    fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            use postbox::Publish;
            let Self(client, one, all) = self;
            let mut tx = client.transaction().await.unwrap();
            match by {
                By::Postbox => publish!(tx, work, await),
                By::Hand => {
                    with_parameters!(work, |sql, parameters| {
                        let statement = if sql == INSERT { &*one } else { &*all };
                        tx.execute(statement, parameters).await.unwrap()
                    });
                }
            }
            tx.commit().await.unwrap();
        })
    }
}

struct Deadpool(deadpool_postgres::Pool);

impl Contender for Deadpool {
    fn name(&self) -> &'static str {
        "deadpool-postgres, `prepare_cached`"
    }

    fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            use postbox::Publish;
            let mut client = self.0.get().await.unwrap();
            let mut tx = client.transaction().await.unwrap();
            match by {
                By::Postbox => publish!(tx, work, await),
                By::Hand => {
                    with_parameters!(work, |sql, parameters| {
                        let statement = tx.prepare_cached(sql).await.unwrap();
                        tx.execute(&statement, parameters).await.unwrap()
                    });
                }
            }
            tx.commit().await.unwrap();
        })
    }
}

/// Those without `async` work on this thread of theirs.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    tokio::task::block_in_place(work)
}

struct Postgres(Option<postgres::Client>);

impl Contender for Postgres {
    fn name(&self) -> &'static str {
        "postgres, `execute(text)`"
    }

    fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()> {
        let client = self.0.as_mut().unwrap();
        blocking(|| {
            use blocking::Publish;
            let mut tx = client.transaction().unwrap();
            match by {
                By::Postbox => publish!(tx, work),
                By::Hand => {
                    with_parameters!(work, |sql, parameters| tx.execute(sql, parameters).unwrap());
                }
            }
            tx.commit().unwrap();
        });
        Box::pin(async {})
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let client = self.0.take();
        blocking(|| drop(client));
    }
}

/// What diesel's insert takes.
macro_rules! row {
    ($row:expr) => {{
        let row = $row;
        (
            outbox::id.eq(row.id),
            outbox::topic.eq(TOPIC),
            outbox::message_type.eq(TYPE),
            outbox::key.eq(row.key),
            outbox::headers.eq(row.headers),
            outbox::payload.eq(row.payload),
        )
    }};
}

macro_rules! insert {
    ($connection:expr, $work:expr $(, $await:tt)?) => {
        match $work {
            Work::One(n) => diesel::insert_into(outbox::table).values(row!(columns(n))).execute($connection)$(.$await)?,
            Work::Batch => {
                let rows: Vec<_> = (0..BATCH).map(|n| row!(columns(n))).collect();
                diesel::insert_into(outbox::table).values(rows).execute($connection)$(.$await)?
            }
        }
    };
}

struct Diesel(AsyncConnectionWrapper<AsyncPgConnection>);

impl Contender for Diesel {
    fn name(&self) -> &'static str {
        "diesel, `insert_into`"
    }

    fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()> {
        let done = blocking(|| {
            Connection::transaction(&mut self.0, |connection| {
                match by {
                    By::Postbox => {
                        use postbox::diesel::Publish;
                        publish!(connection, work);
                    }
                    By::Hand => {
                        use diesel::RunQueryDsl;
                        insert!(connection, work)?;
                    }
                }
                Ok::<_, postbox::Error>(())
            })
        });
        done.unwrap();
        Box::pin(async {})
    }
}

struct DieselAsync(AsyncPgConnection);

impl Contender for DieselAsync {
    fn name(&self) -> &'static str {
        "diesel-async, `insert_into`"
    }

    fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            let done = self.0.transaction(async |connection| {
                match by {
                    By::Postbox => {
                        use postbox::Publish;
                        publish!(connection, work, await);
                    }
                    By::Hand => {
                        use diesel_async::RunQueryDsl;
                        insert!(connection, work, await)?;
                    }
                }
                Ok::<_, postbox::Error>(())
            });
            done.await.unwrap();
        })
    }
}

struct SeaOrm(sea_orm::DatabaseConnection);

impl Contender for SeaOrm {
    fn name(&self) -> &'static str {
        "SeaORM, its query builder"
    }

    fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            use postbox::Publish;
            let mut tx = self.0.begin().await.unwrap();
            match by {
                By::Postbox => publish!(tx, work, await),
                By::Hand => {
                    let rows = match work {
                        Work::One(n) => vec![columns(n)],
                        Work::Batch => (0..BATCH).map(columns).collect(),
                    };
                    let mut insert = Query::insert();
                    insert
                        .into_table((Alias::new("postbox"), Alias::new("outbox")))
                        .columns(["id", "topic", "type", "key", "headers", "payload"].map(Alias::new));
                    for row in rows {
                        insert.values_panic([
                            row.id.into(),
                            TOPIC.into(),
                            TYPE.into(),
                            row.key.into(),
                            row.headers.into(),
                            row.payload.into(),
                        ]);
                    }
                    tx.execute(&insert).await.unwrap();
                }
            }
            tx.commit().await.unwrap();
        })
    }
}

/// The same with the statement that the others have.
struct SeaOrmRaw(sea_orm::DatabaseConnection);

impl Contender for SeaOrmRaw {
    fn name(&self) -> &'static str {
        "SeaORM, `execute_raw`"
    }

    fn transaction(&mut self, by: By, work: Work) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            use postbox::Publish;
            let mut tx = self.0.begin().await.unwrap();
            match by {
                By::Postbox => publish!(tx, work, await),
                By::Hand => {
                    let (sql, values): (_, Vec<sea_orm::Value>) = match work {
                        Work::One(n) => {
                            let row = columns(n);
                            let values = vec![
                                row.id.into(),
                                TOPIC.into(),
                                TYPE.into(),
                                row.key.into(),
                                row.headers.into(),
                                row.payload.into(),
                            ];
                            (INSERT, values)
                        }
                        Work::Batch => {
                            let rows = batch();
                            let texts = |texts: Vec<&str>| {
                                texts.into_iter().map(str::to_owned).collect::<Vec<String>>()
                            };
                            let values = vec![
                                rows.ids.into(),
                                texts(rows.topics).into(),
                                texts(rows.types).into(),
                                rows.keys.into(),
                                rows.headers.into(),
                                rows.payloads.into(),
                            ];
                            (INSERT_ALL, values)
                        }
                    };
                    let statement = sea_orm::Statement::from_sql_and_values(DbBackend::Postgres, sql, values);
                    tx.execute_raw(statement).await.unwrap();
                }
            }
            tx.commit().await.unwrap();
        })
    }
}

async fn tokio_postgres_client(db: &TestDatabase) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(db.url(), NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn sea_orm_connection(db: &TestDatabase) -> sea_orm::DatabaseConnection {
    let mut options = sea_orm::ConnectOptions::new(db.url());
    options.sqlx_logging(false);
    sea_orm::Database::connect(options).await.unwrap()
}

async fn contenders(db: &TestDatabase) -> Vec<Box<dyn Contender>> {
    let prepared = tokio_postgres_client(db).await;
    let (one, all) = (
        prepared.prepare(INSERT).await.unwrap(),
        prepared.prepare(INSERT_ALL).await.unwrap(),
    );
    let manager = deadpool_postgres::Manager::new(db.url().parse().unwrap(), NoTls);
    vec![
        Box::new(Sqlx(sqlx::PgPool::connect(db.url()).await.unwrap())),
        Box::new(Sqlx08(sqlx_0_8::PgPool::connect(db.url()).await.unwrap())),
        Box::new(TokioPostgres(tokio_postgres_client(db).await)),
        Box::new(Prepared(prepared, one, all)),
        Box::new(Deadpool(
            deadpool_postgres::Pool::builder(manager).build().unwrap(),
        )),
        Box::new(Postgres(Some(blocking(|| {
            postgres::Client::connect(db.url(), NoTls).unwrap()
        })))),
        Box::new(Diesel(
            AsyncPgConnection::establish(db.url()).await.unwrap().into(),
        )),
        Box::new(DieselAsync(AsyncPgConnection::establish(db.url()).await.unwrap())),
        Box::new(SeaOrm(sea_orm_connection(db).await)),
        Box::new(SeaOrmRaw(sea_orm_connection(db).await)),
    ]
}

async fn time(contender: &mut dyn Contender, by: By, batches: bool) -> Duration {
    let many = if batches { BATCHES } else { TRANSACTIONS };
    let began = Instant::now();
    for n in 0..many {
        let work = if batches { Work::Batch } else { Work::One(n) };
        contender.transaction(by, work).await;
    }
    began.elapsed() / u32::try_from(many).unwrap()
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// Microseconds for each transaction by Postbox and by hand, a pair for each round.
type Times = Vec<(f64, f64)>;

fn row(times: &Times) -> String {
    let of = |of: fn(&(f64, f64)) -> f64| median(times.iter().map(of).collect());
    let (postbox, hand, ratio) = (of(|t| t.0), of(|t| t.1), of(|t| t.0 / t.1));
    format!("{hand:>8.0} {postbox:>8.0} {ratio:>6.2}")
}

#[tokio::main]
async fn main() {
    // `cargo test --benches` passes nothing; it only looks whether this builds and starts.
    let rounds = if std::env::args().any(|argument| argument == "--bench") {
        ROUNDS
    } else {
        1
    };
    let db = TestDatabase::new().await.unwrap();
    let mut contenders = contenders(&db).await;
    let mut times: Vec<[Times; 2]> = contenders.iter().map(|_| Default::default()).collect();
    for round in 0..=rounds {
        for (contender, times) in contenders.iter_mut().zip(&mut times) {
            for (batches, times) in [false, true].into_iter().zip(times) {
                let order = if round % 2 == 0 {
                    [By::Postbox, By::Hand]
                } else {
                    [By::Hand, By::Postbox]
                };
                let mut took = [Duration::ZERO; 2];
                for by in order {
                    took[usize::from(by == By::Hand)] = time(contender.as_mut(), by, batches).await;
                }
                let [postbox, hand] = took.map(|took| took.as_secs_f64() * 1e6);
                // The first round is for the caches.
                if round > 0 {
                    times.push((postbox, hand));
                }
            }
        }
        sqlx::raw_sql("TRUNCATE postbox.outbox")
            .execute(db.pool())
            .await
            .unwrap();
    }
    println!("Microseconds a transaction, medians of {rounds} rounds; a batch has {BATCH} messages.\n");
    println!("{:<36} {:>24}   {:>24}", "", "one message", "a batch");
    let columns = format!("{:>8} {:>8} {:>6}", "by hand", "Postbox", "ratio");
    println!("{:<36} {columns}   {columns}", "");
    for (contender, [one, batch]) in contenders.iter().zip(&times) {
        println!("{:<36} {}   {}", contender.name(), row(one), row(batch));
    }
}
