//! The connections for reading: to the same run of the same server as the session.
//!
//! After a failover an address may mean another server, and the old one may still answer. What is read there is another history than the one that the
//! session knows, so nothing is read while there is no session, and nothing on connections of an earlier one.

use postbox_core::link;
use sqlx::pool::PoolConnection;
use sqlx::postgres::PgConnectOptions;
use sqlx::{PgPool, Postgres};
use tokio::sync::watch;

const CONNECTIONS: u32 = 2;

/// Plans for reading are known in advance; see docs/internals/reading.md.
const SETTINGS: &str = "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_bitmapscan = off; \
     SET enable_hashjoin = off; SET enable_mergejoin = off";

/// As [`core::seal`](postbox_core::seal) asks for it.
const KEY: &str = "SELECT postbox.run_key()";

pub(crate) struct Readers {
    options: PgConnectOptions,
    now: watch::Sender<Now>,
}

#[derive(Clone)]
enum Now {
    /// There is no session; there will be one.
    Closed,
    Open(PgPool),
    /// There will be none any more.
    Ended,
}

impl Readers {
    /// There are none yet.
    pub(crate) fn new(options: PgConnectOptions) -> Self {
        Self {
            options: options.application_name("postbox reader"),
            now: watch::Sender::new(Now::Closed),
        }
    }

    /// There is a session, in the run of the database that has this key.
    pub(crate) fn open(&self, key: &[u8]) {
        let key: Vec<u8> = key.to_vec();
        let pool = link::pool_options(CONNECTIONS)
            .after_connect(move |connection, _| {
                let key = key.clone();
                Box::pin(async move {
                    link::set_up(connection, SETTINGS).await?;
                    let here: Vec<u8> = sqlx::query_scalar(KEY).fetch_one(connection).await?;
                    match here == key {
                        true => Ok(()),
                        false => Err(sqlx::Error::Protocol(
                            "this is another server than the session's, or it has restarted since".to_owned(),
                        )),
                    }
                })
            })
            .connect_lazy_with(self.options.clone());
        self.replace(Now::Open(pool));
    }

    /// The session is lost: reads wait for the next one.
    pub(crate) fn close(&self) {
        self.replace(Now::Closed);
    }

    /// The process stops: reads fail, since a broadcast that waited for the next session would not hear that it is to stop.
    pub(crate) fn end(&self) {
        self.replace(Now::Ended);
    }

    fn replace(&self, now: Now) {
        if let Now::Open(former) = self.now.send_replace(now) {
            // What is under way ends by itself; nobody keeps what it finds.
            tokio::spawn(async move { link::close(&former).await });
        }
    }

    /// One of them; waits for a session.
    pub(crate) async fn acquire(&self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        let mut changes = self.now.subscribe();
        loop {
            let now = changes.borrow_and_update().clone();
            match now {
                Now::Open(pool) => match pool.acquire().await {
                    Err(sqlx::Error::PoolClosed) => {}
                    other => return other,
                },
                Now::Closed => {}
                Now::Ended => return Err(sqlx::Error::PoolClosed),
            }
            // The sender is this one's.
            if changes.changed().await.is_err() {
                return Err(sqlx::Error::PoolClosed);
            }
        }
    }
}
