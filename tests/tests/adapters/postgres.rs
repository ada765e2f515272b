use postbox::Result;
use postgres::NoTls;

use crate::script::{Blocking, BlockingTransaction, Client, End, Ran, Said, Step, play_blocking, suite};

pub(crate) struct Postgres(Blocking<postgres::Client>);

impl Client for Postgres {
    async fn connect(url: &str) -> Self {
        let url = url.to_owned();
        Self(Blocking::connect(move || postgres::Client::connect(&url, NoTls).expect("a connection")).await)
    }

    async fn run(&mut self, steps: Vec<Step>, end: End) -> Ran {
        self.0.with(move |client| run(client, steps, end)).await
    }
}

fn run(client: &mut postgres::Client, steps: Vec<Step>, end: End) -> Ran {
    let mut tx = client.transaction().expect("a transaction");
    let said = play_blocking(&mut tx, steps);
    let ended = match end {
        End::Commit => tx.commit(),
        End::Rollback => tx.rollback(),
    };
    let ended = ended.map_err(Into::into);
    Ran { said, ended }
}

impl BlockingTransaction for postgres::Transaction<'_> {
    fn sql(&mut self, sql: &'static str) -> Result<()> {
        Ok(self.batch_execute(sql)?)
    }

    fn savepoint(&mut self, steps: Vec<Step>, end: End) -> Vec<Result<Said>> {
        let mut inner = self.transaction().expect("a savepoint");
        let said = play_blocking(&mut inner, steps);
        let ended = match end {
            End::Commit => inner.commit(),
            End::Rollback => inner.rollback(),
        };
        ended.expect("ended");
        said
    }
}

suite!(Postgres);
