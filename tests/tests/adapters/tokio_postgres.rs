use postbox::Result;
use tokio_postgres::NoTls;

use crate::script::{Client, End, Ran, Said, Step, Transaction, play, play_inside, suite};

pub(crate) struct TokioPostgres(tokio_postgres::Client);

impl Client for TokioPostgres {
    async fn connect(url: &str) -> Self {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("a connection");
        tokio::spawn(connection);
        Self(client)
    }

    async fn run(&mut self, steps: Vec<Step>, end: End) -> Ran {
        let mut tx = self.0.transaction().await.expect("a transaction");
        let said = play(&mut tx, steps).await;
        let ended = match end {
            End::Commit => tx.commit().await,
            End::Rollback => tx.rollback().await,
        };
        let ended = ended.map_err(Into::into);
        Ran { said, ended }
    }
}

impl Transaction for tokio_postgres::Transaction<'_> {
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

suite!(TokioPostgres);
