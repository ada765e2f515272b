//! `cargo bench -p postbox-consumer --features micro`: what a process pays for a message beside the database.

use divan::Bencher;
use divan::counter::ItemsCount;
use postbox_consumer::micro::{Pipeline, lane_of};
use postbox_core::announcements;

fn main() {
    divan::main();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

/// From a block in memory through order, handler and settling; keys and whether the handler waits once.
#[divan::bench(args = [(1, false), (1_000, false), (100_000, false), (1_000, true)], sample_count = 20)]
fn executor(bencher: Bencher<'_, '_>, (keys, waits): (i32, bool)) {
    let runtime = runtime();
    bencher
        .counter(ItemsCount::new(Pipeline::MESSAGES))
        .with_inputs(|| {
            let _within = runtime.enter();
            Pipeline::new(keys, waits)
        })
        .bench_local_values(|pipeline| runtime.block_on(pipeline.run()));
}

#[divan::bench]
fn lane() -> usize {
    lane_of(
        divan::black_box(1_234_567),
        divan::black_box(Some(987_654_321)),
        32,
    )
}

/// What a notification of one message says.
#[divan::bench]
fn announcement_of_a_message() -> usize {
    announcements::topics(divan::black_box(
        "orders 1234567 3:120:987654321:123456789:1234567890",
    ))
    .count()
}
