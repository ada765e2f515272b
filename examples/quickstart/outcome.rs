//! What a replay leaves behind, beside the airline's tables.

use std::time::Duration;

use tokio::time::Instant;

use crate::board::Board;
use crate::latency::Latencies;
use crate::sequence::Sequence;

#[derive(Debug)]
pub(crate) struct Outcome {
    /// How many events.
    pub(crate) published: u64,
    pub(crate) begun: Instant,
    /// From the first event to the commit of the last.
    pub(crate) publishing: Duration,
    pub(crate) sequence: Sequence,
    /// One of each node, with its name.
    pub(crate) boards: Vec<(&'static str, Board)>,
    pub(crate) latencies: Latencies,
}
