//! A node of the service that consumes: one of two in this process, as there would be one on each machine.

use std::time::Duration;

use anyhow::{Context, Result};
use postbox_consumer::{Consumer, ConsumerHandle, handlers};
use postbox_dispatcher::status;
use sqlx::PgPool;

use crate::board::{Board, refresh_board};
use crate::latency::Latencies;
use crate::sequence::{Sequence, check_order};
use crate::statistics::count_delays;

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: &'static str,
    pub(crate) board: Board,
    consumer: ConsumerHandle,
}

impl Node {
    pub(crate) async fn start(
        name: &'static str,
        pool: PgPool,
        sequence: &Sequence,
        latencies: &Latencies,
    ) -> Result<Self> {
        let board = Board::default();
        let consumer = Consumer::new(pool)
            .node(name)
            .name(name)
            .state(board.clone())
            .state(sequence.clone())
            .state(latencies.clone())
            .handlers(handlers![count_delays, check_order, refresh_board])
            .start()
            .await?;
        Ok(Self {
            name,
            board,
            consumer,
        })
    }

    /// How many events each of its groups has handled.
    pub(crate) fn handled(&self) -> impl Iterator<Item = (String, u64)> {
        self.consumer
            .stats()
            .into_iter()
            .map(|stats| (stats.group, stats.handled))
    }

    pub(crate) async fn shutdown(self) -> Result<()> {
        Ok(self.consumer.shutdown().await?)
    }
}

/// Waits until the nodes have divided the lanes of their groups. They do so by themselves, within a second, and events would
/// wait for it; begun later, it does not show in the latencies.
pub(crate) async fn lanes_are_divided(pool: &PgPool) -> Result<()> {
    let divided = async {
        loop {
            let lanes: Vec<i64> = status::read(pool)
                .await?
                .consumers
                .iter()
                .map(|consumer| consumer.lanes)
                .collect();
            if lanes.iter().all(|count| *count > 0 && *count == lanes[0]) {
                return anyhow::Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), divided)
        .await
        .context("the nodes did not divide the lanes within 20 s")?
}
