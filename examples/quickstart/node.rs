//! A node of the service that consumes: one of two in this process, as there would be one on each machine.

use anyhow::Result;
use postbox_consumer::{Consumer, ConsumerHandle, handlers};
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
    pub(crate) async fn start(name: &'static str, pool: PgPool, sequence: &Sequence, latencies: &Latencies) -> Result<Self> {
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
        Ok(Self { name, board, consumer })
    }

    /// How many events each of its groups has handled.
    pub(crate) fn handled(&self) -> impl Iterator<Item = (String, u64)> {
        self.consumer.stats().into_iter().map(|stats| (stats.group, stats.handled))
    }

    pub(crate) async fn shutdown(self) -> Result<()> {
        Ok(self.consumer.shutdown().await?)
    }
}
