use deadpool_postgres::{Manager, Pool};
use postbox::Result;
use tokio_postgres::NoTls;

use crate::script::{Client, End, Ran, Said, Step, Transaction, play, play_inside, suite};

pub(crate) struct Deadpool(Pool);

impl Client for Deadpool {
    async fn connect(url: &str) -> Self {
        let manager = Manager::new(url.parse().expect("an address"), NoTls);
        Self(Pool::builder(manager).build().expect("a pool"))
    }

    async fn run(&mut self, steps: Vec<Step>, end: End) -> Ran {
        let mut client = self.0.get().await.expect("a connection");
        let mut tx = client.transaction().await.expect("a transaction");
        let said = play(&mut tx, steps).await;
        let ended = match end {
            End::Commit => tx.commit().await,
            End::Rollback => tx.rollback().await,
        };
        let ended = ended.map_err(Into::into);
        Ran { said, ended }
    }
}

impl Transaction for deadpool_postgres::Transaction<'_> {
    async fn sql(&mut self, sql: &'static str) -> Result<()> {
        Ok(self.batch_execute(sql).await?)
    }

    async fn savepoint(&mut self, steps: Vec<Step>, end: End) -> Vec<Result<Said>> {
        let mut inner = self.transaction().await.expect("a savepoint");
        let said = play_inside(&mut inner, steps).await;
        let ended = match end {
            End::Commit => inner.commit().await,
            End::Rollback => inner.rollback().await,
        };
        ended.expect("ended");
        said
    }
}

suite!(Deadpool);
