use diesel::result::Error as DieselError;
use diesel_async::{AsyncConnection, AsyncPgConnection, SimpleAsyncConnection};
use postbox::{Error, Publish, Result};
use postbox_testkit::TestDatabase;

use crate::script::{
    Client, End, Ran, Said, Step, Transaction, is_rolled_back, play, play_inside, suite, told,
};
use crate::suite::{every_method, nothing_is_written};

pub(crate) struct DieselAsync(AsyncPgConnection);

impl Client for DieselAsync {
    const TELLS_ALL_CODES: bool = false;

    async fn connect(url: &str) -> Self {
        Self(AsyncPgConnection::establish(url).await.expect("a connection"))
    }

    async fn run(&mut self, steps: Vec<Step>, end: End) -> Ran {
        let mut said = Vec::new();
        let ended = self.0.transaction(async |connection| {
            said = play(connection, steps).await;
            ending(end)
        });
        let ended = is_rolled_back(end, ended.await);
        Ran { said, ended }
    }
}

fn ending(end: End) -> Result<()> {
    match end {
        End::Commit => Ok(()),
        End::Rollback => Err(DieselError::RollbackTransaction.into()),
    }
}

impl Transaction for AsyncPgConnection {
    async fn sql(&mut self, sql: &'static str) -> Result<()> {
        Ok(self.batch_execute(sql).await?)
    }

    async fn savepoint(&mut self, steps: Vec<Step>, end: End) -> Vec<Result<Said>> {
        let mut said = Vec::new();
        let ended = self.transaction(async |connection| {
            said = play_inside(connection, steps).await;
            ending(end)
        });
        is_rolled_back(end, ended.await).expect("ended");
        said
    }
}

suite!(DieselAsync);

async fn each_is_refused(connection: &mut AsyncPgConnection) {
    for step in every_method() {
        let told: Result<Said> = told!(connection, step, await);
        assert!(matches!(told, Err(Error::NoTransaction)), "{told:?}");
    }
}

#[tokio::test]
async fn outside_of_a_transaction_all_is_refused_and_nothing_is_written() {
    let db = TestDatabase::new().await.expect("a database");
    let mut client = DieselAsync::connect(db.url()).await;
    each_is_refused(&mut client.0).await;
    for end in [End::Commit, End::Rollback] {
        client.run(Vec::new(), end).await.ended.expect("ended");
        each_is_refused(&mut client.0).await;
    }
    nothing_is_written(db.pool()).await;
}
