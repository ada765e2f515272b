//! Through the traits of diesel's connections, which diesel-async's wrapper has too.

use diesel::Connection;
use diesel::connection::SimpleConnection;
use diesel::result::Error as DieselError;
use diesel_async::AsyncPgConnection;
use diesel_async::async_connection_wrapper::AsyncConnectionWrapper;
use postbox::diesel::{InTransaction, Publish};
use postbox::{Error, Outgoing, Result, blocking};
use postbox_testkit::TestDatabase;

use crate::script::{Blocking, Client, End, Ran, Said, Step, is_rolled_back, pause_blocking, suite, told};
use crate::suite::{every_method, nothing_is_written, number};

type Wrapper = AsyncConnectionWrapper<AsyncPgConnection>;

pub(crate) struct Diesel(Blocking<Wrapper>);

impl Client for Diesel {
    const TELLS_ALL_CODES: bool = false;

    async fn connect(url: &str) -> Self {
        let url = url.to_owned();
        Self(Blocking::connect(move || Wrapper::establish(&url).expect("a connection")).await)
    }

    async fn run(&mut self, steps: Vec<Step>, end: End) -> Ran {
        self.0.with(move |connection| run(connection, steps, end)).await
    }
}

fn run(connection: &mut Wrapper, steps: Vec<Step>, end: End) -> Ran {
    let mut said = Vec::new();
    let ended = connection.transaction(|connection| {
        for step in steps {
            match step {
                Step::Savepoint(steps, end) => {
                    let ran = run(connection, steps, end);
                    ran.ended.expect("ended");
                    said.extend(ran.said);
                }
                Step::Sql(sql) => {
                    let done = connection.batch_execute(sql).map(|()| Said::Nothing);
                    said.push(done.map_err(Into::into));
                }
                Step::Pause(pause) => said.push(pause_blocking(pause)),
                step => said.push(told!(connection, step)),
            }
        }
        match end {
            End::Commit => Ok(()),
            End::Rollback => Err(Error::from(DieselError::RollbackTransaction)),
        }
    });
    let ended = is_rolled_back(end, ended);
    Ran { said, ended }
}

suite!(Diesel);

fn each_is_refused(connection: &mut Wrapper) {
    for step in every_method() {
        let told: Result<Said> = told!(connection, step);
        assert!(matches!(told, Err(Error::NoTransaction)), "{told:?}");
    }
}

#[tokio::test]
async fn outside_of_a_transaction_all_is_refused_and_nothing_is_written() {
    let db = TestDatabase::new().await.expect("a database");
    let mut client = Diesel::connect(db.url()).await;
    let work = |connection: &mut Wrapper| {
        each_is_refused(connection);
        for end in [End::Commit, End::Rollback] {
            let ran = run(connection, Vec::new(), end);
            ran.ended.expect("ended");
            each_is_refused(connection);
        }
        // Not one that diesel knows of.
        connection.batch_execute("BEGIN").expect("begun");
        each_is_refused(connection);
        connection.batch_execute("COMMIT").expect("committed");
    };
    client.0.with(work).await;
    nothing_is_written(db.pool()).await;
}

#[tokio::test]
async fn what_is_in_a_transaction_publishes_as_any_blocking_client() {
    fn publish(tx: &mut impl blocking::Publish) -> Result<()> {
        tx.publish(Outgoing::json("orders", &1)).map(drop)
    }
    let db = TestDatabase::new().await.expect("a database");
    let mut client = Diesel::connect(db.url()).await;
    let work = |connection: &mut Wrapper| {
        let refused = InTransaction::of(connection).expect_err("there is none");
        assert!(matches!(refused, Error::NoTransaction), "{refused}");
        connection.transaction(|connection| publish(&mut InTransaction::of(connection)?))
    };
    client.0.with(work).await.expect("published");
    assert_eq!(number(db.pool(), "SELECT count(*) FROM postbox.outbox").await, 1);
}

#[tokio::test]
async fn a_test_transaction_is_one() {
    let db = TestDatabase::new().await.expect("a database");
    let mut client = Diesel::connect(db.url()).await;
    let work = |connection: &mut Wrapper| {
        connection.begin_test_transaction()?;
        connection.publish(Outgoing::json("orders", &1))
    };
    client.0.with(work).await.expect("published");
    nothing_is_written(db.pool()).await;
}
