use postbox::Result;
use sqlx_0_8::{Acquire, Executor, PgPool, Postgres};

use crate::script::{Client, End, Ran, Said, Step, Transaction, play, play_inside, suite};

pub(crate) struct Sqlx08(PgPool);

impl Client for Sqlx08 {
    async fn connect(url: &str) -> Self {
        Self(PgPool::connect(url).await.expect("a pool"))
    }

    async fn run(&mut self, steps: Vec<Step>, end: End) -> Ran {
        let mut tx = self.0.begin().await.expect("a transaction");
        let said = play(&mut tx, steps).await;
        let ended = match end {
            End::Commit => tx.commit().await,
            End::Rollback => tx.rollback().await,
        };
        let ended = ended.map_err(Into::into);
        Ran { said, ended }
    }
}

impl Transaction for sqlx_0_8::Transaction<'_, Postgres> {
    async fn sql(&mut self, sql: &'static str) -> Result<()> {
        (&mut **self).execute(sql).await?;
        Ok(())
    }

    async fn savepoint(&mut self, steps: Vec<Step>, end: End) -> Vec<Result<Said>> {
        let mut inner = self.begin().await.expect("a savepoint");
        let said = play_inside(&mut inner, steps).await;
        let ended = match end {
            End::Commit => inner.commit().await,
            End::Rollback => inner.rollback().await,
        };
        ended.expect("ended");
        said
    }
}

suite!(Sqlx08);
