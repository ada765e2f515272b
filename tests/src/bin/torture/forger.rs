//! Somebody who may connect and nothing else, and who sends what dispatchers and consumers listen to: made up, recorded and sent again, and floods.

use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgPool};

use crate::chance;
use crate::message::{LEDGER, STEPS};

pub(crate) const ROLE: &str = "torture_stranger";
const CHANNELS: [&str; 4] = [
    "postbox_segment",
    "postbox_outbox",
    "postbox_scheduled",
    "postbox_cron",
];
const TOPICS: [&str; 2] = [STEPS, LEDGER];

pub(crate) async fn admit(pool: &PgPool) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(format!(
        "DO $$ BEGIN CREATE ROLE {ROLE} LOGIN PASSWORD '{ROLE}'; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
    )))
    .execute(pool)
    .await?;
    Ok(())
}

/// Forges for a span; ends early when the server goes away.
pub(crate) async fn forge(options: PgConnectOptions, seed: u64, span: Duration) -> Result<(), sqlx::Error> {
    let mut rng = chance::rng(seed, "forger");
    let options = options
        .username(ROLE)
        .password(ROLE)
        .options([("statement_timeout", "0"), ("idle_session_timeout", "0")]);
    let pool = PgPoolOptions::new()
        .max_connections(2)
        .connect_with(options)
        .await?;
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen(CHANNELS[0]).await?;
    let mut recorded: Vec<String> = Vec::new();
    let end = Instant::now() + span;
    while Instant::now() < end {
        while let Some(heard) = listener.next_buffered() {
            recorded.push(heard.payload().to_owned());
        }
        if let Ok(heard) = tokio::time::timeout(Duration::from_millis(20), listener.try_recv()).await {
            recorded.extend(heard?.map(|heard| heard.payload().to_owned()));
        }
        let topic = TOPICS[rng.usize(0..TOPICS.len())];
        let head = [rng.i64(0..100), rng.i64(0..100_000), i64::MAX][rng.usize(0..3)];
        let (xid, seq) = (rng.u64(700..100_000), rng.u64(1..100_000));
        let text = match rng.u32(0..6) {
            0 => format!("{topic} {head} -"),
            1 => format!("{topic} {head} {}:10:{xid}:{seq}:-", rng.u32(0..8)),
            2 => format!(
                "{topic} {head} {}:10:{xid},{xid}:{seq},{}:-,-",
                rng.u32(0..8),
                seq + 1
            ),
            3 => String::new(),
            4 if !recorded.is_empty() => recorded[rng.usize(0..recorded.len())].clone(),
            _ => format!("{:032x} {} {topic} {head} -", rng.u128(..), rng.i64(0..1_000_000)),
        };
        let channel = CHANNELS[rng.usize(0..CHANNELS.len())];
        // Now and then many.
        let times = if rng.u32(0..10) == 0 { 2_000 } else { 1 };
        sqlx::query("SELECT count(pg_notify(CASE WHEN n % 4 = 0 THEN $1 ELSE 'postbox_segment' END, CASE WHEN $2 = '' THEN '' ELSE $2 || repeat(' ', n) END)) \
                FROM generate_series(0, $3 - 1) n")
            .bind(channel)
            .bind(&text)
            .bind(times)
            .execute(&pool)
            .await?;
    }
    pool.close().await;
    Ok(())
}
